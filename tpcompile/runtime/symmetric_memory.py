"""Torch's symmetric memory, where cards read each other's: what of Inductor needs it, and for which programs.

``_micro_pipeline_tp`` makes one operator of a matmul and the gather or reduce-scatter of positions beside
it, which sends one part while it computes another. ``_collective.auto_select`` adds up what is small in one
step, without NCCL. Both do nothing for groups of which torch was not told that they have such memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.fx import GraphModule

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import symmetric_memory
from tpcompile.lowering.chunk_collectives import chunk_collectives
from tpcompile.lowering.collective_lines import groups_of

BESIDE_MATMULS, SMALL_SUMS = "_micro_pipeline_tp", "_collective.auto_select"


def asks(options: Mapping[str, Any], name: str) -> bool:
    """Whether an option of Inductor is on, among those of torch.compile."""
    return bool((options.get("options") or {}).get(name))


def check_symmetric_memory(options: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Refuses what needs symmetric memory where there is none.

    Args:
        options: torch.compile's.
        group: the group of all ranks.

    Raises:
        TpCompileError: the ranks have none.
    """
    asked = [name for name in (BESIDE_MATMULS, SMALL_SUMS) if asks(options, name)]
    if not asked or group is None or group.size() == 1 or _enabled(group.group_name):
        return
    if (backend := dist.get_backend(group)) != "nccl":
        raise TpCompileError(
            f"ranks that talk over {backend} share no memory of cards",
            where=f"compile={{{asked[0]!r}: True}}",
            todo="leave it out, or give each rank a GPU, with NVLink between them, and a mesh over NCCL",
        )


def use_symmetric_memory(graph: GraphModule, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Prepares a program for what the options ask for.

    Args:
        graph: a program, and its regions; is changed.
        options: torch.compile's.

    Returns:
        The options for this program. Inductor knows a matmul beside a collective where sizes are compiled in.
    """
    beside = asks(options, BESIDE_MATMULS)
    if not beside and not asks(options, SMALL_SUMS):
        return options
    parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
    for name in {name for part in parts for name in groups_of(part.graph)}:
        _enable(name)
    if not beside or not any([chunk_collectives(part.graph) for part in parts]):
        return options
    for part in parts:
        part.recompile()
    return {**options, "dynamic": bool(options.get("dynamic"))}


def for_open_sizes(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options where sizes are open: there is no memory of one size to add up in, at which torch stops."""
    if not asks(options, SMALL_SUMS):
        return options
    return {**options, "options": {**options["options"], SMALL_SUMS: False}}


def _enable(group: str) -> None:
    if _enabled(group):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it need not be called; Inductor goes by it
        symmetric_memory.enable_symm_mem_for_group(group)  # type: ignore[arg-type]


def _enabled(group: str) -> bool:
    found: bool = symmetric_memory.is_symm_mem_enabled_for_group(group)  # type: ignore[arg-type]
    return found
