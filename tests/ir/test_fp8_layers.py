"""transformers' fp8 layers: what cannot be divided is refused, and they are as they were then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FineGrainedFP8Config, GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import tpcompile
from tests.helpers.quantised import SIZES
from tpcompile.ir.block_scaled import BlockScaled
from tpcompile.ir.unwrap import put_together_on_error, unwrap, unwrapped_copy

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Doubled(FP8Linear):
    """A layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Twice what the layer gives."""
        return 2 * super().forward(input)


def model() -> Any:
    """A mixtral with fp8 layers, which share a weight."""
    whole = MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS))
    replace_with_fp8_linear(whole, ["lm_head", "gate"], FineGrainedFP8Config(weight_block_size=(16, 16)))
    whole.to_empty(device="cpu")
    attention = whole.model.layers[0].self_attn
    for name in ("weight", "weight_scale_inv"):
        setattr(attention.o_proj, name, getattr(attention.q_proj, name))
    attention.v_proj.weight.requires_grad_(False)
    return whole


def seen(of: nn.Module) -> list[Any]:
    """All that is known of a model's weights, and their places in memory."""
    tensors = [(n, p.data_ptr(), p.dtype, p.requires_grad, type(p)) for n, p in of.named_parameters()]
    kinds = [type(module) for module in of.modules()]
    return [tensors, kinds, list(of.state_dict()), [len(module._parameters) for module in of.modules()]]


def refused(of: nn.Module) -> str:
    """What is said; the model is as it was."""
    before = seen(of)
    with pytest.raises(tpcompile.TpCompileError) as said, put_together_on_error(of):
        unwrap(of)
    assert seen(of) == before
    return str(said.value)


def test_they_are_given_back() -> None:
    """Whatever fails afterwards."""
    whole = model()
    before = seen(whole)
    with pytest.warns(UserWarning, match="5 fp8 layers"), pytest.raises(ZeroDivisionError):
        with put_together_on_error(whole):
            unwrap(whole)
            layer = whole.model.layers[0]
            assert isinstance(layer.mlp.experts.down_proj, BlockScaled)
            assert "weight_scale_inv" not in dict(layer.self_attn.q_proj.named_parameters())
            assert unwrapped_copy(whole) is whole, "there is nothing more to do"
            raise ZeroDivisionError
    assert seen(whole) == before
    attention = whole.model.layers[0].self_attn
    assert attention.o_proj.weight is attention.q_proj.weight


def change(attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, attribute, value)


@pytest.mark.parametrize(
    ("path", "act", "said"),
    [
        ("self_attn.q_proj", change("block_size", None), "one scale for a whole weight"),
        ("self_attn.q_proj", change("block_size", (8, 16)), "scales of shape"),
        ("self_attn.q_proj", change("__class__", Doubled), "a Doubled, whose forward"),
        ("mlp.experts", change("down_proj", nn.Parameter(torch.zeros(4, 64, 64).char(), False)), "of 4 bits"),
        ("mlp", change("experts", Mxfp4GptOssExperts(GptOssConfig(**SIZES, **EXPERTS))), "for a kernel"),
    ],
)
def test_refused(path: str, act: Callable[[Any], None], said: str) -> None:
    whole = model()
    act(whole.model.layers[0].get_submodule(path))
    found = refused(whole)
    assert said in found and "keep_quantised=True" in found and "layers.0" in found
    with pytest.raises(tpcompile.TpCompileError) as again:
        tpcompile.plan(whole, 2)
    assert found == str(again.value)
