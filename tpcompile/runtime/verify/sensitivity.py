"""What rounding does to a model that amplifies it: its python, from weights that differ in the last bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .outcome import Key, compared
from .report import Kind, Report
from .trial import Trial

_MARGIN, _MOST = 100.0, 1e-3  # every operator rounds, not only what the weights are


def sensitive(trial: Trial, want: Mapping[Key, Any], report: Report) -> tuple[Kind, str] | None:
    """What follows for a report if all that differs may be rounding, and why; None if it may not.

    A sum over ranks is rounded in another order, as are weights that differ in their last bits. Where the
    model's own values then change as much, what ranks compute cannot be held against them more closely. Up
    to 1e-3 that is called right; where more is rounding, nothing is known.

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
    own = {(f.sort, f.name): f.error for f in moved}
    if any(not f.error <= _MARGIN * own.get((f.sort, f.name), 0.0) for f in report.wrong):
        return None
    most = max(own[f.sort, f.name] for f in report.wrong)
    kind: Kind = "numerics" if max(most, *(f.error for f in report.wrong)) <= _MOST else "undecided"
    return kind, f"the last bits of its weights change the model's own values by up to {most:.0e}"
