"""A user's wishes for single parameters: globs of modules or parameters to placements."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch.distributed import tensor as dtensor
from torch.fx import Node

from .errors import TpCompileError
from .factors import Factors
from .placements import Placement, R, Replicate, Shard
from .planner.decide import Pins
from .rules.rule import Rule, operands
from .work import Work

STYLES = ("colwise", "rowwise", "replicate")
Pin = Any  # Shard(dim), Replicate(), ours or torch's, or one of STYLES


def check_pins(pins: Mapping[str, Pin], names: Iterable[str]) -> None:
    """Refuses pins that name nothing or ask for something that is no placement.

    Args:
        pins: glob of a module or parameter -> what is wanted.
        names: the model's parameter names.

    Raises:
        TpCompileError: with the nearest names.
    """
    params = list(names)
    known = sorted({*params, *(n.rpartition(".")[0] for n in params)})
    for glob, pin in pins.items():
        if not any(_matches(glob, n) for n in params):
            near = difflib.get_close_matches(glob, known, n=3, cutoff=0.3)
            raise TpCompileError(
                f"the pin {glob!r} names no module or parameter with weights",
                where="plan",
                todo=f"did you mean {', '.join(near)}?" if near else "see model.named_parameters()",
            )
        _kind(glob, pin)


def make_pins(pins: Mapping[str, Pin]) -> Pins:
    """The pins as the planner wants them: allowed placements per parameter placeholder.

    On later sub-axes a divided parameter may also be whole, where no units are left.
    """

    def resolve(work: Work, axis: int) -> Mapping[Node, frozenset[Placement]]:
        if not pins:
            return {}
        factors = work.factors()
        found: dict[Node, frozenset[Placement]] = {}
        idle = set(pins)
        own = work.custom.parts
        for node, name in work.params().items():
            for glob, pin in pins.items():
                if _matches(glob, name) and node.users and name not in own:
                    wanted = _allowed(factors, node, _kind(glob, pin), glob)
                    if wanted is not None:
                        found[node] = wanted if axis == 0 else wanted | {R}
                        idle.discard(glob)
        for glob in idle:
            raise TpCompileError(
                f"the pin {glob!r} asks for {pins[glob]!r}, which this parameter does not have, "
                "or which the captured call does not use",
                where="plan",
                todo="pin a dimension that can be divided",
            )
        return found

    return resolve


def matching(pins: Mapping[str, Pin], name: str) -> list[str]:
    """The globs that match a parameter."""
    return [glob for glob in pins if _matches(glob, name)]


def _matches(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _kind(glob: str, pin: Pin) -> str | int:
    """``"replicate"``, ``"colwise"``, ``"rowwise"`` or the dimension of a shard."""
    if isinstance(pin, str) and pin in STYLES:
        return pin
    if isinstance(pin, Replicate | dtensor.Replicate):
        return "replicate"
    if isinstance(pin, Shard | dtensor.Shard):
        return pin.dim
    raise TpCompileError(
        f"the pin for {glob!r} is {pin!r}, which is no placement",
        where="plan",
        todo=f"use Shard(dim), Replicate() or one of {', '.join(STYLES)}",
    )


def _allowed(factors: Factors, param: Node, kind: str | int, glob: str) -> frozenset[Placement] | None:
    rank = param.meta["val"].ndim
    if kind == "replicate":
        return frozenset({R})
    if isinstance(kind, str):
        if rank < 2:
            return None  # a bias or norm follows its matrix
        dim = _style_dim(factors, param, kind)
    else:
        dim = kind + rank if kind < 0 else kind
        if rank == 1 and not 0 <= dim < rank:
            return None  # the bias of a module pinned by its matrix
    if dim is None or not 0 <= dim < rank or not factors.atoms(param, dim):
        raise TpCompileError(
            f"the pin {glob!r} asks for {kind!r}, which this parameter does not have",
            where=f"{param.name} of shape {tuple(param.meta['val'].shape)}",
            todo="pin a dimension that can be divided",
        )
    return frozenset(Shard(d, k) for d, k in factors.places(param) if d == dim)


def _style_dim(factors: Factors, param: Node, style: str) -> int | None:
    """The dimension that a matmul keeps (colwise) or sums over (rowwise)."""
    for user in param.users:
        rule = factors.rules.get(user)
        if not isinstance(rule, Rule):
            continue
        if not rule.contraction and len(operands(user)) == 1:  # a transposed or cast weight
            inner = _style_dim(factors, user, style)
            return _through(rule, inner)
        if rule.contraction:
            labels = rule.inputs[operands(user).index(param)]
            for d, letters in enumerate(labels):
                summed = bool(letters) and all(x in rule.reduce for x in letters)
                if (
                    letters
                    and summed == (style == "rowwise")
                    and not set(letters) & _shared(rule, user, param)
                ):
                    return d
    return None


def _shared(rule: Rule, user: Node, param: Node) -> set[str]:
    """Letters that the weight shares with another operand and the result (experts, batches)."""
    mine = operands(user).index(param)
    others = {x for i, t in enumerate(rule.inputs) if i != mine and len(t) > 1 for d in t for x in d}
    return {x for t in rule.outputs for d in t for x in d} & others


def _through(rule: Rule, dim: int | None) -> int | None:
    if dim is None:
        return None
    wanted = rule.outputs[0][dim]
    return next((d for d, letters in enumerate(rule.inputs[0]) if letters == wanted), None)
