"""What the ranks do in ``test_changes``: a sharded llama is changed by everything that changes a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.on_ranks.models import mesh
from tpcompile import TpCompileError

IDS = torch.arange(22).view(2, 11) % 64
Change = Callable[[Any], Any]


def built(tied: bool) -> Any:
    """A tiny llama, the same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()


def new(*shape: int, **options: Any) -> nn.Parameter:
    """A parameter that no model has."""
    return nn.Parameter(torch.ones(*shape, **options))


def state_with(model: Any, value: Any) -> dict[str, Any]:
    """A state dict with another value for one weight."""
    return {**model.state_dict(), "model.norm.weight": value}


def _subclass(part: nn.Module) -> type[nn.Module]:
    return type("Doubled", (type(part),), {"forward": lambda self, x: x})


REFUSED: dict[str, Change] = {
    "more tokens": lambda m: m.resize_token_embeddings(70, mean_resizing=False),
    "fewer tokens": lambda m: m.resize_token_embeddings(50),
    "padded tokens": lambda m: m.resize_token_embeddings(pad_to_multiple_of=48),
    "other embeddings": lambda m: m.set_input_embeddings(nn.Embedding(64, 16)),
    "another head": lambda m: m.set_output_embeddings(nn.Linear(16, 64, bias=False)),
    "a parameter": lambda m: m.model.register_parameter("new", new(2)),
    "a parameter, set": lambda m: setattr(m.model.norm, "new", new(2)),
    "a bias": lambda m: m.lm_head.register_parameter("bias", new(64)),
    "a bias, set": lambda m: setattr(m.lm_head, "bias", new(64)),
    "a buffer": lambda m: m.register_buffer("new", torch.ones(2)),
    "a module": lambda m: m.add_module("new", nn.Linear(2, 2)),
    "a module, registered": lambda m: m.register_module("new", nn.Linear(2, 2)),
    "a module, set": lambda m: setattr(m.model, "new", nn.Linear(2, 2)),
    "no head": lambda m: delattr(m, "lm_head"),
    "no head, set": lambda m: setattr(m, "lm_head", None),
    "no weight": lambda m: delattr(m.lm_head, "weight"),
    "no weight, set": lambda m: setattr(m.lm_head, "weight", None),
    "a layer replaced": lambda m: m.model.layers.__setitem__(0, nn.Identity()),
    "a layer appended": lambda m: m.model.layers.append(nn.Identity()),
    "a layer inserted": lambda m: m.model.layers.insert(0, nn.Identity()),
    "layers added": lambda m: m.model.layers.extend([nn.Identity()]),
    "a layer popped": lambda m: m.model.layers.pop(0),
    "a layer deleted": lambda m: m.model.layers.__delitem__(0),
    "a table cleared": lambda m: m._modules.clear(),
    "an item of a table popped": lambda m: m.model._modules.popitem(),
    "a default set in a table": lambda m: m.model._modules.setdefault("more", nn.Identity()),
    "a table joined": lambda m: m.model._modules.__ior__({"norm": nn.Identity()}),
    "a table updated": lambda m: m.model._modules.update(norm=nn.Identity()),
    "another activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "another class": lambda m: setattr(m.model.norm, "__class__", nn.Identity),
    "another forward in a class": lambda m: setattr(m.lm_head, "__class__", _subclass(m.lm_head)),
    "a smaller weight": lambda m: setattr(m.model.norm, "weight", new(3)),
    "a weight without values": lambda m: setattr(m.model.norm, "weight", new(16, device="meta")),
    "smaller values": lambda m: setattr(m.lm_head.weight, "data", torch.zeros(3, 3)),
    "pruning": lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.5),
    "pruning of rows": lambda m: prune.ln_structured(m.lm_head, "weight", 0.5, n=2, dim=0),
    "weight norm": lambda m: nn.utils.weight_norm(m.lm_head),  # type: ignore[no-untyped-call]
    "weight norm, new": lambda m: parametrizations.weight_norm(m.lm_head),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.lm_head),
    "a parametrization": lambda m: parametrize.register_parametrization(m.lm_head, "weight", nn.Identity()),
    "new weights": lambda m: m.apply(m._init_weights),
    "a new weight": lambda m: m.lm_head.reset_parameters(),
    "no state": lambda m: m.load_state_dict(5),
    "a list for a state": lambda m: m.load_state_dict([1]),
    "a state of numbers": lambda m: m.load_state_dict(state_with(m, 5)),
    "a state without values": lambda m: m.load_state_dict(state_with(m, new(16, device="meta"))),
    "a state of other shapes": lambda m: m.load_state_dict(state_with(m, torch.ones(3))),
    "a state of complex numbers": lambda m: m.load_state_dict(state_with(m, torch.ones(16) * 1j)),
}
REFUSED_IF_TIED: dict[str, Change] = {
    "untied": lambda m: setattr(m.lm_head, "weight", new(64, 16)),
    "a state assigned": lambda m: m.load_state_dict(m.state_dict(), assign=True),
}
REFUSED_UNLESS_TIED: dict[str, Change] = {
    "tied": lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight),
}
RIGHT: dict[str, Change] = {
    "as many tokens": lambda m: m.resize_token_embeddings(64),
    "tied again": lambda m: m.tie_weights(),
    "the same module": lambda m: setattr(m, "lm_head", m.lm_head),
    "double and back": lambda m: m.double().float(),
    "a frozen model": lambda m: m.requires_grad_(False),
    "a weight": lambda m: setattr(m.model.norm, "weight", new(16)),
    "zeros": lambda m: m.apply(
        lambda part: part.weight.data.zero_() if isinstance(part, nn.Linear) else None
    ),
    "a state": lambda m: m.load_state_dict(state_with(m, torch.ones(16))),
    "a vector": lambda m: nn.utils.vector_to_parameters(
        torch.linspace(0, 1, sum(p.numel() for p in m.parameters())), m.parameters()
    ),
}


def logits(model: Any) -> Tensor:
    """What a model says."""
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def look(model: Any) -> tuple[Any, ...]:
    """All that a refused change must leave."""
    state = {key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
             for key, value in model.state_dict().items()}  # fmt: skip
    return [*dict(model.named_modules())], state, str(model.config), str(model), logits(model)


def changes(tied: bool) -> dict[str, str]:
    """What is wrong after each change, if anything is."""
    whole = built(tied)
    example = {"input_ids": IDS, "use_cache": False}
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), example_kwargs=example)
    before, found = look(sharded), {}
    for name, change in (REFUSED | REFUSED_IF_TIED if tied else REFUSED_UNLESS_TIED).items():
        torch.manual_seed(0)
        accepted = _accepts(sharded, change)
        same = all(map(_equal, look(sharded), before))
        found[name] = f"accepted: {accepted}, unchanged: {same}" if accepted or not same else ""
    for name, change in RIGHT.items() if tied else ():
        model, reference = copy.deepcopy(sharded), copy.deepcopy(whole)
        change(reference)
        right = _accepts(model, change) and torch.allclose(logits(model), logits(reference), atol=1e-5)
        found[name] = "" if right else "wrong"
    return {name: fault for name, fault in found.items() if fault}


def _accepts(model: Any, change: Change) -> bool:
    try:
        change(model)
    except TpCompileError:
        return False
    return True


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
