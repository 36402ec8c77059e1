"""``tpcompile.verify``: all ranks in one process, against the model as the python that it is."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import checked
from tpcompile.ir.unwrap import unwrapped_copy
from tpcompile.lowering.simulate import lower_all
from tpcompile.planner.options import Options
from tpcompile.planner.search.cost import CostModel
from tpcompile.runtime.read_request import (
    Bytes,
    Dynamic,
    Keywords,
    Passes,
    PlanLike,
    Ranks,
    example_call,
    read_options,
)

from .assemble import RanksDiffer
from .compare import LIMITS
from .in_double import double_by_default, widened
from .locate import locate
from .outcome import Finding, Key, refuse_nothing
from .report import Difference, Report
from .sensitivity import sensitive
from .simulated_calls import simulated
from .tokens import Steps, greedy
from .trial import Lower, SimulatedCompiler, Trial


@checked
def verify(
    model: nn.Module,
    ranks: Ranks,
    example_args: Sequence[Any] = (),
    example_kwargs: Keywords = None,
    *,
    gradients: bool = True,
    generate: Steps = 0,
    plan: PlanLike = "auto",
    dynamic: Dynamic = True,
    cost_model: CostModel | str | None = None,
    memory: Bytes | None = None,
    passes: Passes = (),
    sequence_parallel: bool = False,
) -> Report:
    """Runs a model as it would run on some ranks, all in this process, and compares with the model itself.

    What is compared: results, buffers and attributes that the call changes, caches, and gradients. Where
    something differs, values of the captured and of the sharded graph are compared one by one, and the
    first that differs is reported.

    Args:
        model: any module with weights, in eval mode if it draws random numbers; it stays as it is.
        ranks: how many ranks.
        example_args: see ``parallelize``, as for all that are not named here.
        example_kwargs: keyword arguments of that call.
        gradients: compare gradients as well, if parameters or arguments want some.
        generate: how many tokens to generate greedily behind the example, and to compare.
        passes: passes to run after the compiler's own.

    Raises:
        TpCompileError: the model cannot be compiled for these ranks, or not run in this way.
    """
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        raise TpCompileError(
            "the model has no weights: they are on the meta device",
            where=type(model).__name__,
            todo="make it on a real device, if need be with fewer layers; random weights will do",
        )
    model = unwrapped_copy(model)
    asked = (plan, cost_model, "cpu", dynamic, memory, passes)
    options = read_options(model, *asked, sequence_parallel=sequence_parallel)
    if options.custom:
        raise TpCompileError(
            "modules with custom strategies run on processes only",
            where=", ".join(options.custom),
            todo="parallelize the model, and call its verify()",
        )
    bound = example_call(model, example_args, example_kwargs, dynamic)
    return examine(model, VerifyRequest(bound, options, ranks, gradients, generate))


@dataclass(frozen=True)
class VerifyRequest:
    """What to examine.

    Attributes:
        bound: a call.
        options: what it is compiled with.
        ranks: how many ranks.
        gradients: compare gradients as well.
        generate: how many tokens to generate.
        lower: makes the ranks' programs.
        exact: the model's python computes in double precision, where it says otherwise too.
    """

    bound: dict[str, Any]
    options: Options
    ranks: int
    gradients: bool = True
    generate: int = 0
    lower: Lower = lower_all
    exact: bool = False


def examine(model: nn.Module, request: VerifyRequest) -> Report:
    """See ``verify``; the model has weights."""
    began = time.perf_counter()
    report = _examined(model, request)
    if report.limit > LIMITS[torch.float64]:
        right = not any(f.sort == "token" for f in report.wrong)
        exact = _in_double(model, replace(request, generate=0) if right else request)
        if exact is not None and exact.ok and report.wrong:
            report = replace(report, kind="numerics", first_difference=None)
        elif exact is not None and not exact.ok:
            report = exact
        report = replace(report, notes=(*report.notes, _said_of(exact)))
    return replace(report, seconds=time.perf_counter() - began)


def _examined(model: nn.Module, request: VerifyRequest) -> Report:
    """The report for a model in its own precision."""
    compiler = SimulatedCompiler(request.options, request.ranks, request.lower, exact=request.exact)
    trial = Trial(copy.deepcopy(model), request.bound, compiler, request.gradients)
    want = trial.python()
    findings = [f for f in trial.compare_ranks(want, trial.on_ranks()) if not _is_absent(f, want)]
    if request.generate:
        findings.append(_tokens(model, request))
    refuse_nothing(model, want)
    learned = not request.gradients or any(f.sort == "gradient" for f in findings)
    notes = () if learned else ("no gradients were compared: no result has any",)
    kinds = {t.dtype for t in (*model.parameters(), *want.values()) if isinstance(t, Tensor)}
    precision = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds if k.is_floating_point))
    report = Report(request.ranks, precision, tuple(findings), trial.limit, "", notes=notes)
    if report.wrong and (found := sensitive(trial, want, report)) is not None:
        kind, note = found
        report = replace(report, kind=kind, notes=(*notes, note))
    elif report.wrong:
        kind, first = locate(trial, want)
        report = replace(report, kind=kind, first_difference=first or _worst(report))
    return report


def _is_absent(finding: Finding, want: Mapping[Key, Any]) -> bool:
    """Whether a gradient came neither to the model nor to the ranks, so that nothing was compared."""
    nothing = finding.sort == "gradient" and want.get(("gradient", finding.name)) is None
    return nothing and finding.error == 0.0


def _worst(report: Report) -> Difference:
    """What is wrong, where no value of a graph is."""
    finding = max(report.wrong, key=lambda one: one.error)
    why = "no value of the graph before it differs"
    return Difference(f"the {finding.sort} {finding.name}", "", "", "", "", "", finding.error, why=why)


def _tokens(model: nn.Module, request: VerifyRequest) -> Finding:
    """Whether all ranks together generate the tokens that the model does."""
    wanted = greedy(copy.deepcopy(model), request.bound, request.generate)
    try:
        with simulated(model, SimulatedCompiler(request.options, request.ranks, request.lower)) as copied:
            same = greedy(copied, request.bound, request.generate) == wanted
    except RanksDiffer:
        same = False
    return Finding("token", f"{request.generate} tokens", 0.0 if same else math.inf)


def _said_of(exact: Report | None) -> str:
    """What the run in float64 has shown."""
    if exact is None:
        return "it does not run in float64: what is smaller than rounding is not seen"
    return f"in float64 the error is {max((f.error for f in exact.findings), default=0.0):.1e} at most"


def _in_double(model: nn.Module, request: VerifyRequest) -> Report | None:
    """The report in float64; None if the model cannot be run in it."""
    wide = copy.deepcopy(model).double()
    try:
        with double_by_default():
            return _examined(wide, replace(request, bound=widened(request.bound), exact=True))
    except (TpCompileError, RuntimeError):  # its python wants the type that it was made in
        return None
