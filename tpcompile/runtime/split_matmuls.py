"""Takes apart matmuls of few rows with many columns, as a head's for the tokens of a step, on CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

_ATEN = torch.ops.aten
LAST_PASS = "post_grad_custom_post_pass"
"""Inductor's option for passes that change its graph when all others have."""
_PART = 1024
"""So many columns at once for each thread."""
_ROWS = range(2, 129)


def split_matmuls(graph: Graph) -> None:
    """Replaces `mm` of few rows by several over parts of the columns, which write side by side.

    Before it multiplies, MKL seems to copy a transposed weight into the order that its kernel reads. A part's
    copy stays in the cache; that of a whole head goes to memory and comes back. A single row is not copied.
    The sum of an element is not divided.

    Args:
        graph: Inductor's, with values; is changed.
    """
    part = _PART * torch.get_num_threads()
    for node in graph.find_nodes(op="call_function", target=_ATEN.mm.default):
        rows, weight = node.args
        if not _is_split(rows.meta.get("val"), weight.meta.get("val"), 4 * part):
            continue
        wide = weight.meta["val"].shape[1]
        with graph.inserting_before(node):
            parts = [_part(graph, rows, weight, at, min(at + part, wide)) for at in range(0, wide, part)]
            whole = graph.call_function(_ATEN.cat.default, (parts, 1))
        node.replace_all_uses_with(whole)
        graph.erase_node(node)


def _is_split(rows: Tensor | None, weight: Tensor | None, wide: int) -> bool:
    if rows is None or weight is None:  # what another pass has made
        return False
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return False
    if any(type(n) is not int for n in (*rows.shape, *weight.shape, weight.stride(0))):
        return False
    return rows.shape[0] in _ROWS and weight.shape[1] >= wide and weight.stride(0) == 1


def _part(graph: Graph, rows: Node, weight: Node, start: int, end: int) -> Node:
    columns = graph.call_function(_ATEN.slice.Tensor, (weight, 1, start, end))
    return graph.call_function(_ATEN.mm.default, (rows, columns))


@dataclass(frozen=True)
class SplitMatmuls:
    """``split_matmuls`` as a pass of Inductor's, which keeps on disk what was compiled with it."""

    def __call__(self, graph: Graph) -> None:
        split_matmuls(graph)

    def uuid(self) -> str:
        """Tells this pass from others; to be changed with what it does."""
        return f"tpcompile split_matmuls 1, {torch.get_num_threads()} threads"


def last_pass() -> Any:
    """Inductor's last pass: the user's for all programs (``torch._inductor.config``), or this one."""
    from tpcompile.ir.dynamo_internals import CustomGraphPass, inductor_config

    CustomGraphPass.register(SplitMatmuls)
    return inductor_config.post_grad_custom_post_pass or SplitMatmuls()
