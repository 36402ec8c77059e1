"""What the ranks do in ``tests/runtime/test_compile_step.py``: programs that a compiler of torch is given."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import tpcompile
from tests.helpers.other_thread import turns_of_others
from tests.helpers.toys import Mlp
from tests.on_ranks.models import Calls, error, gradient_error, mesh

WIDTH = 12


class Uneven(nn.Module):
    """Two inputs, a buffer that forward changes, a hidden dimension that two ranks do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls.add_(1)
        z: Tensor = self.down(torch.relu(self.up(x))) + y * self.calls
        return z


def pair(make: Callable[[], nn.Module], *example: Tensor, **options: Any) -> tuple[Any, Any]:
    """A model with the same weights on all ranks, and the same sharded."""
    torch.manual_seed(0)
    whole = make()
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), example, **options)
    return whole, sharded


def compiled(model: Any) -> list[tuple[int, int]]:
    """Per program, how often it was compiled, and for how many kinds of call."""
    return [(len(s.compiled), len(s.guarded)) for p in model.programs for s in p.steps.values()]


def worst_gradient(whole: nn.Module, sharded: nn.Module) -> float:
    """The worst gradient's error; both models' gradients are cleared."""
    worst = gradient_error(whole, sharded)
    for model in (whole, sharded):
        model.zero_grad()
    return worst


def kinds(compile: Any) -> dict[str, Any]:
    """Errors over modes, sizes and frozen weights; what was compiled, and that dynamo has seen nothing."""
    inputs = [torch.randn(rows, WIDTH) for rows in (4, 6, 1)]
    whole, sharded = pair(Uneven, inputs[0], inputs[0].clone(), compile=compile)
    counters.clear()
    errors: list[float] = []

    def both(*given: Tensor) -> None:
        mine, theirs = sharded(*given), whole(*given)
        errors.append(error(mine, theirs))
        if mine.requires_grad:
            ((mine**2).sum() + (theirs**2).sum()).backward()
            errors.append(worst_gradient(whole, sharded))

    for x in inputs:
        both(x, x + 1)
    with torch.no_grad():
        both(inputs[0], inputs[1][:4])
    with torch.inference_mode():
        both(inputs[0], inputs[1][:4])
    for x in inputs[:2]:
        both(x, x)
    whole.up.requires_grad_(False)
    sharded.up.requires_grad_(False)
    both(inputs[0], inputs[0] + 1)
    whole.double()
    sharded.double()
    both(inputs[0].double(), inputs[1][:4].double())
    return {
        "worst": max(errors),
        "calls": float(sharded.calls),
        "compiled": compiled(sharded),
        "dynamo": counters["stats"]["unique_graphs"],
    }


def trained(compile: Any) -> dict[str, Any]:
    """Errors of results, gradients and a buffer for two sizes."""
    x = torch.randn(4, WIDTH)
    whole, sharded = pair(Uneven, x, x.clone(), compile=compile)
    errors = []
    for given in (x, torch.randn(6, WIDTH)):
        mine, theirs = sharded(given, given + 1), whole(given, given + 1)
        ((mine**2).sum() + (theirs**2).sum()).backward()
        errors += [error(mine, theirs), worst_gradient(whole, sharded)]
    errors.append(error(sharded.calls, whole.calls))
    return {"worst": max(errors), "compiled": compiled(sharded)}


def assumptions() -> dict[str, Any]:
    """What a compiler assumes of sizes while it compiles selects what it has made."""
    made: list[str] = []
    ran: list[str] = []

    def choosy(graph: GraphModule, inputs: list[Tensor]) -> Any:
        rows = next(x.shape[0] for x in inputs if isinstance(x.shape[0], torch.SymInt))
        kind = ("fours" if rows % 4 == 0 else "others") + (" many" if rows > 10 else " few")
        made.append(kind)

        def run(*values: Tensor) -> Any:
            ran.append(kind)
            return graph.forward(*values)

        return run

    _, sharded = pair(Mlp, torch.randn(4, WIDTH), compile={"backend": choosy})
    with torch.no_grad():
        for rows in (4, 8, 6, 7, 12, 16, 20, 14, 3, 4):
            sharded(torch.randn(rows, WIDTH))
        count = len(ran)
        x = torch.randn(4, WIDTH)
        with FlopCounterMode(display=False) as flops:
            sharded(x)
        with Calls() as seen:
            sharded(x)
    unseen = len(ran) - count
    flopped = flops.get_total_flops()
    return {"made": made, "ran": ran[:count], "flops": flopped, "seen": set(seen.counts), "unseen": unseen}


class Deep(nn.Module):
    """Equal layers, more than are captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def layers(compile: Any) -> dict[str, Any]:
    """Repeated layers: errors, and how often a region is called with gradients and without."""
    x = torch.randn(3, 5, WIDTH)
    whole, sharded = pair(Deep, x, compile=compile)
    mine, theirs = sharded(x), whole(x)
    ((mine**2).sum() + (theirs**2).sum()).backward()
    errors = [error(mine, theirs), worst_gradient(whole, sharded)]
    with torch.no_grad():
        x = torch.randn(2, 7, WIDTH)
        errors.append(error(sharded(x), whole(x)))
    region = torch.ops.higher_order.invoke_subgraph
    nodes = [steps.graph.graph.nodes for steps in sharded.programs[0].steps.values()]
    regions = [sum(node.target is region for node in each) for each in nodes]
    return {"worst": max(errors), "regions": regions}


def in_cpp() -> dict[str, Any]:
    """Layers that repeat, with C++ around their kernels; one rank comes late, while another thread works."""
    x = torch.randn(4, WIDTH)
    options = {"cpp_wrapper": True}
    whole, sharded = pair(lambda: nn.Sequential(*(Mlp() for _ in range(8))), x, compile=options)
    with torch.no_grad():
        found = {"worst": error(sharded(x), whole(x)), "compiled": compiled(sharded)}
        dist.barrier()
        late = 1.0 if dist.get_rank() else 0.0
        time.sleep(late)
        return found | {"late": late, "turns": turns_of_others(lambda: sharded(x))}
