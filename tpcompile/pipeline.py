"""The compiler on one screen: from a captured program to a planned, rewritten one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .capture.export.captured import Captured
from .errors import TpCompileError
from .ir.layout.weight_layout import WeightLayout
from .ir.units import size_text
from .passes.annotate_placements import AnnotatePlacements
from .passes.canonicalise import Canonicalise
from .passes.choose_collectives import ChooseCollectives
from .passes.coalesce_collectives import CoalesceCollectives
from .passes.divide_sequence import DivideSequence
from .passes.expand_losses import PREFIX, ExpandLosses, loss_groups
from .passes.expand_randomness import ExpandRandomness
from .passes.flatten_strided import FlattenStrided
from .passes.insert_gradient_copies import InsertGradientCopies
from .passes.insert_reshards import InsertReshards
from .passes.join_segments import JoinSegments
from .passes.lift_reductions import LiftReductions
from .passes.merge_matmuls import MergeMatmuls
from .passes.pipeline import run_passes
from .passes.simplify_masks import SimplifyMasks
from .passes.split_packed_matmul import SplitPackedMatmul, packed_groups
from .passes.users_passes import premises_of, refuse_other_premises, refuse_unplanned
from .passes.verify_placements import verify_placements
from .planner.buffer_weights import find_buffer_weights, mark_divided_buffers
from .planner.decide import Pins, decide, plan_on_axes, split_what_pays
from .planner.decisions import decisions_from_data, decisions_to_data
from .planner.global_program import GlobalProgram, Pass
from .planner.options import Options
from .planner.pins import Wishes, make_pins
from .planner.plan import Plan
from .planner.plan_layout import check_layout, completed, layout_of, pins_from_layout
from .planner.search.cost import PRESETS, CostModel
from .planner.store_plan import Decisions, plan_cached


def before_planning() -> list[Pass]:
    """Passes that give the planner one form of everything."""
    return [FlattenStrided(), Canonicalise(), SimplifyMasks(), ExpandRandomness()]


def after_planning(
    training: bool,
    cost: CostModel = PRESETS["cpu"],
    coalesce: bool = True,
    sequence: bool | frozenset[str] = False,
) -> list[Pass]:
    """Passes that carry the plan out, still at global shapes; ``sequence``: see ``rewrite``."""
    passes: list[Pass] = [
        AnnotatePlacements(),
        InsertReshards(),
        InsertGradientCopies(enabled=training),
        ChooseCollectives(),
    ]
    if sequence:
        modules = None if sequence is True else sequence
        passes += [LiftReductions(), DivideSequence(modules, training)]
    # By now it is known which matmuls have the very same input.
    return [*passes, *([CoalesceCollectives(cost)] if coalesce else []), MergeMatmuls(cost)]


def canonical(captured: Captured, ranks: int, extra: Sequence[Pass] = (), **known: Any) -> GlobalProgram:
    """A captured program in the one form that everything after it expects.

    Args:
        captured: the program.
        ranks: how many ranks it is for.
        extra: the user's passes, of which those run that want to before planning.
        known: other fields of the program.
    """
    # A copy, so that names of new nodes follow from the graph, not from how it came here: ranks compare them.
    program = GlobalProgram(captured, ranks, **known).copy()
    run_passes(program, [*before_planning(), *(one for one in extra if one.before_planning)])
    find_buffer_weights(program)
    return program


def split_copy(
    base: GlobalProgram, groups: frozenset[str], layout: WeightLayout | None = None
) -> GlobalProgram:
    """A copy of a program with some packed matmuls split, over weights that are placed as a layout says."""
    copy = base.copy()
    if layout is not None:
        mark_divided_buffers(copy, layout)
    join = [JoinSegments(layout)] if layout else []
    run_passes(copy, [SplitPackedMatmul(groups, layout), *join, ExpandLosses(groups)])
    copy.layout = layout  # not before: it knows packed parameters by their segments
    return copy


def plan_program(
    base: GlobalProgram,
    cost: CostModel,
    pins: Pins,
    layout: WeightLayout | None = None,
    *,
    divide_small: bool = False,
) -> GlobalProgram:
    """A planned copy of a canonical program; nothing is rewritten for the plan yet.

    Args:
        base: the program.
        cost: the cost model.
        pins: the placements that parameters may have.
        layout: where the weights already are: only activations are planned then, and weights that no program
            has used yet.
        divide_small: small matrices must be divided too.
    """
    if layout is None:
        return decide(base, cost, [*packed_groups(base), *loss_groups(base)], split_copy, pins, divide_small)

    def plan(chosen: frozenset[str], axis_sizes: tuple[int, ...]) -> GlobalProgram:
        return plan_on_axes(split_copy(base, chosen, layout), axis_sizes, cost, pins)

    used = {source.spec.name for node, source in base.sources.items() if node.users}
    groups = packed_groups(base, layout.undecided) if used & set(layout.undecided) else []
    held = frozenset(group for group in layout.split_groups if not group.startswith(PREFIX))
    return split_what_pays(plan, layout.axis_sizes, [*groups, *loss_groups(base)], held)


def rewrite(
    program: GlobalProgram,
    training: bool,
    extra: Sequence[Pass] = (),
    cost: CostModel = PRESETS["cpu"],
    *,
    coalesce: bool = True,
    sequence: bool | frozenset[str] = False,
) -> None:
    """Carries a plan out in the graph: reshards, gradients, collectives, then the user's passes.

    Args:
        program: the planned program.
        training: gradients are recorded.
        extra: the user's passes, of which those run that don't before planning.
        cost: the cost model.
        coalesce: small all-reduces travel together.
        sequence: whether the sequence is divided between the blocks, or at which modules.

    Raises:
        TpCompileError: what a pass made cannot be proved, or a pass of the user's made calls that the planner
            has not seen, or changed what a proof goes out from.
    """
    known = set(program.graph.nodes)
    last = [[one] for one in extra if not one.before_planning]
    for passes in (*_proved_together(after_planning(training, cost, coalesce, sequence)), *last):
        premises = premises_of(program)
        run_passes(program, passes)
        if passes in last:
            refuse_other_premises(program, premises, passes[0])
            refuse_unplanned(program, known, passes[0])
        program.proof = verify_placements(program, training=training, after=passes[-1].name)
        known = set(program.graph.nodes)


def _proved_together(passes: list[Pass]) -> list[list[Pass]]:
    """The compiler's own passes, behind the last of each list of which a proof is made.

    All of them at once, unless passes are logged: then each behind which no marker stands for a choice.
    """
    if not os.environ.get("TPCOMPILE_LOGS"):
        return [passes]
    at = [type(one) for one in passes].index(ChooseCollectives) + 1
    both = 2 if any(isinstance(one, DivideSequence) for one in passes) else 0  # half a division is none
    apart = [[one] for one in passes[at + both :]]
    return [passes[:at], *([passes[at : at + both]] if both else []), *apart]


def find_decisions(
    base: GlobalProgram,
    options: Options,
    wishes: Wishes,
    fingerprint: str,
    tensors: Mapping[str, Tensor],
    layout: WeightLayout | None = None,
) -> Decisions:
    """What is decided for a program: by the plan that was given, by one that was kept, or anew.

    Args:
        base: the canonical program.
        options: what the user asked for.
        wishes: what is asked of single parameters.
        fingerprint: the captured graph's: a plan that was made for it is followed to the letter.
        tensors: the model's whole parameters and buffers; their values do not matter.
        layout: where the weights already are.

    Raises:
        TpCompileError: the plan is for another number of ranks, or more memory is needed than allowed.
    """
    given = options.plan
    if given is not None and given.ranks != base.ranks:
        raise TpCompileError(
            f"the plan is for {given.ranks} ranks, the mesh axis has {base.ranks}",
            where="plan",
            todo="plan again",
        )
    if given is not None and _says_all(given, base, fingerprint):
        return list(given.layout.split_groups), given.decisions

    def plan() -> Decisions:
        if layout is not None:
            planned = plan_program(base, options.cost, pins_from_layout(layout), layout)
        else:
            planned = _within_memory(base, options.cost, make_pins(wishes), options.memory, tensors)
        return sorted(planned.split_groups), decisions_to_data(planned)

    asked = {"cost": options.cost, "pins": wishes, "memory": options.memory, "layout": layout}
    return plan_cached(plan, base, asked)


def known_layout(
    base: GlobalProgram,
    options: Options,
    fingerprint: str,
    tensors: Mapping[str, Tensor],
    layout: WeightLayout | None,
) -> WeightLayout | None:
    """Where the weights are, as programs before and the plan that was given say; None: nobody does.

    Args:
        base: the canonical program.
        options: what the user asked for.
        fingerprint: the captured graph's.
        tensors: the model's whole parameters and buffers; their values do not matter.
        layout: what programs before have decided.
    """
    given = options.plan
    if given is None or given.ranks != base.ranks:
        return layout
    if layout is None and _says_all(given, base, fingerprint):
        return None
    theirs = {name: replace(p, dtype=tensors[name].dtype) for name, p in given.layout.params.items()}
    whole = replace(given.layout, params=theirs)
    return whole if layout is None else completed(layout, whole)


def _says_all(plan: Plan, base: GlobalProgram, fingerprint: str) -> bool:
    """Whether a plan was made for this very program, and can be carried out."""
    return plan.fingerprint == fingerprint and not base.refused


def _within_memory(
    base: GlobalProgram, cost: CostModel, pins: Pins, limit: float | None, tensors: Mapping[str, Tensor]
) -> GlobalProgram:
    planned = plan_program(base, cost, pins)
    if limit is None or layout_of(planned, tensors).fullest <= limit:
        return planned
    tighter = plan_program(base, cost, pins, divide_small=True)
    held = layout_of(tighter, tensors).fullest
    if held > limit:
        raise TpCompileError(
            f"the fullest rank would hold {size_text(held)} of parameters, more than the "
            f"{size_text(limit)} allowed, with everything divided that can be",
            where="memory",
            todo="use more ranks, or allow more memory",
        )
    return tighter


def follow(base: GlobalProgram, data: Decisions, layout: WeightLayout | None = None) -> GlobalProgram:
    """A copy of a canonical program with decisions that were made for it, given where the weights are."""
    groups, decisions = data
    copy = split_copy(base, frozenset(groups), layout)
    decisions_from_data(copy, decisions)
    if layout is not None:
        check_layout(copy, layout)
    return copy
