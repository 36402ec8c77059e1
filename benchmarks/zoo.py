"""Every type of an auto class of the installed transformers, tiny, on two simulated ranks (or more).

    python -m benchmarks.zoo [--auto causal] [--types a,b,...] [--limit SECONDS] [--static] [--ranks N]
        [--out FILE]
    python -m benchmarks.zoo --report FILE...

One line per type: whether it is captured, the error against the unsharded model, the share of the weights
that a rank holds, how many collectives, what is computed whole for want of a rule, and which large weights
stay whole. Each type runs in a process of its own that is stopped after the limit. ``--out`` keeps all that
was found, one JSON object a line; ``--report`` makes the lists of docs/models.md from such files.
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
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from benchmarks.report_zoo import line, report
from benchmarks.tiny_models import default_problem, tiny_model
from tests.helpers import programs
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.export.capture_model import capture
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.ir.names import starred
from tpcompile.lowering import simulate
from tpcompile.pipeline import canonical, plan_program, rewrite, split_copy
from tpcompile.planner.collective import collectives_of
from tpcompile.planner.decisions import decisions_from_data, decisions_to_data
from tpcompile.planner.make_plan import fallbacks_of
from tpcompile.planner.plan_layout import layout_of
from tpcompile.planner.search.cost import preset

AUTO = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "ctc": ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "audio": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "clip": (
        "AutoModelForZeroShotImageClassification",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "sequence": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
"""Auto classes by a short name, with the name of transformers' table of their types."""


def measure(kind: str, auto: str, dynamic: bool, ranks: int, stages: list[str]) -> dict[str, Any]:
    """Captures, plans and runs one type.

    Args:
        kind: the type.
        auto: the short name of its auto class.
        dynamic: whether batch and sequence stay open, as they are by default.
        ranks: how many share the model.
        stages: told what is being done, for the case that it fails.
    """
    stages.append("build")
    register_cache_support()  # a cache that is returned is compared too
    model, call, whole = _reference(kind, AUTO[auto][0])
    stages.append("capture")
    base = canonical(capture(model, call, dynamic=dynamic), ranks)
    stages.append("plan")
    planned = plan_program(base, preset("cpu"), lambda _work, _axis: {})
    work = split_copy(base, planned.split_groups)
    decisions_from_data(work, decisions_to_data(planned))
    layout = layout_of(work, whole_tensors(model))
    stages.append("rewrite")
    rewrite(work, training=False)
    stages.append("lower")
    lowered = simulate.lower_all(work)
    stages.append("run")
    with torch.no_grad():
        results = programs.run_ranks(work, model, lowered=lowered, **call)
    params = dict(model.named_parameters(remove_duplicate=False))
    used = [name for name in layout.params if name not in layout.open and name in params]
    return {
        "error": max(_error(rank, whole) for rank in results),
        "share": max(sum(_held(layout, name, r) for name in used) for r in range(ranks))
        / sum(_size(layout, name) for name in used),
        "collectives": sum(c.count for c in collectives_of(work)),
        "where": [f"{c.count} {c.kind} {c.where}" for c in collectives_of(work)],
        "fallbacks": list(fallbacks_of(work)),
        "whole": _whole(layout, used),
        "notes": list(work.captured.notes),
    }


def _reference(kind: str, auto: str) -> tuple[nn.Module, dict[str, Any], list[torch.Tensor]]:
    """A model, a call of it, and its results; in single precision if the model cannot do double."""
    failed: list[Exception] = []
    for dtype in (torch.float64, torch.float32):
        try:
            model, inputs = tiny_model(kind, auto, dtype)
            call = bind_call(model, (), inputs)
            with torch.no_grad():
                whole = [x for x in tree_leaves(model(**call)) if torch.is_tensor(x)]
            if all(bool(x.isfinite().all()) for x in whole):
                return model, call, whole
            failed.append(ValueError("the unsharded model's own results are not finite"))
        except Exception as error:
            failed.append(error)
    raise failed[0]


def _error(results: list[Any], whole: list[torch.Tensor]) -> float:
    """The largest error of any result, relative to the largest element of that result."""
    worst = 0.0
    tensors = [r for r in results if torch.is_tensor(r)]
    if len(tensors) < len(whole):
        return math.inf
    for mine, true in zip(tensors, whole, strict=False):
        if mine.shape != true.shape:
            return math.inf
        scale = max(float(true.abs().max()), 1e-30) if true.numel() else 1.0
        difference = (mine.double() - true.double()).abs().max() if true.numel() else torch.zeros(())
        found = float(difference) / scale
        worst = max(worst, math.inf if math.isnan(found) else found)
    return worst


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


def kinds_of(auto: str) -> list[str]:
    """The types that an auto class knows."""
    return sorted(getattr(modeling_auto, AUTO[auto][1]))


def _read(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for text in Path(path).read_text().splitlines():
            yield json.loads(text)


def main() -> None:
    """Prints the table and a summary, or the report of earlier runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--auto", choices=AUTO, default="causal")
    parser.add_argument("--types", help="comma-separated; all by default")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per type")
    parser.add_argument(
        "--static", action="store_true", help="capture with fixed sizes: three times as quick"
    )
    parser.add_argument("--out", help="a file to add results to; types that it has already are left out")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print a report of such files")
    options = parser.parse_args()
    types = {auto: len(kinds_of(auto)) for auto in AUTO}
    if options.report:
        print(report(_read(options.report), types))
        return
    out = Path(options.out) if options.out else None
    seen = {(f["auto"], f["kind"]) for f in _read([options.out])} if out and out.exists() else set()
    found = []
    for kind in options.types.split(",") if options.types else kinds_of(options.auto):
        if (options.auto, kind) in seen:
            continue
        found.append(run(kind, options.auto, options.limit, not options.static, options.ranks))
        print(line(found[-1]), flush=True)
        if out:
            with out.open("a") as file:
                print(json.dumps(found[-1]), file=file)
    print(report(found, types), file=sys.stderr)


if __name__ == "__main__":
    main()
