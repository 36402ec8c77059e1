"""Looks for divisions that work although the rule does not offer them, by trying all simple ones.

On two ranks: at most one dimension of every operand is cut in halves, all of the same size, and any
other operands are whole or random summands. The operator runs on the raw pieces; integer constants
are tried as they are and halved. Where all results can be put together to the whole ones, the
division works, and random data makes sure that this is not a coincidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.placements import Partial, Placement, R, Shard
from tpcompile.runtime.verify.assemble import RanksDiffer, Unknown, lay_out, put_together
from tpcompile.runtime.verify.rule_program import TOLERANCE, Operand, RuleProgram, operands_of

RANKS = 2
SMALLEST_CONSTANT = 4
"""Smaller integers are dimensions, not sizes."""

Pieces = list[list[Tensor]]


def missing(program: RuleProgram) -> list[str]:
    """Divisions that work and are not offered, as ``(S(0), R) -> S(0)``."""
    offered = {tuple(w): [] for w in map(program.wants, program.choices()) if w}  # type: ignore[var-annotated]
    for choice in program.choices():
        offered[tuple(program.wants(choice) or ())].append(choice.outputs)
    found = []
    for placements in _choices(program):
        for works in _works(program, placements):
            if not any(_covered(outputs, works) for outputs in offered.get(placements, [])):
                results = ", ".join(" or ".join(map(str, w)) for w in works)
                found.append(f"({', '.join(map(str, placements))}) -> {results}")
                break
    return found


def _covered(outputs: tuple[Placement, ...], works: list[list[Placement]]) -> bool:
    return all(o in w for o, w in zip(outputs, works, strict=True))


def _choices(program: RuleProgram) -> Iterator[tuple[Placement, ...]]:
    """Placements of the operands: equal sizes cut together, or one of them, or nothing; the rest R or P."""
    operands = operands_of(program.case)
    sizes = {s for o in operands for s in o.shape if s and s % RANKS == 0}
    seen = set()
    for size in (0, *sorted(sizes)):
        cuts = [_kinds(o, x, size) for o, x in zip(operands, program.inputs, strict=True)]
        for choice in itertools.product(*cuts):
            if choice not in seen and any(p != R for p in choice):
                seen.add(choice)
                yield choice


def _kinds(operand: Operand, value: Tensor, size: int) -> list[Placement]:
    shards: list[Placement] = [Shard(d) for d, s in enumerate(operand.shape) if s == size]
    summable = value.dtype.itemsize > 1 and (value.dtype.is_floating_point or value.dtype.is_complex)
    return [R, *shards, *([Partial()] if summable else [])]


def _works(program: RuleProgram, placements: tuple[Placement, ...]) -> Iterator[list[list[Placement]]]:
    """For every reading of the constants with which it works: per result, all placements that fit."""
    torch.manual_seed(2)
    columns = [
        lay_out(x, [[s] for s in x.shape], (RANKS,), [p])
        for x, p in zip(program.inputs, placements, strict=True)
    ]
    pieces = [list(row) for row in zip(*columns, strict=True)]
    for constant in (None, *sorted(_constants((program.case.args, program.case.kwargs)))):
        results = _run(program, pieces, constant)
        if results is None:
            continue
        fits = [_fits(parts, want) for parts, want in zip(results, program.expected, strict=True)]
        if all(fits):
            yield fits


def _constants(arg: Any) -> set[int]:
    if isinstance(arg, list | tuple):
        return set().union(*map(_constants, arg))
    if isinstance(arg, dict):
        return _constants(tuple(arg.values()))
    return {arg} if type(arg) is int and arg >= SMALLEST_CONSTANT and arg % RANKS == 0 else set()


def _halve(arg: Any, constant: int | None) -> Any:
    if isinstance(arg, list | tuple):
        return type(arg)(_halve(a, constant) for a in arg)
    return arg // RANKS if type(arg) is int and arg == constant else arg


def _run(program: RuleProgram, pieces: Pieces, constant: int | None) -> Pieces | None:
    case = program.case
    args, kwargs = _halve(case.args, constant), {k: _halve(v, constant) for k, v in case.kwargs.items()}
    ranks = []
    for row in pieces:
        values = dict(zip(operands_of(case), row, strict=True))
        try:
            ranks.append(program.compute(args, kwargs, values))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
    if any(len(parts) != len(program.expected) for parts in ranks):
        return None
    return [list(parts) for parts in zip(*ranks, strict=True)]


def _fits(parts: list[Tensor], want: Tensor) -> list[Placement]:
    kinds: list[Placement] = [R, *(Partial(op) for op in ("sum", "max", "min"))]
    kinds += [Shard(d) for d, s in enumerate(want.shape) if s % RANKS == 0]
    return [k for k in kinds if _fit(parts, want, k)]


def _fit(parts: list[Tensor], want: Tensor, placement: Placement) -> bool:
    shape = list(want.shape)
    if isinstance(placement, Shard):
        shape[placement.dim] //= RANKS
    if any(list(p.shape) != shape for p in parts):
        return False
    if isinstance(placement, Partial) and (
        want.dtype is torch.bool or (want.dtype.is_complex and placement.op != "sum")
    ):
        return False
    try:
        got = put_together(parts, [[s] for s in want.shape], (RANKS,), [placement])
    except (RanksDiffer, Unknown):
        return False
    return torch.allclose(
        got.double() if not got.is_complex() else got,
        want.double() if not want.is_complex() else want,
        rtol=TOLERANCE,
        atol=TOLERANCE,
        equal_nan=True,
    )
