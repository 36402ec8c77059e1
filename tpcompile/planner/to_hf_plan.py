"""An automatic plan as a ``tp_plan`` that plain transformers takes."""

from __future__ import annotations

import warnings

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import checked

from .export_styles import LOST, ExportedStyles
from .plan import Plan


@checked
def to_hf_plan(plan: Plan) -> dict[str, str]:
    """A plan as rules of transformers: module or parameter, ``*`` for numbers -> style.

    Every module with a matmul is named, ``replicate`` where its weight is whole, because transformers
    5.23 merges a given ``tp_plan`` into the model's own. Placements that no style expresses (sub-axes,
    uneven heads, unequal packed parts) become ``replicate`` too, and are named in one warning. The
    model's code must take its numbers of heads from shapes, as that of all models with a plan of their
    own does.

    Raises:
        TpCompileError: the plan comes from disk, which has no program to look at.
    """
    if plan.planned is None:
        raise TpCompileError(
            "a plan from disk does not say how its weights are used",
            where="plan",
            todo="make it again with tpcompile.plan",
        )
    found = ExportedStyles(plan.planned, plan.ranks).rules()
    lost = [key for key, style in found.items() if style == LOST]
    if lost:
        warnings.warn(
            f"transformers has no style for the placement of {', '.join(lost)}: whole in the exported plan",
            stacklevel=2,
        )
    return _as_installed({key: "replicate" if style == LOST else style for key, style in found.items()})


def _as_installed(rules: dict[str, str]) -> dict[str, str]:
    """The rules in the styles that the installed transformers has.

    5.17 knows no ``embedding_colwise``, for which the vocabulary can be divided, and no ``replicate``, which
    it needs not: there a given plan takes the place of the model's own.
    """
    from tpcompile.ir.hf_internals import ALL_PARALLEL_STYLES as known

    if "embedding_colwise" not in known:
        rules = {k: "embedding_rowwise" if s == "embedding_colwise" else s for k, s in rules.items()}
    return {key: style for key, style in rules.items() if style in known}
