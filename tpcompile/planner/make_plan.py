"""Makes the plan of a program, from it as it was planned and as it was rewritten."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from tpcompile.capture.checkpointing import Checkpointing
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.markers import all_gather, origin
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import is_tensor, operands, tensor_of
from tpcompile.ir.regions import members_of, where
from tpcompile.ir.sizes import bytes_of
from tpcompile.planner.search.must_divide import GATHERED, GATHERS, matrix, weight_root
from tpcompile.rules.rule import Rule

from .buffer_weights import ATTENTION
from .collective import collectives_of, sequence_seconds
from .decide import Pins
from .decisions import decisions_to_data
from .global_program import GlobalProgram
from .options import Options
from .plan import Plan

_LINEAR = torch.ops.aten.linear.default
_NOTHING_GATHERED = (
    'checkpointing="gathered": no linear layer gathers positions, so that nothing is gathered again '
    "(sequence_parallel=True has them gathered)"
)
_KINDS = {
    "buffer": "a buffer",
    "attribute": "an attribute",
    "constant": "a constant",
    "param": "mixed with others before it is used",
}


def make_plan(
    planned: GlobalProgram,
    rewritten: GlobalProgram,
    layout: WeightLayout,
    options: Options,
    fingerprint: str,
    pins: Pins,
    sequence: bool | frozenset[str] = False,
) -> Plan:
    """The plan of a program, from it as it was planned and as it was rewritten."""
    cost = options.cost
    gathered = _gathered_weights(rewritten)
    again = _gathered_again(rewritten)
    seconds = sum(d.cost for d in planned.decisions) - GATHERED * sum(map(rewritten.times, gathered))
    return Plan(
        layout=layout,
        decisions=decisions_to_data(planned),
        fingerprint=fingerprint,
        collectives=collectives_of(rewritten),
        fallbacks=fallbacks_of(planned),
        notes=(
            *rewritten.captured.notes,
            *((_NOTHING_GATHERED,) if rewritten.captured.gathers_again and not again else ()),
            *dict.fromkeys(
                [*gathered.values(), *_whole_weights(planned, layout), *_divided_buffers(planned, layout)]
            ),
        ),
        cost=cost,
        seconds=seconds + sequence_seconds(rewritten, cost),
        sequence=sequence,
        recomputed=_recomputed(rewritten, options.checkpointing, again),
        proof=rewritten.proof,
        timings={"proof": rewritten.proof.seconds} if rewritten.proof is not None else {},
        planned=planned,
        pins=pins,
        rewritten=rewritten,
    )


def _recomputed(
    program: GlobalProgram, checkpointing: Checkpointing | None, gathered_again: int
) -> tuple[str, ...]:
    """What is computed again in backward, one line for layers that are alike."""
    found: dict[str, int] = {}
    for calls in members_of(program.graph).values():
        name = starred(where(calls)) or "calls of forward"
        found[name] = found.get(name, 0) + max(map(program.times, calls))
    if gathered_again:
        found["what linear layers gather"] = gathered_again
    but = f", but for {checkpointing.kept}" if checkpointing is not None and checkpointing.kept else ""
    return tuple(f"{name} ({count}){but}" for name, count in found.items())


def _gathered_again(program: GlobalProgram) -> int:
    """How often linear layers gather what they read, and gather it again in backward."""
    if not program.captured.gathers_again:
        return 0
    gathers = program.graph.find_nodes(op="call_function", target=all_gather)
    again = [g for g in gathers if g.args[4:] == (True,) and any(u.target is _LINEAR for u in g.users)]
    return sum(map(program.times, again))


def _gathered_weights(program: GlobalProgram) -> dict[Node, str]:
    """The collectives of weights that an earlier program divided as this one cannot use them, with a note."""
    found: dict[Node, str] = {}
    params, roots = program.params(), set(program.params())
    for node in program.graph.nodes:
        root = weight_root(origin(node), roots) if node.target in GATHERS and is_tensor(node) else None
        if root is not None:
            name = starred(params[root])
            found[node] = f"{name} is gathered for this call, which uses it otherwise than it was divided for"
    return found


def _divided_buffers(program: GlobalProgram, layout: WeightLayout) -> Iterator[str]:
    """Buffers that are weights: they come to be DTensors, which who reads them may not expect."""
    for source in program.sources.values():
        name = source.spec.name
        if source.spec.kind == "buffer" and name in layout.params and not layout.params[name].is_whole:
            yield f"{starred(name)} is a buffer, and divided as parameters are: a DTensor"


def _whole_weights(program: GlobalProgram, layout: WeightLayout) -> Iterator[str]:
    """Matrices that are used as weights, and stay whole on every rank, such as those in plain attributes.

    Parameters and saved buffers are divided where they are weights as they are, not mixed with others first.
    """
    specs = {n: s.spec for n, s in program.sources.items() if s.spec.kind in _KINDS and matrix(n)}
    params = specs.keys() & program.params().keys()
    made_of = _made_of(
        program, {n for n in specs if n not in params or layout.params[specs[n].name].is_whole}
    )
    for node, rule in program.planned_factors.rules.items():
        if (
            program.ranks == 1
            or not (isinstance(rule, Rule) and rule.contraction)
            or node.target in ATTENTION
        ):
            continue
        for operand in operands(node):
            if tensor_of(operand).is_floating_point() and not weight_root(operand, params):
                for root in made_of[operand] or ():
                    size = float(bytes_of(tensor_of(root)))
                    name, kind = starred(specs[root].name), _KINDS[specs[root].kind]
                    yield f"{name} is {kind}, and whole on every rank ({size:.0f} bytes)"


def _made_of(program: GlobalProgram, weights: set[Node]) -> dict[Node, dict[Node, None] | None]:
    """Of which of some weights each value is made; None for one that depends on the call's tensors."""
    found: dict[Node, dict[Node, None] | None] = {}
    for node in program.graph.nodes:
        parts = [found[o] for o in node.all_input_nodes]
        if node in program.sources:
            given = program.sources[node].spec.kind == "user"
            found[node] = None if given else {node: None} if node in weights else {}
        elif isinstance(node.meta.get("val"), torch.SymInt):
            found[node] = {}
        else:
            found[node] = None if None in parts else {root: None for part in parts for root in part or ()}
    return found


def fallbacks_of(program: GlobalProgram) -> tuple[str, ...]:
    """Operators without a rule among the values that descend from parameters, one line each."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for node, rule in program.planned_factors.rules.items():
        if isinstance(rule, str) and program.decisions and node in program.decisions[0].nodes:
            gathered = sum(bytes_of(tensor_of(o)) for o in operands(node))
            count, size = found.get((str(node.target), rule), (0, 0))
            found[str(node.target), rule] = (
                count + program.times(node),
                size + gathered * program.times(node),
            )
    return tuple(
        f"{op}: replicated {count} times, {size:.0f} bytes of operands whole on every rank ({why})"
        for (op, why), (count, size) in found.items()
    )
