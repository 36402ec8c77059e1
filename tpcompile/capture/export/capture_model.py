"""Captures a model's forward as one functional graph at global shapes."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_unflatten

from tpcompile.capture.caches.call_results import GivenCache, Results, take_results
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.errors import OnlyInParts, TpCompileError
from tpcompile.ir.calls import call_model, flatten_call, leaf_names

from .captured import Captured
from .decompose import decompose
from .dynamic_dims import Attempt, Dims, Place, attempts
from .explain_failure import explain_failure, is_data_dependent
from .fake_model import capture_device, fake_input, lend_fake_weights, no_fused_encoder
from .flatten_program import PREFIX, UserResult, flatten_program
from .inline_no_grad import inline_regions
from .read_guards import read_guards, read_ranges
from .switch_experts import exportable_experts

log = logging.getLogger(__name__)

_PYTHON_VALUES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def capture(
    model: nn.Module,
    bound: dict[str, Any],
    *,
    dynamic: bool | Mapping[str, Dims] = True,
    device: torch.device | str | None = None,
    twins: Mapping[int, int] | None = None,
) -> Captured:
    """Export ``model`` for the call ``bound`` and return it as a flat functional graph.

    Train mode, grad mode and autocast are taken as they are. Neither the model nor the inputs are
    touched, and no weight is copied: only shapes, dtypes and the device matter.

    Args:
        model: any module; its parameters may be on the meta device.
        bound: what ``bind_call`` returned.
        dynamic: leave batch and sequence sizes open where the model allows it; or, per input name,
            which dimensions are to be open.
        device: the device that the graph is made for; the model's own by default.
        twins: leaves of the call that are no inputs of the graph, each with the leaf that the model is
            given in its place.
    """
    register_cache_support()
    every, in_spec = flatten_call(bound)
    every_name = leaf_names(bound)
    _refuse_bad_leaves(every_name, every)
    target = torch.device(device) if device is not None else capture_device(model, every)
    twins = twins or {}
    kept = [i for i in range(len(every)) if i not in twins]
    leaves, names = [every[i] for i in kept], [every_name[i] for i in kept]
    cached = _cached(bound, names)
    structure = _Structure(in_spec, tuple(kept.index(twins.get(i, i)) for i in range(len(every))))
    tried: list[str] = []
    first_error: Exception | None = None
    with exportable_experts(model, target), torch.inference_mode(False):
        for attempt in attempts(names, leaves, cached, dynamic):
            static = all(spec is None for spec in attempt.dynamic)
            if first_error is not None and is_data_dependent(first_error) and not static:
                continue
            tried.append(attempt.name)
            try:
                captured = _export(model, names, leaves, structure, attempt, target)
            except TpCompileError:
                raise
            except Exception as error:
                log.info("capture with %s failed: %s", attempt.name, error)
                first_error = error
                continue
            refusal = captured.accepts(leaves)
            if refusal is None:
                captured.notes += _notes(captured, attempt, tried)
                return captured
            log.info("capture with %s refuses its own example: %s", attempt.name, refusal)
    assert first_error is not None
    raise explain_failure(first_error, model, names, tried) from first_error


def _refuse_bad_leaves(names: Sequence[str], leaves: Sequence[Any]) -> None:
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise OnlyInParts(
            f"the call has no tensors{': ' + ', '.join(names) if names else ''}",
            todo="give the model's inputs as tensors",
        )
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, (torch.Tensor, *_PYTHON_VALUES)):
            cache = any(base.__name__ == "Cache" for base in type(leaf).__mro__)
            advice = "pass tensors and python values, or register the type with torch.utils._pytree"
            raise TpCompileError(
                f"the argument {name} is a {type(leaf).__name__}, which capture cannot take apart",
                todo="give a DynamicCache or a StaticCache, or pass use_cache=False" if cache else advice,
            )


def _cached(bound: Mapping[str, Any], names: Sequence[str]) -> list[bool]:
    """Tell for each leaf whether it is part of a cache: a transformers Cache, or the customary argument."""
    caches = {
        name
        for name, value in bound.items()
        if "past_key_values" in name or any(base.__name__ == "Cache" for base in type(value).__mro__)
    }
    return [any(name == c or name.startswith((f"{c}[", f"{c}.")) for c in caches) for name in names]


@dataclass
class _Seen:
    """The output side of the last trace; an object of its own because export resets module attributes."""

    results: list[UserResult] = field(default_factory=list)
    taken: Results | None = None
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Structure:
    """How a call is made of the captured leaves: which of them stands at each place of the structure."""

    in_spec: TreeSpec
    places: tuple[int, ...]

    def bound(self, leaves: Sequence[Any]) -> Any:
        return tree_unflatten([leaves[i] for i in self.places], self.in_spec)


class _FlatModel(nn.Module):
    """Calls the model on flat tensor leaves, and keeps its output structure and python results aside."""

    def __init__(
        self, model: nn.Module, leaves: Sequence[Any], structure: _Structure, attempt: Attempt
    ) -> None:
        super().__init__()
        setattr(self, PREFIX, model)
        self.training = model.training
        self._fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._structure = structure
        self._attempt = attempt
        self.seen = _Seen()

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        tensors = iter(leaves)
        flat = [next(tensors) if t else v for t, v in zip(self._is_tensor, self._fixed, strict=True)]
        self._tie(flat)
        call, model = self._structure.bound(flat), getattr(self, PREFIX)
        before = [
            _Buffer(module, name, f"{path}.{name}" if path else name, old)
            for path, module in model.named_modules()
            for name, old in module._buffers.items()
            if old is not None
        ]
        taken = take_results(call, call_model(model, call))
        self.seen.lost = [buffer.path for buffer in before if buffer.has_other_form()]
        taken.values[:] = _write_assigned(before, taken.values)
        returned = taken.out_spec.num_leaves
        results = [
            _result(name, value, i >= returned)
            for i, (name, value) in enumerate(zip(taken.names, taken.values, strict=True))
        ]
        self.seen.results, self.seen.taken = results, taken
        return tuple(v for v, r in zip(taken.values, results, strict=True) if r.is_traced)

    def _tie(self, flat: Sequence[Any]) -> None:
        """Compare sizes that belong together: the comparison makes the tracer take them for one symbol."""

        def size(place: Place) -> Any:
            return flat[place[0]].shape[place[1]]

        equal = all(size(group[0]) == size(other) for group in self._attempt.ties for other in group[1:])
        if not equal or not all(size(t) == size(a) + size(b) for t, a, b in self._attempt.sums):
            raise AssertionError("made-up example sizes do not fit together")


@dataclass(frozen=True)
class _Buffer:
    """A buffer as it was before a call."""

    module: nn.Module
    name: str
    path: str
    old: torch.Tensor

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
            assigned.append((buffer.old, new.detach().clone()))
            buffer.module._buffers[buffer.name] = buffer.old

    kept = [
        value.clone()
        if isinstance(value, torch.Tensor) and any(_shares(value, old) for old, _ in assigned)
        else value
        for value in results
    ]
    for old, new in assigned:
        old.copy_(new)
    return kept


def _say_lost(names: Sequence[str]) -> tuple[str, ...]:
    """Warns of buffers that do not keep what they were assigned."""
    if not names:
        return ()
    note = (
        f"forward assigns a tensor of another shape or type to {', '.join(names)}: the next call finds what "
        "was there before. If it is to be kept, let it have that form from the beginning"
    )
    warnings.warn(note, stacklevel=2)
    return (note,)


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return bool(torch._C._is_alias_of(one, other))  # type: ignore[attr-defined]


def _result(name: str, value: Any, is_state: bool) -> UserResult:
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return UserResult(name or "output", is_traced=True, is_state=is_state)
    if isinstance(value, (*_PYTHON_VALUES, GivenCache)):
        return UserResult(name or "output", is_traced=False, value=value)
    raise TpCompileError(
        f"the model returns a {type(value).__name__} as {name or 'its result'}, which cannot be taken apart",
        todo="return tensors, or register the type with torch.utils._pytree; caches: pass use_cache=False",
    )


def _export(
    model: nn.Module,
    names: Sequence[str],
    leaves: Sequence[Any],
    structure: _Structure,
    attempt: Attempt,
    device: torch.device,
) -> Captured:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Fresh fakes for every attempt: a failed export leaves marks on its example tensors.
    fakes = tuple(
        fake_input(mode, leaf, device, shape)
        for leaf, shape in zip(leaves, attempt.shapes, strict=True)
        if shape is not None
    )
    shapes = tuple(
        dims for leaf, dims in zip(leaves, attempt.dynamic, strict=True) if isinstance(leaf, torch.Tensor)
    )
    flat = _FlatModel(model, leaves, structure, attempt)
    with lend_fake_weights(model, device), _quiet(), no_fused_encoder():
        program = torch.export.export(flat, fakes, dynamic_shapes=(shapes,), strict=False)
        _inline(program)
        guards = read_guards(program)
        program = decompose(program)
    taken = flat.seen.taken
    assert taken is not None
    gm, inputs, outputs, constants = flatten_program(program, model, names, leaves, flat.seen.results)
    return Captured(
        gm,
        tuple(inputs),
        tuple(outputs),
        structure.in_spec,
        taken.out_spec,
        constants,
        ranges=read_ranges(program),
        guards=guards,
        states=taken.states,
        notes=_say_lost(flat.seen.lost),
    )


def _inline(program: ExportedProgram) -> None:
    tainted = {
        node
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].requires_grad
    }
    inline_regions(program.graph_module, grad_enabled=torch.is_grad_enabled(), tainted=tainted)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch about torch: its own deprecations, and the partial graph that it prints on failure."""
    printed = io.StringIO()
    partial = ""
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    except Exception as error:
        partial = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        text = printed.getvalue()
        sys.stderr.write(text.replace(partial + "\n", "") if partial else text)


def _notes(captured: Captured, attempt: Attempt, tried: Sequence[str]) -> tuple[str, ...]:
    if len(tried) == 1:
        return ()
    fixed = [f"{spec.name}{list(spec.extents)}" for spec in captured.user_inputs if spec.extents is not None]
    return (f"captured with {attempt.name}; input sizes: {', '.join(fixed)}",)
