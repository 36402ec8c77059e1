"""A model as a tree of its modules, in which modules that are alike are one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from tpcompile.ir.layout.weight_layout import ParamLayout
from tpcompile.ir.units import ranks_text


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, and all that are like it in modules that are alike.

    Attributes:
        label: its name in the module above it.
        path: its name, with ``*`` or ``0-2`` for the numbers of modules that are alike.
        name: the name of the first one.
        count: how many there are.
        layout: how one is held.
    """

    label: str
    path: str
    name: str
    count: int
    layout: ParamLayout


@dataclass(frozen=True)
class Module:
    """A module, and all that are like it.

    Attributes:
        label: its name in the module above it.
        path: its name, as for ``Weight``.
        count: how many there are.
        inside: its weights and the modules below it, in the model's order.
    """

    label: str
    path: str
    count: int
    inside: tuple[Weight | Module, ...] = ()

    def every_weight(self) -> Iterator[Weight]:
        """Its weights, and those of the modules below."""
        for each in self.inside:
            if isinstance(each, Weight):
                yield each
            else:
                yield from each.every_weight()


@dataclass
class _Node:
    """A module as the names of weights have it."""

    weights: dict[str, ParamLayout] = field(default_factory=dict)
    below: dict[str, _Node] = field(default_factory=dict)

    def likeness(self) -> Hashable:
        """What is equal for modules that are alike."""
        own = tuple((name, replace(param, name="")) for name, param in self.weights.items())
        return own, tuple((name, node.likeness()) for name, node in self.below.items())


def tree_of(params: Mapping[str, ParamLayout]) -> Module:
    """The tree of all parameters."""
    root = _Node()
    for name, param in params.items():
        *path, own = name.split(".")
        node = root
        for part in path:
            node = node.below.setdefault(part, _Node())
        node.weights[own] = param
    return _module(root, "", "", 1)


def _module(node: _Node, label: str, path: str, count: int) -> Module:
    inside: list[Weight | Module] = []
    for own, param in node.weights.items():
        inside.append(Weight(own, _below(path, own), param.name, count, param))
    for name, first, times in _groups(node.below):
        made = _module(first, name, _below(path, name), count * times)
        if first.below:
            inside.append(made)
        else:  # a layer such as nn.Linear: its weights are shown without a line for it
            inside += [replace(weight, label=f"{name}.{weight.label}") for weight in made.inside]
    if len(inside) == 1 and isinstance(only := inside[0], Module) and label:
        return replace(only, label=f"{label}.{only.label}")
    return Module(label, path, count, tuple(inside))


def _groups(below: Mapping[str, _Node]) -> Iterator[tuple[str, _Node, int]]:
    """Modules by name; numbered ones that are alike are one."""
    alike: dict[Hashable, list[str]] = {}
    for name, node in below.items():
        alike.setdefault(node.likeness() if name.isdecimal() else name, []).append(name)
    numbered = sum(name.isdecimal() for name in below)
    for names in alike.values():
        all_of_them = len(names) == numbered > 1
        label = "*" if all_of_them else ranks_text(tuple(map(int, names))) if len(names) > 1 else names[0]
        yield label, below[names[0]], len(names)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
