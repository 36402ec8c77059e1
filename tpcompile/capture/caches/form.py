"""The form in which a kind of cache layer is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from tpcompile.ir.torch_internals import pytree

Parts = dict[str, Any]
"""Tensors by role, and python flags that select the program."""
LayerFacts = tuple[Hashable, ...]


@dataclass(frozen=True)
class LayerForm:
    """How layers of one class are taken apart.

    Attributes:
        take: gives a layer's tensors by role (none of them if it holds no data yet), and its facts.
        make: makes an empty layer of its facts and, for a layer without data, its tensors.
        put: gives a layer the state that ``take`` took from another one with the same facts.
    """

    take: Callable[[Any], tuple[Parts, LayerFacts]]
    make: Callable[[LayerFacts, Parts], Any]
    put: Callable[[Any, Parts, LayerFacts], None]


def register_pytree(kind: Any, flatten: Any, unflatten: Any, flatten_with_keys: Any) -> None:
    """Registers a class with pytree, instead of what it may be registered with already."""
    known = pytree.SUPPORTED_NODES.get(kind)
    if known is not None and known.flatten_fn is flatten:
        return
    if known is not None:
        pytree._deregister_pytree_node(kind)
    name = f"{kind.__module__}.{kind.__name__}"
    pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys
    )
