"""Captures a model's forward as one functional graph at global shapes."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tpcompile.capture.caches.layers import with_counts
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.errors import CannotCapture, OnlyInParts, TpCompileError
from tpcompile.ir.calls import OpenNumber, flatten_call, identical, leaf_names
from tpcompile.ir.torch_internals import FakeTensorMode

from .asked_tracing import plain_modules
from .autograd_functions import kept_functions
from .captured import Captured
from .decompose import decompose
from .dynamic_dims import Attempt, Dims, attempts
from .explain_failure import explain_failure, is_data_dependent
from .fake_model import capture_device, fake_input, lend_fake_weights, no_fused_encoder
from .flat_model import PYTHON_VALUES, FlatModel, Structure
from .flatten_program import flatten_program, merge_names
from .inline_no_grad import inline_regions
from .read_guards import read_guards, read_ranges
from .shots import storage
from .stack_lines import quick_stack_lines
from .switch_experts import exportable_experts
from .watch_calls import watched_calls

log = logging.getLogger(__name__)


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
        twins: leaves of the call that are not inputs of the graph, each with the leaf that the model is
            given in its place.
    """
    register_cache_support()
    every, in_spec = flatten_call(bound)
    every_name = leaf_names(bound)
    _refuse_bad_leaves(every_name, every)
    target = torch.device(device) if device is not None else capture_device(model, every)
    twins = twins or {}
    kept = [i for i in range(len(every)) if i not in twins]
    numbers = frozenset(i for i in range(len(every)) if isinstance(every[i], OpenNumber))
    leaves, names = [with_counts(every, numbers)[i] for i in kept], [every_name[i] for i in kept]
    cached = _cached(bound, names)
    # The same tensor twice is one in the trace, too: python may ask (`if memory is x`).
    same = identical(every, [at for at, held in zip(kept, cached, strict=True) if not held])
    places = tuple(kept.index(same.get(i, twins.get(i, i))) for i in range(len(every)))
    structure = Structure(in_spec, places, numbers)
    choices = attempts(names, leaves, cached, dynamic)
    mode = torch.set_grad_enabled(torch.is_grad_enabled())  # inference_mode(False) turns gradients on
    with exportable_experts(model, target), torch.inference_mode(False), mode:
        return _first_capture(model, names, leaves, structure, choices, target)


def _first_capture(
    model: nn.Module,
    names: list[str],
    leaves: list[Any],
    structure: Structure,
    choices: Iterable[Attempt],
    target: torch.device,
) -> Captured:
    """Exports the model with the first choice of open dimensions that works, and that fits its own example.

    Raises:
        TpCompileError: none does.
    """
    tried: list[str] = []
    first_error: Exception | None = None
    for attempt in choices:
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
        if captured.asks_strides:
            _refuse_strided(names, leaves)
        if (refusal := captured.accepts(leaves)) is None:
            captured.notes += _notes(captured, attempt, tried)
            return captured
        log.info("capture with %s refuses its own example: %s", attempt.name, refusal)
    assert first_error is not None
    raise explain_failure(first_error, model, names, tried) from first_error


def _refuse_bad_leaves(names: Sequence[str], leaves: Sequence[Any]) -> None:
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise OnlyInParts(
            f"the call has no tensors{': ' + ', '.join(names) if names else ''}",
            where="the call",
            todo="give the model's inputs as tensors",
        )
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and not _is_dense(leaf):
            raise TpCompileError(
                f"the argument {name} is a sparse, nested or quantised tensor",
                where="the call",
                todo="make it dense: to_dense(), dequantize(), torch.nested.to_padded_tensor(...)",
            )
        if not isinstance(leaf, (torch.Tensor, *PYTHON_VALUES)):
            cache = any(base.__name__ == "Cache" for base in type(leaf).__mro__)
            advice = "pass tensors and python values, or register the type with torch.utils._pytree"
            raise TpCompileError(
                f"the argument {name} is a {type(leaf).__name__}, which capture cannot take apart",
                where="the call",
                todo="give a DynamicCache or a StaticCache, or pass use_cache=False" if cache else advice,
            )


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _refuse_strided(names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and not leaf.is_contiguous():
            raise CannotCapture(
                "forward depends on the order of elements in memory (stride, is_contiguous, as_strided, or a "
                f"write into what reshape or contiguous gave), and {name} is not contiguous",
                where="the call",
                todo=f"give the model {name}.contiguous()",
            )


def _cached(bound: Mapping[str, Any], names: Sequence[str]) -> list[bool]:
    """Tell for each leaf whether it is part of a cache: a transformers Cache, or the customary argument."""
    caches = {
        name
        for name, value in bound.items()
        if "past_key_values" in name or any(base.__name__ == "Cache" for base in type(value).__mro__)
    }
    return [any(name == c or name.startswith((f"{c}[", f"{c}.")) for c in caches) for name in names]


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


def _export(
    model: nn.Module,
    names: Sequence[str],
    leaves: Sequence[Any],
    structure: Structure,
    attempt: Attempt,
    device: torch.device,
) -> Captured:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Fresh fakes for every attempt: a failed export leaves marks on its example tensors.
    tensors = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    fakes = tuple(fake_input(mode, leaves[at], device) for at in tensors)
    shapes = tuple(attempt.dynamic[at] for at in tensors)
    flat = FlatModel(model, leaves, structure, attempt)
    with lend_fake_weights(model, device), _quiet(), no_fused_encoder(), kept_functions() as kept:
        with watched_calls() as watch, _cached_results(attempt), quick_stack_lines(), plain_modules():
            flat.begin = watch.order.begin
            exported = torch.export.export(flat, fakes, dynamic_shapes=(shapes,), strict=False)
        _simplify(exported, model)
        program = decompose(exported)
        guards = read_guards(exported)  # with those of what was taken apart
    taken, peeked = flat.seen.taken, watch.peeked
    assert taken is not None
    if watch.computed:  # of which tensors is not known; torch follows the values of small ones
        peeked.update(_single_numbers(model))
    gm, inputs, outputs, constants = flatten_program(program, model, names, leaves, flat.seen.results, peeked)
    baked = [spec.name for spec in inputs if spec.kind == "constant"]
    return Captured(
        gm,
        tuple(inputs),
        flat.seen.marked(outputs),
        structure.in_spec,
        taken.out_spec,
        {name: value.detach() for name, value in constants.items()},
        ranges=read_ranges(program),
        guards=guards,
        states=taken.states,
        notes=_say_lost(flat.seen.lost),
        asks_gradients=watch.asks_gradients,
        asks_strides=watch.order.asked,
        functions=kept.functions,
        regions=kept.regions,
        reads=frozenset(flat.seen.reads),
        outer=tuple(flat.seen.outer),
        baked=None if watch.computed else (*constants.values(), *peeked.values()),
        writes=tuple(flat.seen.writes),
        detached=tuple(
            n for n in baked if constants[n].requires_grad or storage(constants[n]) in watch.wanting
        ),
    )


def _single_numbers(model: nn.Module) -> dict[int, torch.Tensor]:
    """The tensors of one element among the attributes of a model, by identity."""
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, torch.Tensor))
    return {id(x): x for x in held if x.numel() == 1}


def _simplify(program: ExportedProgram, model: nn.Module) -> None:
    merge_names(program, model)
    tainted = {
        node
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].requires_grad
    }
    inline_regions(program.graph_module, grad_enabled=torch.is_grad_enabled(), tainted=tainted)


def _cached_results(attempt: Attempt) -> AbstractContextManager[object]:
    """Whether fake tensors use torch's cache of what calls give, also later, in lowering.

    To keep a result whose sizes are symbols takes longer than most calls: captures took up to twice as long.
    """
    static = all(spec is None for spec in attempt.dynamic)
    from tpcompile.ir.dynamo_internals import dynamo_config

    return dynamo_config.patch(fake_tensor_cache_enabled=static)


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
