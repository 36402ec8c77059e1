"""The tests' ranks on a CUDA device: two that share one card over gloo, one over NCCL, and one of eight.

They skip themselves where there is none. What ranks do takes the device as an argument, so that it can be
tried on the CPU. What can be said of another device without one is in ``test_other_devices``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from benchmarks.gpu_local import LLAMA_8B, difference, exact_float32
from tests.helpers import families
from tests.helpers.run_ranks import run_alone, run_spmd
from tests.on_ranks import encoder_decoder as spmd_encoder_decoder
from tests.on_ranks import from_pretrained as spmd_from_pretrained
from tests.on_ranks import generate as spmd_generate
from tests.on_ranks import models as spmd_models
from tests.on_ranks.models import CAPTURED, OTHER, error, mesh

TIMEOUT = 420
F32 = 1e-5
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

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


def collectives(device: str = "cuda", backend: str = "nccl") -> dict[str, bool]:
    """Every operator on a group of one rank, where it is the identity: eager, compiled, its gradient."""
    tp = init_device_mesh(device, (1,), mesh_dim_names=("tp",), backend_override={"tp": backend})
    group = tp.get_group().group_name
    ops = torch.ops.tpcompile
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "all_reduce": lambda x: ops.all_reduce(x, group),
        "copy_to_ranks": lambda x: ops.copy_to_ranks(x, group),
        "all_gather": lambda x: ops.all_gather(x, group, 1, [6], 0),
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


# ------------------------------------------------------------------------------------------- with a device


def on_two_ranks(do: Callable[..., Any], *args: Any) -> list[Any]:
    """What both ranks found."""
    return run_spmd(on_card, 2, do, *args, timeout=TIMEOUT)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_families(name: str) -> None:
    for found in on_two_ranks(spmd_models.forward, name, ""):
        assert max(found["captured"], found["other"]) <= F32
        assert found["state"] and found["type"] and found["devices"] == {"cuda"}
        assert found["programs"] == (2 if name == "mamba" else 1)  # its recurrence is a loop in python


@pytest.mark.parametrize("name", ("llama", "phi3", "mixtral"))
def test_compiled(name: str) -> None:
    for found in on_two_ranks(spmd_models.forward, name, "inductor"):
        assert max(found["captured"], found["other"]) <= F32


@pytest.mark.parametrize("name", ("llama", "phi3", "mixtral", "gpt2"))
def test_gradients(name: str) -> None:
    assert max(on_two_ranks(spmd_models.gradients, name)) <= F32


@pytest.mark.parametrize("plan", ("auto", "hf", "hf-ep"))
@pytest.mark.parametrize("inner", [64, 72])
def test_experts_in_bf16(plan: str, inner: int) -> None:
    """Half of 72 columns is not a multiple of the 16 bytes that torch's kernel wants."""
    fields = {"hidden_size": 48, "intermediate_size": inner}
    for found in on_two_ranks(half, "mixtral", plan, fields):
        assert max(found["mine"], found["compiled"]) <= 1.5 * found["theirs"], found
        assert "aten._grouped_mm.default" in found["targets"]


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss"))
def test_tokens(name: str) -> None:
    for found in on_two_ranks(spmd_generate.tokens, name, 2, [("dynamic", 7, 24), ("static", 7, 12)]):
        assert all(one["same"] for one in found), found


@pytest.mark.parametrize("name", ("t5", "mamba", "bamba"))
def test_tokens_of_other_kinds_of_models(name: str) -> None:
    for found in on_two_ranks(spmd_encoder_decoder.tokens, name):
        assert found["same"], found


def test_padding_beams_and_sampling() -> None:
    for found in on_two_ranks(spmd_generate.modes):
        assert all(same for same, _ in found.values()), found
        assert max(error for _, error in found.values()) <= F32


def test_compiled_decoding() -> None:
    for found in on_two_ranks(spmd_generate.compiled, "llama", "static", {}):
        assert all(one["same"] for one in found), found
        assert found[0]["graphs"] == found[1]["graphs"] and not found[1]["breaks"], found


@pytest.mark.parametrize("name", ("mixtral", "tied"))
def test_checkpoints(name: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    spmd_models.build(name).save_pretrained(folder)  # type: ignore[operator]
    for found in on_two_ranks(spmd_from_pretrained.load, name, str(folder), None, str(out), True):
        assert not found["wrong"] and found["tokens"] and found["there"]
        assert found["error"] <= F32


def test_nccl_on_one_rank() -> None:
    (found,) = run_spmd(on_card, 1, over_nccl, timeout=TIMEOUT)
    assert max(found["eager"], found["compiled"]) <= F32
    assert found["tokens"]


def test_nccl_collectives() -> None:
    (found,) = run_spmd(on_card, 1, collectives, timeout=TIMEOUT)
    assert all(found.values()), found


def test_one_rank_of_eight_at_real_widths() -> None:
    assert run_alone(difference, "cuda", 8, LLAMA_8B, 2, (2, 128), timeout=TIMEOUT) <= F32
