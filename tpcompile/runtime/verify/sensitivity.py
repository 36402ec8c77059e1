"""What rounding does to a model that amplifies it: its python, from weights that differ in the last bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .outcome import Key, compared
from .report import Report
from .trial import Trial

_MARGIN, _MOST = 100.0, 1e-3  # every operator rounds, not only what the weights are


def sensitive(trial: Trial, want: Mapping[Key, Any], report: Report) -> str:
    """Why all that differs is rounding, or an empty text.

    A sum over ranks is rounded in another order, as are weights that differ in their last bits. Where the
    model's own values then change as much, what ranks compute cannot be held against them more closely. A
    difference over 1e-3 is not explained in this way, nor are whole numbers and tokens.

    Args:
        trial: the call, which some ranks compute otherwise.
        want: what the model leaves behind as python.
        report: what differs.
    """
    model, generator = copy.deepcopy(trial.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                signs = torch.rand(weight.shape, generator=generator).sub_(0.5).sign_().to(weight)
                weight.mul_(1 + torch.finfo(weight.dtype).eps * signs)
    moved = compared(trial.run_python(model), want)
    own = {(f.sort, f.name): f.error for f in moved if f.error < _MOST}
    if any(not f.error <= min(_MOST, _MARGIN * own.get((f.sort, f.name), 0.0)) for f in report.wrong):
        return ""
    most = max(own[f.sort, f.name] for f in report.wrong)
    return f"the last bits of its weights change the model's own values by up to {most:.0e}"
