"""The weight layout that follows from a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from tpcompile.capture.held_caches import same_place
from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.segment import Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout, whole_layout
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.rules.factors import Factors

from .decide import Pins
from .global_program import GlobalProgram, Source


def layout_of(program: GlobalProgram, tensors: Mapping[str, Tensor]) -> WeightLayout:
    """The layout of all parameters and buffers of a model.

    Args:
        program: a planned program.
        tensors: every parameter and buffer of the model by its original name (values do not matter);
            those that the program does not use are whole.
    """
    parts: dict[str, list[tuple[Source, Segment]]] = {}
    used: set[str] = set()
    for node, source in program.sources.items():
        if source.segment is not None:
            used |= {source.spec.name} if node.users else set()
            placed = _placed(program, node, source.segment)
            parts.setdefault(source.spec.name, []).append((source, placed))
    # Layers that were left out are placed as the one that stands for them.
    like = {name: name for name in parts}
    if program.blocks is not None:
        like |= {left_out: name for name, left_out in program.blocks.left_out(list(parts))}
    unused = tuple(name for name, captured in like.items() if captured not in used)
    params: dict[str, ParamLayout] = {}
    for name, tensor in tensors.items():
        layout = whole_layout(name, tensor, len(program.decisions))
        if name in like:
            captured = like[name]
            segments = tuple(s for _, s in sorted(parts[captured], key=lambda p: p[0].order))
            layout = replace(layout, segments=segments, packed_dim=program.packed_dims.get(captured, 0))
        if name in program.custom.parts:
            layout = program.custom.layout(name, tensor, program.axis_sizes)
        params[name] = layout
    return WeightLayout(program.axis_sizes, params, tuple(sorted(program.split_groups)), unused)


def extended(layout: WeightLayout, program: GlobalProgram, tensors: Mapping[str, Tensor]) -> WeightLayout:
    """A layout with the parameters that it left open, and that a later program uses, as that one has them."""
    later = layout_of(program, tensors)
    return replace(completed(layout, later), split_groups=later.split_groups)


def completed(layout: WeightLayout, given: WeightLayout) -> WeightLayout:
    """A layout with the parameters that it leaves open, and that a plan decides, as the plan has them."""
    decided = set(layout.undecided) - set(given.undecided)
    params = {name: given.params[name] if name in decided else p for name, p in layout.params.items()}
    undecided = tuple(name for name in layout.undecided if name not in decided)
    groups = tuple(sorted({*layout.split_groups, *given.split_groups}))
    return replace(layout, params=params, split_groups=groups, undecided=undecided)


def check_layout(program: GlobalProgram, layout: WeightLayout) -> None:
    """Refuses decisions for weights placed otherwise: the program would take a rank's part for another.

    Args:
        program: a planned program.
        layout: where the weights are.

    Raises:
        TpCompileError: with the first such weight.
    """
    for node, source in program.sources.items():
        open_ = source.spec.name in layout.undecided or source.spec.name in program.custom.parts
        if source.segment is None or open_ or not node.users:
            continue
        for axis, decision in enumerate(program.decisions):
            held = _placement(program.planned_factors, node, program.held_as(source), axis)
            if decision.params[node] != held:
                raise TpCompileError(
                    f"the plan of this call has the weight as {decision.params[node]}, it is held as {held}",
                    where=source.spec.name,
                    todo="make the plan again for this model; if none was given, report this",
                )


def _placed(program: GlobalProgram, node: Node, segment: Segment) -> Segment:
    atoms = tuple(tuple(int(s) for s in dim) or (1,) for dim in program.planned_factors.atom_sizes(node))
    starts = [sum(len(d) for d in atoms[:i]) for i in range(len(atoms))]

    def flat(placement: Placement) -> int | None:
        return starts[placement.dim] + placement.factor if isinstance(placement, Shard) else None

    return replace(segment, atoms=atoms, shards=tuple(flat(d.params[node]) for d in program.decisions))


def pins_from_layout(layout: WeightLayout) -> Pins:
    """Pins that keep every parameter where it is: a later program plans its activations only.

    Parameters that no program has used yet are planned as in a first one.
    """
    undecided = set(layout.undecided)

    def resolve(program: GlobalProgram, axis: int) -> Mapping[Node, frozenset[Placement]]:
        factors = program.factors()
        found: dict[Node, frozenset[Placement]] = {}
        for node, source in program.sources.items():
            if source.spec.name in program.custom.parts:
                found[node] = frozenset({R})  # it is placed as its strategy wants it
            elif source.segment is not None and node.users and source.spec.name not in undecided:
                _refuse_selection(layout.params[source.spec.name])
                found[node] = frozenset({_placement(factors, node, program.held_as(source), axis)})
        return found

    return resolve


def _refuse_selection(param: ParamLayout) -> None:
    if param.selection is not None:
        raise TpCompileError(
            f"the plan leaves the parameter to the custom strategy {param.selection.strategy!r}",
            where=param.name,
            todo="give parallelize the strategies again, instead of the plan",
        )


def _placement(factors: Factors, node: Node, segment: Segment, axis: int) -> Placement:
    """Where the atom that the layout divides stands among the (finer) factors of this program."""
    place = segment.place(axis)
    if place is None:
        return R
    dim, position = place
    found = same_place(factors.atom_sizes(node)[dim], segment.atoms[dim], position)
    assert found is not None, "what is divided stays in one piece"
    return Shard(dim, found)
