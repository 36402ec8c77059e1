"""What the ranks do in ``test_symmetric_memory``: torch's operators over it, run as what they mean over gloo.

There is no such memory on a CPU. Torch has a mode for tests, in which groups count as having it, and says in
other operators what its own give: here they are run as that.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.codegen.wrapper import AllocateLine
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

import tpcompile
from tests.on_ranks.models import error, gradient_error, mesh
from tpcompile import TpCompileError
from tpcompile.lowering.collective_lines import groups_of
from tpcompile.runtime.symmetric_memory import use_symmetric_memory

BESIDE, SMALL = {"_micro_pipeline_tp": True}, {"_collective.auto_select": True}


@contextmanager
def as_meant() -> Iterator[Counter[str]]:
    """Where torch takes our groups for ones with symmetric memory; counts its operators that are run."""
    meanings: dict[str, Callable[..., Any]] = {
        "fused_all_gather_matmul": symmetric_memory._fused_all_gather_matmul_fallback,
        "fused_matmul_reduce_scatter": symmetric_memory._fused_matmul_reduce_scatter_fallback,
        "one_shot_all_reduce": lambda x, op, group: _add_up(x, op, group, torch.empty_like(x)),
        "one_shot_all_reduce_out": _add_up,  # what torch 2.13 calls for it
    }
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return meanings[name](*args, **kwargs)

        return run

    def allocate(line: Any, code: Any) -> None:
        code.writeline(line.wrapper.make_buffer_allocation(line.node))

    with ExitStack() as stack:
        stack.enter_context(symmetric_memory._test_mode())
        stack.enter_context(patch.object(dist, "is_nccl_available", return_value=True))
        stack.enter_context(patch.object(AllocateLine, "_codegen_comm_buffer", allocate))
        library = stack.enter_context(torch.library._scoped_library("symm_mem", "IMPL"))
        for name in meanings:
            library.impl(name, counted(name), "CPU")
        yield counts


def _add_up(x: Tensor, op: str, group: str, out: Tensor) -> Tensor:
    sums = torch.ops._c10d_functional
    return out.copy_(sums.wait_tensor(sums.all_reduce(x, op, group)))


class Block(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return z


class Gated(nn.Module):
    """Two of them, of any number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.Sequential(Block(12, 20), Block(12, 20)), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.blocks(x))
        return y


def chunked() -> dict[tuple[int, ...], tuple[bool, int]]:
    """Per size of an input: whether both forms give the same bits, gradients too; how many are chunked."""
    found = {}
    for sizes in ((2, 8, 12), (2, 7, 12), (8, 12), (1, 2, 12)):
        torch.manual_seed(0)
        whole, x = Gated(), torch.randn(sizes)
        seen: list[GraphModule] = []

        def as_it_is(graph: GraphModule, inputs: list[Tensor], options: Any = None) -> Any:
            seen.append(graph)  # noqa: B023
            return graph.forward

        results = []
        for options in ({}, BESIDE):
            compile: Any = {"backend": as_it_is, "options": {**options, "any": 1}}
            with symmetric_memory._test_mode():
                sharded: Any = tpcompile.parallelize(
                    copy.deepcopy(whole), mesh(), (x,), sequence_parallel=True, compile=compile
                )
            mine = sharded(x)
            (mine**3).sum().backward()
            grads = [p.grad.to_local() for p in sharded.parameters()]
            results.append([mine, *grads])
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        found[sizes] = same, sum(bool(n.kwargs.get("chunked")) for n in seen[-1].graph.nodes)
    return found


def fused() -> dict[str, Any]:
    """Per size of an input: the worst error; torch's operators forward and backward, and those that ran."""
    found = {}
    for sizes in ((2, 8, 12), (2, 7, 12)):
        graphs: list[Counter[str]] = []

        def look(graph: Graph) -> None:
            graphs.append(_targets(graph))  # noqa: B023

        torch.manual_seed(0)
        whole, x = Gated(), torch.randn(sizes)
        options: Any = {**BESIDE, "post_grad_custom_post_pass": look}
        with as_meant() as counts:
            sharded: Any = tpcompile.parallelize(
                copy.deepcopy(whole), mesh(), (x,), sequence_parallel=True, compile=options
            )
            mine, theirs = sharded(x), whole(x)
            ((mine**3).sum() + (theirs**3).sum()).backward()
        worst = max(error(mine, theirs), gradient_error(whole, sharded))
        found[sizes] = worst, [dict(each) for each in graphs], dict(counts)
    return found


def _targets(graph: Graph) -> Counter[str]:
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in names if name.startswith(("symm_mem", "_c10d_functional")))


def summed() -> dict[str, Any]:
    """Per way to ask: the error, and how many sums took one step."""
    torch.manual_seed(0)
    whole, x = Gated(), torch.randn(2, 8, 12)
    few = {**SMALL, "_collective.one_shot_all_reduce_threshold_bytes": 8}
    ways: dict[str, Any] = {
        "fixed sizes": {"options": SMALL, "dynamic": False},
        "open sizes": {"options": SMALL},
        "larger than that": {"options": few, "dynamic": False},
    }
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, compile in ways.items():
            with as_meant() as counts:
                sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,), compile=compile)
                found[name] = error(sharded(x), whole(x)), sum(counts.values())
    return found


def told() -> tuple[bool, bool]:
    """Whether torch takes a model's group for one with symmetric memory, before and after it is asked for."""
    model: Any = tpcompile.parallelize(Gated(), mesh(), (torch.ones(2, 8, 12),))
    graph = copy.deepcopy(model.programs[0].graph_module)
    (group,) = groups_of(graph.graph)
    before = symmetric_memory.is_symm_mem_enabled_for_group(group)  # type: ignore[arg-type]
    use_symmetric_memory(graph, {"options": SMALL})
    return before, symmetric_memory.is_symm_mem_enabled_for_group(group)  # type: ignore[arg-type]


def refused() -> list[tuple[str, bool]]:
    """What is said where there is no such memory, and whether the model is as it was."""
    found = []
    for options in (BESIDE, SMALL):
        model = Gated()
        try:
            tpcompile.parallelize(model, mesh(), (torch.ones(2, 8, 12),), compile=options)
        except TpCompileError as refusal:
            found.append((str(refusal), type(model) is Gated))
    return found
