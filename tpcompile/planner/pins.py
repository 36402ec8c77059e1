"""From what a plan's rules ask of parameters to the placements that the planner may give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import operands
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.planner.search.must_divide import worth_dividing
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Labels, Rule
from tpcompile.strategies.read_rules import Wish

from .decide import Pins
from .global_program import GlobalProgram

Wishes = Mapping[str, tuple[Wish, ...]]
"""Per parameter what is asked of it, once per name that it is tied to."""


def make_pins(wishes: Wishes) -> Pins:
    """The wishes as the planner wants them: allowed placements per parameter placeholder.

    On later sub-axes a divided parameter may also be whole, where no units are left.
    """

    def resolve(program: GlobalProgram, axis: int) -> Mapping[Node, frozenset[Placement]]:
        if not wishes:
            return {}
        found = {node: allowed for node, _, allowed, _ in _resolved(program, wishes) if allowed is not None}
        _refuse_idle(wishes, program, found)
        return found if axis == 0 else {node: allowed | {R} for node, allowed in found.items()}

    return resolve


def unmet(program: GlobalProgram, wishes: Wishes) -> list[str]:
    """The wishes of a model's own plan that cannot be met, a line each."""
    lines = [
        f"{name} is not divided as the rule {wish.rule!r}: {wish.asked!r} asks: {why}"
        for _, (name, wish), allowed, why in _resolved(program, wishes)
        if allowed is None and why
    ]
    return list(dict.fromkeys(lines))


Resolved = tuple[Node, tuple[str, Wish], frozenset[Placement] | None, str]


def _resolved(program: GlobalProgram, wishes: Wishes) -> Iterator[Resolved]:
    """Per parameter and wish what is allowed: None where nothing follows, with the reason if it should."""
    factors = program.factors()
    candidates = worth_dividing(factors, set(program.params()))
    stuck, weights = factors.stuck_atoms(), _of_weights(program)
    for node, name in program.params().items():
        met: frozenset[Placement] | None = None
        for wish in wishes.get(name, ()) if node.users and name not in program.custom.parts else ():
            allowed, why = _allowed(factors, weights, node, wish, candidates, stuck)
            if why and not wish.optional:
                raise TpCompileError(
                    f"the rule {wish.rule!r} asks for {wish.asked!r}, "
                    f"which this parameter does not have: {why}",
                    where=f"{name} of shape {tuple(node.meta['val'].shape)}",
                    todo="pin another dimension, or none",
                )
            if allowed is not None and met is not None and not met & allowed:
                why = (
                    f"it is one weight under two names, and {wishes[name][0].rule!r} asks for something else"
                )
                if not wish.optional:
                    raise TpCompileError(
                        f"the rule {wish.rule!r} cannot be met: {why}", where=name, todo="pin both alike"
                    )
                allowed = None
            met = allowed if met is None else met & (allowed or met)
            yield node, (name, wish), met, why


def _allowed(
    factors: Factors, weights: set[Node], param: Node, wish: Wish, candidates: set[int], stuck: set[int]
) -> tuple[frozenset[Placement] | None, str]:
    """The placements that a wish allows; None where it asks for nothing, or cannot be met, and why not."""
    if wish.want == "whole":
        return frozenset({R}), ""
    if wish.want == "any":
        return None, ""
    dim = _dim(factors, weights, param, wish)
    if isinstance(dim, str):
        return None, dim
    if dim is None:
        return None, ""
    places = {place: atom for place, atom in factors.places(param).items() if place[0] == dim}
    usable = {Shard(*place): atom for place, atom in places.items() if atom in candidates}
    if not usable:
        return None, f"dimension {dim} cannot be divided: no matmul has it, or it has size 1"
    # By name, whole units are meant: heads, not halves of them, and a share of each packed part.
    units = [place for place, atom in usable.items() if atom not in stuck and isinstance(wish.want, str)]
    return frozenset(units or usable), ""


def _dim(factors: Factors, weights: set[Node], param: Node, wish: Wish) -> int | str | None:
    """The dimension that a wish divides; None where it does not concern the parameter; or why not."""
    rank = param.meta["val"].ndim
    if isinstance(wish.want, int):
        dim = wish.want + rank if wish.want < 0 else wish.want
        if 0 <= dim < rank:
            return dim
        # The bias of a module that is pinned by its matrix.
        return None if rank == 1 and not wish.direct else f"it has {rank} dimensions"
    if wish.want == "experts":
        return 0 if rank >= 2 else None
    if rank < 2:  # a bias or a norm follows its matrix, unless it is named itself (attention sinks)
        return 0 if rank == 1 and wish.direct and wish.want == "out" else None
    if wish.want in ("rows", "columns"):
        return 0 if wish.want == "rows" else rank - 1
    if rank == 3 and wish.direct:  # a stack of experts: transformers counts dimensions there
        return rank - 2 if wish.want == "out" else rank - 1
    dim = _matmul_dim(factors, weights, param, wish.want)
    if dim is None and not _is_bias(factors, param):
        return f"no matmul {'keeps' if wish.want == 'out' else 'sums over'} a dimension of it"
    return dim


def _is_bias(factors: Factors, param: Node) -> bool:
    """Whether no matmul multiplies with the parameter: it is placed as what it is added to."""
    rules = [(factors.rules.get(user), user) for user in param.users]
    return not any(isinstance(r, Rule) and r.contraction and _multiplied(r, u, param) for r, u in rules)


def _multiplied(rule: Rule, user: Node, param: Node) -> bool:
    return operands(user).index(param) not in rule.once


def _matmul_dim(factors: Factors, weights: set[Node], param: Node, want: str) -> int | None:
    """The dimension that a matmul keeps (``out``) or sums over (``in``); lookups are asked last."""
    found: list[tuple[bool, int]] = []
    for user in param.users:
        rule = factors.rules.get(user)
        if not isinstance(rule, Rule):
            continue
        if not rule.contraction and user in weights:  # transposed, cast, or scaled
            inner = _matmul_dim(factors, weights, user, want)
            mine = rule.inputs[operands(user).index(param)]
            if inner is not None and (dim := _through(rule, mine, inner)) is not None:
                found.append((False, dim))
        elif rule.contraction and _multiplied(rule, user, param):
            for d, letters in enumerate(rule.inputs[operands(user).index(param)]):
                summed = bool(letters) and all(x in rule.reduce for x in letters)
                if letters and summed == (want == "in") and not set(letters) & _shared(rule, user, param):
                    found.append((rule.localize == "lookup", d))
                    break
    return min(found)[1] if found else None


def _shared(rule: Rule, user: Node, param: Node) -> set[str]:
    """Letters that the weight shares with another operand and the result (experts, batches)."""
    mine = operands(user).index(param)
    others = {x for i, t in enumerate(rule.inputs) if i != mine and len(t) > 1 for d in t for x in d}
    return {x for t in rule.outputs for d in t for x in d} & others


def _of_weights(program: GlobalProgram) -> set[Node]:
    """The values that are made of nothing but weights."""
    found = set(program.params())
    for node in program.graph.nodes:
        if node.op == "call_function" and (given := operands(node)) and found.issuperset(given):
            found.add(node)
    return found


def _through(rule: Rule, mine: Labels, dim: int) -> int | None:
    """The dimension of an operand that a result's is, or that has the first factor of it."""
    wanted = set(rule.outputs[0][dim])
    return next((d for d, letters in enumerate(mine) if wanted & set(letters)), None)


def _refuse_idle(wishes: Wishes, program: GlobalProgram, found: Mapping[Node, object]) -> None:
    """A user's rule from which nothing follows for any parameter of the call is a mistake."""
    names = program.params()
    met = {names[node] for node in found}
    if program.blocks is not None:
        met |= {copy for kept, copy in program.blocks.left_out(list(names.values())) if kept in met}
    every = [(wish, name) for name, several in wishes.items() for wish in several]
    useful = {w.rule for w, name in every if w.optional or w.want == "any" or name in met}
    idle = next((wish for wish, _ in every if wish.rule not in useful), None)
    if idle is not None:
        raise TpCompileError(
            f"the rule {idle.rule!r} asks for {idle.asked!r}, which this parameter does not have, "
            "or which the captured call does not use",
            where="plan",
            todo="pin a dimension that can be divided",
        )
