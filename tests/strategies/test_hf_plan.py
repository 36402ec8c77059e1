"""Models' own plans and exported ones; test_families_simulated checks that own plans give right results."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import strategies as spmd_strategies
from tpcompile import TpCompileError
from tpcompile.strategies.parallel_interface import STRATEGIES

TIMEOUT = 300


@functools.cache
def plan_of(name: str, rules: str = "auto", vocab_size: int = families.VOCAB) -> tpcompile.Plan:
    model, example = families.build(name, vocab_size=vocab_size), families.inputs(name, 2, 16)
    return tpcompile.plan(model, 2, example_kwargs=example, plan=rules, cost_model="cpu")


def test_the_plan_of_a_model_and_of_its_config() -> None:
    model = families.build("llama")
    plan = tpcompile.hf_plan(model)
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert plan["lm_head"] == "colwise_gather_output"
    assert tpcompile.hf_plan(model.config) == plan
    plan["lm_head"] = "replicate"  # it is the caller's own
    assert tpcompile.hf_plan(model)["lm_head"] == "colwise_gather_output"
    assert "base_model_tp_plan" not in LlamaConfig().to_dict() or plan is not LlamaConfig.base_model_tp_plan


def test_experts_take_the_place_of_what_is_inside_them() -> None:
    model = families.build("mixtral")
    plan = tpcompile.hf_plan(model, experts=True)
    assert plan["model.layers.*.mlp.experts.gate_up_proj"] == "grouped_gemm"
    assert plan["model.layers.*.mlp.experts"] in ("ep_dispatch_experts", "moe_tp_experts")  # 5.23, 5.17
    assert plan["model.layers.*.self_attn.o_proj"] == "rowwise"
    with pytest.raises(TpCompileError, match="no expert-parallel plan"):
        tpcompile.hf_plan(families.build("llama"), experts=True)


def test_an_own_plan_says_what_it_leaves_out() -> None:
    """gpt_oss has a rule for the head; of its other matrices the user is told, and they are divided."""
    with pytest.warns(UserWarning, match="no rule of the model's own plan covers") as caught:
        plan = plan_of("gpt_oss", rules="hf")
    assert len(caught) == 1
    assert "model.layers.*.self_attn.q_proj.weight" in plan.notes[-1]
    assert plan.layout.fullest < 0.56 * plan.model_bytes
    with pytest.raises(TpCompileError, match='plan="auto"'):
        plan_of("gpt2", rules="hf")


def test_a_user_merges_with_the_default() -> None:
    model = families.build("phi3")
    rules = {**tpcompile.hf_plan(model), "model.layers.*.mlp.down_proj": "replicate"}
    with pytest.warns(UserWarning, match="the rules of the plan cost"):
        plan = tpcompile.plan(
            model, 2, example_kwargs=families.inputs("phi3", 2, 16), plan=rules, cost_model="cpu"
        )
    down = plan.layout.params["model.layers.1.mlp.down_proj.weight"]
    assert down.segments[0].shards == (None,)
    assert rules["lm_head"] == "colwise_gather_output"


EXPORTED = {
    "llama": ("colwise", "rowwise"),
    "phi3": ("packed_colwise", "rowwise"),  # unequal parts of qkv have no style
    "olmo2": ("colwise_gather_output", "rowwise_split_input"),  # a norm over all heads between them
    "mixtral": ("packed_colwise", "moe_tp_experts"),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_plan(name: str) -> None:
    plan = plan_of(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rules = tpcompile.to_hf_plan(plan)
    assert {"lm_head", *EXPORTED[name]} <= {*rules, *rules.values()}
    assert set(rules.values()) <= set(STRATEGIES)
    lost = [str(w.message) for w in caught if "no style" in str(w.message)]
    if name == "phi3":
        assert len(lost) == 1 and "qkv_proj" in lost[0]
        assert (
            rules.get("model.layers.*.self_attn.qkv_proj", "replicate") == "replicate"
        )  # 5.17 has no style for it
        assert rules["model.layers.*.self_attn.o_proj"] == "rowwise_split_input"
    else:
        assert not lost


def test_a_plan_from_disk_cannot_be_exported(tmp_path: Path) -> None:
    plan = plan_of("llama")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(TpCompileError, match="make it again"):
        tpcompile.to_hf_plan(tpcompile.Plan.load(tmp_path / "plan.json"))


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_plain_transformers_takes_an_exported_plan(name: str, tmp_path: Path) -> None:
    vocab_size = 260  # 5.17 wants a head that can be divided
    model = families.build(name, vocab_size=vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rules = tpcompile.to_hf_plan(plan_of(name, vocab_size=vocab_size))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    found = run_spmd(spmd_strategies.load_exported, 2, str(tmp_path), rules, timeout=TIMEOUT)
    width = model.get_parameter("model.layers.0.self_attn.o_proj.weight").shape[1]
    for error, local in found:
        assert error <= 1e-5
        assert local[1] == width // 2


def test_on_processes() -> None:
    """A plan of single rules, some of them foolish, in forward and backward on two ranks."""
    rules = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "colwise_gather_output",
        "model.layers.0.mlp.down_proj": "replicate",
        "lm_head": "rowwise",
    }
    before = dict(rules)
    first, second = run_spmd(spmd_strategies.with_plan, 2, "llama", rules, timeout=TIMEOUT)
    assert rules == before
    for found in (first, second):
        assert found["error"] <= 1e-5 and found["gradients"] <= 1e-5
        assert "the rules of the plan cost" in found["notes"][-1]
    assert torch.equal(torch.tensor(first["error"]), torch.tensor(second["error"]))
