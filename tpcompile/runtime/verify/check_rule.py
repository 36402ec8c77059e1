"""``tpcompile.check_rule``: everything that an operator's rule allows, tried on simulated ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import checked
from tpcompile.ir.nodes import overloads_of
from tpcompile.ir.torch_internals import OpOverload, OpOverloadPacket, tree_map
from tpcompile.rules.choices import Choice
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import operator_of

from .rule_program import Case, Operand, RuleProgram, operands_of
from .run_rule import compare, compare_gradients

_MOST_PAIRS = 200
"""Of ways on two sub-axes: their number is the square of those on one."""

Try = tuple[
    Callable[[RuleProgram, tuple[int, ...], Sequence[Choice]], None], tuple[int, ...], tuple[Choice, ...]
]


@dataclass(frozen=True)
class RuleReport:
    """What trying a rule has found; ``print`` shows it.

    Attributes:
        op: the operator.
        rule: its rule for the example's shapes; or why it has none, and takes whole operands.
        ways: the ways that were tried, such as ``(S(0), R) -> S(0)``.
        wrong: those that compute something else than the whole operator: how, on how many ranks, and what.
        runs: how many runs that were.
    """

    op: str
    rule: str
    ways: tuple[str, ...]
    wrong: tuple[str, ...]
    runs: int

    @property
    def ok(self) -> bool:
        """Whether every way computes what the whole operator does."""
        return not self.wrong

    def __str__(self) -> str:
        found = "all right" if self.ok else f"{len(self.wrong)} wrong"
        lines = [f"{self.op}: {self.rule}", f"  {len(self.ways)} ways in {self.runs} runs: {found}"]
        lines += [f"    {way}" for way in self.ways]
        return "\n".join([*lines, *(f"  wrong: {each}" for each in self.wrong)])


@checked
def check_rule(
    op: OpOverload | OpOverloadPacket | str,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    gradients: bool = True,
) -> RuleReport:
    """Tries every way of dividing an operator that its rule allows, and compares with the whole operator.

    On 2 and 3 ranks, which divide sizes unevenly, on 2 x 2, and backward on 2; partial operands are random
    summands. A rule that passes may still be too narrow, or wrong for other options: give examples of all.

    Args:
        op: the operator, its packet, or its name, as for ``register_rule``.
        example_args: its arguments, with tensors of float64 for narrow limits; at least 4 along every
            dimension that may be divided, and no two sizes equal, show most.
        example_kwargs: its keyword arguments.
        gradients: try backward as well.

    Raises:
        TpCompileError: there is no such operator, or it fails on the example.
    """
    with torch.random.fork_rng(devices=[]):
        program = _program(operator_of(op, "check_rule"), tuple(example_args), dict(example_kwargs or {}))
        return _tried(program, gradients)


def _tried(program: RuleProgram, gradients: bool) -> RuleReport:
    wrong: dict[str, None] = {}
    ways, runs = dict.fromkeys(map(str, program.choices())), 0
    for attempt, axis_sizes, chosen in _tries(program, gradients and _has_backward(program)):
        runs += 1
        try:
            attempt(program, axis_sizes, chosen)
        except Exception as error:  # an operator may fail on parts in any way; that it does is what counts
            text = next(iter(str(error).strip().splitlines()), type(error).__name__)
            ranks = " x ".join(map(str, axis_sizes))
            wrong[f"{'  x  '.join(map(str, chosen))} on {ranks} ranks: {text}"] = None
    rule = program.rule
    text = str(rule) if isinstance(rule, Rule) else f"whole operands only: {rule}"
    op = str(program.case.op).removesuffix(".default")
    return RuleReport(op, text, tuple(ways), tuple(wrong), runs)


def _program(op: OpOverload | OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RuleProgram:
    """The example as a program: of a packet, the first overload that takes it."""
    made: dict[int, Operand] = {}

    def operand(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return made.setdefault(id(leaf), Operand(tuple(leaf.shape), lambda _: leaf.detach().clone()))

    given, named = tree_map(operand, (args, kwargs))
    overloads = overloads_of(op)
    why = ""
    for overload in overloads:
        try:
            return RuleProgram(Case(overload, given, named))
        except Exception as error:  # the operator's own: anything may be wrong with the example
            why = why or next(iter(str(error).splitlines()), type(error).__name__)
    todo = "give arguments that the operator takes"
    raise TpCompileError(f"the example cannot be run: {why}", where=str(op), todo=todo)


def _has_backward(program: RuleProgram) -> bool:
    """Whether the whole operator has gradients."""
    case = program.case
    found = [x.clone().requires_grad_(x.is_floating_point()) for x in program.inputs]
    try:
        results = program.compute(case.args, case.kwargs, dict(zip(operands_of(case), found, strict=True)))
        for result in results:
            if result.requires_grad:
                result.sum().backward(retain_graph=True)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _tries(program: RuleProgram, gradients: bool) -> Iterator[Try]:
    for ranks in (2, 3):
        yield from ((compare, (ranks,), (choice,)) for choice in program.choices(ranks))
    yield from ((compare, (2, 2), pair) for pair in itertools.islice(program.pairs(), _MOST_PAIRS))
    if gradients:
        yield from ((compare_gradients, (2,), (choice,)) for choice in program.choices(2))
