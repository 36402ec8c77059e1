"""What a step of a model takes on some ranks: its programs are run for one of them, without values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from tpcompile.capture.checkpointing import Asked, read_checkpointing
from tpcompile.capture.held_caches import Held
from tpcompile.compile_program import Compiled
from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.calls import flatten_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.ir.unwrap import unwrapped_copy
from tpcompile.planner.dry_run.devices import Device, device_named
from tpcompile.planner.dry_run.estimate import Estimate, Memory, Mode, Sends, Time
from tpcompile.planner.options import Options
from tpcompile.planner.plan import Plan
from tpcompile.planner.search.cost import CostModel
from tpcompile.runtime.check_model import check_model
from tpcompile.runtime.make_program import hand_out
from tpcompile.runtime.sharded_result import defer_gathers

from .calls import next_call, sizes_of_call, token_call
from .compiler import Captures, DryCompiler
from .inputs import FakeInputs
from .optimizers import read_optimizer
from .recorder import Transfer
from .run_step import Optimizer, StepRun, run_step
from .shorten import extended, highest, left_out
from .step_time import time_of


@dataclass(frozen=True)
class Step:
    """What to estimate.

    Attributes:
        mode: a step of training, a prompt, or one more token.
        batch: texts; None for the call that the model was planned for.
        seq: tokens of each.
        device: what a rank computes on.
        optimizer: makes the optimizer of a step of training.
        checkpointing: what is run again in backward, as ``parallelize`` takes it; True: all layers, False:
            what forward itself says, None: as the model is planned.
    """

    mode: Mode
    batch: int | None
    seq: int | None
    device: Device
    optimizer: Optimizer
    checkpointing: bool | Asked | None


@dataclass
class Estimator:
    """Estimates steps of one model, for any number of ranks.

    Attributes:
        lent: gives the model, as long as it is there.
        options: what it is planned with.
        example: the call that it is planned for; None for a call with token ids.
        captures: what was captured already.
    """

    lent: Callable[[], nn.Module | None]
    options: Options
    example: dict[str, Any] | None = None
    captures: Captures = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, options: Options, example: dict[str, Any] | None = None) -> Estimator:
        """An estimator that does not keep a model's weights: only a model on ``meta`` outlives its user."""
        has_values = any(p.device.type != "meta" for p in (*model.parameters(), *model.buffers()))
        return Estimator(weakref.ref(model) if has_values else lambda: model, options, example)

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            TpCompileError: it is gone, or is sharded by now.
        """
        found = self.lent()
        if found is None:
            raise TpCompileError(
                "the model that was planned is gone", where="model", todo="keep it, or plan it on meta"
            )
        apart = unwrapped_copy(found)
        check_model(apart)
        return apart

    def of_plan(
        self,
        plan: Plan,
        mode: Mode,
        batch: int | None,
        seq: int | None,
        device: str | CostModel,
        optimizer: str | Callable[..., Any],
        checkpointing: bool | Asked | None,
        sequence: bool | frozenset[str],
    ) -> Estimate:
        """See ``Plan.estimate``.

        Raises:
            TpCompileError: see there.
        """
        if (batch is None) != (seq is None):
            raise TpCompileError(
                "batch and seq belong together", where="batch, seq", todo="give both, or none"
            )
        self._check_types(plan.layout)
        found = device_named(device)
        make = read_optimizer(optimizer, found.accelerator)
        step = Step(mode, batch, seq, found, make, checkpointing)
        return self.estimate(step, plan.ranks, plan.layout, sequence)

    def _check_types(self, layout: WeightLayout) -> None:
        for name, tensor in whole_tensors(self.model).items():
            if layout.params[name].dtype != tensor.dtype:
                raise TpCompileError(
                    f"it is of {tensor.dtype} now, the plan was made for {layout.params[name].dtype}",
                    where=name,
                    todo="plan the model again",
                )

    def estimate(
        self, step: Step, ranks: int, layout: WeightLayout | None, sequence: bool | frozenset[str]
    ) -> Estimate:
        """What a step takes on each of some ranks.

        Args:
            step: the step.
            ranks: how many ranks.
            layout: how the weights are divided; None if the step's first call is to decide it.
            sequence: whether the sequence is divided between the blocks.

        Raises:
            TpCompileError: the step cannot be compiled, or not run in this way.
        """
        options = replace(self.options, sequence=sequence)
        if step.checkpointing is not None:
            full: Asked | None = "full" if step.checkpointing is True else None
            asked = full if isinstance(step.checkpointing, bool) else step.checkpointing
            options = replace(options, checkpointing=read_checkpointing(self.model, asked))
        if options.custom:
            raise TpCompileError(
                "modules with custom strategies run on processes only",
                where=", ".join(options.custom),
                todo="estimate the model without them",
            )
        compiler = DryCompiler(options, ranks, step.device.accelerator, self.captures)
        compiled, bound, caches, sizes = self._compiled(compiler, step, layout)
        runs = list(self._runs(compiler, compiled, bound, caches, step))
        return _put_together(step, compiler, compiled, runs, sizes)

    def _compiled(
        self, compiler: DryCompiler, step: Step, layout: WeightLayout | None
    ) -> tuple[Compiled, dict[str, Any], Mapping[str, Held], tuple[int, int] | None]:
        """The step's program, its call, the caches that it is given, and its batch and length."""
        sizes = (step.batch, step.seq) if step.batch is not None and step.seq is not None else None
        if sizes is None and step.mode != "decode" and self.example is not None:
            sizes = sizes_of_call(self.model, self.example)
            compiled = compiler.compile_as((), self.model, self.example, layout)
            return compiled, self.example, {}, sizes
        if sizes is None:
            raise TpCompileError("no batch and length are given", where="batch, seq", todo="give both")
        mode: Mode = "train" if step.mode == "train" else "prefill"
        prompt = token_call(self.model, mode, *sizes)
        runs = step.mode != "decode"
        compiled = compiler.compile_as((mode, *sizes), self.model, prompt, layout, runs=runs)
        if runs:
            return compiled, prompt, {}, sizes
        caches = hand_out(compiled.planned)
        bound = next_call(self.model, compiled.planned, prompt, sizes[0])
        after = compiler.compile_as(("decode", *sizes), self.model, bound, compiled.plan.layout, caches)
        return after, bound, caches, sizes

    def _runs(
        self,
        compiler: DryCompiler,
        compiled: Compiled,
        bound: dict[str, Any],
        caches: Mapping[str, Held],
        step: Step,
    ) -> Iterator[StepRun]:
        training = step.mode == "train"
        leaves = flatten_call(bound)[0]
        layout = compiled.plan.layout
        for _, program, lowered in compiler.programs:
            graph = (lowered.training if training else None) or lowered.local
            # As a call runs it: what nobody uses beside the loss stays divided.
            module, _ = defer_gathers(graph, program.captured.whole_outputs)
            inputs = FakeInputs(
                self.model, program.captured, leaves, layout, learning=training, caches=caches
            )
            optimizer = step.optimizer if training else None
            todo = "report the model; what can be had without a run is in the plan"
            with refusing("the program does not run without values", where=f"mode={step.mode!r}", todo=todo):
                run = run_step(module, program.captured.whole_outputs, inputs, optimizer)
            yield run


def _put_together(
    step: Step,
    compiler: DryCompiler,
    compiled: Compiled,
    runs: Sequence[StepRun],
    sizes: tuple[int, int] | None,
) -> Estimate:
    program, layout = compiled.rewritten, compiled.plan.layout
    copies = left_out(program)

    def whole(of: Callable[[StepRun], float]) -> float:
        return extended([of(run) for run in runs], copies)

    moment = highest([run.peaks for run in runs], [c for c, _, _ in compiler.programs], program)
    cache, given = whole(lambda run: run.cache), whole(lambda run: run.given_cache)
    grown = (cache - given) / sizes[0] if step.mode == "decode" and sizes is not None else None
    memory = Memory(
        weights=layout.held(0),
        gradients=moment.gradients,
        optimizer=whole(lambda run: run.states),
        cache=cache,
        activations=given + moment.live - moment.gradients - cache,
        logits=max(run.result for run in runs),
        cache_per_token=grown,
    )
    _, _, lowered = compiler.programs[0]
    recomputed = (*compiled.plan.recomputed, *lowered.notes) if step.mode == "train" else ()
    times = [time_of(run.events, step.device) for run in runs]
    time = Time(**{f.name: extended([getattr(t, f.name) for t in times], copies) for f in fields(Time)})
    return Estimate(
        mode=step.mode,
        ranks=compiler.ranks,
        batch=sizes[0] if sizes else None,
        seq=sizes[1] if sizes else None,
        device=step.device.name,
        memory=memory,
        time=time,
        collectives=_sent([run.sent for run in runs], copies),
        operations=whole(lambda run: sum(e.operations for e in run.events)),
        capacity=step.device.memory,
        rests_on=tuple(_rests_on(step, copies, recomputed)),
    )


def _sent(counts: Sequence[Counter[Transfer]], copies: tuple[int, ...]) -> tuple[Sends, ...]:
    every = dict.fromkeys(sent for count in counts for sent in count if not sent.joined)
    alone = {s: round(extended([c[s] for c in counts], copies)) for s in every}
    # Of gradients that travel together every run has the same messages, the larger the more layers it has.
    joined = zip(*([s for s in count.elements() if s.joined] for count in counts), strict=True)
    for messages in joined:
        size = round(extended([s.bytes for s in messages], copies))
        whole = messages[0]._replace(bytes=size, joined=False)
        alone[whole] = alone.get(whole, 0) + 1
    return tuple(Sends(s.kind, count, s.bytes, s.ranks) for s, count in alone.items())


def _rests_on(step: Step, copies: tuple[int, ...], recomputed: Sequence[str]) -> Iterator[str]:
    yield (
        "memory: the tensors that the first rank's program makes in torch's eager mode on a CPU "
        f"(torch {torch.__version__}), counted while it runs without values; what kernels take for "
        "themselves, and what an allocator keeps, is not in it"
    )
    if sum(copies) > len(copies):
        yield f"layers: {sum(copies)} periods of equal layers were not run, each adds what the last one does"
    if step.mode == "train":
        yield "optimizer: its own second update, run without values"
    yield from (f"recomputed in backward: {line}" for line in recomputed)
    yield f"device: {step.device.rests_on}"
    yield (
        "time: a formula, for each operator the most of arithmetic, traffic and a launch; attention counts "
        "without its mask; collectives take a latency and a ring"
    )
