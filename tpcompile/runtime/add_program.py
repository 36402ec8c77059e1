"""The first call of its kind: it is captured, and the first one of all decides where the weights are."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tpcompile.capture.divide_caches import whole_caches
from tpcompile.compile_program import Compiled
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import tensors_by_name, whole_tensors
from tpcompile.ranks.compare_calls import can_compare, compare_weights
from tpcompile.weights.shard import shard_weights, unsharded
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor

from .guards import divided_paths, entered, without_guards, without_hooks
from .make_program import hand_out, make_program
from .program import RankProgram
from .python_values import forget_values, open_numbers
from .state import State
from .trace_program import trace_program

_MOST_STATES = 4


def add_program(runtime: State, model: nn.Module, bound: dict[str, Any], path: str = "") -> RankProgram:
    """Compiles a program for a call; the first one also decides where the weights are.

    Args:
        runtime: the model's.
        model: the sharded model.
        bound: the call.
        path: the submodule that is called, "" for the model itself.

    Raises:
        TpCompileError: the call cannot be captured, planned or lowered; the model is unchanged.
    """
    if can_compare(leaves := flatten_call(bound)[0]):
        runtime.compare(model, bound, path, leaves, "capture")
    if runtime.compiler.options.dynamic is False:
        _refuse_new_shapes(runtime, bound, path)
    else:
        bound = open_numbers(runtime.programs, bound, path)
    _refuse_counting(runtime, tuple(bound), path)
    if runtime.layout is None:
        tensors = {name: local_tensor(t) for name, t in whole_tensors(model).items()}
        compare_weights(runtime.compiler.group, tensors)
    runtime.note_types(model)
    _follow_types(runtime, model)
    _keep_whole(runtime, model)
    with (
        unsharded(model, runtime.original),
        without_guards(model),
        without_hooks(model, runtime.hooks),
        entered(model, path, runtime.lifted),
        saved_tensors_hooks(_itself, _itself),  # activation checkpointing would count what is traced
    ):
        compiled = runtime.compiler.compile(
            model, whole_caches(bound, runtime.caches), runtime.layout, runtime.caches
        )
    with torch.inference_mode(False):  # slices that could not be trained, even outside of the mode
        runtime.layout = _divide(runtime, model, compiled)
    runtime.caches = {**hand_out(compiled.planned), **runtime.caches}
    runtime.divided = divided_paths(model, runtime.layout)
    runtime.note_composed(model)
    program = make_program(
        model, compiled, bound, path, runtime.compiler.rank, runtime.settings, runtime.original_of(model)
    )
    if runtime.foreign:
        program.bind(False)
    runtime.settings.read |= program.captured.reads
    runtime.captured += 1
    program.number = runtime.captured
    runtime.programs.append(program)
    runtime.last.clear()
    trace_program(program)
    if (note := forget_values(runtime.programs, bound)) and runtime.compiler.rank == 0:
        warnings.warn(note, stacklevel=2)
    return program


def _keep_whole(runtime: State, model: nn.Module) -> None:
    """Sees to it that no program divides what python has read."""
    named = model.named_parameters()
    read = frozenset(name for name, p in named if isinstance(p, ShardedParameter) and p.read)
    runtime.compiler.whole = read
    if runtime.layout is not None:
        kept = tuple(name for name in runtime.layout.undecided if name not in read)
        runtime.layout = replace(runtime.layout, undecided=kept)


def _divide(runtime: State, model: nn.Module, compiled: Compiled) -> WeightLayout:
    """Cuts the parameters of which a program has decided how they are placed; how they are from now on.

    Raises:
        TpCompileError: others stand in their place.
    """
    layout = compiled.plan.layout
    decided = None if runtime.layout is None else set(runtime.layout.undecided) - set(layout.undecided)
    if runtime.lent and (decided is None or decided):
        raise TpCompileError(
            "functional_call lends weights, and this call would be the first to say how they are divided",
            where=", ".join(sorted(decided or ())[:3]) or "the weights",
            todo="make such a call of the model itself before, or model.capture(...)",
        )
    weights = replace(runtime.weights(layout), custom=compiled.planned.custom)
    shard_weights(model, weights, decided)
    runtime.custom = weights.custom
    return layout


def _follow_types(runtime: State, model: nn.Module) -> None:
    """Takes note of ``model.to(dtype)``.

    Raises:
        TpCompileError: the weights have left the mesh's device.
    """
    axis = runtime.compiler.axis
    if runtime.layout is None or axis is None:
        return
    params = dict(runtime.layout.params)
    for name, (module, attribute) in tensors_by_name(model).items():
        tensor = getattr(module, attribute)
        if name in params and tensor.device.type not in (axis.device_type, "meta"):
            raise TpCompileError(
                f"the mesh is for {axis.device_type}, a weight is on {tensor.device}",
                where=name,
                todo=f"move the model back to {axis.device_type}",
            )
        if name in params and params[name].dtype != tensor.dtype:
            params[name] = replace(params[name], dtype=tensor.dtype)
    runtime.layout = replace(runtime.layout, params=params)


def _refuse_counting(runtime: State, names: tuple[str, ...], path: str) -> None:
    """Refuses a call that leaves another python state each time, so that each wants its own program."""
    found = [p.counted for p in runtime.programs if (p.entry, p.names) == (path, names) and p.counted]
    if len(found) >= _MOST_STATES:
        raise TpCompileError(
            f"forward changes {found[-1]} at every call, and depends on it: {len(found)} of its values "
            "have programs already",
            where=path or runtime.original.__name__,
            todo="let it be a buffer, a tensor that forward changes in place; or keep it out of forward",
        )


def _refuse_new_shapes(runtime: State, bound: dict[str, Any], path: str) -> None:
    leaves, _ = flatten_call(bound)
    for program in runtime.programs:
        same = program.names == tuple(bound) and len(leaves) == len(program.example)
        if same and program.entry == path and (why := program.captured.accepts(leaves)) is not None:
            raise TpCompileError(
                f"the call has other shapes than the program was captured for: {why}",
                where="the call",
                todo="parallelize with dynamic=True, or keep to the captured shapes",
            )


def _itself(tensor: Tensor) -> Tensor:
    return tensor
