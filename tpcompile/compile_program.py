"""Compiles one call signature of a model: capture, plan, rewrite, lower, with all ranks in agreement."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule

from tpcompile.ir.calls import flatten_call

from .capture.held_caches import Held, mark_caches
from .capture.open_numbers import capture_numbers
from .capture.repeats.capture_repeated import capture_repeated, unroll_captured
from .disk_cache import own_sources
from .errors import TpCompileError
from .ir.layout.weight_layout import WeightLayout
from .ir.module_tensors import whole_tensors
from .ir.print_graph import graph_text
from .ir.units import size_text
from .lowering.cannot_lower import CannotLower
from .lowering.collective_lines import sent_by
from .lowering.lower_graph import lower_program
from .passes.pipeline import Pass
from .pipeline import canonical, plan_program, rewrite, split_copy
from .planner.compare_plans import outcome_of, worse
from .planner.decisions import decisions_from_data, decisions_to_data
from .planner.make_plan import make_plan
from .planner.must_unroll import uneven_layers
from .planner.pins import Wishes, make_pins, unmet
from .planner.plan import Plan, sequence_text
from .planner.plan_layout import extended, layout_of, pins_from_layout
from .planner.search.cost import CostModel
from .planner.store_plan import Decisions, plan_cached
from .ranks.agree import compare, from_first, together
from .ranks.compare_sent import compare_sent
from .ranks.describe import describe_code, describe_value
from .ranks.exchange import exchange
from .ranks.groups import AxisGroups
from .ranks.mesh import local_device
from .ranks.mesh_axis import MeshAxis
from .ranks.own_groups import TIMEOUT
from .rules.randomness import refuse_randomness
from .rules.table import user_rows
from .strategies.custom.custom_modules import CustomModules, partition_modules
from .strategies.read_rules import Rules, Wish
from .work import Alike, Work

MOST_TRIES = 8
"""How often a program is planned whose calls turn out not to run on parts."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without python's search for reference cycles, which takes a tenth of the time of a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        cost: the cost model.
        rules: what the user's plan asks of single parameters.
        dynamic: which dimensions of the inputs may change (see ``capture``).
        memory: bytes of weights that a rank may hold, or None.
        passes: passes that run after ours.
        plan: a plan to follow instead of making one.
        custom: custom strategies by glob of a module.
        compose: whether what cannot be captured runs as python over its parts; None: only if that is the
            model's fault, not perhaps the call's.
        sequence: whether the sequence is divided between the blocks, or at which modules.
    """

    cost: CostModel
    rules: Rules = field(default_factory=Rules)
    dynamic: bool | Mapping[str, Any] = True
    memory: float | None = None
    passes: Sequence[Pass] = ()
    plan: Plan | None = None
    custom: Mapping[str, str] = field(default_factory=dict)
    compose: bool | None = False
    sequence: bool | frozenset[str] = False

    def lines(self) -> list[str]:
        """What all ranks must have asked for, as text; the cost model may differ: rank 0's counts."""
        plan = None if self.plan is None else (self.plan.fingerprint, self.plan.layout.to_json())
        passes = [f"{describe_code(type(each))}: {describe_value(each)}" for each in self.passes]
        own = sorted(user_rows().items())
        rows = [f"{op}: {row if isinstance(row, str) else describe_code(row)}" for op, row in own]
        versions = [own_sources(), torch.__version__]
        asked: dict[str, Any] = {"rules": self.rules.wishes, "custom": dict(self.custom), "plan": plan}
        asked |= {"passes": passes, "dynamic": self.dynamic, "memory": self.memory, "compose": self.compose}
        asked |= {"rows": rows, "versions": versions}
        asked["sequence"] = self.sequence if isinstance(self.sequence, bool) else sorted(self.sequence)
        return [f"{name}: {value!r}" for name, value in asked.items()]


@dataclass
class Compiled:
    """A compiled program.

    Attributes:
        planned: at global shapes, with decisions, before it was rewritten.
        rewritten: at global shapes, with collectives.
        plan: the plan.
        local: this rank's graph (without a mesh: the one at global shapes).
        outlined: the same with repeated layers as calls of a submodule, if there are many.
        differentiable: whether its collectives are such that gradients come out right.
    """

    planned: Work
    rewritten: Work
    plan: Plan
    local: GraphModule
    outlined: GraphModule | None = None
    differentiable: bool = True


class Compiler:
    """Compiles the call signatures of one model.

    Args:
        options: what the user asked for.
        ranks: the size of the mesh axis.
        mesh: the mesh, or None to plan only.
        axis: the name of the mesh axis, for a mesh of several.
        timeout: seconds that ranks wait for each other.

    Attributes:
        whole: parameters that are not to be divided, because python that is not captured has read them.
    """

    def __init__(
        self,
        options: Options,
        ranks: int,
        mesh: DeviceMesh | None = None,
        axis: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.options, self.ranks = options, ranks
        self.axis = MeshAxis.of(mesh, axis, timeout) if mesh is not None else None
        self.rank = self.axis.rank if self.axis is not None else 0
        line = mesh[axis] if mesh is not None and axis is not None else mesh
        self._mesh = line if options.custom else None  # custom strategies are given the mesh itself
        self.sequence = options.sequence or (options.plan.sequence if options.plan is not None else False)
        self.whole: frozenset[str] = frozenset()
        self._groups: dict[tuple[int, ...], AxisGroups] = {}
        self._custom: CustomModules | None = None

    @property
    def _wishes(self) -> Wishes:
        """What is asked of single parameters."""
        read = {name: (Wish(name, "to stay whole", "whole", optional=True),) for name in sorted(self.whole)}
        return {**self.options.rules.wishes, **read}

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of the axis."""
        return None if self.axis is None else self.axis.group

    @_uncollected()
    def compile(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        layout: WeightLayout | None,
        caches: Mapping[str, Held] | None = None,
    ) -> Compiled:
        """Compiles one call signature, on all ranks together.

        Args:
            model: the model with its original class and whole weights (their values do not matter).
            bound: the example call.
            layout: where the weights already lie, or None if this program is to decide it.
            caches: how the tensors of caches lie that earlier programs handed out, by name.

        Raises:
            TpCompileError: on all ranks, if any of them fails or they disagree.
        """
        began = time.perf_counter()
        self._custom_modules(model)  # of all ranks together
        base = together(
            self.group, "capture the model", lambda: self.capture(model, bound, layout, caches or {})
        )
        captured = time.perf_counter()
        fingerprint = compare(self.group, "captured graphs", graph_text(base.graph).splitlines())
        if constants := base.captured.constant_lines():
            todo = (
                "make the tensors that forward reads alike on all ranks (a seed), or register them as buffers"
            )
            compare(self.group, "constants in their programs", constants, todo)
        tensors = whole_tensors(model)
        training = any(p.requires_grad for p in model.parameters()) or _wants_gradient(bound)
        for _ in range(MOST_TRIES):
            compiled = self._attempt(base, layout, fingerprint, tensors, training)
            if isinstance(compiled, Compiled):
                break
            base = replace(base, refused={**base.refused, **compiled})
        else:
            where = ", ".join(f"{op} in {path}" for op, path in base.refused)
            raise TpCompileError("too many calls do not run on parts", where=where, todo="report this")
        self._compare_derived(compiled)
        compiled.plan.timings["capture"] = captured - began
        missed = compiled.rewritten.captured.notes[len(base.captured.notes) :]
        if layout is None and missed and self.rank == 0:
            warnings.warn("\n".join(missed), stacklevel=2)
        if layout is None and self.options.rules.wishes:
            self._remark(base, compiled, tensors)
        return compiled

    def _attempt(
        self,
        base: Work,
        layout: WeightLayout | None,
        fingerprint: str,
        tensors: Mapping[str, Tensor],
        training: bool,
    ) -> Compiled | dict[Alike, str]:
        """A plan, carried out; or the calls that lowering cannot divide as planned, on any rank, and why."""
        began = time.perf_counter()
        data = from_first(self.group, lambda: self._decide(base, layout, fingerprint, tensors))
        compare(self.group, "plans", [repr(data), f"sequence_parallel: {sequence_text(self.sequence)}"])
        seconds = time.perf_counter() - began
        planned = together(self.group, "follow the plan", lambda: _follow(base, data, layout))
        self._make_groups(planned.axes)

        def finish() -> Compiled | CannotLower:
            placed = layout_of(planned, tensors) if layout is None else extended(layout, planned, tensors)
            rewritten = _follow(base, data, layout)
            passes, cost = self.options.passes, self.options.cost
            rewrite(rewritten, training, passes, cost, sequence=self.sequence)
            pins = make_pins(self._wishes) if layout is None else pins_from_layout(layout)
            plan = make_plan(planned, rewritten, placed, cost, fingerprint, pins, self.sequence)
            plan.timings = {"plan": seconds}
            try:
                return Compiled(planned, rewritten, plan, *self._lower(rewritten), differentiable=training)
            except CannotLower as error:
                return error

        found = together(self.group, "lower the model", finish)
        cannot = dict.fromkeys(found.calls, found.what) if isinstance(found, CannotLower) else {}
        everyone = exchange(self.group, "lower the model: refusals", cannot) if self.group else [cannot]
        refused = {call: why for each in everyone for call, why in each.items()}
        return refused if refused or isinstance(found, CannotLower) else found

    def _compare_derived(self, compiled: Compiled) -> None:
        """Compares what every rank has made of the plan by itself, with its rules and passes."""
        layout = [repr(param) for param in compiled.plan.layout.to_json()["params"]]
        text = graph_text(compiled.rewritten.graph).splitlines()
        todo = "register the same rules on every rank, and give the same passes in the same versions"
        compare(self.group, "layouts of the weights", layout, todo)
        compare(self.group, "rewritten graphs", text, todo)
        if self.axis is not None:
            compare_sent(self.group, sent_by(compiled.local.graph))

    def _remark(self, base: Work, compiled: Compiled, tensors: Mapping[str, Tensor]) -> None:
        """Adds to a plan what its user should know of the rules that it follows, and warns of it once."""

        def remarks() -> list[str]:
            rules = self.options.rules
            found = [*rules.notes, *unmet(base, rules.wishes)]
            mine = outcome_of(compiled.plan)
            best = outcome_of(self.without_rules().plan_captured(base, tensors))
            if worse(mine, best):
                found.append(f'the rules of the plan cost: {mine}; plan="auto" has {best}')
            return found

        notes = from_first(self.group, remarks)
        compiled.plan.notes += tuple(notes)
        if notes and self.rank == 0:
            warnings.warn("\n".join(notes), stacklevel=2)

    def plan_captured(self, base: Work, tensors: Mapping[str, Tensor], *, coalesce: bool = True) -> Plan:
        """A plan for a program that this rank has captured; other ranks are not asked."""
        data = self._decide(base, None, "", tensors)
        planned, rewritten = _follow(base, data), _follow(base, data)
        cost, sequence = self.options.cost, self.sequence
        rewrite(rewritten, training=False, cost=cost, coalesce=coalesce, sequence=sequence)
        pins = make_pins(self.options.rules.wishes)
        return make_plan(planned, rewritten, layout_of(planned, tensors), cost, "", pins, sequence)

    def without_rules(self) -> Compiler:
        """A compiler that plans automatically, for comparison."""
        return Compiler(replace(self.options, rules=Rules(), plan=None, sequence=self.sequence), self.ranks)

    def _custom_modules(self, model: nn.Module) -> CustomModules:
        """The modules of custom strategies; the first program finds them while the weights are whole."""
        if self._custom is None:
            where = (self.ranks, self._mesh, self.group, self.rank)
            self._custom = partition_modules(model, self.options.custom, *where)
        return self._custom

    def capture(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        layout: WeightLayout | None = None,
        caches: Mapping[str, Held] = MappingProxyType({}),
    ) -> Work:
        """The canonical program of one call signature."""
        custom = self._custom_modules(model)
        differentiable = any(p.requires_grad for p in model.parameters())
        device = self._device(model)
        # A program captured with gradients also serves calls without them.
        with torch.inference_mode(False), torch.enable_grad() if differentiable else contextlib.nullcontext():
            with custom.captured(model):
                dynamic = self.options.dynamic
                captured = mark_caches(
                    capture_numbers(
                        lambda call: capture_repeated(model, call, dynamic=dynamic, device=device), bound
                    )
                )
        uneven = uneven_layers(captured, self._wishes, layout, caches)
        if uneven is not None:
            captured = unroll_captured(captured)
            captured.notes += (f"repeated layers are planned one by one: {uneven}",)
        base = replace(canonical(captured, self.ranks), custom=custom, caches=caches)
        refuse_randomness(base.graph)
        return base

    def _device(self, model: nn.Module) -> torch.device | None:
        """The device to capture for: where this rank's weights are, or will be."""
        if self.axis is None or self.axis.device_type == "cpu":
            return None
        kind = self.axis.device_type
        return next((p.device for p in model.parameters() if p.device.type == kind), local_device(kind))

    def _decide(
        self, base: Work, layout: WeightLayout | None, fingerprint: str, tensors: Mapping[str, Tensor]
    ) -> Decisions:
        given = self.options.plan
        if given is not None and given.ranks != self.ranks:
            raise TpCompileError(
                f"the plan is for {given.ranks} ranks, the mesh axis has {self.ranks}",
                where="plan",
                todo="plan again",
            )
        if given is not None and given.fingerprint == fingerprint and not base.refused:
            return list(given.layout.split_groups), given.decisions
        if given is not None:
            layout = given.layout
        o = self.options
        wishes = {"cost": o.cost, "pins": self._wishes, "memory": o.memory, "layout": layout}
        return plan_cached(lambda: self._plan(base, layout, tensors), base, wishes)

    def _plan(self, base: Work, layout: WeightLayout | None, tensors: Mapping[str, Tensor]) -> Decisions:
        if layout is not None:
            planned = plan_program(base, self.options.cost, pins_from_layout(layout), layout)
        else:
            planned = self._within_memory(base, tensors)
        return sorted(planned.split_groups), decisions_to_data(planned)

    def _within_memory(self, base: Work, tensors: Mapping[str, Tensor]) -> Work:
        pins, limit = make_pins(self._wishes), self.options.memory
        planned = plan_program(base, self.options.cost, pins)
        if limit is None or layout_of(planned, tensors).fullest <= limit:
            return planned
        tighter = plan_program(base, self.options.cost, pins, divide_small=True)
        held = layout_of(tighter, tensors).fullest
        if held > limit:
            raise TpCompileError(
                f"the fullest rank would hold {size_text(held)} of parameters, more than the "
                f"{size_text(limit)} allowed, with everything divided that can be",
                where="memory",
                todo="use more ranks, or allow more memory",
            )
        return tighter

    def _make_groups(self, axes: tuple[int, ...]) -> None:
        """Process groups of sub-axes are made by all ranks at the same point: it is a collective."""
        if self.axis is not None and axes not in self._groups:
            self._groups[axes] = AxisGroups(self.axis, axes)

    def _lower(self, rewritten: Work) -> tuple[GraphModule, GraphModule | None]:
        if self.axis is None:
            return GraphModule(nn.Module(), rewritten.graph), None
        axes = rewritten.axes
        return lower_program(rewritten, WeightLayout(axes, {}).coordinates(self.rank), self._groups[axes])


def _follow(base: Work, data: Decisions, layout: WeightLayout | None = None) -> Work:
    """A copy of a canonical program with decisions that were made for it, given where the weights lie."""
    groups, decisions = data
    copy = split_copy(base, frozenset(groups), layout)
    decisions_from_data(copy, decisions)
    return copy


def _wants_gradient(bound: dict[str, Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in flatten_call(bound)[0])
