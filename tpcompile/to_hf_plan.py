"""An automatic plan as a ``tp_plan`` that plain transformers takes."""

from __future__ import annotations

import warnings

from .errors import TpCompileError
from .plan import Plan
from .strategies.export_styles import LOST, ExportedStyles


def to_hf_plan(plan: Plan) -> dict[str, str]:
    """A plan as rules of transformers: module or parameter, ``*`` for numbers -> style.

    Every module with a matmul is named, ``replicate`` where its weight is whole, because transformers
    merges a given ``tp_plan`` into the model's own. Placements that no style expresses (sub-axes,
    uneven heads, unequal packed parts) become ``replicate`` too, and are named in one warning. The
    model's code must take its numbers of heads from shapes, as that of all models with a plan of their
    own does.

    Raises:
        TpCompileError: the plan comes from disk, which has no program to look at.
    """
    if plan.work is None:
        raise TpCompileError(
            "a plan from disk does not say how its weights are used", todo="make it again with tpcompile.plan"
        )
    found = ExportedStyles(plan.work, plan.ranks).rules()
    lost = [key for key, style in found.items() if style == LOST]
    if lost:
        warnings.warn(
            f"transformers has no style for the placement of {', '.join(lost)}: whole in the exported plan",
            stacklevel=2,
        )
    return {key: "replicate" if style == LOST else style for key, style in found.items()}
