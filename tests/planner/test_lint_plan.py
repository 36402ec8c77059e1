"""What a plan does when taken literally: what it leaves whole, gathers and repeats, and what that costs."""

from __future__ import annotations

import pytest
import torch

import tpcompile
from tests.helpers import families
from tpcompile import TpCompileError

# Collectives of one forward under transformers' own plan, as counted on two processes, and of the best plan.
COUNTED = {"phi3": (10, 6), "olmo2": (12, 8), "cohere": (6, 4)}


def meta(name: str) -> torch.nn.Module:
    return families.build(name).to("meta")


@pytest.mark.parametrize("name", COUNTED)
def test_own_plan(name: str) -> None:
    report = tpcompile.lint_plan(meta(name), "hf", 2, cost_model="cpu")
    assert (report.literal.collectives, report.best.collectives) == COUNTED[name]
    assert report.literal.moved > report.best.moved and report.literal.seconds > report.best.seconds
    assert not report.unknown and not report.unmatched and not report.unmet
    packed = {"phi3": "qkv_proj", "olmo2": "q_proj"}.get(name)
    text = str(report)
    if packed is not None:
        assert f"gathers what model.layers.*.self_attn.{packed} computes" in text
        assert "every rank repeats the attention of model.layers.*.self_attn" in text
    else:
        assert not report.gathered and not report.repeated
    saved = report.literal.collectives - report.best.collectives
    assert f'plan="auto" saves {saved} collectives' in text


def test_a_plan_for_the_head_only() -> None:
    plan = {
        "lm_head": "colwise_gather_output",
        "model.layers.*.self_attn.q_prj": "colwise",
        "model.layers.*.self_attn.k_proj": "sideways",
    }
    before = dict(plan)
    report = tpcompile.lint_plan(meta("gpt_oss").config, plan, 2, cost_model="cpu")
    assert plan == before and not report.clean
    assert report.unmatched == ("model.layers.*.self_attn.q_prj",)
    assert report.unknown == {"model.layers.*.self_attn.k_proj": "sideways"}
    assert report.replicated_share > 0.85
    assert report.replicated["model.layers.*.self_attn.q_proj.weight"] == 2 * 96 * 40 * 4
    assert report.literal.held > 1.8 * report.best.held
    assert "every rank repeats the attention" in str(report)
    assert "of weights per rank" in str(report).splitlines()[-1]


def test_what_cannot_be_linted() -> None:
    with pytest.raises(TpCompileError, match="unknown plan 'best'"):
        tpcompile.lint_plan(meta("llama"), "best", 2)
    with pytest.raises(TpCompileError, match="no tensor-parallel plan"):
        tpcompile.lint_plan(meta("gpt2"), "hf", 2)
    with pytest.raises(TpCompileError, match="neither a model nor a config"):
        tpcompile.lint_plan("llama", "hf", 2)
