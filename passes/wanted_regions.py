"""Which regions of positions a plan asks to divide, and what it should be told of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.fx import Node

from tpcompile.capture.repeats.blocks import RepeatedBlocks
from tpcompile.ir.markers import all_reduce
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import is_tensor, module_path, shape

from .sequence_regions import Positions, SequenceRegion


def wanted(region: SequenceRegion, modules: frozenset[str] | None, blocks: RepeatedBlocks | None) -> bool:
    """Whether a region has something of these modules in it (of layers left out: of those kept for them)."""
    if modules is None:
        return True
    found = {name for node in region.nodes for name in _in_modules(node)}
    if blocks is not None:
        found |= {copy for kept, copy in blocks.left_out(list(found))}
    return bool(found & modules)


def missed(
    positions: Positions, regions: list[SequenceRegion], modules: frozenset[str] | None
) -> Iterator[str]:
    """What was asked for and is not divided, and why: a line each."""
    if modules is None:
        if not regions:
            yield f"the sequence is not divided anywhere: {_why_not(positions, 'a norm')}"
        return
    blocks = positions.program.blocks
    left = [m for m in sorted(modules) if not any(wanted(r, frozenset({m}), blocks) for r in regions)]
    for name in dict.fromkeys(map(starred, left)):
        yield f"the sequence is not divided at {name}: {_why_not(positions, 'it')}"


def _why_not(positions: Positions, goal: str) -> str:
    """Why there are no regions, or why they leave something out."""
    sums = positions.program.graph.find_nodes(op="call_function", target=all_reduce)
    sums = [n for n in sums if is_tensor(n) and n.meta["val"].ndim >= 2]
    if not sums:
        return "the ranks complete no sums"
    if all(shape(n)[-2] == 1 for n in sums):
        return "the call has one position"
    if not any(positions.entry_keys(n) for n in positions.entries()):
        return f"positions are not a dimension of the sums in {module_path(sums[0]) or 'the model'}"
    if any(positions.along_all(math.inf)) and not any(positions.along_all()):
        return "so much is needed whole that more than twice as many bytes would be sent"
    return f"no sum over the ranks leads to {goal} by way of calls that treat positions one by one"


def _in_modules(node: Node) -> Iterator[str]:
    """The modules that a node was traced in."""
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        yield str(entry[0])
