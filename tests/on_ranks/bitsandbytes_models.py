"""What ranks do in ``test_bitsandbytes``: models whose linear layers bitsandbytes has quantised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import tpcompile
from tests.on_ranks.module_life import refusal

from .models import mesh
from .quantised import CALL, IDS, LORA, adapted, adapters_apart, learn, logits

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "fp4, scales quantised": NESTED,
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 2.0},
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def theirs(folder: Path, model_class: Any = LlamaForCausalLM, **kind: Any) -> Any:
    """As transformers loads it, in float32 on every CPU: on some its layers would round to bfloat16."""
    model = model_class.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**kind))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def _tokens(model: Any) -> Tensor:
    found: Tensor = model.generate(IDS, max_new_tokens=4, do_sample=False)
    return found


def kinds(folder: Path) -> dict[str, float]:
    """Quantised while they are loaded, before, and in memory: how far logits are from the whole model's."""
    found = {}
    for name, kind in KINDS.items():
        whole = theirs(folder, **kind)
        want, tokens, weight = logits(whole), _tokens(whole), whole.model.layers[0].mlp.up_proj.weight
        loaded = tpcompile.from_pretrained(
            folder, mesh(), example_kwargs=CALL, quantization_config=BitsAndBytesConfig(**kind)
        )
        own = loaded.model.layers[0].mlp.up_proj.weight
        numbers = own.numbers if hasattr(own, "numbers") else own.packed.reshape(-1, 1)
        assert torch.equal(numbers, weight.data)
        assert torch.equal(_tokens(loaded), tokens)
        for change in (
            lambda layer, weight: setattr(layer, "weight", weight),
            lambda layer, weight: setattr(layer, "weight", weight.data),
            lambda layer, weight: delattr(layer, "weight"),
        ):
            said = refusal(lambda: change(loaded.model.layers[0].mlp.up_proj, weight))  # noqa: B023
            assert "replaced, added or removed" in said, (name, said)
        stored = tpcompile.from_pretrained(folder / name, mesh(), example_kwargs=CALL)
        for how, model in (("loaded", loaded), ("stored", stored)):
            found[f"{name}, {how}"] = float((logits(model) - want).abs().max())
            assert not model.training
        assert "other tensors" in refusal(lambda: loaded.save_pretrained(folder / "written"))  # noqa: B023
    sharded = tpcompile.parallelize(theirs(folder, **NESTED), mesh(), example_kwargs=CALL)
    found["in memory"] = float((logits(sharded) - logits(theirs(folder, **NESTED))).abs().max())
    return found


def adapters(folder: Path) -> dict[str, float]:
    """QLoRA: an adapter put in before and after the model is divided; how far off it is."""
    found = {}
    for name, when in (("nf4", "before"), ("int8", "after")):
        losses, weights = learn(adapted(theirs(folder, **KINDS[name]).train()))
        assert losses[-1] < losses[0]
        model = theirs(folder, **KINDS[name]).train()
        found[f"{name}, {when}"] = adapters_apart(model, when, losses, weights)
    loaded = tpcompile.from_pretrained(
        folder, mesh(), example_kwargs=CALL, quantization_config=BitsAndBytesConfig(**NF4), adapter=LORA
    )
    assert {type(m).__name__ for n, m in loaded.named_modules() if n.endswith("q_proj")} == {"Linear4bit"}
    return found


def given_back(folder: Path) -> list[str]:
    """A request that fails leaves a model as it was."""
    said = []
    for kind in KINDS.values():
        model = theirs(folder, **kind)
        layer = model.model.layers[0].mlp.up_proj
        want, state, before = logits(model), copy.deepcopy(model.state_dict()), dict(vars(layer))
        said.append(refusal(lambda: tpcompile.parallelize(model, mesh(), plan={"nothing": "colwise"})))  # noqa: B023
        assert type(layer) in (Linear4bit, Linear8bitLt)
        assert {key: type(value) for key, value in vars(layer).items()} == {
            key: type(value) for key, value in before.items()
        }
        assert torch.equal(logits(model), want)
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in now)
    return said
