"""A plan: what was decided, in a form that can be read, explained, saved and used again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import arguments, module_path, operands, tensor_of
from tpcompile.ir.placements import Filled
from tpcompile.ir.sizes import bytes_of
from tpcompile.planner.search.cost import CostModel
from tpcompile.work import Work

from .decide import Pins
from .decisions import decisions_to_data
from .explain import explain_module

VERSION = 1


@dataclass(frozen=True)
class Collective:
    """One kind of collective at one place of the model (numbered blocks counted together).

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ...
        where: the module, ``*`` for block numbers.
        count: how many a forward issues.
        bytes: what one of them moves, for the example's sizes (the whole value).
    """

    kind: str
    where: str
    count: int
    bytes: int


@dataclass
class Plan:
    """The placements of a model on a mesh axis, and of one program on it.

    Attributes:
        layout: where every parameter and buffer lies.
        decisions: per sub-axis, the strategies of the program's calls.
        graph: the fingerprint of the captured graph that the decisions are about.
        collectives: what one forward communicates.
        fallbacks: a line per operator that is computed whole although it uses divided parameters.
        notes: what else the user should know.
        cost: the cost model.
        seconds: the modelled time of one forward of the example.
        model_bytes: bytes of all parameters and buffers.
        sequence: whether the sequence was to be divided between the blocks, or at which modules.
        timings: seconds that the stages took where the plan was made.
        work: the planned program, and
        pins: what its parameters were held to, for explanations; None for a plan from disk.
    """

    layout: WeightLayout
    decisions: list[dict[str, Any]]
    graph: str
    collectives: tuple[Collective, ...]
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    cost: CostModel
    seconds: float
    model_bytes: int
    sequence: bool | frozenset[str] = False
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    work: Work | None = field(default=None, repr=False, compare=False)
    pins: Pins | None = field(default=None, repr=False, compare=False)

    @property
    def ranks(self) -> int:
        """How many ranks share the model."""
        return self.layout.ranks

    @property
    def axes(self) -> tuple[int, ...]:
        """The sub-axes of the mesh axis, major first."""
        return self.layout.axes

    def explain(self, name: str) -> str:
        """Why a module's parameters lie as they do: alternatives with their cost, and refusals.

        Args:
            name: a module or a parameter, by its qualified name.

        Raises:
            TpCompileError: there is no such module, or the plan was loaded from disk.
        """
        if self.work is None or self.pins is None:
            raise TpCompileError(
                "a plan from disk has no alternatives to compare",
                where=name,
                todo="make the plan again with tpcompile.plan",
            )
        return explain_module(self.work, self.cost, self.pins, name)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; the file appears whole or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps(self.to_json(), indent=1))
        part.replace(target)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a saved plan.

        Raises:
            TpCompileError: the file is no plan, or of another version.
        """
        try:
            data = json.loads(Path(path).read_text())
            version = data["version"]
            if version != VERSION:
                raise TpCompileError(
                    f"plan of version {version}, this is version {VERSION}",
                    where=str(path),
                    todo="plan again",
                )
            return Plan.from_json(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TpCompileError(
                f"not a plan: {error!r}", where=str(path), todo="save one with plan.save"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": VERSION,
            "layout": self.layout.to_json(),
            "decisions": self.decisions,
            "graph": self.graph,
            "collectives": [asdict(c) for c in self.collectives],
            "fallbacks": list(self.fallbacks),
            "notes": list(self.notes),
            "cost": asdict(self.cost),
            "seconds": self.seconds,
            "model_bytes": self.model_bytes,
            "sequence": self.sequence if isinstance(self.sequence, bool) else sorted(self.sequence),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """What ``to_json`` gave."""
        sequence = data.get("sequence", False)
        return Plan(
            WeightLayout.from_json(data["layout"]),
            list(data["decisions"]),
            data["graph"],
            tuple(Collective(**c) for c in data["collectives"]),
            tuple(data["fallbacks"]),
            tuple(data["notes"]),
            CostModel(**data["cost"]),
            data["seconds"],
            data["model_bytes"],
            sequence if isinstance(sequence, bool) else frozenset(sequence),
        )

    def __str__(self) -> str:
        from .print_plan import plan_text

        return plan_text(self)


def sequence_text(sequence: bool | frozenset[str]) -> str:
    """Where the sequence is to be divided, for comparison."""
    return str(sequence) if isinstance(sequence, bool) else ", ".join(sorted(sequence))


def make_plan(
    work: Work,
    rewritten: Work,
    layout: WeightLayout,
    cost: CostModel,
    graph: str,
    pins: Pins,
    sequence: bool | frozenset[str] = False,
) -> Plan:
    """The plan of a program, from it as it was planned and as it was rewritten."""
    return Plan(
        layout=layout,
        decisions=decisions_to_data(work),
        graph=graph,
        collectives=collectives_of(rewritten),
        fallbacks=fallbacks_of(work),
        notes=tuple(rewritten.captured.notes),
        cost=cost,
        seconds=sum(d.cost for d in work.decisions) + _sequence_seconds(rewritten, cost),
        model_bytes=sum(_bytes(p) for p in layout.params.values()),
        sequence=sequence,
        work=work,
        pins=pins,
    )


def _bytes(layout: ParamLayout) -> int:
    return math.prod(layout.shape) * layout.dtype.itemsize


def collectives_of(work: Work) -> tuple[Collective, ...]:
    """What a rewritten program communicates in one forward, counted per place."""
    found: dict[tuple[str, str, int], int] = {}
    for node in work.graph.nodes:
        if node.op == "call_function" and node.target in markers.COMMUNICATING:
            key = (node.target.__name__, starred(module_path(node)), _moved(node))
            found[key] = found.get(key, 0) + work.times(node)
    return tuple(Collective(kind, where, count, size) for (kind, where, size), count in found.items())


def _sequence_seconds(work: Work, cost: CostModel) -> float:
    """What the collectives along a divided sequence take more than those that were planned."""
    total = 0.0
    for node in work.graph.nodes:
        if node.op == "call_function" and any(isinstance(a, Filled) for a in node.args):
            size, axes = _moved(node), [work.axes[a] for a in arguments(node)[1]]
            ranks = math.prod(axes)
            match node.target:
                case markers.reduce_scatter:  # after an all-reduce, which is planned axis by axis
                    more = cost.all_gather(size, ranks) - sum(cost.all_reduce(size, a) for a in axes)
                case markers.all_to_all:
                    more = cost.all_to_all(size, ranks) - cost.all_gather(size, ranks)
                case markers.all_gather:
                    more = cost.all_gather(size, ranks)
                case _:
                    more = 0.0
            total += more * work.times(node)
    return total


def _moved(node: Node) -> int:
    moved = arguments(node)[0]
    return int(sum(bytes_of(tensor_of(v)) for v in (moved if isinstance(moved, list | tuple) else [moved])))


def fallbacks_of(work: Work) -> tuple[str, ...]:
    """Operators without a rule among the values that descend from parameters, one line each."""
    assert work.planned_factors is not None
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for node, rule in work.planned_factors.rules.items():
        if isinstance(rule, str) and work.decisions and node in work.decisions[0].nodes:
            gathered = sum(bytes_of(tensor_of(o)) for o in operands(node))
            count, size = found.get((str(node.target), rule), (0, 0))
            found[str(node.target), rule] = (count + work.times(node), size + gathered * work.times(node))
    return tuple(
        f"{op}: replicated {count} times, {size:.0f} bytes of operands whole on every rank ({why})"
        for (op, why), (count, size) in found.items()
    )
