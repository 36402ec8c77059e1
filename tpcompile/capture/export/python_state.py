"""What a model's python keeps from call to call: attributes of modules, containers and objects in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .look_inside import OURS, Attributes, beside_items, content, same
from .opaque_values import is_iterator, is_opaque, put_back, refuse_changed, refuse_iterator, snapshot
from .shots import DEEPEST, MISSING, items_now

BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""What every module has and torch looks after; train and eval mode are the user's."""

Step = tuple[str, Any]
"""From a value into it: ``("attribute", name)``, ``("item", key)`` or ``("beside", "")``, a list's table."""

_LARGEST = 10_000


def is_ours(name: str) -> bool:
    """Whether an attribute of a module is torch's or ours, not its own."""
    return name in BOOKKEEPING or name.startswith(OURS) or name == "_compiled_call_impl"


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
        names = [f"[{key!r}]" if kind == "item" else str(key) for kind, key in self.steps]
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
        self._seen: set[tuple[int, type]] = set()
        self._iterators: dict[tuple[str, str], str] = {}
        self._opaque: list[tuple[str, Any, bytes]] = []
        for path, module in model.named_modules():
            self._add(path, (), module.__dict__)

    def _add(self, path: str, steps: tuple[Step, ...], live: Any, kind: str = "attribute") -> None:
        owner = live.owner if isinstance(live, Attributes) else live
        if (id(owner), type(live)) in self._seen or len(live) > _LARGEST:
            return
        self._seen.add((id(owner), type(live)))
        self._known[id(owner)] = owner
        items = _copied(live)
        self._tables.append(_Table(path, steps, live, items))
        for key, value in items.items() if isinstance(items, dict) else enumerate(items):
            if not steps and str(key).startswith(OURS):
                continue
            inside = content(value)
            if is_iterator(value):
                place = steps[0][1] if steps else str(key)
                self._iterators[path, place] = str(StateChange(path, steps, key, value))
            if is_opaque(value):
                self._opaque.append((str(StateChange(path, steps, key, value)), value, snapshot(value)))
            if inside is not value:
                self._known.setdefault(id(value), value)
            if inside is not None and len(steps) < DEEPEST:
                into = (*steps, (kind, key))
                self._add(path, into, inside, "item" if inside is value else "attribute")
                if (own := beside_items(value)) is not None:
                    self._add(path, (*into, ("beside", "")), own)

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
            if isinstance(live, tuple) or _same_items(items_now(live), before):
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
            live, before = items_now(table.live), table.before
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


def _copied(live: Any) -> dict[Any, Any] | list[Any] | set[Any]:
    if isinstance(live, dict):
        return dict(dict.items(live))  # past what a class makes of its keys
    now = items_now(live)
    return now if isinstance(now, dict) else set(now) if isinstance(now, set) else list(now)


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
    for kind, key in steps:
        table = beside_items(table) if kind == "beside" else content(table[key])
    return table
