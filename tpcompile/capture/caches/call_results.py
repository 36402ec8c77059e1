"""What a call leaves behind: its result, and the state of the caches that it was given.

A model writes into the caches it is given, and usually returns them as well. Their state after the call is a
result of the program by itself, whether the model returns it or not; in the returned structure the caller's
own object stands, as it does without a compiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpcompile.ir.calls import join_path, leaf_names, leaf_paths
from tpcompile.ir.torch_internals import TreeSpec, tree_flatten

from .form import LayerFacts
from .layers import make_layer, put_layer, take_layer
from .paired import FLAGS, PAIR, is_paired
from .register import is_cache


@dataclass(frozen=True)
class GivenCache:
    """A place in a result where the cache stands that was given as an argument."""

    argument: str


@dataclass(frozen=True)
class CacheState:
    """How the state of a given cache follows from a program's results.

    Attributes:
        argument: the argument that the cache was given as.
        layers: per layer the roles of its tensors, which stand in this order, its class and its facts.
        part: the attribute that this is about, in a pair of caches.
        flags: the keys of the flags, if that attribute holds flags.
    """

    argument: str
    layers: tuple[tuple[tuple[str, ...], tuple[str, LayerFacts]], ...] = ()
    part: str = ""
    flags: tuple[int, ...] = ()

    @cached_property
    def count(self) -> int:
        """How many tensors it takes."""
        return sum(len(roles) for roles, _ in self.layers) + len(self.flags)

    def put(self, cache: Any, tensors: Sequence[Any]) -> None:
        """Gives the caller's cache its new state."""
        if self.part:
            cache = getattr(cache, self.part)
        if self.flags:
            cache.update(zip(self.flags, tensors, strict=True))
        left = iter(tensors)
        for i, (roles, context) in enumerate(self.layers):
            parts = {role: next(left) for role in roles}
            if i < len(cache.layers):
                put_layer(cache.layers[i], parts, context)
            else:
                cache.layers.append(make_layer(parts, context))


@dataclass(frozen=True)
class Results:
    """What a call left behind, flat.

    Attributes:
        names: of every value: the path in the result, or in the arguments for the state of a cache.
        values: the leaves of the result, then the tensors of the caches.
        out_spec: the structure of the result.
        states: how the rest of the values belongs to caches.
    """

    names: list[str]
    values: list[Any]
    out_spec: TreeSpec
    states: tuple[CacheState, ...]


def take_results(call: Mapping[str, Any], result: Any) -> Results:
    """Flattens the result of a call, after it, and the caches that it was given.

    Raises:
        TpCompileError: a cache has layers that nobody has said how to take apart.
    """
    given = given_caches(call)
    by_id = {id(cache): GivenCache(name) for name, cache in given.items()}

    def is_given(node: Any) -> bool:
        return id(node) in by_id

    flat, out_spec = tree_flatten(result, is_leaf=is_given)
    values = [by_id.get(id(value), value) for value in flat]
    states = tuple(state for name, cache in given.items() for state in states_of(name, cache))
    tensors, _ = tree_flatten(given)
    names = [_name(path) for path in leaf_paths(result, is_given)] + leaf_names(given)
    return Results(names, values + tensors, out_spec, states)


def given_caches(call: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among the arguments of a call."""
    return {name: value for name, value in call.items() if is_cache(value)}


def states_of(argument: str, cache: Any) -> list[CacheState]:
    """How a cache is made of its tensors as it is now; a pair of caches is made of both and of its flags."""
    if not is_paired(cache):
        return [_state(argument, cache)]
    halves = [_state(argument, getattr(cache, part), part) for part in PAIR]
    return [*halves, CacheState(argument, part=FLAGS, flags=tuple(getattr(cache, FLAGS)))]


def _state(argument: str, cache: Any, part: str = "") -> CacheState:
    taken = [take_layer(layer) for layer in cache.layers]
    return CacheState(argument, tuple((tuple(parts), context) for parts, context in taken), part)


def _name(path: Sequence[Any]) -> str:
    return join_path(path).lstrip(".")
