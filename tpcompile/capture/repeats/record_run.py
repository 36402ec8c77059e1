"""Runs a model on fake tensors and writes down what it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tpcompile.capture.caches.call_results import CacheState, Results, take_results
from tpcompile.capture.export.asked_tracing import as_untraced
from tpcompile.capture.export.autograd_functions import kept_functions
from tpcompile.capture.export.fake_model import fake_input, fake_weight, no_fused_encoder, restore_after
from tpcompile.capture.export.open_sizes import types_of_numbers
from tpcompile.capture.export.outer_places import Outer, places_of
from tpcompile.capture.export.outer_state import unchanged_outside
from tpcompile.capture.export.python_state import PythonState
from tpcompile.capture.export.recorded_reads import hooked, recorded_reads
from tpcompile.capture.export.state_writes import StateWrite, collect_writes
from tpcompile.capture.export.switch_experts import install_output_hooks
from tpcompile.ir.calls import call_model
from tpcompile.ir.module_tensors import replace_tensors, whole_tensors
from tpcompile.ir.put_together import put_together
from tpcompile.ir.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    TreeSpec,
    no_dispatch,
    tree_unflatten,
)

from .blocks import Repeat

_LARGEST_CONSTANT = 1 << 20


class Ref(NamedTuple):
    """A tensor that an earlier operator made."""

    event: int
    output: int
    needs_grad: bool


class Input(NamedTuple):
    """A tensor of the call, by its position among the leaves; behind them are those that caches make."""

    leaf: int
    facts: str


class WeightRef(NamedTuple):
    """A parameter or buffer, under its first name."""

    name: str
    facts: str


class _Made(NamedTuple):
    event: int
    output: int


class Mark(NamedTuple):
    """A layer's call begins or ends before the event of this number."""

    repeat: int
    layer: int
    begins: bool
    event: int


@dataclass
class RecordedRun:
    """What one run of the model did; an event is an operator, its operands, and the grad mode.

    Attributes:
        events: all operators that ran.
        marks: where layers begin and end.
        results: the leaves of the result, as operands are written down; what was made when it was taken
            apart stands there as the operator that made it.
        names: their key paths.
        values: themselves, where they are not tensors.
        out_spec: the structure of the result.
        states: how the leaves behind those of the result belong to caches that were given.
        reads: see ``Captured``, as for what follows.
        writes: what the call leaves in python state.
        left: where that is a tensor.
    """

    events: list[tuple[Any, ...]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    results: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    out_spec: TreeSpec | None = None
    states: tuple[CacheState, ...] = ()
    reads: set[tuple[str, str]] = field(default_factory=set)
    outer: tuple[Outer, ...] = ()
    writes: tuple[StateWrite, ...] = ()
    left: tuple[str, ...] = ()


class _Recorder(TorchDispatchMode):
    """Writes every operator down; tensors appear as who made them."""

    def __init__(self, run: RecordedRun, known: dict[int, Any], leaves: int) -> None:
        super().__init__()
        self.run, self.known, self.leaves = run, known, leaves
        self.alive: list[Any] = []  # an id is only a name for as long as its object lives
        self.stage: Literal["before", "inside", "after"] = "before"
        self.extra = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)  # a question, not a step of the computation
        event = (func, self.token(args), self.token(kwargs), torch.is_grad_enabled())
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        for number, output in enumerate(outputs):
            for tensor in output if isinstance(output, (list, tuple)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self.known[id(tensor)] = self._made(event, number)
                    self.alive.append(tensor)
        if self.stage == "inside":
            self.run.events.append(event)
        return result

    def _made(self, event: tuple[Any, ...], number: int) -> Any:
        if self.stage == "inside":
            return _Made(len(self.run.events), number)
        if self.stage == "after":
            return (*event, number)
        if event[0] is torch.ops.aten.clone.default and isinstance(event[1][0], Input):
            return event[1][0]
        self.extra += 1  # of a cache that is put together for the call
        return Input(self.leaves + self.extra, str((*event, number)))

    def note(self, key: str, operands: list[Any]) -> None:
        """Writes down what shows in no operator: a function's constants may be used in its backward only."""
        self.run.events.append((key, self.token(operands), (), torch.is_grad_enabled()))

    def token(self, value: Any) -> Any:
        """A value in a form that can be compared between runs."""
        if isinstance(value, torch.Tensor):
            known = self.known.get(id(value))
            if known is None:
                known = self.known[id(value)] = self._stranger(value)
                self.alive.append(value)
            return Ref(*known, value.requires_grad) if isinstance(known, _Made) else known
        if isinstance(value, (list, tuple)):
            return tuple([self.token(item) for item in value])
        if isinstance(value, dict):
            return tuple([(key, self.token(item)) for key, item in value.items()])
        return (type(value).__name__, repr(value))

    def _stranger(self, value: torch.Tensor) -> str:
        """Name a tensor that nothing made: by its value if it has one, else so that it equals nothing."""
        unseen = isinstance(value, FakeTensor) or value.device.type == "meta"
        if unseen or value.requires_grad or value.numel() > _LARGEST_CONSTANT:  # a gradient of its own
            return f"unknown tensor {id(value)}"
        with no_dispatch():
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.sha256(bytes(plain.tolist())).hexdigest()
        return f"constant {tuple(value.shape)} {value.dtype} {digest}"


def record_run(
    model: nn.Module,
    repeats: Sequence[Repeat],
    leaves: Sequence[Any],
    in_spec: TreeSpec,
    device: torch.device,
    names: Mapping[int, str],
    twins: Mapping[int, int] | None = None,
) -> RecordedRun:
    """Run the model once without data, as far as possible as export does, and leave it as it was.

    Args:
        model: whole or truncated.
        repeats: the lists of layers whose calls are marked.
        leaves: the example call, flat.
        in_spec: its structure.
        device: the device that the fake tensors claim to be on.
        names: the first name in the whole model of every parameter and buffer, by id.
        twins: leaves that are not given, with the leaf that is given in their place.
    """
    from tpcompile.ir.dynamo_internals import export_trace

    # Sizes that depend on data become symbols instead of errors; those of the inputs stay numbers.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    run, known = RecordedRun(), dict[int, Any]()
    with ExitStack() as stack:
        stack.enter_context(restore_after(model))
        # Without gradients a run takes half as long; grad mode and detach() are recorded as they are.
        real = list(whole_tensors(model).values())
        fakes = {id(tensor): fake_weight(mode, tensor, device, requires_grad=False) for tensor in real}
        for tensor in real:
            facts = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
            known[id(fakes[id(tensor)])] = WeightRef(names[id(tensor)], facts)
        replace_tensors(model, fakes)
        flat = [fake_input(mode, leaf, device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for i, leaf in enumerate(flat):
            if isinstance(leaf, torch.Tensor):
                known[id(leaf)] = Input(i, f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype}")
        given = [flat[(twins or {}).get(i, i)] for i in range(len(flat))]
        functions, strangers = list[FunctionType](), list[tuple[nn.Module, str]]()
        hooks = hooked(model)  # without our own
        run.outer = tuple(stack.enter_context(unchanged_outside(model, functions)))
        for context in (_marking(model, repeats, run), no_fused_encoder(), put_together(model)):
            stack.enter_context(context)
        stack.enter_context(export_trace._compiling_state_context())  # type: ignore[attr-defined]
        stack.enter_context(as_untraced([]))
        stack.enter_context(mode)
        recorder = stack.enter_context(_Recorder(run, known, len(leaves)))
        stack.enter_context(kept_functions(recorder.note))
        call = tree_unflatten(given, in_spec)
        install_output_hooks(model)
        state = PythonState(model)
        run.reads = stack.enter_context(recorded_reads(model, strangers))
        stack.enter_context(types_of_numbers(functions, False))
        recorder.stage = "inside"
        result = call_model(model, call)
        recorder.stage = "after"
        _note_results(recorder, take_results(call, result), state)
    run.reads |= hooks
    run.outer += tuple(places_of(strangers))
    return run


def _note_results(recorder: _Recorder, taken: Results, before: PythonState) -> None:
    run = recorder.run
    writes, left = collect_writes(before, 0)
    run.writes, run.left = tuple(writes), tuple(name for name, _ in left)
    run.out_spec, run.states = taken.out_spec, taken.states
    run.results = tuple(recorder.token(value) for value in taken.values)
    run.values = tuple(None if isinstance(value, torch.Tensor) else value for value in taken.values)
    run.names = tuple(name or "output" for name in taken.names)


@contextmanager
def _marking(model: nn.Module, repeats: Sequence[Repeat], run: RecordedRun) -> Iterator[None]:
    """Notes where in the run each layer begins and ends."""

    def note(number: int, layer: int, begins: bool) -> Callable[..., None]:
        return lambda *_: run.marks.append(Mark(number, layer, begins, len(run.events)))

    handles = []
    try:
        for number, repeat in enumerate(repeats):
            for name, layer in model.get_submodule(repeat.path)._modules.items():
                assert layer is not None
                handles.append(layer.register_forward_pre_hook(note(number, int(name), True), prepend=True))
                handles.append(layer.register_forward_hook(note(number, int(name), False)))
        yield
    finally:
        for handle in handles:
            handle.remove()
