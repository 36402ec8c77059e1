"""The two calls that users make: ``parallelize`` and ``plan``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .compile_program import Compiler
from .errors import TpCompileError
from .ir.calls import signature_of
from .ir.check import check_arguments, checked, well_called
from .ir.unwrap import put_together_on_error, unwrap, unwrapped_copy
from .planner.options import Options
from .planner.plan import Plan
from .planner.search.cost import CostModel
from .ranks.agree import compare, together
from .ranks.compare_order import number_of_model
from .ranks.mesh import Axis, check_mesh, default_mesh
from .ranks.mesh_axis import MeshAxis
from .ranks.own_groups import TIMEOUT, seconds_of
from .runtime.check_model import check_device, device_of
from .runtime.compile_options import CompileLike, for_group, read_compile
from .runtime.dry_run.estimator import Estimator
from .runtime.generation import class_when_sharded
from .runtime.guards import Hook, backward_hooks, guard_submodules
from .runtime.module import ShardedModule
from .runtime.new_adapters import tell_of_adapters
from .runtime.parts import compose_call, try_first
from .runtime.read_request import (
    Bytes,
    Checkpointing,
    Dynamic,
    Keywords,
    Passes,
    PlanLike,
    Ranks,
    example_call,
    example_or_default,
    read_options,
)
from .runtime.runtime import Runtime
from .runtime.training.tell_trainer import tell_trainer
from .weights.saving.adapters import tell_peft


@well_called
def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Keywords = None,
    *,
    plan: PlanLike = "auto",
    axis: Axis | None = None,
    dynamic: Dynamic = True,
    compile: CompileLike = False,
    cost_model: CostModel | str | None = None,
    memory: Bytes | None = None,
    passes: Passes = (),
    compose: bool | None = None,
    compare_calls: bool = False,
    sequence_parallel: bool = False,
    checkpointing: Checkpointing = None,
    timeout: float | timedelta = TIMEOUT,
) -> ShardedModule:
    """Makes a model tensor-parallel over a mesh, in place, and returns it.

    The model keeps its class, names and signature; its parameters become this rank's slices, and its
    forward runs a compiled program. Every rank of the mesh must call this with the same model.

    Args:
        model: any module; it must hold the same weights on every rank.
        mesh: the device mesh; by default one axis over all processes.
        example_args: positional arguments of a typical call. Without examples a transformers model is
            captured with ``input_ids`` of shape [2, 16], any other module at its first call.
        example_kwargs: keyword arguments of that call; or ``"generate"``: what the model's ``generate`` makes
            of a single prompt, so that its first token needs no other capture.
        plan: ``"auto"``, a ``Plan``, or rules: glob of a module or parameter -> ``Shard(dim)``,
            ``Replicate()`` or the name of a strategy, as in a ``tp_plan`` of transformers. ``"hf"`` is
            the model's own such plan, ``"hf-ep"`` the one with whole experts on each rank.
        axis: the name of the mesh axis to divide over, for a mesh of several; or a tuple of names, in the
            mesh's order, of axes that are used as one.
        dynamic: True: batch and sequence may change; False: shapes are fixed; or argument name ->
            {dimension: whether it may change}.
        compile: have Inductor compile every program; instead of True a mode (``"max-autotune"``), options
            of Inductor, or arguments of ``torch.compile``.
        cost_model: a ``CostModel`` or the name of a preset, for nodes of 8 ``"h100x8"``; by default the
            device's preset, within a node.
        memory: bytes of weights that a rank may hold.
        passes: passes of your own (``Pass``), to run after the compiler's: behind the planner, or before it.
        compose: run a module that cannot be captured as the python that it is, over its submodules, which
            are captured one by one, down to single layers. Every such module is warned about. None: if
            the model is one of transformers, and its python depends on tensor values.
        compare_calls: compare the arguments of every call over the ranks before it runs, which takes one
            small message each. Without it only the first call of each program is compared.
        sequence_parallel: between the blocks, in norms and residual additions, each rank computes some of
            the positions: less memory for activations, as many bytes sent.
        checkpointing: layers (the items of the model's outermost lists of modules) are computed again in
            backward, with their collectives, instead of being kept: ``"full"``; ``"selective"``: results of
            matmuls, attention and collectives are kept; a list of the operators to keep; or a policy, as for
            torch's ``create_selective_checkpoint_contexts``. ``"gathered"``: no layers, but what sequence
            parallelism gathers for linear layers is gathered again. None: what forward itself gives to
            ``torch.utils.checkpoint`` is computed again, as after ``gradient_checkpointing_enable()``.
        timeout: seconds that ranks wait for one that does not come, in the calls of this model over gloo and
            whenever ranks compare; at most the limit of the mesh's process group. What NCCL sends, its own
            watchdog looks after.

    Raises:
        TpCompileError: on all ranks: the request is refused; the model is unchanged.
    """
    arguments = locals().copy()
    mesh = mesh if mesh is not None else default_mesh(device_of(model))
    ranks, seconds = check_mesh(mesh, axis), seconds_of(timeout)
    group = MeshAxis.of(mesh, axis, seconds).group
    with put_together_on_error(model):
        options, example, hooks = together(group, "read the request", lambda: _read(mesh, arguments))
        asked = [*options.lines(), f"compare_calls: {compare_calls}", f"timeout: {seconds}"]
        compare(group, "requests", asked, "make the same request on every rank")
        wanted = read_compile(compile)
        compiled = None if wanted is None else for_group(wanted, group)
        signature, original, lifted = signature_of(model), type(model), model.__dict__.get("forward")
        compiler = Compiler(options, ranks, mesh, axis, seconds)
        runtime = Runtime(
            compiler, signature, original, lifted=lifted, hooks=hooks, compare_calls=compare_calls
        )
        runtime.number = (number_of_model(runtime.group_name),)
        failed = try_first(runtime, model, example) if example is not None else None
        _become_sharded(model, runtime)
        if failed is not None and example is not None:
            compose_call(runtime, model, "", tuple(example), failed)
            # Perhaps a call without pictures: more of the model is planned at once.
            usual = example_or_default(model, (), None)
            if runtime.layout is None and usual is not None and usual.keys() != example.keys():
                try_first(runtime, model, usual, optional=True)
        runtime.mark_weights(model)
        runtime.compile_options = compiled
        return cast(ShardedModule, model)


def _become_sharded(model: nn.Module, runtime: Runtime) -> None:
    """From here on calls of the model are the runtime's, and libraries know that it is not a whole one."""
    model.__dict__.pop("forward", None)
    model._tp = runtime  # type: ignore[assignment]
    model.__class__ = class_when_sharded(runtime.original)
    guard_submodules(model)
    runtime.rebind()  # the modules' tables are others now
    tell_trainer()
    tell_peft()
    tell_of_adapters()


@checked
def plan(
    model: nn.Module,
    mesh_or_sizes: DeviceMesh | Ranks,
    example_args: Sequence[Any] = (),
    example_kwargs: Keywords = None,
    *,
    plan: PlanLike = "auto",
    axis: Axis | None = None,
    dynamic: Dynamic = True,
    cost_model: CostModel | str | None = None,
    memory: Bytes | None = None,
    sequence_parallel: bool = False,
    checkpointing: Checkpointing = None,
) -> Plan:
    """Plans a model without a process group, without weights (``meta`` will do), without a GPU.

    Args:
        model: any module; it stays as it is.
        mesh_or_sizes: a mesh, or how many ranks share the model.
        example_args: see ``parallelize``, as for all that follow. A module that is not from
            transformers needs an example here.

    Raises:
        TpCompileError: the model cannot be captured, or the request cannot be met.
    """
    if isinstance(mesh_or_sizes, DeviceMesh):
        ranks, device = check_mesh(mesh_or_sizes, axis, connected=False), mesh_or_sizes.device_type
    elif axis is not None:
        raise TpCompileError(
            f"a number of ranks has no axis {axis!r}", where="axis", todo="leave it out, or give a mesh"
        )
    else:
        ranks, device = mesh_or_sizes, "h100"
    apart = unwrapped_copy(model)
    options = read_options(
        apart,
        *(plan, cost_model, device, dynamic, memory, ()),
        sequence_parallel=sequence_parallel,
        checkpointing=checkpointing,
    )
    example = example_call(apart, example_args, example_kwargs, dynamic)
    found = Compiler(options, ranks).compile(apart, example, None).plan
    found.estimator = Estimator.of(model, options, example).of_plan
    return found


def _read(mesh: DeviceMesh, asked: Mapping[str, Any]) -> tuple[Options, dict[str, Any] | None, list[Hook]]:
    """The arguments of ``parallelize``, checked and read."""
    check_arguments(parallelize, asked)
    model = asked["model"]
    check_device(model, mesh)
    unwrap(model)
    names = inspect.signature(read_options).parameters.keys() & asked.keys()
    options = read_options(device=mesh.device_type, **{name: asked[name] for name in names})
    read_compile(asked["compile"])
    example = example_or_default(model, asked["example_args"], asked["example_kwargs"], asked["dynamic"])
    return options, example, backward_hooks(model)
