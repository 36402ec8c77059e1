"""What a dry run says of memory, time and collectives: against processes, and against shapes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import tpcompile
from benchmarks.predicted import Taken, said
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import dry_run as on_ranks
from tests.on_ranks.dry_run import BATCH, LENGTH, Deep, X, llama
from tpcompile import CostModel, Estimate, TpCompileError
from tpcompile.planner.dry_run.devices import DEVICES
from tpcompile.runtime.dry_run import compiler
from tpcompile.runtime.dry_run.recorder import Operation, Transfer
from tpcompile.runtime.dry_run.step_time import time_of

COST = CostModel("mine", 1e9, 1e9, 1e-4, 1e8, 1e-6)


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.fixture(scope="module")
def plans() -> dict[str, tpcompile.Plan]:
    return {
        "deep": tpcompile.plan(meta(Deep), 2, (X,), cost_model="cpu"),
        "short": tpcompile.plan(meta(lambda: Deep(2)), 2, (X,), cost_model="cpu"),
        "llama": tpcompile.plan(meta(llama), 2, cost_model="cpu"),
    }


def test_processes_take_what_was_said(plans: dict[str, tpcompile.Plan]) -> None:
    ranks: list[dict[str, Taken]] = run_spmd(on_ranks.taken, 2, timeout=300)
    sizes = {"batch": BATCH, "seq": LENGTH, "device": "cpu"}
    ways: dict[tuple[str, str], dict[str, Any]] = {
        ("deep", "train"): {},
        ("deep", "selective"): {"checkpointing": "selective"},
        ("deep", "divided"): {"sequence_parallel": True},  # gradients of norms travel together
        ("short", "full"): {"checkpointing": True},
    }
    expected: dict[str, Taken] = {"deep": {}, "short": {}}
    for (name, way), options in ways.items():
        expected[name][way] = said(plans[name].estimate("train", device="cpu", **options))
    modes = ("train", "prefill", "decode")
    expected["llama"] = {mode: said(plans["llama"].estimate(mode, **sizes)) for mode in modes}
    expected["llama"]["weights"] = (plans["llama"].layout.fullest, "")
    for name, steps in expected.items():
        for step, (size, sent) in steps.items():
            most = max(rank[name][step][0] for rank in ranks)
            # gloo's thread holds what it has sent and received last until the next message.
            assert size == pytest.approx(most, rel=0.02), (name, step)
            assert {rank[name][step][1] for rank in ranks} == {sent}, (name, step)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("deep", "train", {}),
        ("deep", "train", {"checkpointing": True, "optimizer": "momentum"}),
        ("deep", "train", {"sequence_parallel": True}),
        ("llama", "decode", {"batch": 2, "seq": 30}),
    ],
)
def test_few_layers_tell_what_all_take(
    plans: dict[str, tpcompile.Plan], monkeypatch: pytest.MonkeyPatch, name: str, mode: Any, options: Any
) -> None:
    def numbers(found: Estimate) -> list[float]:
        return [*vars(found.memory).values(), *vars(found.time).values(), found.operations]

    few = plans[name].estimate(mode, device=COST, **options)
    monkeypatch.setattr(compiler, "samples", lambda copies: [copies])
    every = plans[name].estimate(mode, device=COST, **options)
    assert any("periods" in line for line in few.rests_on)
    known = [x is not None for x in numbers(few)]
    assert [x for x, k in zip(numbers(few), known, strict=True) if k] == pytest.approx(
        [x for x, k in zip(numbers(every), known, strict=True) if k], rel=1e-6
    )
    assert set(few.collectives) == set(every.collectives)


def test_checkpointing_and_a_divided_sequence_take_less_memory(plans: dict[str, tpcompile.Plan]) -> None:
    plain, again, divided = (
        plans["deep"].estimate("train", device=COST, **options).memory
        for options in ({}, {"checkpointing": True}, {"sequence_parallel": True})
    )
    kept = BATCH * LENGTH * 24 * 4
    assert again.activations < plain.activations - 5 * kept
    assert divided.activations < plain.activations - 2 * kept
    assert plain.weights == again.weights == divided.weights


def test_a_cache_grows_by_its_share(plans: dict[str, tpcompile.Plan]) -> None:
    step = plans["llama"].estimate("decode", batch=2, seq=30, device="h100")
    per_token = 5 * 2 * (2 // 2) * 8 * 4  # layers, keys and values, this rank's heads, their size, bytes
    assert step.memory.cache_per_token == per_token
    assert step.memory.cache == 2 * 31 * per_token
    assert (step.tokens, step.capacity) == (2, 80e9)
    text = str(step)
    assert all(f"rests on: {what}" in text for what in ("memory", "layers", "device", "time"))
    data = step.to_json()
    assert data["memory"]["peak"] == step.memory.peak
    assert data["tokens_per_second"] == 2 / step.time.seconds


def test_optimizers_have_their_states(plans: dict[str, tpcompile.Plan]) -> None:
    def states(optimizer: Any) -> float:
        return plans["deep"].estimate("train", device="cpu", optimizer=optimizer).memory.optimizer

    trained = sum(
        param.bytes // 2 if not param.is_whole else param.bytes
        for name, param in plans["deep"].layout.params.items()
        if name != "first.weight"
    )
    assert states("adamw") == pytest.approx(2 * trained, rel=0.05)
    assert states("momentum") == pytest.approx(trained, rel=0.05)
    assert states(lambda params: torch.optim.Adam(params, amsgrad=True)) == pytest.approx(
        3 * trained, rel=0.05
    )
    assert states("sgd") == 0


def test_what_could_overlap() -> None:
    device = DEVICES["cpu"]
    first = Operation(("forward", 0), 5e10, 0.0, torch.float32, False, ())
    sent = Operation(("forward", 0), 0.0, 0.0, torch.float32, False, (0,), Transfer("all_reduce", 10**9, 2))
    beside = Operation(("forward", 0), 1e11, 0.0, torch.float32, False, (0,))
    behind = Operation(("forward", 0), 0.0, 8e9, torch.float32, True, (1,))
    found = time_of([first, sent, beside, behind], device)
    assert (found.compute, found.memory, found.elementwise) == pytest.approx((3.0, 1.0, 1.0))
    assert found.communication == pytest.approx(1.0, rel=1e-3)
    assert found.could_overlap == pytest.approx(found.communication)
    assert time_of([first, sent, behind], device).could_overlap == pytest.approx(0.0, abs=1e-9)


def test_fit_tries_each_number_of_ranks() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=1000
    )
    found = tpcompile.fit(config, "400 kB", [1, 2, 3], batch=2, seq=8, device=COST)
    whole = found.model_bytes
    assert whole > 400e3
    alone, two, three = found.sizes
    assert not alone.fits and alone.estimate is None and alone.peak == whole
    assert two.estimate is not None and three.estimate is not None
    assert two.peak > three.peak > whole / 3
    assert [size.fits for size in found.sizes] == [size.peak <= 400e3 for size in found.sizes]
    for best in (found.quickest, found.cheapest):
        assert best is None or best.fits
    plan = tpcompile.plan(on_meta(config), 2)
    assert plan.estimate("decode", batch=2, seq=8, device=COST).memory == two.estimate.memory
    assert "ranks" in str(found) and found.to_json()["sizes"][0]["estimate"] is None


def on_meta(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return meta(lambda: AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.estimate("decode"), "no batch and length"),
        (lambda plan: plan.estimate(batch=2), "belong together"),
        (lambda plan: plan.estimate(batch=2, seq=4), "not given token ids"),
        (lambda plan: plan.estimate(device="abacus"), "no device named"),
        (lambda plan: plan.estimate("train", optimizer="newton"), "no optimizer is named"),
        (lambda plan: plan.estimate("train", optimizer=lambda params: params), "more than single elements"),
        (lambda plan: tpcompile.Plan.from_json(plan.to_json()).estimate(), "no model to estimate"),
        (lambda plan: tpcompile.fit(meta(Deep), device="cpu"), "how much memory"),
        (lambda plan: tpcompile.fit(meta(Deep), "80 apples"), "not a size of memory"),
        (lambda plan: tpcompile.fit(meta(Deep), 1e9, [2]), "not given token ids"),
        (lambda plan: tpcompile.fit(meta(Deep), 1e9, [2], dtype="bfloat16"), "which has a type"),
        (lambda plan: tpcompile.fit(3, 1e9), "model is 3"),
    ],
)
def test_what_is_refused(plans: dict[str, tpcompile.Plan], call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TpCompileError) as error:
        call(plans["deep"])
    assert message in str(error.value) and error.value.where and error.value.todo


def test_a_model_with_weights_is_not_kept_and_must_be_as_it_was() -> None:
    model = nn.Linear(4, 6)
    plan = tpcompile.plan(model, 2, (torch.ones(3, 4),))
    assert plan.estimate(device="cpu").memory.weights == 3 * 4 * 4 + 3 * 4
    model.double()
    with pytest.raises(TpCompileError, match="is of torch"):
        plan.estimate(device="cpu")
    del model
    gc.collect()
    with pytest.raises(TpCompileError, match="is gone"):
        plan.estimate(device="cpu")
