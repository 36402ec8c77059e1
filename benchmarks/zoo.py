"""Every type of an auto class of the installed transformers, tiny, on two simulated ranks (or more).

    python -m benchmarks.zoo [--auto causal|...|all] [--types a,b,...] [--limit SECONDS] [--static]
        [--ranks N] [--out FILE]
    python -m benchmarks.zoo --report FILE...

One line per type: whether it is captured, proved, and right (the largest errors of results and of gradients
against the model's python), the share of the weights that a rank holds, how many collectives, what is
computed whole for want of a rule, and which large weights stay whole. Each type runs in a process of its own
that is stopped after the limit. ``--auto all`` takes every type once, by the first class that has it.
``--out`` keeps all that was found, one JSON object a line; ``--report`` makes the lists of docs/models.md
from such files, and says what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from benchmarks.report_zoo import line, report
from benchmarks.tiny_inputs import wants_other_numbers
from benchmarks.tiny_models import default_problem, tiny_model
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.ir.names import starred
from tpcompile.lowering import simulate
from tpcompile.planner.collective import collectives_of
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.make_plan import fallbacks_of
from tpcompile.planner.plan_layout import layout_of
from tpcompile.runtime.read_request import read_options
from tpcompile.runtime.verify.one_process import VerifyRequest, examine

SHORT = {
    "AutoModelForCausalLM": "causal",
    "AutoModelForMaskedLM": "masked",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForImageClassification": "image",
    "AutoModelForSpeechSeq2Seq": "speech",
    "AutoModelForCTC": "ctc",
    "AutoModelForAudioClassification": "audio",
    "AutoModelForZeroShotImageClassification": "clip",
    "AutoModelForSequenceClassification": "sequence",
}


def _auto_classes() -> dict[str, tuple[str, list[str]]]:
    """transformers' auto classes by a short name, with the types that each knows; the most general last."""
    found: dict[str, tuple[str, list[str]]] = {}
    classes = vars(modeling_auto)
    last = ["AutoModelForPreTraining", "AutoBackbone", "AutoModel"]
    tasks = [n for n in classes if n.startswith("AutoModelFor") and n not in (*SHORT, *last)]
    for name in [*SHORT, *tasks, *last]:
        if (mapping := getattr(classes[name], "_model_mapping", None)) is not None:
            short = SHORT.get(name, name.removeprefix("AutoModelFor"))
            found[short] = (name, sorted(mapping._model_mapping))
    return found


AUTO = _auto_classes()


def first_classes() -> list[tuple[str, str]]:
    """Every type, with the first auto class that knows it."""
    first: dict[str, str] = {}
    for auto, (_, kinds) in AUTO.items():
        for kind in kinds:
            first.setdefault(kind, auto)
    return [(auto, kind) for kind, auto in first.items()]


def measure(kind: str, auto: str, dynamic: bool, ranks: int, stages: list[str]) -> dict[str, Any]:
    """Verifies one type: captures, plans, proves, and runs results and gradients on all ranks.

    Args:
        kind: the type.
        auto: the short name of its auto class.
        dynamic: whether batch and sequence stay open, as they are by default.
        ranks: how many share the model.
        stages: told what is being done, for the case that it fails.
    """
    stages.append("build")
    model, call = _example(kind, AUTO[auto][0])
    stages.append("verify")
    programs: list[GlobalProgram] = []

    def lower(program: GlobalProgram) -> Sequence[GraphModule]:
        programs.append(program)
        return simulate.lower_all(program)

    options = read_options(model, "auto", None, "cpu", dynamic, None, ())
    report = examine(model, VerifyRequest(call, options, ranks, lower=lower))
    program = programs[-1]
    layout = layout_of(program, whole_tensors(model))
    used = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in _used(layout)]
    errors = {f.sort: [g.error for g in report.findings if g.sort == f.sort] for f in report.findings}
    return {
        "ok": report.ok,
        "kind of fault": report.kind,
        "first": "" if report.ok or report.first_difference is None else report.first_difference.node,
        "precision": report.precision,
        "errors": {sort: max(found) for sort, found in errors.items()},
        "share": max(sum(_held(layout, name, r) for name in used) for r in range(ranks))
        / sum(_size(layout, name) for name in used),
        "collectives": sum(c.count for c in collectives_of(program)),
        "where": [f"{c.count} {c.kind} {c.where}" for c in collectives_of(program)],
        "fallbacks": list(fallbacks_of(program)),
        "whole": _whole(layout, used),
        "notes": [*program.captured.notes, *report.notes],
    }


def _used(layout: WeightLayout) -> set[str]:
    return set(layout.params) - set(layout.undecided)


def _example(kind: str, auto: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a call of it; in single precision if the model cannot do double."""
    failed: list[Exception] = []
    for dtype in (torch.float64, torch.float32):
        try:
            model, inputs = tiny_model(kind, auto, dtype)
            call = bind_call(model, (), inputs)
            with torch.no_grad():
                whole = [x for x in tree_leaves(model(**call)) if torch.is_tensor(x)]
            if all(bool(x.isfinite().all()) for x in whole):
                return model, call
            failed.append(ValueError("the unsharded model's own results are not finite"))
        except Exception as error:
            failed.append(error)
            if not wants_other_numbers(error):
                break
    raise failed[0]


def _size(layout: WeightLayout, name: str) -> int:
    return math.prod(layout.params[name].shape) * layout.params[name].dtype.itemsize


def _held(layout: WeightLayout, name: str, rank: int) -> int:
    return math.prod(layout.local_shape(name, rank)) * layout.params[name].dtype.itemsize


def _whole(layout: WeightLayout, used: list[str]) -> dict[str, float]:
    """Weights with at least 1 % of the bytes that every rank holds whole: their share, layers added up."""
    total, found = sum(_size(layout, name) for name in used), dict[str, float]()
    for name in used:
        if _held(layout, name, 0) == _size(layout, name):
            found[starred(name)] = found.get(starred(name), 0.0) + _size(layout, name) / total
    return {name: round(size, 4) for name, size in found.items() if size >= 0.01}


def _child(kind: str, auto: str, dynamic: bool, ranks: int, answer: Connection) -> None:
    stages: list[str] = []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        found = measure(kind, auto, dynamic, ranks, stages)
    except Exception as error:
        refused = isinstance(error, TpCompileError)
        trace = "" if refused or stages[-1] == "build" else traceback.format_exc()[-3000:]
        found = {
            "failed": f"{type(error).__name__}: {error}"[:1500],
            "stage": stages[-1],
            "refused": refused,
            "trace": trace,
        }
        if stages[-1] == "build" and (problem := default_problem(kind, AUTO[auto][0])):
            found |= {"stage": "default", "failed": problem[:1500]}
    found["ranks"] = ranks
    found["cpu"] = round(time.process_time(), 1)
    answer.send(found)


def run(kind: str, auto: str, limit: float, dynamic: bool = True, ranks: int = 2) -> dict[str, Any]:
    """Measures one type in a process of its own."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, auto, dynamic, ranks, other))
    start = time.monotonic()
    process.start()
    other.close()
    try:
        found: dict[str, Any] = (
            mine.recv() if mine.poll(limit) else {"failed": f"more than {limit:g} s", "stage": "time"}
        )
    except EOFError:
        found = {"failed": "the process died", "stage": "died"}
    process.kill()
    process.join()
    return {"kind": kind, "auto": auto, "seconds": round(time.monotonic() - start, 1), **found}


def _read(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for text in Path(path).read_text().splitlines():
            yield json.loads(text)


def main() -> None:
    """Prints the table and a summary, or the report of earlier runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--auto", choices=[*AUTO, "all"], default="causal")
    parser.add_argument("--types", help="comma-separated; all by default")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per type")
    parser.add_argument(
        "--static", action="store_true", help="capture with fixed sizes: three times as quick"
    )
    parser.add_argument("--out", help="a file to add results to; types that it has already are left out")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print a report of such files")
    options = parser.parse_args()
    types = {auto: kinds for auto, (_, kinds) in AUTO.items()}
    if options.report:
        print(report(_read(options.report), types))
        return
    asked = [(options.auto, kind) for kind in types.get(options.auto, ())] or first_classes()
    chosen = options.types.split(",") if options.types else None
    out = Path(options.out) if options.out else None
    seen = {(f["auto"], f["kind"]) for f in _read([options.out])} if out and out.exists() else set()
    found = []
    for auto, kind in asked:
        if (auto, kind) in seen or (chosen and kind not in chosen):
            continue
        found.append(run(kind, auto, options.limit, not options.static, options.ranks))
        print(line(found[-1]), flush=True)
        if out:
            with out.open("a") as file:
                print(json.dumps(found[-1]), file=file)
    print(report(found, types), file=sys.stderr)


if __name__ == "__main__":
    main()
