"""Runs one step of a rank's program on tensors without values, and takes down what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError

from .inputs import FakeInputs
from .local_program import LocalProgram
from .operations import extent
from .recorder import Label, Moment, Operation, Recorder, Transfer

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepRun:
    """What a step has taken.

    Attributes:
        events: what was run.
        peaks: per part of the program, the moment when most was alive; weights, caches that are given, and an
            optimizer's states do not count.
        sent: collectives.
        cache: bytes of the caches behind the step,
        given_cache: and before it.
        result: bytes of the largest result.
        states: bytes of the optimizer's states.
    """

    events: list[Operation]
    peaks: Mapping[Label, Moment]
    sent: Counter[Transfer]
    cache: int
    given_cache: int
    result: int
    states: int = 0


def run_step(
    module: GraphModule,
    specs: Sequence[OutputSpec],
    inputs: FakeInputs,
    optimizer: Optimizer | None,
) -> StepRun:
    """Runs a forward, and with an optimizer a backward and its update.

    Args:
        module: the rank's graph.
        specs: its results.
        inputs: gives its inputs.
        optimizer: makes an optimizer, for a step of training.

    Raises:
        TpCompileError: there is no loss, or nothing to train.
    """
    program = LocalProgram(module)
    recorder = Recorder(program.where, inputs.layout.axis_sizes)
    given = inputs.of(module.graph)
    for value in (*given, *inputs.given.values()):
        if isinstance(value, Tensor):
            recorder.hold(value, counts=False)
    caches = [v for (_, name), v in inputs.given.items() if name in inputs.caches]
    before = sum(map(extent, caches))
    training = optimizer is not None
    with inputs.mode, recorder, torch.set_grad_enabled(training):
        results = program.run(given)
        cached = [x for x, spec in zip(results, specs, strict=True) if spec.divided and isinstance(x, Tensor)]
        others = [x for x, spec in zip(results, specs, strict=True) if not spec.divided]
        sizes = [extent(x) for x in others if isinstance(x, Tensor)]
        after = sum({x.untyped_storage()._cdata: extent(x) for x in cached}.values())
        del results, cached
        if training:
            params = [v for v in inputs.given.values() if isinstance(v, Tensor) and v.requires_grad]
            _backward(others, params, recorder)
    states = _update(optimizer, params, recorder, program) if optimizer is not None else 0
    sends = (event.sent for event in recorder.events if event.sent is not None)
    sent = Counter(each._replace(axes=(), axis_sizes=()) for each in sends)  # whichever ranks they are
    return StepRun(recorder.events, recorder.peaks, sent, after, before, max(sizes, default=0), states)


def _backward(results: list[Any], params: list[Tensor], recorder: Recorder) -> None:
    """From the loss, if a single number among the results wants a gradient, else from the sum of all.

    ``results`` is emptied, as a loop of training forgets everything but the loss.
    """
    wanted = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if not wanted or not params:
        raise TpCompileError(
            "nothing of the result depends on a weight that is trained",
            where='mode="train"',
            todo="give a model whose parameters want gradients, and a call with a loss or results",
        )

    def note(param: Tensor) -> None:
        assert param.grad is not None
        recorder.gradients += extent(param.grad)

    for param in params:
        param.register_post_accumulate_grad_hook(note)
    losses = [x for x in wanted if x.numel() == 1]
    loss = losses[0] if losses else torch.stack([x.sum().to(torch.float32) for x in wanted]).sum()
    results.clear()
    del wanted, losses
    loss.backward()


def _update(make: Optimizer, params: list[Tensor], recorder: Recorder, program: LocalProgram) -> int:
    """A second update of an optimizer, whose states are there by then; returns the bytes of these.

    It runs outside of the mode that makes tensors without values: step counters are real numbers.
    """
    optimizer = make(params)
    before, run = recorder.live, len(recorder.events)
    with recorder, torch.no_grad():
        program.label = ("update", "first")
        optimizer.step()
        states = recorder.live - before
        recorder.peaks.pop(("update", "first"), None)
        recorder.forget(run)
        program.label = ("update", "next")
        optimizer.step()
    seen = recorder.peaks[("update", "next")]
    recorder.peaks[("update", "next")] = Moment(seen.live - states, seen.gradients)
    return states
