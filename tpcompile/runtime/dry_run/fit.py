"""``tpcompile.fit``: which numbers of ranks a model fits on, which is quickest, and which cheapest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tpcompile.capture.checkpointing import Asked
from tpcompile.errors import TpCompileError
from tpcompile.ir.check import checked
from tpcompile.ir.units import read_bytes, size_text
from tpcompile.ir.unwrap import unwrapped_copy
from tpcompile.planner.dry_run.devices import Device, device_named
from tpcompile.planner.dry_run.estimate import Mode
from tpcompile.planner.dry_run.fitted import Fit, Size
from tpcompile.planner.plan import Count
from tpcompile.planner.search.cost import CostModel
from tpcompile.runtime.find_model import model_meant
from tpcompile.runtime.read_request import PlanLike, Ranks, read_options

from .estimator import Estimator, Step
from .optimizers import read_optimizer


@checked
def fit(
    model: Any,
    memory: str | float | None = None,
    ranks: Sequence[Ranks] = range(1, 17),
    *,
    device: str | CostModel = "h100",
    mode: Mode = "decode",
    batch: Count = 1,
    seq: Count = 4096,
    optimizer: str | Callable[..., Any] = "adamw",
    checkpointing: bool | Asked | None = None,
    sequence_parallel: bool = False,
    plan: PlanLike = "auto",
    dtype: str | torch.dtype | None = None,
    keep_quantised: bool = False,
) -> Fit:
    """Which numbers of ranks a model fits on, which of them is quickest, and which cheapest per token.

    For each number the model is planned, and its step is compiled and run without values, in this process:
    no GPU, no process group, no weights. The model is captured once for all of them.

    Args:
        model: a model that is given token ids (on ``meta`` will do), a configuration of transformers, or
            what the command line takes: a folder, a ``config.json``, a name in the hub's cache.
        memory: what a rank may take, in bytes or as ``"80GiB"``; by default what the device has.
        ranks: the numbers to try.
        device: ``"h100"``, ``"h200"``, ``"b200"``, ``"a100"``, ``"cpu"``, in nodes of 8 ``"h100x8"``, or
            a ``CostModel``.
        mode: ``"decode"``: one more token for each text; ``"prefill"``: a prompt; ``"train"``: a step.
        batch: texts in a step, for all ranks together.
        seq: tokens of each text; for ``"decode"``, those in the cache.
        optimizer: see ``Plan.estimate``, as for all that follow.
        plan: see ``parallelize``.
        dtype: of the weights of a configuration or a name; by default the configuration's.
        keep_quantised: of a checkpoint's folder or name: see ``from_pretrained``. Else a quantised one
            counts as dequantised.

    Raises:
        TpCompileError: the arguments make no sense, or the model cannot be captured. What is refused for a
            single number of ranks is reported with it.
    """
    if not ranks:
        raise TpCompileError("there is no number of ranks to try", where="ranks", todo="give range(1, 17)")
    began = time.perf_counter()
    found, built = device_named(device), unwrapped_copy(model_meant(model, dtype, keep_quantised))
    limit = _limit(memory, found)
    options = read_options(built, plan, found.cost, "cpu", False, None, ())
    estimator = Estimator.of(built, options)
    step = Step(mode, batch, seq, found, read_optimizer(optimizer, found.accelerator), checkpointing)
    weights = _weights(built)
    sizes = tuple(_size(estimator, step, n, sequence_parallel, weights, limit) for n in ranks)
    if sizes and all(size.estimate is None and size.peak < limit for size in sizes):
        raise TpCompileError(sizes[0].why, where="model", todo="plan it by tpcompile.plan, which says more")
    return Fit(mode, limit, found.name, weights, sizes, time.perf_counter() - began)


def _size(estimator: Estimator, step: Step, ranks: int, sequence: bool, weights: int, limit: float) -> Size:
    if weights / ranks > limit:
        return Size(ranks, False, weights / ranks, why="an equal share of the weights is more than there is")
    try:
        estimate = estimator.estimate(step, ranks, None, sequence)
    except TpCompileError as error:
        return Size(ranks, False, weights / ranks, why=f"refused: {error.what}")
    peak = estimate.memory.peak
    fits = peak <= limit
    return Size(ranks, fits, peak, estimate, "" if fits else f"more than {size_text(limit)}")


def _limit(memory: str | float | None, device: Device) -> float:
    if memory is not None:
        return read_bytes(memory, "memory")
    if device.memory is None:
        raise TpCompileError(
            f"nobody knows how much memory {device.name} has", where="memory", todo='give it: memory="80GiB"'
        )
    return device.memory


def _weights(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
