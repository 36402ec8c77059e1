"""What a model's python keeps from call to call: attributes of modules, containers and objects in them."""

from __future__ import annotations

import ctypes
import operator
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .look_inside import PLAIN, Attributes, content, same
from .opaque_values import is_iterator, is_opaque, put_back, refuse_changed, refuse_iterator, snapshot

MISSING: Any = object()
BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""What every module has and torch looks after; train and eval mode are the user's."""

Step = tuple[str, Any]
"""From a value into it: ``("attribute", name)`` or ``("item", key)``."""

DEEPEST, _LARGEST, _SMALL = 5, 10_000, 64
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)

Shot = Callable[[Any], bool]
"""Whether a value is still what it was."""


def is_ours(name: str) -> bool:
    """Whether an attribute of a module is torch's or ours, not its own."""
    return name in BOOKKEEPING or name.startswith("_tp") or name == "_compiled_call_impl"


def shot(value: Any, baked: frozenset[int] | None = None, depth: int = 0) -> Shot:
    """A function that tells whether a value is the same, by content where it is a container or an object.

    Args:
        value: the value.
        baked: the storages of tensors whose values matter (``storage``), of others only the form does;
            None: all matter.
        depth: how deep it is in others.
    """
    inside = content(value)
    if isinstance(value, Tensor):
        if baked is not None and storage(value) not in baked:
            return form_shot(value)
        version, held = tensor_version(value), _bytes(value) if is_small(value) else None
        return lambda now: (
            now is value and tensor_version(now) == version and (held is None or _bytes(now) == held)
        )
    if is_opaque(value):
        taken = snapshot(value)
        return lambda now: type(now) is type(value) and snapshot(now) == taken
    if inside is None or depth > DEEPEST:
        return lambda now: same(now, value)
    kind = type(value)
    if isinstance(value, types.MethodType):
        function, owner = value.__func__, shot(value.__self__, baked, depth + 1)
        return lambda now: type(now) is kind and now.__func__ is function and owner(now.__self__)
    if isinstance(inside, dict | Attributes):
        plain = {k: v for k, v in inside.items() if isinstance(v, PLAIN)}
        deep = [(k, shot(v, baked, depth + 1)) for k, v in inside.items() if not isinstance(v, PLAIN)]
        order = tuple(inside) if inside is value else ()  # forward may go through a dict
        return lambda now: (
            type(now) is kind and _same_dict(content(now), plain, deep) and (not order or tuple(now) == order)
        )
    if isinstance(inside, set):
        items = frozenset(inside)
        return lambda now: type(now) is kind and now == items
    shots = [shot(v, baked, depth + 1) for v in inside]

    def unchanged(now: Any) -> bool:
        if type(now) is not kind:
            return False
        items = content(now)
        return len(items) == len(shots) and all(map(_call, shots, items))

    return unchanged


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
    now = _now(live)
    if len(now) != len(plain) + len(deep):
        return False
    found = [dict.get(now, key, MISSING) for key in plain]
    if not all(map(operator.is_, found, plain.values())) and not all(map(same, found, plain.values())):
        return False
    return all(shot(dict.get(now, key, MISSING)) for key, shot in deep)


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


@dataclass(frozen=True)
class StateChange:
    """A value that forward has changed.

    Attributes:
        path: the module's path.
        steps: from the module to the container that has changed.
        key: of the value in it; of a list, how many of its items are as they were.
        value: the new value; of a list, all behind these; ``MISSING`` if it is gone.
        old: the value before, of a dict's or an object's.
    """

    path: str
    steps: tuple[Step, ...]
    key: Any
    value: Any
    old: Any = MISSING

    def __str__(self) -> str:
        names = [str(key) if kind == "attribute" else f"[{key!r}]" for kind, key in self.steps]
        last = [] if self.steps and not isinstance(self.key, str) else [str(self.key)]
        return ".".join(filter(None, [self.path, *names, *last])).replace(".[", "[")


@dataclass(frozen=True)
class _Table:
    path: str
    steps: tuple[Step, ...]
    live: Any
    before: Any


class PythonState:
    """A model's python state as it is now, to compare with and to return to."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[_Table] = []
        self._known: dict[int, Any] = {}  # kept alive, so that no other object gets its id
        self._seen: set[int] = set()
        self._iterators: dict[tuple[str, str], str] = {}
        self._opaque: list[tuple[str, Any, bytes]] = []
        for path, module in model.named_modules():
            self._add(path, (), module.__dict__)

    def _add(self, path: str, steps: tuple[Step, ...], live: Any, kind: str = "attribute") -> None:
        owner = live.owner if isinstance(live, Attributes) else live
        if id(owner) in self._seen or len(live) > _LARGEST:
            return
        self._seen.add(id(owner))
        self._known[id(owner)] = owner
        now = _now(live)
        items = dict(now) if isinstance(now, dict) else set(now) if isinstance(now, set) else list(now)
        self._tables.append(_Table(path, steps, live, items))
        for key, value in items.items() if isinstance(items, dict) else enumerate(items):
            inside = content(value)
            if is_iterator(value):
                place = steps[0][1] if steps else str(key)
                self._iterators[path, place] = str(StateChange(path, steps, key, value))
            if is_opaque(value):
                self._opaque.append((str(StateChange(path, steps, key, value)), value, snapshot(value)))
            if inside is not value:
                self._known.setdefault(id(value), value)
            if inside is not None and len(steps) < DEEPEST:
                self._add(path, (*steps, (kind, key)), inside, "item" if inside is value else "attribute")

    def knows(self, value: Any) -> bool:
        """Whether a value was somewhere in the state."""
        return self._known.get(id(value)) is value

    def refuse_iterators(self, reads: set[tuple[str, str]]) -> None:
        """Refuses iterators in attributes that forward reads.

        Raises:
            CannotCapture: there is one.
        """
        for place, name in self._iterators.items():
            if place in reads:
                refuse_iterator(name)

    def refuse_opaque(self) -> None:
        """Refuses changes of what does not show them.

        Raises:
            CannotCapture: there is one.
        """
        for name, value, taken in self._opaque:
            refuse_changed(name, value, taken)

    def restore(self) -> None:
        """Puts everything back."""
        for _, value, taken in self._opaque:
            put_back(value, taken)
        for table in self._tables:
            live, before = table.live, table.before
            if isinstance(live, tuple) or _same_items(_now(live), before):
                continue
            if isinstance(live, dict | Attributes) and before.keys() <= live.keys():
                for key in live.keys() - before.keys():
                    del live[key]
                live.update(before)
                continue
            live.clear()
            live.extend(before) if isinstance(live, list | deque) else live.update(before)

    def changes(self) -> Iterator[StateChange]:
        """What has changed since; parameters, buffers, modules and hooks under their tables' names."""
        for table in self._tables:
            live, before = _now(table.live), table.before
            if isinstance(live, tuple) or _same_items(live, before):
                continue
            if isinstance(live, dict):
                for key in [*before, *(key for key in live if key not in before)]:
                    old, new = dict.get(before, key, MISSING), dict.get(live, key, MISSING)
                    if not same(old, new) and (table.steps or not is_ours(key)):
                        yield StateChange(table.path, table.steps, key, new, old)
            elif isinstance(live, list | deque):
                pairs = zip(before, live, strict=False)
                kept = next(
                    (i for i, pair in enumerate(pairs) if not same(*pair)), min(len(before), len(live))
                )
                yield StateChange(table.path, table.steps, kept, list(live)[kept:])
            else:
                yield StateChange(table.path, table.steps, None, frozenset(live))


def _now(live: Any) -> Any:
    """A container as it is now: the one that it is, or a copy of an object's attributes."""
    return dict(live) if isinstance(live, Attributes) else live


def _same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, dict):
        return all(same(dict.get(one, key, MISSING), value) for key, value in other.items())
    return all(map(same, one, other))


def table_at(model: nn.Module, path: str, steps: tuple[Step, ...]) -> Any:
    """The container at a place of a model."""
    table: Any = model.get_submodule(path).__dict__
    for _, key in steps:
        table = content(table[key])
    return table
