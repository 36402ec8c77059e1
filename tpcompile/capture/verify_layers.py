"""Makes sure, by running the whole model on fake tensors, that the layers left out are copies of one kept.

A layer may depend on its number in ways that no attribute shows (``if self.layer_idx >= 20``), and so may
the loop around the layers, or the shape of the result. So the model runs twice without data, whole and
truncated, and the operators of both runs are compared: what they are, their constants, and whose results
they take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export._trace import _compiling_state_context
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tpcompile.capture.bind_call import call_model
from tpcompile.capture.fake_model import fake_input, restore_after
from tpcompile.capture.find_repeats import Repeat, truncated

_LARGEST_CONSTANT = 1 << 20


class _Ref(NamedTuple):
    """A tensor that an earlier operator made."""

    event: int
    output: int
    needs_grad: bool


class _Weight(NamedTuple):
    """A parameter or buffer, under its first name."""

    name: str
    facts: str


class _Mark(NamedTuple):
    """A layer's call begins or ends before the event of this number."""

    repeat: int
    layer: int
    begins: bool
    event: int


@dataclass
class _Run:
    """What one run of the model did; an event is an operator, its operands, and the grad mode."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    marks: list[_Mark] = field(default_factory=list)
    results: tuple[Any, ...] = ()
    out_spec: TreeSpec | None = None


class _Recorder(TorchDispatchMode):
    """Writes every operator down; tensors appear as who made them."""

    def __init__(self, run: _Run, known: dict[int, Any]) -> None:
        super().__init__()
        self.run, self.known = run, known
        self.alive: list[Any] = []  # an id is only a name for as long as its object lives

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        event = (func, self.token(args), self.token(kwargs), torch.is_grad_enabled())
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        for number, output in enumerate(outputs):
            for tensor in output if isinstance(output, (list, tuple)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self.known[id(tensor)] = (len(self.run.events), number)
                    self.alive.append(tensor)
        self.run.events.append(event)
        return result

    def token(self, value: Any) -> Any:
        """A value in a form that can be compared between runs."""
        if isinstance(value, torch.Tensor):
            known = self.known.get(id(value))
            if known is None:
                known = self.known[id(value)] = self._stranger(value)
                self.alive.append(value)
            return _Ref(*known, value.requires_grad) if type(known) is tuple else known
        if isinstance(value, (list, tuple)):
            return tuple([self.token(item) for item in value])
        if isinstance(value, dict):
            return tuple([(key, self.token(item)) for key, item in value.items()])
        return (type(value).__name__, repr(value))

    def _stranger(self, value: torch.Tensor) -> str:
        """Name a tensor that came from nowhere: by its value if it has one, else so that it equals nothing."""
        if isinstance(value, FakeTensor) or value.device.type == "meta" or value.numel() > _LARGEST_CONSTANT:
            return f"unknown tensor {id(value)}"
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(bytes(plain.tolist())).hexdigest()
        return f"constant {tuple(value.shape)} {value.dtype} {digest}"


def refuse_layers(
    model: nn.Module,
    repeats: Sequence[Repeat],
    leaves: Sequence[Any],
    in_spec: TreeSpec,
    device: torch.device,
) -> str | None:
    """Return None if the model is its truncated self with the last kept period repeated, else why not."""
    names = _first_names(model)
    with truncated(model, repeats):
        short = _run(model, repeats, leaves, in_spec, device, names)
    full = _run(model, repeats, leaves, in_spec, device, names)
    try:
        return _Comparison(repeats, _Regions(repeats, short), _Regions(repeats, full)).refusal()
    except _Disorder as error:
        return str(error)


def _first_names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        names.setdefault(id(tensor), name)
    return names


def _run(
    model: nn.Module,
    repeats: Sequence[Repeat],
    leaves: Sequence[Any],
    in_spec: TreeSpec,
    device: torch.device,
    names: Mapping[int, str],
) -> _Run:
    """Runs the model once without data, as far as possible as export does."""
    # Sizes that depend on data become symbols instead of errors; those of the inputs stay numbers.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    run, known = _Run(), {}
    with ExitStack() as stack:
        stack.enter_context(restore_after(model))
        alive = _lend_weights(model, mode, device, names, known)
        flat = [
            fake_input(mode, leaf, device, tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        known.update({id(leaf): f"input {i}" for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)})
        stack.enter_context(_marking(model, repeats, run))
        stack.enter_context(_no_fused_encoder())
        stack.enter_context(_compiling_state_context())
        stack.enter_context(mode)
        recorder = stack.enter_context(_Recorder(run, known))
        result = call_model(model, tree_unflatten(flat, in_spec))
        values, run.out_spec = tree_flatten(result)
        run.results = tuple(recorder.token(value) for value in values)
        del alive
    return run


def _lend_weights(
    model: nn.Module,
    mode: FakeTensorMode,
    device: torch.device,
    names: Mapping[int, str],
    known: dict[int, Any],
) -> list[torch.Tensor]:
    """Replaces every weight by a fake one of this mode (``restore_after`` undoes it); notes their names."""
    memo: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in memo:
                    memo[id(tensor)] = fake = _fake_weight(tensor, mode, device)
                    facts = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
                    known[id(fake)] = _Weight(names[id(tensor)], facts)
                table[key] = memo[id(tensor)]  # type: ignore[assignment]
    return list(memo.values())


def _fake_weight(like: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    with mode, torch.no_grad():
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    # Without gradients a run takes half as long; grad mode and detach() are recorded as they are.
    return nn.Parameter(fake, requires_grad=False) if isinstance(like, nn.Parameter) else fake


@contextmanager
def _no_fused_encoder() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _marking(model: nn.Module, repeats: Sequence[Repeat], run: _Run) -> Iterator[None]:
    """Notes where in the run each layer begins and ends."""

    def note(number: int, layer: int, begins: bool) -> Callable[..., None]:
        return lambda *_: run.marks.append(_Mark(number, layer, begins, len(run.events)))

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


class _Disorder(Exception):
    """Layers are not called one after the other."""


class _Place(NamedTuple):
    """Where an event stands: in which period of which list, or (list -1) in which stretch between lists."""

    repeat: int
    period: int


_OWN, _BEFORE = _Place(-2, 0), _Place(-2, -1)


class _Operand(NamedTuple):
    """A tensor by the place and position of the event that made it."""

    source: _Place
    position: int
    output: int
    needs_grad: bool


class _Regions:
    """Cuts a run into the periods of every list of layers and the stretches before, between and after.

    A period ends with its last layer: what the model does between two layers belongs to the later one,
    and what it does after the last layer to none.
    """

    def __init__(self, repeats: Sequence[Repeat], run: _Run) -> None:
        self.run = run
        self.spans: dict[_Place, range] = {}
        cuts = sorted(
            (begin, number, stops)
            for number, repeat in enumerate(repeats)
            for begin, stops in [_periods(number, repeat, run.marks)]
        )
        at = 0
        for stretch, (begin, number, stops) in enumerate(cuts):
            if begin < at:
                raise _Disorder("two lists of layers run in turns")
            self.spans[_Place(-1, stretch)] = range(at, begin)
            for period, stop in enumerate(stops):
                self.spans[_Place(number, period)] = range(begin, stop)
                begin = stop
            at = begin
        self.spans[_Place(-1, len(cuts))] = range(at, len(run.events))
        self.places = [(place, event - span.start) for place, span in self.spans.items() for event in span]

    def last(self, repeat: int) -> int:
        """The number of the last period of a list."""
        return max(place.period for place in self.spans if place.repeat == repeat)


def _periods(number: int, repeat: Repeat, marks: Sequence[_Mark]) -> tuple[int, list[int]]:
    """Return where the first period begins and where each one ends."""
    own = [mark for mark in marks if mark.repeat == number]
    layers = [mark.layer for mark in own[::2]]
    paired = all(a.layer == b.layer and a.begins > b.begins for a, b in zip(own[::2], own[1::2], strict=False))
    if len(own) % 2 or not paired or layers != sorted(set(layers)) or repeat.first not in layers:
        raise _Disorder(f"the layers of {repeat.path} are not called once each, one after the other")
    inside = range(repeat.first, repeat.first + repeat.count * repeat.period)
    ends = [mark.event for mark in own[1::2] if mark.layer in inside]
    if len(ends) % repeat.period:
        raise _Disorder(f"not every layer of {repeat.path} is called")
    begin = next(mark.event for mark in own if mark.layer == repeat.first)
    return begin, ends[repeat.period - 1 :: repeat.period]


class _Comparison:
    """Compares the full run with the truncated one."""

    def __init__(self, repeats: Sequence[Repeat], short: _Regions, full: _Regions) -> None:
        self.repeats, self.short, self.full = repeats, short, full

    def refusal(self) -> str | None:
        """Why the full run is not the truncated one with periods added; None if it is."""
        for number, repeat in enumerate(self.repeats):
            lasts = (self.short.last(number) + 1, self.full.last(number) + 1)
            if lasts != (repeat.kept, repeat.count):
                return f"{repeat.path} runs {lasts[1]} of its {repeat.count} periods, {lasts[0]} when truncated"
            refusal = self._refuse_periods(number, repeat)
            if refusal:
                return refusal
        for place, span in self.short.spans.items():
            if self._absolute(self.short, place) != self._absolute(self.full, place):
                where = "outside of the layers" if place.repeat < 0 else self.repeats[place.repeat].path
                return f"what runs {where} depends on the number of layers (after {self._last_op(span)})"
        if self.short.run.out_spec != self.full.run.out_spec:
            return "the structure of the result depends on the number of layers"
        results = (self.short.run.results, self.full.run.results)
        if self._token(results[0], self.short, -1) != self._token(results[1], self.full, -1):
            return "the results depend on the number of layers"
        return None

    def _refuse_periods(self, number: int, repeat: Repeat) -> str | None:
        pattern = self._relative(number, repeat.kept - 1)
        if not _same_layout(self._relative(number, repeat.kept - 2), pattern):
            return f"the last two captured periods of {repeat.path} do different things"
        for period in range(repeat.kept, repeat.count):
            if self._relative(number, period) != pattern:
                layer = repeat.first + period * repeat.period
                return f"{repeat.path}.{layer} does not do what the layers before it do"
        return None

    def _last_op(self, span: range) -> str:
        events = self.short.run.events[span.start : span.stop]
        return str(events[-1][0]) if events else "nothing"

    def _absolute(self, regions: _Regions, place: _Place) -> list[Any]:
        span = regions.spans[place]
        return [self._token(e, regions, place.repeat) for e in regions.run.events[span.start : span.stop]]

    def _token(self, token: Any, regions: _Regions, here: int) -> Any:
        """Operands by the place where they were made.

        Seen from elsewhere, the full run's last period of a list is the last kept one, and what stands
        between has no counterpart.
        """
        if isinstance(token, _Ref):
            place, position = regions.places[token.event]
            if regions is self.full and place.repeat not in (-1, here):
                repeat = self.repeats[place.repeat]
                if place.period == repeat.count - 1:
                    place = _Place(place.repeat, repeat.kept - 1)
                elif place.period >= repeat.kept - 1:
                    place = _Place(place.repeat, -1)
            return _Operand(place, position, token.output, token.needs_grad)
        if type(token) is tuple:
            return tuple([self._token(item, regions, here) for item in token])
        return token

    def _relative(self, number: int, period: int) -> list[Any]:
        """A period's events; operands from itself and from the period before are named relative to it."""
        regions, repeat = self.full, self.repeats[number]
        span = regions.spans[_Place(number, period)]

        def visit(token: Any) -> Any:
            if isinstance(token, _Ref):
                place, position = regions.places[token.event]
                distance = period - place.period if place.repeat == number else -1
                source = {0: _OWN, 1: _BEFORE}.get(distance, place)
                return _Operand(source, position, token.output, token.needs_grad)
            if isinstance(token, _Weight):
                own = repeat.period_of(token.name) == period
                return _Weight(repeat.shifted(token.name, -period) if own else token.name, token.facts)
            if type(token) is tuple:
                return tuple([visit(item) for item in token])
            return token

        return [visit(event) for event in regions.run.events[span.start : span.stop]]


def _same_layout(earlier: Any, later: Any) -> bool:
    """Whether two periods do the same, whatever the earlier takes where the later takes from the one before.

    The period before the earlier one is the first, which may be built differently.
    """
    if isinstance(later, _Operand) and later.source == _BEFORE:
        return not isinstance(earlier, _Operand) or earlier.source != _OWN
    if type(later) in (list, tuple) and type(earlier) is type(later):
        return len(earlier) == len(later) and all(map(_same_layout, earlier, later))
    return bool(earlier == later)
