"""Reads a plan's rules against a model: from globs and names to a wish for every parameter."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed import tensor as dtensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.names import starred
from tpcompile.ir.placements import Replicate, Shard

from .match_rules import Names, Target, names_of
from .parallel_interface import STRATEGIES
from .strategy import Division, Strategy

Pin = Any
"""``Shard(dim)``, ``Replicate()``, ours or torch's, or the name of a strategy."""


@dataclass(frozen=True)
class Wish:
    """What a rule asks of one parameter.

    Attributes:
        rule: the rule's glob.
        asked: what it says, as text.
        want: the dimension to divide, or how to find it.
        direct: the rule names the parameter itself, not its module.
        optional: it is the model's own plan that asks; what cannot be done is left out.
    """

    rule: str
    asked: str
    want: Division | int
    direct: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Rules:
    """A plan's rules, read.

    Attributes:
        wishes: per parameter (by its first name) what is asked of it, once per name that it is tied to.
        whole_inputs: modules that get their input whole if the plan is taken literally.
        whole_results: modules whose results are made whole then.
        sequence: modules at whose results the sequence is to be divided.
        notes: what a user should know of a plan that is not their own.
    """

    wishes: Mapping[str, tuple[Wish, ...]] = field(default_factory=dict)
    whole_inputs: tuple[str, ...] = ()
    whole_results: tuple[str, ...] = ()
    sequence: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def read_rules(model: nn.Module, rules: Mapping[str, Pin], *, own: bool = False) -> Rules:
    """Reads rules against a model; neither is changed.

    Args:
        model: the model.
        rules: glob of modules or parameters -> a placement or the name of a strategy.
        own: it is the model's default plan: rules that name nothing are noted, not refused.

    Raises:
        TpCompileError: a rule names nothing, or asks for something unknown.
    """
    names = names_of(model)
    best: dict[str, tuple[Target, Wish]] = {}
    whole: dict[str, list[str]] = {"inputs": [], "results": []}
    notes: list[str] = []
    sequence: set[str] = set()
    for glob, pin in rules.items():
        if not isinstance(glob, str):
            raise TpCompileError(
                f"the rule {glob!r} is not a name", where="plan", todo="give globs of modules or parameters"
            )
        strategy = _strategy(glob, pin)
        targets, modules = names.targets(glob), names.modules_of(glob)
        if isinstance(strategy, Strategy):
            whole["inputs"] += modules if strategy.whole_input else []
            whole["results"] += modules if strategy.whole_result else []
        if isinstance(strategy, Strategy) and strategy.sequence:
            sequence.update(modules, (t.param.rpartition(".")[0] for t in targets))
        if not targets and not (modules and _needs_no_weights(strategy)):
            notes.append(_unused(glob, pin, names, own))
        for target in targets:
            wish = _wish(glob, pin, strategy, target, names, own)
            if target.param not in best or target.rank >= best[target.param][0].rank:
                best[target.param] = (target, wish)
    if own:
        notes += _uncovered(best, names)
    wishes: dict[str, tuple[Wish, ...]] = {}
    for name, (_, wish) in best.items():
        first = names.params[name]
        wishes[first] = (*wishes.get(first, ()), wish)
    found = frozenset(sequence)
    return Rules(wishes, tuple(whole["inputs"]), tuple(whole["results"]), found, tuple(notes))


def _strategy(glob: str, pin: Pin) -> Strategy | int:
    """The strategy that a rule names, or the dimension that it divides; a custom one pins nothing."""
    if isinstance(pin, str):
        if pin in STRATEGIES:
            found = STRATEGIES[pin]
            return found if isinstance(found, Strategy) else Strategy("any")
        near = difflib.get_close_matches(pin, STRATEGIES, n=1)
        raise TpCompileError(
            f"the rule {glob!r} asks for {pin!r}, which is neither a placement nor a strategy",
            where="plan",
            todo=(f"did you mean {near[0]!r}? " if near else "")
            + f"use Shard(dim), Replicate() or one of {', '.join(sorted(STRATEGIES))}",
        )
    if isinstance(pin, Replicate | dtensor.Replicate):
        return Strategy("whole")
    if isinstance(pin, Shard | dtensor.Shard) and not getattr(pin, "factor", 0):
        return pin.dim
    if isinstance(pin, Strategy):
        return pin
    raise TpCompileError(
        f"the pin for {glob!r} is {pin!r}, which is not a placement",
        where="plan",
        todo=f"use Shard(dim), Replicate() or one of {', '.join(sorted(STRATEGIES))}",
    )


def _needs_no_weights(strategy: Strategy | int) -> bool:
    """Whether a rule may name a module without parameters of its own."""
    return isinstance(strategy, Strategy) and (strategy.division == "any" or strategy.sequence)


def _wish(glob: str, pin: Pin, strategy: Strategy | int, target: Target, names: Names, own: bool) -> Wish:
    want: Division | int = strategy if isinstance(strategy, int) else strategy.division
    owner = names.modules.get(target.param.rpartition(".")[0])
    if isinstance(owner, nn.Embedding) and isinstance(want, str):
        # Of a table, rows are what the lookup sums over; a head that is tied to it may ask otherwise.
        renamed: dict[str, Division] = {"out": "columns", "in": "rows"}
        want = renamed.get(want, want)
    return Wish(glob, pin if isinstance(pin, str) else str(pin), want, target.direct, own)


def _unused(glob: str, pin: Pin, names: Names, own: bool) -> str:
    if own:
        return f"the rule {glob!r}: {pin!r} of the model's own plan names nothing in it"
    if names.modules_of(glob):
        raise TpCompileError(
            f"the rule {glob!r} names modules that have no parameters of their own",
            where="plan",
            todo="name the modules inside it, or its parameters",
        )
    near = names.nearest(glob)
    raise TpCompileError(
        f"the pin {glob!r} names no module or parameter with weights",
        where="plan",
        todo=f"did you mean {', '.join(near)}?" if near else "see model.named_parameters()",
    )


def _uncovered(best: Mapping[str, object], names: Names) -> list[str]:
    """Matrices that the model's own plan does not mention."""
    covered = {names.params[name] for name in best}
    owners = {n: names.modules.get(n.rpartition(".")[0]) for n in names.params.values()}
    left = [
        n
        for n, owner in owners.items()
        if n not in covered
        and owner is not None
        and sum(size != 1 for size in owner.get_parameter(n.rpartition(".")[2]).shape) >= 2
    ]
    stars = list(dict.fromkeys(map(starred, left)))
    if not stars:
        return []
    return [f"no rule of the model's own plan covers {', '.join(stars)}: placed automatically"]
