"""What a CUDA device changes: two ranks that share one card, NCCL, and one rank's work at real widths.

The tests marked ``gpu`` skip themselves where there is none; what can be said of another device without one
is tested everywhere. What ranks do takes the device as an argument, so that it can be tried on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import Graph

import tpcompile
from benchmarks.gpu_local import LLAMA_8B, difference, exact_float32
from tests import families
from tests.spmd import run_spmd
from tests.spmd_models import CAPTURED, OTHER, error
from tpcompile.capture import bind_call
from tpcompile.capture.repeated_layers import capture_repeated
from tpcompile.lowering.lower_graph import lower_graph
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.cost import preset
from tpcompile.print_graph import graph_text

TIMEOUT = 420
F32 = 1e-5
FAMILIES = ("llama", "phi3", "mixtral", "gpt2", "bert")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# ------------------------------------------------------------------------------------------- what ranks do


def mesh(device: str, backend: str) -> DeviceMesh:
    """All ranks as one axis on one card; without the override torch may take NCCL, which refuses that."""
    exact_float32()
    if device == "cuda":
        torch.cuda.set_device(0)
    return init_device_mesh(
        device, (dist.get_world_size(),), mesh_dim_names=("tp",), backend_override={"tp": backend}
    )


def call(name: str, sizes: tuple[int, int], device: str) -> dict[str, Any]:
    """A family's inputs on a device."""
    inputs = families.inputs(name, *sizes)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def pair(name: str, device: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """A family's model, sharded, and its whole twin."""
    model = families.build(name).to(device)
    whole = copy.deepcopy(model)
    tp = mesh(device, backend)
    return tpcompile.parallelize(model, tp, example_kwargs=call(name, CAPTURED, device)), whole


def forward(name: str, device: str, backend: str, compiled: bool = False) -> dict[str, Any]:
    """Errors of a forward as captured and at other sizes, where its results are, and the state dict's."""
    sharded, whole = pair(name, device, backend)
    run = torch.compile(sharded, fullgraph=True) if compiled else sharded
    found: dict[str, Any] = {"devices": {p.device.type for p in sharded.parameters()}}
    with torch.no_grad():
        for label, sizes in (("captured", CAPTURED), ("other", OTHER)):
            inputs = call(name, sizes, device)
            found[label] = error(run(**inputs), whole(**inputs))
    state, expected = sharded.full_state_dict(), whole.state_dict()
    found["state"] = state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )
    return found


def gradients(name: str, device: str, backend: str) -> float:
    """The worst relative error of any parameter's gradient against the slice of the unsharded one."""
    sharded, whole = pair(name, device, backend)
    for each in (sharded, whole):
        result = families.tensors(each(**call(name, OTHER, device)))[families.FAMILIES[name].output]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (result * weights).sum().backward()
    expected = {name: param.grad for name, param in whole.named_parameters()}
    worst = 0.0
    for key, param in sharded.named_parameters():
        theirs = expected[key]
        assert param.grad is not None and theirs is not None
        piece = sharded.plan.layout.shard(key, theirs, dist.get_rank())
        worst = max(worst, float((param.grad - piece).abs().max() / theirs.abs().max()))
    return worst


def collectives(device: str, backend: str) -> dict[str, bool]:
    """Every operator on a group of one rank, where it is the identity: eager, compiled, its gradient."""
    group = mesh(device, backend).get_group().group_name
    ops = torch.ops.tpcompile
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "all_reduce": lambda x: ops.all_reduce(x, group),
        "copy_to_ranks": lambda x: ops.copy_to_ranks(x, group),
        "all_gather": lambda x: ops.all_gather(x, group, 1, [6], 0),
        "all_gather_partial": lambda x: ops.all_gather_partial(x, group, 1, [6], 0),
        "reduce_scatter": lambda x: ops.reduce_scatter(x, group, 1, [6], 0),
        "all_to_all": lambda x: ops.all_to_all(x, group, 0, 1, [4], [6], 0),
    }
    found = {}
    for name, do in calls.items():
        good = True
        for run in (do, torch.compile(lambda x, do=do: do(x * 1), fullgraph=True)):
            x = torch.randn(4, 6, device=device, requires_grad=True)
            y = run(x)
            (y * y).sum().backward()
            good = good and torch.equal(y, x) and torch.equal(x.grad, 2 * x)
        found[name] = good
    return found


def refusal() -> str:
    """A model on the CPU, a mesh for the card."""
    tp = init_device_mesh("cuda", (dist.get_world_size(),), backend_override={0: "gloo"})
    try:
        tpcompile.parallelize(nn.Linear(4, 4), tp, (torch.zeros(2, 4),))
    except tpcompile.TpCompileError as refused:
        return str(refused)
    return "accepted"


class Alone:
    """Stands in for the process groups of rank 1."""

    def name(self, axes: tuple[int, ...]) -> str:
        return "none"

    def index(self, axes: tuple[int, ...]) -> int:
        return 1


def strays(names: tuple[str, ...]) -> dict[str, list[str]]:
    """What is not on the device, in programs for a device that torch is only told of."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("elsewhere")
    device = torch.device("elsewhere", 0)
    found = {}
    for name in names:
        model = families.build(name).requires_grad_(False)  # this device has no autograd
        call = bind_call(model, (), families.inputs(name, *CAPTURED))
        captured = capture_repeated(model, call, device=device)
        work = plan_program(canonical(captured, 2), preset("cpu"), lambda _work, _axis: {})
        rewrite(work, training=False)
        local = lower_graph(work, (1,) * len(work.axes), Alone())
        values = {n.name: n.meta.get("val") for n in (*work.graph.nodes, *local.graph.nodes)}
        wanted = {n.name: n.kwargs.get("device", device) for n in local.graph.nodes}
        found[name] = [k for k, v in values.items() if isinstance(v, Tensor) and v.device != device]
        found[name] += [k for k, d in wanted.items() if d not in (None, device)]
    return found


def alone(do: Callable[..., Any], *args: Any) -> Any:
    """Calls a module-level function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(do, *args).result(TIMEOUT)


# ------------------------------------------------------------------------------------------- with a device


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in FAMILIES])
def test_two_ranks_on_one_card(name: str) -> None:
    for found in run_spmd(forward, 2, name, "cuda", "gloo", timeout=TIMEOUT):
        assert found["devices"] == {"cuda"}
        assert max(found["captured"], found["other"]) <= F32
        assert found["state"]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=gpu)])
def test_gradients_on_one_card(name: str) -> None:
    assert max(run_spmd(gradients, 2, name, "cuda", "gloo", timeout=TIMEOUT)) <= F32


@pytest.mark.parametrize("compiled", [pytest.param(c, marks=gpu) for c in (False, True)])
def test_nccl_on_one_rank(compiled: bool) -> None:
    (found,) = run_spmd(forward, 1, "llama", "cuda", "nccl", compiled, timeout=TIMEOUT)
    assert max(found["captured"], found["other"]) <= F32


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=gpu)])
def test_nccl_collectives(backend: str) -> None:
    (found,) = run_spmd(collectives, 1, "cuda", backend, timeout=TIMEOUT)
    assert all(found.values()), found


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_one_rank_of_eight_at_real_widths(device: str) -> None:
    assert alone(difference, device, 8, LLAMA_8B, 2, (2, 128)) <= F32


# ---------------------------------------------------------------------------------------------- everywhere


def test_a_model_on_another_device_than_the_mesh_is_refused() -> None:
    for message in run_spmd(refusal, 2):
        assert "the mesh is for cuda, the model is on cpu" in message
        assert "move the model to cuda" in message


def test_programs_for_another_device_hold_nothing_of_the_cpu() -> None:
    assert alone(strays, ("llama", "phi3", "mixtral", "bert")) == {
        "llama": [],
        "phi3": [],
        "mixtral": [],
        "bert": [],
    }


def test_ranks_on_different_cards_have_the_same_text() -> None:
    texts = set()
    for card in range(2):
        graph = Graph()
        graph.call_function(torch.ops.aten.arange.default, (4,), {"device": torch.device("cuda", card)})
        graph.output(())
        texts.add(graph_text(graph))
    assert len(texts) == 1
