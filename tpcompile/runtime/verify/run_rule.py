"""Runs a way of computing one call on simulated ranks, and compares with the whole call, backward as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.placements import Placement, Replicate, Shard
from tpcompile.lowering.simulate import run
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.choices import Choice

from .assemble import lay_out, put_together
from .rule_program import RuleProgram, completed, operands_of


def compare(program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice]) -> None:
    """Runs a choice per sub-axis on all ranks and compares the values.

    Raises:
        AssertionError: the ranks do not compute the whole results.
    """
    placed = program.placed(axis_sizes, chosen)
    with torch.no_grad():
        ranks = run(placed, _feeds(program, placed, axis_sizes))
    _compare(program, axis_sizes, chosen, ranks)


def compare_gradients(program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice]) -> None:
    """The same for gradients: those of whole and partial values are whole, those of divided ones divided.

    Raises:
        AssertionError: a rank's gradient of an input is not what belongs to the input's placement.
    """
    whole = [x.clone().requires_grad_(has_fractions(x)) for x in program.inputs]
    values = dict(zip(operands_of(program.case), whole, strict=True))
    results = program.compute(program.case.args, program.case.kwargs, values)
    used = [i for i, y in enumerate(results) if y.requires_grad]
    if not used:
        return
    seeds = [torch.randn_like(results[i]) for i in used]
    asked = [x for x in whole if x.requires_grad]
    expected = torch.autograd.grad([results[i] for i in used], asked, seeds, allow_unused=True)

    placed = program.placed(axis_sizes, chosen, gradients=True)
    feeds = _feeds(program, placed, axis_sizes)
    leaves = [[x.requires_grad_(has_fractions(x)) for x in feed] for feed in feeds]
    ranks = run(placed, leaves)
    layouts, out_layouts = program.layouts()
    outputs, gradients = [], []
    for i, seed in zip(used, seeds, strict=True):
        placements = [_gradient(s.outputs[i]) for s in chosen]
        gradients += lay_out(seed, out_layouts[i], axis_sizes, placements)
        outputs += [r[i] for r in ranks]
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    flat = [x for feed in leaves for x in feed if x.requires_grad]
    got = torch.autograd.grad([o for o, _ in pairs], flat, [g for _, g in pairs], allow_unused=True)
    found = iter(got)
    by_rank = [[next(found) if x.requires_grad else None for x in feed] for feed in leaves]
    wanted = iter(expected)
    wants = [program.wants(s) or [] for s in chosen]
    for k, x in enumerate(whole):
        if not x.requires_grad:
            continue
        want = next(wanted)
        parts = [
            torch.zeros_like(feed[k]) if grad[k] is None else grad[k]
            for feed, grad in zip(leaves, by_rank, strict=True)
        ]
        placements = [_gradient(w[k]) for w in wants]
        whole_gradient = put_together(parts, layouts[k], axis_sizes, placements, program.tolerance)  # type: ignore[arg-type]
        wanted_gradient = torch.zeros_like(x) if want is None else want
        _close(whole_gradient, wanted_gradient, f"gradient of operand {k}", program.tolerance)


def _gradient(placement: Placement) -> Placement:
    return placement if isinstance(placement, Shard) else Replicate()


def _feeds(program: RuleProgram, placed: GlobalProgram, axis_sizes: tuple[int, ...]) -> list[list[Tensor]]:
    torch.manual_seed(1)
    layouts, _ = program.layouts()
    columns = []
    for node, value, layout in zip(
        placed.graph.find_nodes(op="placeholder"), program.inputs, layouts, strict=True
    ):
        columns.append(lay_out(value, layout, axis_sizes, [d.params[node] for d in placed.decisions]))
    return [list(row) for row in zip(*columns, strict=True)]


def _compare(
    program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice], ranks: list[Any]
) -> None:
    _, layouts = program.layouts()
    for i, want in enumerate(program.expected):
        placements = [completed(s.outputs[i]) for s in chosen]
        got = put_together([r[i] for r in ranks], layouts[i], axis_sizes, placements, program.tolerance)
        assert got.dtype == want.dtype, f"result {i} is {got.dtype}, not {want.dtype}"
        _close(got, want, f"result {i}", program.tolerance)


def _close(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    # Of complex numbers both parts: one of them may be infinite, and the other rounded.
    got, want = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (got, want))
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
