"""Values that change in place, and show it in no attribute: arrays, random generators, iterators."""

from __future__ import annotations

import io
import pickle
import random
from array import array
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from torch import nn

from tpcompile.errors import CannotCapture

_OPAQUE = (
    *(bytearray, array, np.ndarray),
    *(random.Random, np.random.Generator, np.random.RandomState),
)


def is_opaque(value: Any) -> bool:
    """Whether a value is one of these, and can be compared with what it was (``SystemRandom`` can't)."""
    return isinstance(value, _OPAQUE) and not isinstance(value, random.SystemRandom)


def snapshot(value: Any) -> bytes:
    """All that is in an opaque value."""
    return pickle.dumps(value)


def put_back(value: Any, taken: bytes) -> None:
    """Gives an opaque value the state of a snapshot of it."""
    if snapshot(value) == taken:
        return
    before = pickle.loads(taken)
    if isinstance(value, random.Random):
        value.setstate(before.getstate())
    elif isinstance(value, np.random.RandomState):
        value.set_state(before.get_state())
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = before.bit_generator.state
    else:
        value[... if isinstance(value, np.ndarray) else slice(None)] = before


def refuse_changed(name: str, value: Any, taken: bytes) -> None:
    """Refuses a forward that changes an opaque value.

    Raises:
        CannotCapture: it has.
    """
    if snapshot(value) != taken:
        raise CannotCapture(
            f"the model's forward changes {name}, a {type(value).__name__}, in place",
            where=name,
            todo="keep what forward changes in tensors, lists and numbers; draw random ones with torch",
        )


def is_iterator(value: Any) -> bool:
    """Whether a value is used up as it is read, and does not show how far it is."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase | nn.Module)


def refuse_iterator(name: str) -> NoReturn:
    """Refuses an iterator that forward reads.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture(
        f"the model's forward reads {name}, an iterator, which does not show where it is",
        where=name,
        todo="use a number or a list that is an attribute of a module",
    )
