"""SimplifyMasks: attention masks that hide nothing, or the future, are left to the attention itself."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import drop_unused
from tpcompile.ir.nodes import argument, shape
from tpcompile.planner.global_program import GlobalProgram, Pass

from .evaluate_indices import IndexValues
from .index_values import Affine, Truth

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Replaces ``sdpa(q, k, v, mask)`` by ``sdpa(q, k, v)`` or ``sdpa(q, k, v, is_causal=True)``.

    Fires where it can be shown, for all sizes, that the mask is true everywhere, or exactly where the key's
    position is not behind the query's. Models hand masks over because an exported program must not depend on
    the example's length; the same program without one makes no mask, and may use faster kernels.
    """

    name = "simplify-masks"

    def apply(self, program: GlobalProgram) -> bool:
        values, changed = IndexValues(), False
        for node in program.graph.find_nodes(op="call_function", target=SDPA):
            mask = argument(node, 3, "attn_mask")
            if mask is None or argument(node, 5, "is_causal", False):
                continue
            kind = _kind(values, mask)
            if kind != "other":
                _replace(node, causal=kind == "causal")
                changed = True
        return drop_unused(program.graph) or changed


def _kind(values: IndexValues, mask: Node) -> str:
    """``all``, ``causal`` or ``other``."""
    found, sizes = values.of(mask), shape(mask)
    if not isinstance(found, Truth):
        return "other"
    if not found.conditions:
        return "all"
    zeros = (sympy.Integer(0),) * (len(sizes) - 2)
    past = Affine(sympy.Integer(0), (*zeros, sympy.Integer(1), sympy.Integer(-1)))
    # Where lengths differ, kernels do not agree on what causal means.
    return "causal" if found.conditions == {past} and sizes[-1] == sizes[-2] else "other"


def _replace(node: Node, causal: bool) -> None:
    options = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal", "dropout_p")}
    dropout = argument(node, 4, "dropout_p", 0.0)
    node.args = (*node.args[:3], None, dropout, causal)
    node.kwargs = options
