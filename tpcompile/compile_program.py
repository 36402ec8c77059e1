"""Compiles one call signature of a model: capture, plan, rewrite, lower, with all ranks in agreement."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule

from .capture.checkpointing import mark_layers
from .capture.export.captured import Captured
from .capture.gradient_mode import in_gradient_mode
from .capture.held_caches import Held, mark_caches
from .capture.open_numbers import capture_numbers
from .capture.repeats.capture_repeated import capture_repeated, unroll_captured
from .errors import TpCompileError
from .ir.calls import flatten_call
from .ir.layout.weight_layout import WeightLayout
from .ir.module_tensors import whole_tensors
from .ir.print_graph import graph_text
from .ir.uncollected import uncollected
from .lowering.cannot_lower import LAYERS, CannotLower
from .lowering.collective_lines import sent_by
from .lowering.lower_graph import Lowered, lower_program
from .pipeline import canonical, find_decisions, follow, known_layout, rewrite
from .planner.compare_plans import outcome_of, worse
from .planner.global_program import Alike, GlobalProgram
from .planner.make_plan import make_plan
from .planner.must_unroll import uneven_layers
from .planner.options import Options
from .planner.pins import Wishes, make_pins, unmet
from .planner.plan import Plan, sequence_text
from .planner.plan_layout import extended, layout_of, pins_from_layout
from .ranks.agree import compare, from_first, together
from .ranks.compare_sent import compare_sent
from .ranks.exchange import exchange
from .ranks.groups import AxisGroups
from .ranks.mesh import Axis, local_device
from .ranks.mesh_axis import MeshAxis, line_of
from .ranks.own_groups import TIMEOUT
from .rules.randomness import refuse_randomness
from .strategies.custom.custom_modules import CustomModules, partition_modules
from .strategies.read_rules import Rules, Wish

MOST_TRIES = 8
"""How often a program is planned whose calls turn out not to run on parts."""


@dataclass
class Compiled:
    """A compiled program.

    Attributes:
        planned: at global shapes, with decisions, before it was rewritten.
        rewritten: at global shapes, with collectives.
        plan: the plan.
        lowered: this rank's graphs (without a mesh: the one at global shapes).
        differentiable: whether its collectives are such that gradients come out right.
    """

    planned: GlobalProgram
    rewritten: GlobalProgram
    plan: Plan
    lowered: Lowered
    differentiable: bool = True


class Compiler:
    """Compiles the call signatures of one model.

    Args:
        options: what the user asked for.
        ranks: the size of the mesh axis.
        mesh: the mesh, or None to plan only.
        axis: the name of the mesh axis, or a tuple of several, for a mesh of several.
        timeout: seconds that ranks wait for each other.

    Attributes:
        whole: parameters that are not to be divided, because python that is not captured has read them.
        groups: the process groups of sub-axes, by the sizes of these.
    """

    def __init__(
        self,
        options: Options,
        ranks: int,
        mesh: DeviceMesh | None = None,
        axis: Axis | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.options, self.ranks = options, ranks
        self.axis = MeshAxis.of(mesh, axis, timeout) if mesh is not None else None
        self.rank = self.axis.rank if self.axis is not None else 0
        # Custom strategies are given the mesh itself.
        self._mesh = line_of(mesh, axis, timeout) if mesh is not None and options.custom else None
        self.sequence = options.sequence or (options.plan.sequence if options.plan is not None else False)
        self.whole: frozenset[str] = frozenset()
        self.groups: dict[tuple[int, ...], AxisGroups] = {}
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

    @uncollected()
    def compile(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        layout: WeightLayout | None,
        caches: Mapping[str, Held] | None = None,
        uneven: str = "",
    ) -> Compiled:
        """Compiles one call signature, on all ranks together.

        Args:
            model: the model with its original class and whole weights (their values do not matter).
            bound: the example call.
            layout: where the weights already are, or None if this program is to decide it.
            caches: how the tensors of caches are placed that earlier programs handed out, by name.
            uneven: why repeated layers are to be planned one by one, if they are.

        Raises:
            TpCompileError: on all ranks, if any of them fails or they disagree.
        """
        began = time.perf_counter()
        self._custom_modules(model)  # of all ranks together
        what = (model, bound, layout, caches)
        base = together(self.group, "capture the model", lambda: self.canonical(*what, uneven))
        captured = time.perf_counter()
        fingerprint = compare(self.group, "captured graphs", graph_text(base.graph).splitlines())
        if constants := base.captured.constant_lines():
            todo = "make tensors that forward reads alike on all ranks (a seed), or register them as buffers"
            compare(self.group, "constants in their programs", constants, todo)
        tensors = whole_tensors(model)
        given = (x for x in flatten_call(bound)[0] if isinstance(x, Tensor))
        training = any(x.requires_grad for x in (*model.parameters(), *given))
        for _ in range(MOST_TRIES):
            compiled = self._attempt(base, layout, fingerprint, tensors, training)
            if isinstance(compiled, Compiled):
                break
            if LAYERS in compiled:
                return self.compile(*what, uneven=compiled[LAYERS])
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
        base: GlobalProgram,
        layout: WeightLayout | None,
        fingerprint: str,
        tensors: Mapping[str, Tensor],
        training: bool,
    ) -> Compiled | dict[Alike, str]:
        """A plan, carried out; or the calls that lowering cannot divide as planned, on any rank, and why."""
        began, options = time.perf_counter(), self.options
        layout = known_layout(base, options, fingerprint, tensors, layout)
        wanted = (base, options, self._wishes, fingerprint, tensors, layout)
        data = from_first(self.group, lambda: find_decisions(*wanted))
        compare(self.group, "plans", [repr(data), f"sequence_parallel: {sequence_text(self.sequence)}"])
        seconds = time.perf_counter() - began
        planned = together(self.group, "follow the plan", lambda: follow(base, data, layout))
        self._make_groups(planned.axis_sizes)

        def finish() -> Compiled | CannotLower:
            placed = layout_of(planned, tensors) if layout is None else extended(layout, planned, tensors)
            rewritten = follow(base, data, layout)
            rewrite(rewritten, training, options.passes, options.cost, sequence=self.sequence)
            pins = make_pins(self._wishes) if layout is None else pins_from_layout(layout)
            plan = make_plan(planned, rewritten, placed, options, fingerprint, pins, self.sequence)
            plan.timings["plan"] = seconds
            try:
                lowered = self.lower(rewritten)
            except CannotLower as error:
                return error
            plan.notes += lowered.notes
            return Compiled(planned, rewritten, plan, lowered, training)

        found = together(self.group, "lower the model", finish)
        cannot = dict.fromkeys(found.calls, found.what) if isinstance(found, CannotLower) else {}
        everyone = exchange(self.group, "lower the model: refusals", cannot) if self.group else [cannot]
        refused = {call: why for each in everyone for call, why in each.items()}
        return refused if refused or isinstance(found, CannotLower) else found

    def _compare_derived(self, compiled: Compiled) -> None:
        """Compares what every rank has made of the plan by itself, with its rules and passes."""
        layout = [repr(param) for param in compiled.plan.layout.to_json()["params"]]
        text = [*graph_text(compiled.rewritten.graph).splitlines(), *compiled.plan.recomputed]
        todo = "register the same rules on every rank, and give the same passes in the same versions"
        compare(self.group, "layouts of the weights", layout, todo)
        compare(self.group, "rewritten graphs", text, todo)
        if self.axis is not None:
            compare_sent(self.group, sent_by(compiled.lowered.local.graph))

    def _remark(self, base: GlobalProgram, compiled: Compiled, tensors: Mapping[str, Tensor]) -> None:
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

    def plan_captured(
        self, base: GlobalProgram, tensors: Mapping[str, Tensor], *, coalesce: bool = True
    ) -> Plan:
        """A plan for a program that this rank has captured; other ranks are not asked."""
        data = find_decisions(base, self.options, self._wishes, "", tensors)
        planned, rewritten = follow(base, data), follow(base, data)
        rewrite(rewritten, False, cost=self.options.cost, coalesce=coalesce, sequence=self.sequence)
        pins, placed = make_pins(self.options.rules.wishes), layout_of(planned, tensors)
        return make_plan(planned, rewritten, placed, self.options, "", pins, self.sequence)

    def without_rules(self) -> Compiler:
        """A compiler that plans automatically, for comparison."""
        return Compiler(replace(self.options, rules=Rules(), plan=None, sequence=self.sequence), self.ranks)

    def _custom_modules(self, model: nn.Module) -> CustomModules:
        """The modules of custom strategies; the first program finds them while the weights are whole."""
        if self._custom is None:
            where = (self.ranks, self._mesh, self.group, self.rank)
            self._custom = partition_modules(model, self.options.custom, *where)
        return self._custom.with_names(model)

    def canonical(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        layout: WeightLayout | None = None,
        caches: Mapping[str, Held] | None = None,
        uneven: str = "",
    ) -> GlobalProgram:
        """The canonical program of one call signature; ``compile`` says what it is given."""
        captured = mark_layers(self.capture_call(model, bound), model, self.options.checkpointing)
        uneven = uneven or uneven_layers(captured, self._wishes, layout, caches or {}) or ""
        if uneven:
            captured = unroll_captured(captured)
            captured.notes += (f"repeated layers are planned one by one: {uneven}",)
        custom, passes = self._custom_modules(model), self.options.passes
        base = canonical(captured, self.ranks, passes, custom=custom, caches=caches or {})
        refuse_randomness(base.graph)
        return base

    def capture_call(self, model: nn.Module, bound: dict[str, Any]) -> Captured:
        """One call as it is captured, before any pass; repeated layers may be left out."""
        one = partial(capture_repeated, model, dynamic=self.options.dynamic, device=self._device(model))
        with self._custom_modules(model).captured(model):
            return mark_caches(in_gradient_mode(lambda: capture_numbers(one, bound)))

    def _device(self, model: nn.Module) -> torch.device | None:
        """The device to capture for: where this rank's weights are, or will be."""
        if self.axis is None or self.axis.device_type == "cpu":
            return None
        kind = self.axis.device_type
        return next((p.device for p in model.parameters() if p.device.type == kind), local_device(kind))

    def _make_groups(self, axis_sizes: tuple[int, ...]) -> None:
        """Process groups of sub-axes are made by all ranks at the same point: it is a collective."""
        if self.axis is not None and axis_sizes not in self.groups:
            self.groups[axis_sizes] = AxisGroups(self.axis, axis_sizes)

    def lower(self, rewritten: GlobalProgram) -> Lowered:
        """This rank's graph; without a mesh the one at global shapes."""
        if self.axis is None:
            return Lowered(GraphModule(nn.Module(), rewritten.graph))
        at = WeightLayout(rewritten.axis_sizes, {}).coordinates(self.rank)
        return lower_program(rewritten, at, self.groups[rewritten.axis_sizes])
