"""What a program is given: a call, and the whole weights or a simulated rank's parts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.held_caches import Held
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import every_name
from tpcompile.lowering.state import SOURCE
from tpcompile.planner.global_program import GlobalProgram, Source
from tpcompile.planner.plan_layout import layout_of


def undivided(program: GlobalProgram, model: nn.Module) -> WeightLayout:
    """The layout of the same program on one rank: segments are held apart, and nothing is divided."""
    alone = replace(program, decisions=[], decided=program.decided or program.factors())
    return layout_of(alone, dict(every_name(model)))


@dataclass
class Inputs:
    """What one rank's program is given.

    Attributes:
        model: with whole weights.
        captured: the program as it was captured.
        leaves: the call, flat.
        layout: how the weights are stored.
        rank: the rank.
        learning: gradients are asked for, of parameters and of
        learned: these leaves of the call; None stands for all.
        caches: the leaves of which a rank is given its part, by name.
        given: what was given, by kind and name; later calls for it get the same tensor.
    """

    model: nn.Module
    captured: Captured
    leaves: Sequence[Any]
    layout: WeightLayout
    rank: int = 0
    learning: bool = False
    learned: frozenset[str] | None = None
    caches: Mapping[str, Held] = field(default_factory=dict)
    given: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = dict(every_name(self.model))
        specs = zip(self.captured.user_inputs, self.leaves, strict=True)
        self.call = {spec.name: leaf for spec, leaf in specs}

    def of(self, graph: Graph) -> list[Any]:
        """The values of a lowered graph's placeholders, in their order."""
        return [self.value(node.meta[SOURCE]) for node in graph.find_nodes(op="placeholder")]

    def value(self, source: Source) -> Any:
        """The value of one placeholder: perhaps some segments of a parameter."""
        kind, name = source.spec.kind, source.spec.name
        if (kind, name) not in self.given:
            value = self._value(kind, name)
            if self._learns(kind, name, value):
                value = value.detach().clone().requires_grad_()
            self.given[kind, name] = value
        value = self.given[kind, name]
        if source.order < 0:
            return value
        return value.narrow(*self.layout.span(name, self.rank, source.order, source.count))

    def _value(self, kind: str, name: str) -> Any:
        if kind == "constant":
            return self.captured.constants[name]
        if kind == "attribute":
            path, _, attribute = name.rpartition(".")
            return getattr(self.model.get_submodule(path), attribute)
        if kind != "user":
            return self.layout.shard(name, self.tensors[name].detach(), self.rank)
        value = self.call[name]
        if name in self.caches:
            held = self.caches[name]
            return held.part(value, self.layout.axis_sizes, self.layout.coordinates(self.rank))
        # A copy: programs write into the caches that they are given, and every rank has its own.
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    def _learns(self, kind: str, name: str, value: Any) -> bool:
        if not self.learning or not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        return kind == "param" or (kind == "user" and (self.learned is None or name in self.learned))

    def gradients(self) -> dict[tuple[str, str], Tensor]:
        """The gradients that came back, by kind and name."""
        found = {key: getattr(value, "grad", None) for key, value in self.given.items()}
        return {key: grad for key, grad in found.items() if grad is not None}
