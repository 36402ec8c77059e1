"""How the layers of transformers' caches are taken apart into tensors, and put together again.

Everything that a layer knows must be in the tensors, or be a fact: a python value that selects the program.
A number that grows from call to call is neither; it travels as the SIZE of a tensor without elements, hence
as a symbol and not as a constant that would go stale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError

from .form import LayerFacts, LayerForm, Parts
from .paged import PAGED_FORM
from .state_layers import state_forms

COUNT = "_count"
"""How the role of a number ends that travels as a size."""
SEEN = "seen" + COUNT
"""Tokens that a growing sliding layer has seen: as long as its keys until its window is full."""
WRITTEN = "written" + COUNT
"""Tokens that were written into a static sliding layer."""
CAPACITY = "capacity" + COUNT
"""Tokens that a static layer without data will hold; later the size of its keys says so."""


def take_layer(layer: Any) -> tuple[Parts, tuple[str, LayerFacts]]:
    """A layer's tensors by role, and its class with its facts.

    Raises:
        TpCompileError: nobody has said how such a layer is taken apart.
    """
    name = type(layer).__name__
    if name not in LAYER_FORMS:
        raise TpCompileError(
            f"a cache with a {name} cannot be captured", where="past_key_values", todo="pass use_cache=False"
        )
    parts, facts = LAYER_FORMS[name].take(layer)
    return parts, (name, facts)


def make_layer(parts: Parts, context: tuple[str, LayerFacts]) -> Any:
    """A layer as ``take_layer`` took it apart."""
    name, facts = context
    layer = LAYER_FORMS[name].make(facts, parts)
    put_layer(layer, parts, context)
    return layer


def put_layer(layer: Any, parts: Parts, context: tuple[str, LayerFacts]) -> None:
    """Gives an existing layer another state; one without data stays as it is."""
    if parts.keys() - {CAPACITY}:
        name, facts = context
        LAYER_FORMS[name].put(layer, parts, facts)


def as_count(number: Any, like: Tensor | None = None) -> Tensor:
    """A number as the size of a tensor without elements, made like a tensor of the layer that it is about."""
    return torch.empty((number, 0)) if like is None else like.new_empty((number, 0), dtype=torch.float32)


def with_counts(leaves: Sequence[Any], numbers: Collection[int]) -> list[Any]:
    """The leaves of a call, with the numbers at these places as sizes of tensors without elements."""
    if not numbers:
        return list(leaves)
    return [as_count(leaf) if i in numbers else leaf for i, leaf in enumerate(leaves)]


def is_count(name: str) -> bool:
    """Whether a leaf of this name is a number that travels as a size."""
    return COUNT in name


def _has_data(layer: Any) -> bool:
    return layer.keys is not None and layer.keys.ndim == 4


def _put_tensors(layer: Any, parts: Parts) -> None:
    layer.keys, layer.values = parts["keys"], parts["values"]
    layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
    layer.is_initialized = True


def _take_dynamic(layer: Any) -> tuple[Parts, LayerFacts]:
    parts = {"keys": layer.keys, "values": layer.values} if _has_data(layer) else {}
    return parts, ()


def _make_dynamic(facts: LayerFacts, parts: Parts) -> Any:
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer()


def _put_dynamic(layer: Any, parts: Parts, facts: LayerFacts) -> None:
    _put_tensors(layer, parts)


def _take_sliding(layer: Any) -> tuple[Parts, LayerFacts]:
    facts = (layer.sliding_window, getattr(layer, "record_past", False))
    if not _has_data(layer):
        return {}, facts
    seen = as_count(layer.cumulative_length, layer.keys)
    return {"keys": layer.keys, "values": layer.values, SEEN: seen}, facts


def _make_sliding(facts: LayerFacts, parts: Parts) -> Any:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer: Any = DynamicSlidingWindowLayer(sliding_window=facts[0])
    if facts[1]:
        layer.activate_past_recording()
    return layer


def _put_sliding(layer: Any, parts: Parts, facts: LayerFacts) -> None:
    _put_tensors(layer, parts)
    layer.cumulative_length = parts[SEEN].shape[0]


def _take_static(layer: Any) -> tuple[Parts, LayerFacts]:
    if not _has_data(layer):
        return {CAPACITY: as_count(layer.max_cache_len)}, ()
    return {"keys": layer.keys, "values": layer.values, "cumulative_length": layer.cumulative_length}, ()


def _make_static(facts: LayerFacts, parts: Parts) -> Any:
    from transformers.cache_utils import StaticLayer

    return StaticLayer(max_cache_len=_capacity(parts))


def _capacity(parts: Parts) -> int:
    return parts["keys"].shape[2] if "keys" in parts else parts[CAPACITY].shape[0]


def _put_static(layer: Any, parts: Parts, facts: LayerFacts) -> None:
    """A static layer keeps its tensors: compiled programs and CUDA graphs know them by their address."""
    if _has_data(layer) and layer.keys.shape == parts["keys"].shape:
        for name in ("keys", "values", "cumulative_length"):
            _refill(getattr(layer, name), parts[name])
        return
    _put_tensors(layer, parts)
    layer.cumulative_length = parts["cumulative_length"]
    layer.batch_size, layer.num_heads, _, layer.k_head_dim = layer.keys.shape
    layer.v_head_dim = layer.values.shape[-1]
    if not torch.compiler.is_compiling():
        from tpcompile.ir.dynamo_internals import mark_static_address

        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            mark_static_address(tensor)


def _refill(old: Tensor, new: Tensor) -> None:
    if old is not new:
        with torch.no_grad():
            old.copy_(new)


def _take_static_sliding(layer: Any) -> tuple[Parts, LayerFacts]:
    parts, facts = _take_static(layer)
    if _has_data(layer):
        parts[WRITTEN] = as_count(layer.cumulative_length_int, layer.keys)
    return parts, facts


def _make_static_sliding(facts: LayerFacts, parts: Parts) -> Any:
    from transformers.cache_utils import StaticSlidingWindowLayer

    capacity = _capacity(parts)
    return StaticSlidingWindowLayer(max_cache_len=capacity, sliding_window=capacity)


def _put_static_sliding(layer: Any, parts: Parts, facts: LayerFacts) -> None:
    _put_static(layer, parts, facts)
    layer.cumulative_length_int = parts[WRITTEN].shape[0]


_KEYS_AND_VALUES = {
    "DynamicLayer": LayerForm(_take_dynamic, _make_dynamic, _put_dynamic),
    "DynamicSlidingWindowLayer": LayerForm(_take_sliding, _make_sliding, _put_sliding),
    "StaticLayer": LayerForm(_take_static, _make_static, _put_static),
    "StaticSlidingWindowLayer": LayerForm(_take_static_sliding, _make_static_sliding, _put_static_sliding),
}
LAYER_FORMS: dict[str, LayerForm] = {
    **_KEYS_AND_VALUES,
    **state_forms(_KEYS_AND_VALUES),
    "PagedLayer": PAGED_FORM,
}
"""Class name of a layer -> how it is taken apart. A class that is not here is refused."""
