"""What a CUDA device changes: two ranks that share one card, NCCL, and one rank's work at real widths.

The tests marked ``gpu`` skip themselves where there is none; what can be said of another device without one
is tested everywhere. What ranks do takes the device as an argument, so that it can be tried on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import Graph

import tpcompile
from benchmarks.gpu_local import LLAMA_8B, difference, exact_float32
from tests import families, spmd_encoder_decoder, spmd_from_pretrained, spmd_generate, spmd_models
from tests.spmd import run_spmd
from tests.spmd_models import CAPTURED, OTHER, error, mesh
from tpcompile.capture import bind_call
from tpcompile.capture.repeated_layers import capture_repeated
from tpcompile.lowering.lower_graph import lower_graph
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.cost import preset
from tpcompile.print_graph import graph_text

TIMEOUT = 420
F32 = 1e-5
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# ------------------------------------------------------------------------------------------- what ranks do


def on_card(do: Callable[..., Any], *args: Any, device: str = "cuda") -> Any:
    """What ranks do elsewhere in the tests, with all ranks on one card (or another device)."""
    exact_float32()
    if device == "cuda":
        torch.cuda.set_device(0)
    with families.on(device):
        return do(*args)


def over_nccl(device: str = "cuda", backend: str = "nccl") -> dict[str, Any]:
    """A mesh of one rank, which is all that NCCL can have on one card: what is wrong with a model there."""
    tp = init_device_mesh(device, (1,), mesh_dim_names=("tp",), backend_override={"tp": backend})
    model = families.build("llama")
    whole = copy.deepcopy(model)
    sharded: Any = tpcompile.parallelize(
        model, tp, example_kwargs=families.inputs("llama", *CAPTURED), cost_model=tpcompile.calibrate(tp)
    )
    inputs, ids = families.inputs("llama", *OTHER), families.token_ids(2, 7)
    found: dict[str, Any] = {}
    with torch.no_grad():
        expected = whole(**inputs)
        found["eager"] = error(sharded(**inputs), expected)
        found["compiled"] = error(torch.compile(sharded, fullgraph=True)(**inputs), expected)
    static = sharded.generate(ids, **GREEDY, cache_implementation="static")  # which transformers compiles
    found["tokens"] = torch.equal(static, whole.generate(ids, **GREEDY))
    return found


def half(name: str, plan: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Distances from the float32 result, of the sharded and of the whole bf16 model, as transformers runs it.

    Experts are multiplied by torch's own kernel, attention is whatever torch takes for bf16.
    """
    exact = families.build(name, **fields)
    rounded = families.build(name, torch.bfloat16, **fields)
    for model, experts in ((exact, "batched_mm"), (rounded, "grouped_mm")):
        model.set_experts_implementation(experts)  # type: ignore[operator]
    whole, example = copy.deepcopy(rounded), families.inputs(name, *CAPTURED)
    sharded = tpcompile.parallelize(rounded, mesh(), example_kwargs=example, plan=plan)
    graphs = [m.graph for m in sharded.graph_module.modules() if hasattr(m, "graph")]
    inputs = families.inputs(name, *OTHER)
    with torch.no_grad():
        reference = exact(**inputs)
        return {
            "mine": error(sharded(**inputs), reference),
            "compiled": error(torch.compile(sharded, fullgraph=True)(**inputs), reference),
            "theirs": error(whole(**inputs), reference),
            "targets": {str(node.target) for graph in graphs for node in graph.nodes},
        }


def collectives(device: str, backend: str) -> dict[str, bool]:
    """Every operator on a group of one rank, where it is the identity: eager, compiled, its gradient."""
    tp = init_device_mesh(device, (1,), mesh_dim_names=("tp",), backend_override={"tp": backend})
    group = tp.get_group().group_name
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


def on_two_ranks(do: Callable[..., Any], *args: Any) -> list[Any]:
    """What both ranks found."""
    return run_spmd(on_card, 2, do, *args, timeout=TIMEOUT)


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in sorted(families.FAMILIES)])
def test_families(name: str) -> None:
    for found in on_two_ranks(spmd_models.forward, name, False):
        assert max(found["captured"], found["other"]) <= F32
        assert found["state"] and found["type"] and found["programs"] == 1
        assert found["devices"] == {"cuda"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("llama", "phi3", "mixtral", "mamba")])
def test_compiled(name: str) -> None:
    for found in on_two_ranks(spmd_models.forward, name, True):
        assert max(found["captured"], found["other"]) <= F32


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("llama", "phi3", "mixtral", "gpt2")])
def test_gradients(name: str) -> None:
    assert max(on_two_ranks(spmd_models.gradients, name)) <= F32


@pytest.mark.parametrize("plan", [pytest.param(p, marks=gpu) for p in ("auto", "hf", "hf-ep")])
@pytest.mark.parametrize("inner", [64, 72])
def test_experts_in_bf16(plan: str, inner: int) -> None:
    """Half of 72 columns is no multiple of the 16 bytes that torch's kernel wants."""
    fields = {"hidden_size": 48, "intermediate_size": inner}
    for found in on_two_ranks(half, "mixtral", plan, fields):
        assert max(found["mine"], found["compiled"]) <= 1.5 * found["theirs"], found
        assert "aten._grouped_mm.default" in found["targets"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("llama", "gemma2", "gpt_oss")])
def test_tokens(name: str) -> None:
    for found in on_two_ranks(spmd_generate.tokens, name, [("dynamic", 7, 24), ("static", 7, 12)]):
        assert all(one["same"] for one in found), found


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("t5", "mamba", "bamba")])
def test_tokens_of_other_kinds_of_models(name: str) -> None:
    for found in on_two_ranks(spmd_encoder_decoder.tokens, name, 1):
        assert found["same"], found


@pytest.mark.parametrize("do", [pytest.param(spmd_generate.modes, marks=gpu)])
def test_padding_beams_and_sampling(do: Callable[..., Any]) -> None:
    for found in on_two_ranks(do):
        assert all(same for same, _ in found.values()), found
        assert max(error for _, error in found.values()) <= F32


@pytest.mark.parametrize("do", [pytest.param(spmd_generate.compiled, marks=gpu)])
def test_compiled_decoding(do: Callable[..., Any]) -> None:
    for found in on_two_ranks(do, "llama", "static", {}):
        assert all(one["same"] for one in found), found
        assert found[0]["graphs"] == found[1]["graphs"] and not found[1]["breaks"], found


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("mixtral", "tied")])
def test_checkpoints(name: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    spmd_models.build(name).save_pretrained(folder)  # type: ignore[operator]
    for found in on_two_ranks(spmd_from_pretrained.load, name, str(folder), None, str(out), True):
        assert not found["wrong"] and found["tokens"] and found["there"]
        assert found["error"] <= F32


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=gpu)])
def test_nccl_on_one_rank(backend: str) -> None:
    (found,) = run_spmd(on_card, 1, over_nccl, "cuda", backend, timeout=TIMEOUT)
    assert max(found["eager"], found["compiled"]) <= F32
    assert found["tokens"]


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=gpu)])
def test_nccl_collectives(backend: str) -> None:
    (found,) = run_spmd(on_card, 1, collectives, "cuda", backend, timeout=TIMEOUT)
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
