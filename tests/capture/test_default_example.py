"""The call that a model is captured for when no example is given."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.helpers import families
from tpcompile.capture.export.default_example import default_example
from tpcompile.planner.global_program import GlobalProgram, Pass


class ScaleAttention(Pass):
    """Takes another scale for attention: of equal tokens nothing changes."""

    name = "scale-attention"

    def apply(self, program: GlobalProgram) -> bool:
        attention = torch.ops.aten.scaled_dot_product_attention.default
        found = program.graph.find_nodes(op="call_function", target=attention)
        for node in found:
            node.kwargs = {**node.kwargs, "scale": 50.0}
        return bool(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper", "vit"])
def test_the_model_takes_it(name: str, dtype: torch.dtype) -> None:
    model = families.build(name, dtype)
    example = default_example(model)
    assert example is not None
    with torch.no_grad():
        model(**example)


def test_its_values_differ() -> None:
    """Of equal tokens a model computes the same whatever its attention does, and of padding nothing."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes, **special))
    example = default_example(model)
    assert example is not None
    assert set(example["input_ids"].flatten().tolist()) == {1, 2, 5, 6, 7, 8}
    assert torch.equal(example["input_ids"], default_example(model)["input_ids"])
    report = tpcompile.verify(model.eval(), 2)
    assert 0 < max(f.error for f in report.findings) <= report.limit, (
        "sums of two ranks are rounded otherwise"
    )
    assert tpcompile.verify(model, 2, passes=[ScaleAttention()]).wrong
