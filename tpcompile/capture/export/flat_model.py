"""The model as export sees it: called on flat tensors, its results, caches and buffers looked after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from tpcompile.capture.caches.call_results import GivenCache, Results, take_results
from tpcompile.capture.caches.register import is_cache
from tpcompile.errors import CannotCapture, TpCompileError
from tpcompile.ir.calls import call_model
from tpcompile.ir.put_together import put_together
from tpcompile.ir.torch_internals import TreeSpec, is_alias_of, tree_flatten, tree_unflatten

from .dynamic_dims import Attempt, Place
from .flatten_program import PREFIX, UserResult
from .open_sizes import OPEN, types_of_numbers
from .outer_places import Outer, places_of
from .outer_state import unchanged_outside
from .python_state import PythonState
from .recorded_reads import hooked, recorded_reads
from .specs import OutputKind, OutputSpec
from .state_writes import TRACED, StateWrite, collect_writes
from .switch_experts import install_output_hooks

PYTHON_VALUES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass
class _Seen:
    """The output side of the last trace; an object of its own because export resets module attributes."""

    results: list[UserResult] = field(default_factory=list)
    taken: Results | None = None
    lost: list[str] = field(default_factory=list)
    carrying: set[str] = field(default_factory=set)
    reads: set[tuple[str, str]] = field(default_factory=set)
    outer: list[Outer] = field(default_factory=list)
    writes: list[StateWrite] = field(default_factory=list)

    def marked(self, outputs: Sequence[OutputSpec]) -> tuple[OutputSpec, ...]:
        """The program's results; those are marked that a buffer has with their gradients."""
        return tuple(
            replace(o, carried=o.kind == "buffer_mutation" and o.name in self.carrying) for o in outputs
        )


@dataclass(frozen=True)
class Structure:
    """How a call is made of the captured leaves: which of them stands at each place of the structure.

    Attributes:
        in_spec: the structure.
        places: per place the leaf.
        numbers: the places of numbers that travel as sizes.
    """

    in_spec: TreeSpec
    places: tuple[int, ...]
    numbers: frozenset[int]

    def bound(self, leaves: Sequence[Any]) -> Any:
        flat = [leaves[at].shape[0] if i in self.numbers else leaves[at] for i, at in enumerate(self.places)]
        return tree_unflatten(flat, self.in_spec)


class FlatModel(nn.Module):
    """Calls the model on flat tensor leaves, and keeps its output structure and python results aside."""

    def __init__(
        self, model: nn.Module, leaves: Sequence[Any], structure: Structure, attempt: Attempt
    ) -> None:
        super().__init__()
        setattr(self, PREFIX, model)
        self.training = model.training
        self._fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._is_parameter = [isinstance(leaf, nn.Parameter) for leaf in leaves]
        self._structure = structure
        self._attempt = attempt
        self.begin: Callable[[Sequence[Any]], Any] = len  # is told of each trace's arguments
        self.seen = _Seen()

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        self.begin(leaves)
        tensors = iter(leaves)
        flat: list[Any] = [
            next(tensors) if t else v for t, v in zip(self._is_tensor, self._fixed, strict=True)
        ]
        self._tie(flat)
        for leaf, is_parameter in zip(flat, self._is_parameter, strict=True):
            if is_parameter:
                leaf._is_param = True  # python may ask
        call, model = self._structure.bound(flat), getattr(self, PREFIX)
        before = [
            _Buffer(module, name, f"{path}.{name}" if path else name, old, old.requires_grad)
            for path, module in model.named_modules()
            for name, old in module._buffers.items()
            if old is not None
        ]
        install_output_hooks(model)
        given = _contents(call)
        state = PythonState(model)
        functions: list[FunctionType] = []
        strangers: list[tuple[nn.Module, str]] = []
        with (
            unchanged_outside(model, functions) as self.seen.outer,
            types_of_numbers(functions, any(spec is not None for spec in self._attempt.dynamic)),
            recorded_reads(model, strangers) as self.seen.reads,
        ):
            with put_together(model):
                result = call_model(model, call)
            taken = take_results(call, result)
        self.seen.outer += places_of(strangers)
        _refuse_changed(given, _contents(call))
        state.refuse_iterators(self.seen.reads)
        state.refuse_opaque()
        self.seen.reads |= hooked(model)
        self.seen.carrying = {buffer.path for buffer in before if buffer.carries_gradient()}
        self.seen.lost = [buffer.path for buffer in before if buffer.has_other_form()]
        taken.values[:] = _write_assigned(before, taken.values)
        returned = taken.out_spec.num_leaves
        self.seen.writes, left = collect_writes(state, len(taken.values))
        state.restore()
        results = [
            _result(name, value, "user" if i < returned else "state")
            for i, (name, value) in enumerate(zip(taken.names, taken.values, strict=True))
        ]
        results += [_result(name, value, "attribute") for name, value in left]
        _refuse_text([taken.out_spec, *(r.value for r in results), *map(_said, self.seen.writes)])
        values = [*taken.values, *(value for _, value in left)]
        self.seen.results, self.seen.taken = results, taken
        return tuple(v for v, r in zip(values, results, strict=True) if r.is_traced)

    def _tie(self, flat: Sequence[Any]) -> None:
        """Compare sizes that belong together: the comparison makes the tracer take them for one symbol."""

        def size(place: Place) -> Any:
            return flat[place[0]].shape[place[1]]

        equal = all(size(group[0]) == size(other) for group in self._attempt.ties for other in group[1:])
        if not equal or not all(size(t) == size(a) + size(b) for t, a, b in self._attempt.sums):
            raise AssertionError("sizes that were taken to belong together do not")


def _said(write: StateWrite) -> list[Any]:
    """What may be text, in what a call leaves behind."""
    return [write.steps, write.key, write.spec, *(leaf for leaf in write.leaves if isinstance(leaf, str))]


def _refuse_text(values: list[Any]) -> None:
    """Refuses text that has an open size in it: every size has a text of its own.

    Raises:
        ValueError: some value has; with fixed sizes none has.
    """
    if OPEN in str(values):
        raise ValueError("forward makes text of an open size, and returns or keeps it")


def _contents(call: dict[str, Any]) -> dict[str, tuple[list[Any], TreeSpec]]:
    """What is in the arguments of a call, but for caches, whose new state is a result."""
    return {name: tree_flatten(value) for name, value in call.items() if not is_cache(value)}


def _refuse_changed(
    before: dict[str, tuple[list[Any], TreeSpec]], after: dict[str, tuple[list[Any], TreeSpec]]
) -> None:
    """Refuses a forward that fills the lists, dicts and objects it is given: programs are given tensors only.

    Raises:
        CannotCapture: one has changed.
    """
    for name, (leaves, spec) in before.items():
        now, structure = after[name]
        if structure != spec or any(a is not b for a, b in zip(leaves, now, strict=True)):
            name = name.lstrip("*")
            raise CannotCapture(
                f"the model's forward changes what is in its argument {name}",
                where=name,
                todo="return what is new, or keep it in attributes of the model or a cache of transformers",
            )


@dataclass(frozen=True)
class _Buffer:
    """A buffer as it was before a call."""

    module: nn.Module
    name: str
    path: str
    old: torch.Tensor
    wanted: bool  # a gradient, before the call

    def carries_gradient(self) -> bool:
        """Whether it has a gradient that it did not have."""
        now = self.module._buffers.get(self.name)
        return now is not None and now.requires_grad and not self.wanted

    def assigned(self) -> torch.Tensor | None:
        """What the call has assigned to it."""
        new = self.module._buffers.get(self.name)
        return None if new is self.old else new

    def has_other_form(self) -> bool:
        """Whether what was assigned cannot be written into it."""
        new = self.assigned()
        return new is not None and (new.shape, new.dtype) != (self.old.shape, self.old.dtype)


def _write_assigned(before: Sequence[_Buffer], results: Sequence[Any]) -> list[Any]:
    """Writes what the model assigned to buffers into the tensors that they were: export notes writes only.

    Args:
        before: the model's buffers before the call.
        results: what the model returned.

    Returns:
        The results; of those that show what a buffer was before, copies.
    """
    assigned: list[tuple[torch.Tensor, torch.Tensor]] = []
    for buffer in before:
        new = buffer.assigned()
        if new is not None and not buffer.has_other_form():
            assigned.append((buffer.old, new.clone()))
            buffer.module._buffers[buffer.name] = buffer.old

    kept = [
        value.clone()
        if isinstance(value, torch.Tensor) and any(is_alias_of(value, old) for old, _ in assigned)
        else value
        for value in results
    ]
    for old, new in assigned:
        old.copy_(new)
    return kept


def _result(name: str, value: Any, kind: OutputKind) -> UserResult:
    if isinstance(value, TRACED):
        return UserResult(name or "output", is_traced=True, kind=kind)
    if isinstance(value, (*PYTHON_VALUES, GivenCache)):
        return UserResult(name or "output", is_traced=False, value=value)
    raise TpCompileError(
        f"the model returns a {type(value).__name__} as {name or 'its result'}, which cannot be taken apart",
        where="the result of forward",
        todo="return tensors, or register the type with torch.utils._pytree; caches: pass use_cache=False",
    )
