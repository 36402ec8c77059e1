"""Describes layers by everything but their weights' values, so that equal layers look equal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_DEEPEST = 5
Fingerprint = dict[str, Hashable]


def fingerprints(
    layers: Sequence[nn.Module], owners: Mapping[int, frozenset[str]], path: str
) -> list[Fingerprint]:
    """Return one description per layer of the list at ``path``; layers that may differ differ in it.

    A number that grows evenly with the position (``layer_idx``) counts as equal: most models only look
    caches up with it. Whether a layer computes something else because of it, or because of an object
    that is described by its type alone, is found out by running it (``verify_layers``).

    Args:
        layers: the children of one list.
        owners: every name of every parameter and buffer of the model, by id; see ``weight_owners``.
        path: the name of the list.
    """
    described = [
        _describe(layer, owners, f"{path}.{index}" if path else str(index))
        for index, layer in enumerate(layers)
    ]
    slopes = _even_growth([ints for _, ints in described])
    return [
        facts | {key: ("index", slopes[key]) if key in slopes else ("int", n) for key, n in ints.items()}
        for facts, ints in described
    ]


def fingerprint(layer: nn.Module, owners: Mapping[int, frozenset[str]], path: str) -> Fingerprint:
    """Return the description of one layer by itself: numbers as they are, objects by their identity."""
    facts, ints = _describe(layer, owners, path, exact=True)
    return facts | {key: ("int", n) for key, n in ints.items()}


def weight_owners(model: nn.Module) -> dict[int, frozenset[str]]:
    """Return all names of every parameter and buffer, by its id."""
    names: dict[int, set[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        names.setdefault(id(tensor), set()).add(name)
    return {key: frozenset(found) for key, found in names.items()}


def _even_growth(numbers: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the attributes whose value is ``slope * position + constant`` in all layers that have them."""
    slopes = {}
    for key in {key for layer in numbers for key in layer}:
        points = [(at, layer[key]) for at, layer in enumerate(numbers) if key in layer]
        if len(points) < 3:
            continue
        (x0, y0), (x1, y1) = points[:2]
        slope, rest = divmod(y1 - y0, x1 - x0)
        if slope and not rest and all(y == y0 + slope * (x - x0) for x, y in points):
            slopes[key] = slope
    return slopes


def _describe(
    layer: nn.Module, owners: Mapping[int, frozenset[str]], path: str, exact: bool = False
) -> tuple[Fingerprint, dict[str, int]]:
    facts: Fingerprint = {}
    ints: dict[str, int] = {}
    for name, module in layer.named_modules():
        facts[f"{name}:class"] = _qualified(type(module))
        for key in _HOOKS:
            facts[f"{name}:{key}"] = tuple(_simple(hook, exact) for hook in getattr(module, key).values())
        for key, value in module.__dict__.items():
            if key not in _BOOKKEEPING:
                _add(f"{name}:{key}", value, facts, ints, exact)
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                facts[f"{name}.{key}"] = None if tensor is None else _weight(tensor, owners, path)
    return facts, ints


def _weight(tensor: torch.Tensor, owners: Mapping[int, frozenset[str]], path: str) -> Hashable:
    # A weight that something else uses too is not a layer's own: only layers that share it are equal.
    names = owners.get(id(tensor), frozenset())
    shared = names if any(not name.startswith(path + ".") for name in names) else None
    return (type(tensor).__name__, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, shared)


def _add(key: str, value: Any, facts: Fingerprint, ints: dict[str, int], exact: bool, depth: int = 0) -> None:
    """Adds what is to be said of one attribute; containers are taken apart."""
    if isinstance(value, int) and type(value) is int:
        ints[key] = value
    elif isinstance(value, (dict, list, tuple)) and depth < _DEEPEST:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        facts[key] = (type(value).__name__, len(value))
        for name, item in items:
            _add(f"{key}[{name!r}]", item, facts, ints, exact, depth + 1)
    else:
        facts[key] = _simple(value, exact)


def _simple(value: Any, exact: bool) -> Hashable:
    if value is None or isinstance(value, (bool, float, complex, str, bytes, torch.dtype, torch.device)):
        return (type(value).__name__, repr(value))
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, tuple(sorted(map(repr, value))))
    if exact:
        return id(value)
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    return _qualified(value if hasattr(value, "__qualname__") else type(value))


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
