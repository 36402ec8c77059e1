"""Values outside of a model's modules, as they are before a trace: changes are put back, and refused."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from tpcompile.errors import CannotCapture

from .named_places import CACHED, outer_places
from .opaque_values import is_iterator, is_opaque, put_back, refuse_iterator, snapshot
from .outer_places import Outer
from .shots import shot

_REFILLED = (list, dict, set, deque)


class KeptPlace:
    """What is at a place now, to be put back there.

    Args:
        place: the place.

    Raises:
        CannotCapture: an iterator is there, which cannot be put back.
    """

    def __init__(self, place: Outer) -> None:
        self.place, self._value = place, place.look()
        if is_iterator(self._value):
            refuse_iterator(place.name)
        self._copied: Any = None
        if is_opaque(self._value):
            self._copied = snapshot(self._value)
        elif type(self._value) in _REFILLED:
            self._copied = type(self._value)(self._value)
        self._unchanged = shot(self._value, name=place.name)

    def put_back(self) -> bool:
        """Puts it back, and says whether it had changed; the attributes of an object stay changed."""
        value, copied = self._value, self._copied
        if self._unchanged(self.place.look()):
            return False
        if self.place.look() is not value:
            self.place.put(value)
        if is_opaque(value):
            put_back(value, copied)
        elif copied is not None:
            value.clear()
            value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
        return True


@contextmanager
def _without_traced_results(places: Iterable[Outer]) -> Iterator[None]:
    """Empties the caches of functions (``functools.lru_cache``) that the block, a trace, has filled."""
    caches = [(value, value.cache_info().misses) for p in places if isinstance(value := p.look(), CACHED)]
    try:
        yield
    finally:
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


@contextmanager
def unchanged_outside(
    model: nn.Module, walked: list[types.FunctionType] | None = None
) -> Iterator[list[Outer]]:
    """Puts back what the block changes outside of the model's modules.

    Args:
        model: the model.
        walked: is given the model's functions.

    Yields:
        The places that its functions name.

    Raises:
        CannotCapture: there is such a change, or an iterator; or random numbers are drawn.
    """
    places, drawn, seeded = outer_places(model, walked), _generators(), torch.get_rng_state()
    before, asked = list(map(KeptPlace, places)), list[int]()
    try:
        with _without_traced_results(places), _noted_entropy(asked):
            yield places
    finally:
        changed = [kept.place.name for kept in before if kept.put_back()]
    if not torch.equal(torch.get_rng_state(), seeded):  # what is traced draws nothing by itself
        torch.set_rng_state(seeded)
        raise CannotCapture(
            "the model's forward seeds torch's random numbers, or draws some of constants",
            where="torch.manual_seed",
            todo="set the seed before the call; or keep what forward draws once in a buffer",
        )
    if asked or (now := _generators()) != drawn:
        name = "the system" if asked else next(name for name in now if now[name] != drawn[name])
        raise CannotCapture(
            f"the model's forward draws random numbers of {name}, which would be the same at every call",
            where=name,
            todo="draw them with torch, or give them to the model as tensors",
        )
    if changed:
        raise CannotCapture(
            f"the model's forward changes {changed[0]}",
            where=changed[0],
            todo="keep what forward changes in attributes of the model, best in buffers",
        )


@contextmanager
def _noted_entropy(asked: list[int]) -> Iterator[None]:
    """Notes how many bytes ``random.SystemRandom`` and ``secrets`` draw, which have no state to compare."""
    source: Any = random
    draw = source._urandom

    def noting(count: int) -> Any:
        asked.append(count)
        return draw(count)

    with patch.object(source, "_urandom", noting):
        yield


def _generators() -> dict[str, Any]:
    """Where the generators of random numbers are that python code uses."""
    _, numbers, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (bytes(numbers), rest)}  # type: ignore[arg-type]
