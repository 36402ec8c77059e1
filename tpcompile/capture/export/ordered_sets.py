"""Sets of texts that are gone through in one order, on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class _Kind(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, set)


class OrderedSet(set[Any], metaclass=_Kind):
    """What ``set(...)`` makes in a model's functions while they are traced.

    Python goes through a set of texts in another order in every process: a model that does so
    (``for layer_type in set(config.layer_types)``) would be another graph on every rank.
    """

    def __iter__(self) -> Iterator[Any]:
        items = list(super().__iter__())
        return iter(sorted(items)) if all(isinstance(item, str) for item in items) else iter(items)
