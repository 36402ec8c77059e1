"""The form in which a kind of cache layer is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

Parts = dict[str, Any]
"""Tensors by role, and python flags that select the program."""
Facts = tuple[Hashable, ...]


@dataclass(frozen=True)
class LayerForm:
    """How layers of one class are taken apart.

    Attributes:
        take: gives a layer's tensors by role (none of them if it holds no data yet), and its facts.
        make: makes an empty layer of its facts and, for a layer without data, its tensors.
        put: gives a layer the state that ``take`` took from another one with the same facts.
    """

    take: Callable[[Any], tuple[Parts, Facts]]
    make: Callable[[Facts, Parts], Any]
    put: Callable[[Any, Parts, Facts], None]
