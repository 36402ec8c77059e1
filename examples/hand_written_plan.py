"""Shards a Llama by a plan of one's own, in transformers' words, and asks what the plan costs.

python examples/hand_written_plan.py
torchrun --nproc-per-node 2 examples/hand_written_plan.py
"""

from __future__ import annotations

import warnings

import torch
from launch import launch, say
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)

# One rule is poor: a gathered gate_proj, as in plans that were written in a hurry.
PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "replicate",
    "lm_head": "colwise_gather_output",
}


def build() -> LlamaForCausalLM:
    """The same model on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def main() -> None:
    """Runs on every rank."""
    words = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = build()(words, use_cache=False).logits

    say(f"the plan, taken literally:\n\n{tpcompile.lint_plan(CONFIG, PLAN, 2, cost_model='cpu')}\n")

    try:
        tpcompile.plan(build(), 2, plan=PLAN | {"model.layers.*.mlp.dwn_proj": "rowwise"})
    except tpcompile.TpCompileError as error:
        say(f"a rule that names nothing is refused:\n{error}\n")

    # Rules become pins: the rest is planned around them, and what a poor one costs is said once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = {"input_ids": words, "use_cache": False}
        model = tpcompile.parallelize(build(), example_kwargs=example, plan=PLAN)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(f"warning: {warning.message}\n")
    check(model(words, use_cache=False).logits, expected)

    # A model's own plan, with one rule changed.
    mine = {**tpcompile.hf_plan(CONFIG), "lm_head": "replicate"}
    model = tpcompile.parallelize(build(), example_kwargs=example, plan=mine)
    say(f"{model.plan}\n")
    check(model(words, use_cache=False).logits, expected)


def check(value: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares with the unsharded model."""
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    say(f"relative error {error:.1e}\n")
    assert error <= 1e-5


if __name__ == "__main__":
    launch(main)
