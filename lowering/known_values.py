"""What calls give on fake tensors, computed once for all ranks that are lowered in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from tpcompile.ir.graph_edit import value_of
from tpcompile.ir.torch_internals import FakeTensorMode

Key = tuple[object, ...]


class KnownValues:
    """The values of calls on one rank, for the next rank that makes the same calls with the same values.

    Most ranks hold parts of equal sizes, and to compute what follows of them is most of what lowering does.
    A value is known by its identity, and the second of two equal calls of a rank has one of its own: so
    values of one rank share their memory where they did when they were computed, and nowhere else.

    Attributes:
        parts: the local sizes of dynamic dimensions that are divided, by whole size and ranks.
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[Any, int], SymInt] = {}
        self._known: dict[Key, tuple[Any, Any]] = {}
        self._made = Counter[Key]()

    def next_rank(self) -> None:
        """Begins with another rank."""
        self._made.clear()

    def value_of(self, target: Callable[..., Any], args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
        """As ``graph_edit.value_of``."""
        call = (target, _read(args), _read(kwargs))
        number = self._made[call]
        self._made[call] += 1
        key = (*call, number)
        if key not in self._known:
            # With the arguments, which must not make room for others at the same address.
            self._known[key] = value_of(target, args, kwargs, mode), (args, kwargs)
        return self._known[key][0]


def _read(arg: Any) -> object:
    """An argument as something that can be looked up; a number with its type, of which 1 and 1.0 differ."""
    if isinstance(arg, Node):
        arg = arg.meta["val"]
    if isinstance(arg, list | tuple):
        return tuple(map(_read, arg))
    if isinstance(arg, dict):
        return tuple((name, _read(value)) for name, value in arg.items())
    if isinstance(arg, slice):
        return slice, _read((arg.start, arg.stop, arg.step))
    return id(arg) if isinstance(arg, Tensor | SymInt | SymFloat | SymBool) else (type(arg), arg)
