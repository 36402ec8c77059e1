"""``sharded.verify``: a sharded model on its mesh, against the model that all ranks' weights make up."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call
from tpcompile.ir.module_tensors import every_name, whole_tensors
from tpcompile.ranks.compare_calls import compare_weights
from tpcompile.ranks.exchange import exchange
from tpcompile.runtime.copy_model import as_original
from tpcompile.runtime.guards import without_guards

from .compare import TypesSeen, is_rough, kinds_of, limit_of
from .one_process import VerifyRequest, examine
from .outcome import Finding, Key, compared, refuse_nothing, run_python, worst_of
from .report import Report
from .tokens import greedy

if TYPE_CHECKING:
    from tpcompile.runtime.runtime import Runtime


def verify_live(
    model: nn.Module, runtime: Runtime, bound: dict[str, Any], gradients: bool, generate: int
) -> Report:
    """See ``ShardedModule.verify``; all ranks are here, with the same call."""
    began = time.perf_counter()
    group = runtime.compiler.group
    whole = whole_copy(model, runtime)
    compare_weights(group, whole_tensors(whole))
    learning = gradients and any(p.requires_grad for p in whole.parameters())
    alone = copy.deepcopy(whole)
    with TypesSeen() as seen:
        want = run_python(alone, bound, learning)
    refuse_nothing(alone, want)
    if group is not None:  # what the first rank's python computes is right for all, but for its gradients
        mine = {key: value for key, value in want.items() if key[0] == "result"}
        want |= exchange(group, "verify: the model's results", mine)[0]
    got = run_python(copy.deepcopy(model), bound, learning)
    found = compared(*_side_by_side(got, want, runtime))
    if generate:
        same = greedy(copy.deepcopy(model), bound, generate) == greedy(copy.deepcopy(whole), bound, generate)
        found.append(Finding("token", f"{generate} tokens", 0.0 if same else float("inf")))
    limit = limit_of(
        seen.kinds | kinds_of([*whole.parameters(), list(want.values()), flatten_call(bound)[0]])
    )
    everyone = exchange(group, "verify", found) if group is not None else [found]
    findings = tuple(worst_of(everyone, limit))
    precision = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in whole.parameters()}))
    report = Report(runtime.compiler.ranks, precision, findings, limit, "")
    if report.wrong or is_rough(limit):
        report = _explained(report, whole, bound, runtime, learning)
        if group is not None:
            report = exchange(group, "verify: where it begins", report)[0]
    return replace(report, seconds=time.perf_counter() - began)


def whole_copy(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model before it was sharded, with the weights that the ranks have now; all ranks must call it."""
    memo: dict[int, Any] = {}
    for _, tensor in every_name(model):
        if id(tensor) not in memo and isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach().clone()
            learns = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if learns else full
    with without_guards(model), as_original(model, runtime):
        return copy.deepcopy(model, memo)


def _side_by_side(
    got: Mapping[Key, Any], want: Mapping[Key, Any], runtime: Runtime
) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """Values that can be compared on this rank: what is divided is gathered, caches are cut."""
    mine, theirs = {}, {}
    for key, value in want.items():
        part = got.get(key)
        mine[key] = part.full_tensor() if isinstance(part, DTensor) else part
        held = runtime.caches.get(key[1]) if key[0] == "result" else None
        if held is not None and isinstance(value, Tensor) and runtime.layout is not None:
            axis_sizes = runtime.layout.axis_sizes
            value = held.part(value, axis_sizes, runtime.layout.coordinates(runtime.compiler.rank))
        theirs[key] = value
    return mine, theirs


def _explained(
    report: Report, whole: nn.Module, bound: dict[str, Any], runtime: Runtime, learning: bool
) -> Report:
    """What is to blame: the same is simulated on every rank, from the same weights.

    In half precision also if nothing is: the simulation runs in float64 too, where rounding hides nothing.
    """
    compiler = runtime.compiler
    try:
        simulated = examine(whole, VerifyRequest(bound, compiler.options, compiler.ranks, learning))
    except TpCompileError as error:
        where = "where the difference begins" if report.wrong else "what rounding hides"
        noted = replace(report, notes=(f"it cannot be said {where}: {error.what}",))
        return replace(noted, kind="execution") if report.wrong else noted
    if not simulated.ok or not report.wrong:
        return simulated if not simulated.ok else report
    return replace(report, kind=simulated.kind or "execution")
