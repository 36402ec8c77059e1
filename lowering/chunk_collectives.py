"""Collectives of positions in the form of which Inductor makes one operator with the matmul beside them.

Its pass (`_micro_pipeline_tp`) sends one part while it multiplies another. It looks for rows that are
gathered, taken apart and put together along another dimension, and for the reverse in front of a
reduce-scatter. The values are the same. Positions that the ranks do not divide evenly are sent as ever.

Source: asynchronous tensor parallelism in PyTorch, as in torchtitan.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

ops = torch.ops.tpcompile
_OF_POSITIONS = (ops.scatter_positions, ops.gather_positions, ops.gather_linears)


def chunk_collectives(graph: Graph) -> bool:
    """Gives a rank's graph that form, forward and backward; returns whether anything can have it."""
    found = [node for op in _OF_POSITIONS for node in graph.find_nodes(op="call_function", target=op.default)]
    for node in found:
        node.kwargs = {**node.kwargs, "chunked": True}
    return bool(found)
