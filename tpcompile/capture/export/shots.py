"""Functions that tell whether python values are still what they were."""

from __future__ import annotations

import ctypes
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import CannotCapture

from .look_inside import PLAIN, VIEWS, Attributes, beside_items, content, same
from .opaque_values import is_opaque, snapshot

MISSING: Any = object()
DEEPEST, _SMALL = 20, 64
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)

Shot = Callable[[Any], bool]
"""Whether a value is still what it was."""


def shot(value: Any, baked: frozenset[int] | None = None, name: str = "what forward reads") -> Shot:
    """A function that tells whether a value is the same, by content where it is a container or an object.

    What is at several places in it has to stay one object.

    Args:
        value: the value.
        baked: the storages of tensors whose values matter (``storage``), of others only the form does;
            None: all matter.
        name: what to call the value.

    Raises:
        CannotCapture: there are objects deeper in it than ``DEEPEST``.
    """
    return _Shots(baked, name).take(value, 0)


class _Shots:
    """Those of a value and of all that is in it, each object once."""

    def __init__(self, baked: frozenset[int] | None, name: str) -> None:
        self._baked, self._name = baked, name
        self._taken: dict[int, Any] = {}  # kept alive, so that no other object gets its id
        self._shared: set[int] = set()

    def take(self, value: Any, depth: int) -> Shot:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if is_opaque(value):
            taken = snapshot(value)
            return lambda now: type(now) is type(value) and snapshot(now) == taken
        if (inside := content(value)) is None:
            return lambda now: same(now, value)
        if isinstance(value, weakref.ReferenceType):
            return self._reference(value, value(), depth)
        if depth > DEEPEST:
            raise CannotCapture(
                f"{self._name} holds values that are more than {DEEPEST} deep in others: what is there is "
                "not compared from call to call",
                where=self._name,
                todo="keep what forward reads in an attribute of its own",
            )
        key, shared = id(value), self._shared  # two objects that live at once have two ids
        if key in self._taken:
            shared.add(key)
            return lambda now: id(now) == key
        self._taken[key] = value
        unchanged = self._inside(value, inside, depth)
        if (own := beside_items(value)) is not None:
            items, beside = unchanged, self._table(own, False, beside_items, depth)
            unchanged = lambda now: items(now) and beside(now)  # noqa: E731
        return lambda now: unchanged(now) and (id(now) == key or key not in shared)

    def _reference(self, reference: weakref.ref[Any], there: Any, depth: int) -> Shot:
        """Of a weak reference; nothing in it keeps alive what it refers to."""
        gone = there is None
        unchanged = None if content(there) is None else self.take(there, depth + 1)
        return lambda now: (
            now is reference and (now() is None) == gone and (unchanged is None or unchanged(now()))
        )

    def _tensor(self, value: Tensor) -> Shot:
        if self._baked is not None and storage(value) not in self._baked:
            return form_shot(value)
        version, held = tensor_version(value), _bytes(value) if is_small(value) else None
        return lambda now: (
            now is value and tensor_version(now) == version and (held is None or _bytes(now) == held)
        )

    def _inside(self, value: Any, inside: Any, depth: int) -> Shot:
        kind = type(value)
        if isinstance(value, types.MethodType):
            function, owner = value.__func__, self.take(value.__self__, depth + 1)
            return lambda now: type(now) is kind and now.__func__ is function and owner(now.__self__)
        if isinstance(inside, dict | Attributes):
            table = self._table(inside, isinstance(value, (dict, *VIEWS)), content, depth)
            return lambda now: type(now) is kind and table(now)
        if isinstance(inside, set):
            items = frozenset(inside)
            return lambda now: type(now) is kind and content(now) == items
        shots = [self.take(v, depth + 1) for v in inside]

        def unchanged(now: Any) -> bool:
            if type(now) is not kind or (items := content(now)) is None:
                return False
            return len(items) == len(shots) and all(map(_call, shots, items))

        return unchanged

    def _table(self, inside: Any, ordered: bool, find: Callable[[Any], Any], depth: int) -> Shot:
        plain = {k: v for k, v in inside.items() if isinstance(v, PLAIN)}
        deep = [(k, self.take(v, depth + 1)) for k, v in inside.items() if not isinstance(v, PLAIN)]
        order = tuple(inside) if ordered else ()  # forward may go through a dict
        return lambda now: _same_dict(find(now), plain, deep) and (not order or tuple(find(now)) == order)


def form_shot(tensor: Tensor) -> Shot:
    """For a tensor whose value a program does not have in it: whether another has the same form."""

    def form(t: Tensor) -> tuple[Any, ...]:
        return type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad

    expected = form(tensor)
    return lambda now: isinstance(now, Tensor) and form(now) == expected


def storage(tensor: Tensor) -> int:
    """What tells a tensor's memory from that of others, as long as it lives."""
    return tensor.untyped_storage()._cdata


def _same_dict(
    live: dict[Any, Any] | Attributes, plain: dict[Any, Any], deep: list[tuple[Any, Shot]]
) -> bool:
    now = items_now(live)
    if len(now) != len(plain) + len(deep):
        return False
    found = [dict.get(now, key, MISSING) for key in plain]
    if not all(map(operator.is_, found, plain.values())) and not all(map(same, found, plain.values())):
        return False
    return all(shot(dict.get(now, key, MISSING)) for key, shot in deep)


def items_now(live: Any) -> Any:
    """A container as it is now: the one that it is, or a copy of an object's attributes."""
    return dict(live) if isinstance(live, Attributes) else live


def _call(shot: Shot, now: Any) -> bool:
    return shot(now)


def tensor_version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or is given other memory (``tensor.data = ...``)."""
    plain = type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr() if plain else 0


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor is compared by its value, too: ``data`` and numpy write into it without a trace."""
    plain = type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and 0 < tensor.numel() <= _SMALL and tensor.is_contiguous()


def _bytes(tensor: Tensor) -> bytes:
    """What is in a small tensor's memory, read past whatever looks at operations."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
