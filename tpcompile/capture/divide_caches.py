"""The caches in a call: a caller's whole ones are taken apart, a rank's parts are seen as whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompile.capture.caches.call_results import given_caches, states_of
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call, leaf_names
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.torch_internals import tree_unflatten

from .held_caches import Held


def divide_caches(bound: dict[str, Any], held: Mapping[str, Held], layout: WeightLayout, rank: int) -> None:
    """Leaves of caches that the caller brings whole only a rank's parts, in place.

    Args:
        bound: the call.
        held: how the tensors of caches are placed, by name.
        layout: where the weights are.
        rank: this rank, in the layout.

    Raises:
        TpCompileError: a cache is of another size than this model's, or wants a gradient.
    """
    axis_sizes, at = layout.axis_sizes, layout.coordinates(rank)
    for name, cache in given_caches(bound).items():
        own = {name: cache}
        given = flatten_call(own)[0]
        mine = [
            held[leaf_name].part(leaf, axis_sizes, at) if leaf_name in held else leaf
            for leaf_name, leaf in zip(leaf_names(own), given, strict=True)
        ]
        if torch.is_grad_enabled() and any(
            isinstance(one, Tensor) and one.requires_grad and one.shape != part.shape
            for one, part in zip(given, mine, strict=True)
        ):
            raise TpCompileError(
                "a whole cache that wants a gradient would get that of this rank's part",
                where=name,
                todo="give what is trained as inputs_embeds, or make it a part of the model (PEFT's prefix "
                "tuning, before parallelize)",
            )
        left = iter(mine)
        for state in states_of(name, cache):
            state.put(cache, [next(left) for _ in range(state.count)])


def whole_caches(bound: dict[str, Any], held: Mapping[str, Held]) -> dict[str, Any]:
    """The call with tensors of whole, valueless caches instead of a rank's parts.

    Args:
        bound: the call.
        held: how the tensors of caches are placed, by name.

    Raises:
        TpCompileError: a cache has other dimensions than the one that was handed out.
    """
    if not held:
        return bound
    leaves, spec = flatten_call(bound)
    whole = [
        held[name].whole(leaf) if isinstance(leaf, Tensor) and name in held else leaf
        for name, leaf in zip(leaf_names(bound), leaves, strict=True)
    ]
    found: dict[str, Any] = tree_unflatten(whole, spec)
    return found
