"""How cache layers with recurrent state (state spaces, linear attention, short convolutions) are taken apart.

The state is one tensor per kind and number, of a size that does not grow. Models write into it in place, so
that a traced call gets copies: the copies' last values are results, and the caller's tensors stay inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .form import LayerFacts, LayerForm, Parts

_STATE = "_state"
_TABLES = ("conv", "recurrent")


def is_state(name: str) -> bool:
    """Whether a leaf of this name is recurrent state, whose sizes are the model's apart from the batch."""
    return name.endswith(tuple(f"{kind}{_STATE}{i}']" for kind in _TABLES for i in range(10)))


def state_form(attention: LayerForm | None = None, kind: str = "LinearAttentionLayer") -> LayerForm:
    """The form of a layer with recurrent state, and perhaps keys and values as well.

    Args:
        attention: how its keys and values are taken apart.
        kind: the name of its class.
    """

    def take(layer: Any) -> tuple[Parts, LayerFacts]:
        parts: Parts = {f"{k}{_STATE}{i}": t for k, i, t in _states(layer)}
        if parts:
            # A leaf and no fact: it decides between two programs, and must be seen under torch.compile too.
            parts |= {f"used{i}": flag for i, flag in layer.has_previous_state.items()}
        kernels = tuple(layer.conv_kernel_size.items())
        facts: LayerFacts = (layer.number_of_states, kernels, layer.record_past)
        if attention is None:
            return parts, facts
        more, others = attention.take(layer)
        return parts | more, (*facts, others)

    def make(facts: LayerFacts, parts: Parts) -> Any:
        from transformers import cache_utils

        window = {"sliding_window": facts[3][0]} if "SlidingWindow" in kind else {}  # type: ignore[index]
        layer = getattr(cache_utils, kind)(number_of_states=facts[0], **window)
        if facts[2]:
            layer.activate_past_recording()
        return layer

    def put(layer: Any, parts: Parts, facts: LayerFacts) -> None:
        _put_states(layer, parts, facts)
        if attention is not None and "keys" in parts:
            attention.put(layer, parts, facts[3])  # type: ignore[arg-type]

    return LayerForm(take, make, put)


def _states(layer: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    for i in range(layer.number_of_states):
        if layer.is_conv_states_initialized[i]:
            yield "conv", i, layer.conv_states[i]
        if layer.is_recurrent_states_initialized[i]:
            yield "recurrent", i, layer.recurrent_states[i]


def _put_states(layer: Any, parts: Parts, facts: LayerFacts) -> None:
    layer.conv_kernel_size = dict(facts[1])  # type: ignore[call-overload]
    for kind in _TABLES:
        for i in range(layer.number_of_states):
            state = parts.get(f"{kind}{_STATE}{i}")
            if state is not None:
                own = state.clone() if torch.compiler.is_exporting() else state
                getattr(layer, f"{kind}_states")[i] = own
                getattr(layer, f"is_{kind}_states_initialized")[i] = True
                layer.dtype, layer.device = own.dtype, own.device
    for i in range(layer.number_of_states):
        if f"used{i}" in parts:
            layer.has_previous_state[i] = parts[f"used{i}"]


def state_forms(attention: Mapping[str, LayerForm]) -> dict[str, LayerForm]:
    """The forms of all layers with recurrent state, given those of layers with keys and values."""
    found = {"LinearAttentionLayer": state_form(), "DummyLayer": _NOTHING}
    for kind, inner in _HYBRIDS.items():
        found[kind] = state_form(attention[inner], kind)
    return found


_HYBRIDS = {
    "LinearAttentionAndFullAttentionLayer": "DynamicLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "DynamicSlidingWindowLayer",
}


def _make_nothing(facts: LayerFacts, parts: Parts) -> Any:
    from transformers.cache_utils import DummyLayer

    return DummyLayer()


_NOTHING = LayerForm(lambda layer: ({}, ()), _make_nothing, lambda layer, parts, facts: None)
"""A layer that stands for one without a cache."""
