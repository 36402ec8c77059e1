"""The caches in a call: a caller's whole ones are taken apart, a rank's parts are seen as whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tpcompile.capture.caches.call_results import given_caches, states_of
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
        TpCompileError: a cache is of another size than this model's.
    """
    axis_sizes, at = layout.axis_sizes, layout.coordinates(rank)
    for name, cache in given_caches(bound).items():
        own = {name: cache}
        mine = [
            held[leaf_name].part(leaf, axis_sizes, at) if leaf_name in held else leaf
            for leaf_name, leaf in zip(leaf_names(own), flatten_call(own)[0], strict=True)
        ]
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
