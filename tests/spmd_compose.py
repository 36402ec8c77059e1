"""What the ranks do in ``test_compose``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

import tpcompile
from tests.spmd_models import mesh
from tests.toys import PartlyCapturable


def in_either_order(dense_first: bool) -> dict[str, Any]:
    """Calls that can and that cannot be captured, over the same weights."""
    torch.manual_seed(0)
    model, x = PartlyCapturable().double(), torch.randn(3, 7, 12, dtype=torch.float64)
    whole = copy.deepcopy(model)
    found: dict[str, Any] = {"errors": [], "refused": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = ((x, True), (x,)) if dense_first else ((x,), (x, True))
        sharded = tpcompile.parallelize(model, mesh(), first, compose=True)
        try:
            for call in [first, second, (x[:2, :5], *first[1:])]:
                mine, theirs = sharded(*call), whole(*call)
                found["errors"].append(float((mine - theirs).abs().max()))
        except tpcompile.TpCompileError as refusal:
            found["refused"] = str(refusal)
    if not found["refused"]:
        (sharded(x) + sharded(x, True)).sum().backward()
        (whole(x) + whole(x, True)).sum().backward()
        found["gradients"] = float((model.experts.weight.grad - whole.experts.weight.grad).abs().max())
    found["warned"] = [str(w.message).split("(")[0] for w in caught if "runs as python" in str(w.message)]
    found["entries"] = {program.entry for program in sharded.programs}
    found["shapes"] = [tuple(p.shape) for p in (model.experts.weight, model.mlp.up.weight, model.table.rows)]
    return found
