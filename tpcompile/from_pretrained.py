"""Loads a checkpoint of transformers as a sharded model; every rank reads its own slices only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from datetime import timedelta
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .api import parallelize
from .capture.export.default_example import default_example
from .errors import TpCompileError
from .ir.check import Must, check_arguments, well_called
from .planner.search.cost import CostModel
from .ranks.agree import compare, together
from .ranks.mesh import Axis, check_mesh, default_mesh, local_device
from .ranks.mesh_axis import MeshAxis
from .ranks.own_groups import TIMEOUT, seconds_of
from .runtime.compile_options import CompileLike
from .runtime.module import ShardedModule
from .runtime.read_request import Bytes, Checkpointing, Dynamic, Keywords, Passes, PlanLike
from .runtime.runtime import Runtime
from .weights.loading.find_files import Variant
from .weights.sharded_weights import ShardedWeights

if TYPE_CHECKING:
    from .weights.loading.request import Built


@well_called
def from_pretrained(
    name_or_path: Annotated[str, Must("a folder, or a name on the hub", bool)] | PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    adapter: Any = None,
    plan: PlanLike = "auto",
    config: Any = None,
    model_class: Any = None,
    axis: Axis | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Keywords = None,
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
    attn_implementation: str | Mapping[str, str] | None = None,
    generation_config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    quantization_config: Any = None,
    keep_quantised: bool = False,
    trust_remote_code: bool = False,
    variant: Variant | None = None,
    subfolder: str = "",
    **others: Any,
) -> ShardedModule:
    """Loads a checkpoint over a mesh, and returns the model as ``parallelize`` does, in evaluation mode.

    The model is captured and planned without weights. Then every rank reads its own slices from the
    checkpoint's safetensors; no rank ever holds the whole model. Every rank of the mesh must call this.

    Args:
        name_or_path: a folder (as ``save_pretrained`` writes it), a file, or a name on the hub.
        mesh: the device mesh; by default one axis over all processes, which are connected first if torchrun
            started them.
        dtype: the type of the model; None or ``"auto"``: the checkpoint's.
        adapter: a configuration of PEFT (``LoraConfig(...)``), or the folder of an adapter: the result is a
            ``PeftModel`` around the checkpoint's model. New adapters begin with the numbers of a fixed seed.
        plan: see ``parallelize``, as for ``axis`` and all from ``dynamic`` to ``compare_calls``.
        config: a configuration instead of the checkpoint's.
        model_class: the model's class, or an ``AutoModelFor...``; by default the checkpoint's.
        axis: the name of the mesh axis to divide over, for a mesh of several; or a tuple of names, in the
            mesh's order, of axes that are used as one.
        example_args: positional arguments of a typical call.
        example_kwargs: keyword arguments of a typical call; by default they follow from the configuration.
            With ``"generate"`` those of a prompt: a model that only generates is captured once less.
        dynamic: which sizes of the inputs may change.
        compile: have Inductor compile every program; or with which options.
        cost_model: a ``CostModel`` or the name of a preset (``"h100x8"``: nodes of 8).
        memory: bytes of weights that a rank may hold.
        passes: passes of your own (``Pass``), to run after the compiler's: behind the planner, or before it.
        compose: run what cannot be captured as python over its submodules.
        compare_calls: compare the arguments of every call over the ranks before it runs.
        sequence_parallel: divide the sequence between the blocks.
        checkpointing: compute layers again in backward.
        timeout: seconds that ranks wait for one that does not come.
        attn_implementation: ``"sdpa"``, ``"eager"``, or one that you registered with transformers.
        generation_config: instead of the checkpoint's.
        key_mapping: patterns of keys in the checkpoint -> what they become.
        quantization_config: for a quantised checkpoint: transformers' object, or a dict of its fields, that
            says ``dequantize=True``. Every rank dequantises its own slices while it reads them. For any other
            checkpoint: how its weights are quantised while they are read (``TorchAoConfig``).
        keep_quantised: weights of a checkpoint in fp8 blocks or in MXFP4 stay so in memory, and every
            operation on one begins with dequantising it; numbers are those of ``dequantize=True``.
        trust_remote_code: whether code that comes with the checkpoint may run.
        variant: reads ``model.<variant>.safetensors``.
        subfolder: of the folder or repository.
        others: arguments for the hub (``revision``, ``token``, ``cache_dir``, ...), and fields of the
            configuration to change.

    Raises:
        TpCompileError: on every rank, before weights are read where that can be: the checkpoint is not
            there, damaged, quantised, a pickle, or another model's; or ``parallelize`` refuses the request.
    """
    arguments = locals().copy()
    mesh = mesh if mesh is not None else default_mesh()
    check_mesh(mesh, axis)
    place = MeshAxis.of(mesh, axis, seconds_of(timeout))
    group, device, first = place.group, local_device(mesh.device_type), place.rank == 0
    built = _build(group, arguments, device, first)
    if not example_args and not example_kwargs:
        _check_example(built.model)
    asked = inspect.signature(parallelize).parameters.keys() - {"model", "mesh"}
    model = parallelize(built.model, mesh, **{name: arguments[name] for name in asked})
    _load(group, model, built, device, first)
    return model


def _build(group: dist.ProcessGroup, asked: Mapping[str, Any], device: torch.device, show: bool) -> Built:
    """Opens a checkpoint, and matches it with a model that has no weights yet."""
    # transformers takes seconds to import, and tpcompile can be used without it.
    from .weights.loading.compare_files import compare_files
    from .weights.loading.match_keys import warn_unexpected
    from .weights.loading.request import CheckpointRequest, Opened

    def read() -> tuple[CheckpointRequest, Opened]:
        check_arguments(from_pretrained, asked)
        given = {
            name: asked[name]
            for name in inspect.signature(CheckpointRequest).parameters.keys() & asked.keys()
        }
        older = asked["others"].pop("torch_dtype", None)
        given["dtype"] = older if asked["dtype"] is None else asked["dtype"]
        request = CheckpointRequest(fspath(asked["name_or_path"]), **given)
        return request, request.open()

    request, opened = together(group, "open the checkpoint", read)
    compare(group, "checkpoints", opened.lines())
    compare_files(group, opened.stored)
    built = together(group, "match the checkpoint with the model", lambda: request.build(opened, device))
    if (adapter := asked["adapter"]) is not None:
        from .weights.loading.add_adapter import add_adapter

        built = together(group, "add the adapter", functools.partial(add_adapter, built, adapter, device))
    unexpected = built.unexpected if show else ()
    together(group, "warn of unexpected keys", lambda: warn_unexpected(unexpected, request.name))
    return built


def _load(group: dist.ProcessGroup, model: Any, built: Built, device: torch.device, show: bool) -> None:
    """Reads this rank's slices of the weights."""
    from .weights.loading.load_slices import load_slices

    runtime: Runtime = model._tp
    axis = runtime.compiler.axis
    assert axis is not None, "a sharded model has a mesh"
    weights = ShardedWeights.undecided(model, axis) if runtime.layout is None else runtime.weights()
    with torch.inference_mode(False):  # weights that could not be trained, even outside of the mode
        load = functools.partial(load_slices, model, built.expressions, weights, device, show=show)
        together(group, "load the weights", load)
    runtime.rebind()


def _check_example(model: Any) -> None:
    if default_example(model) is None:
        raise TpCompileError(
            f"no example call of {type(model).__name__} can be made up",
            where=f"its main input is {model.main_input_name}",
            todo="give example_kwargs: the arguments of a typical call",
        )
