"""torch's wrappers and functions that must know of sharded parameters: they are told, or refused.

Everything here replaces something of torch's, once, when the first model is sharded; others see no change.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import optimizer

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import foreach_utils, fully_shard
from tpcompile.ir.when_imported import when_imported

from .clipping import tell_clipping
from .compare_steps import compare_step
from .full_states import tell_helpers
from .optimizer_state import parts_of_state
from .optimizer_updates import tell_optimizers
from .replaced import check_optimizer
from .sharded_parameter import ShardedParameter, local_tensor
from .tensor_layout import UnsayableSpec

_OTHER_AXIS = (
    "mesh = init_device_mesh(device, (replicas, ranks), mesh_dim_names=('data', 'tensor')), "
    "parallelize(model, mesh, axis='tensor')"
)

_OPTIMIZER: Any = optimizer.Optimizer


@functools.cache
def guard_torch() -> None:
    """Tells torch's data parallelism, optimizers and autograd of sharded parameters."""
    for supported in (optimizer._foreach_supported_types, foreach_utils._foreach_supported_types):
        supported.append(ShardedParameter)
    tell_optimizers()
    optimizer.register_optimizer_step_pre_hook(check_optimizer)
    optimizer.register_optimizer_step_pre_hook(compare_step)
    tell_clipping()
    tell_helpers()
    _OPTIMIZER.load_state_dict = _loads_parts(_OPTIMIZER.load_state_dict)
    _around(DistributedDataParallel, _construct_ddp)
    _around(FullyShardedDataParallel, _construct_fsdp)
    _around(ParametrizationList, _construct_parametrization)
    memory: Any = torch.utils.dlpack  # its function reads memory, which subclasses may not have
    read, plain = memory.to_dlpack, (Tensor, nn.Parameter)
    memory.to_dlpack = lambda tensor: read(tensor) if type(tensor) in plain else tensor.__dlpack__()
    vars(torch)["to_dlpack"] = memory.to_dlpack
    nn.init.orthogonal_ = functools.partial(_orthogonal, nn.init.orthogonal_)
    fsdp: Any = fully_shard
    fsdp._get_modules_and_states = functools.partial(_fully_shard_states, fsdp._get_modules_and_states)
    autograd: Any = torch.autograd
    autograd._engine_run_backward = functools.partial(_run_backward, autograd._engine_run_backward)
    graph: Any = torch.autograd.graph
    graph._get_grad_fn_or_grad_acc = functools.partial(_find_node, graph._get_grad_fn_or_grad_acc)
    when_imported("torch.distributed.pipelining.stage", _tell_pipelining)
    zero = "torch.distributed.optim.zero_redundancy_optimizer"
    when_imported(zero, lambda module: _around(module.ZeroRedundancyOptimizer, _construct_zero))


Construct = Callable[[Callable[[], None], dict[str, Any]], None]
"""Takes the original constructor, bound, and its arguments by name."""


def _around(wrapper: Any, construct: Construct) -> None:
    """Lets a function construct the objects of a class."""
    original = wrapper.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        construct(lambda: original(*call.args, **call.kwargs), call.arguments)

    wrapper.__init__ = init


def _sharded(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, ShardedParameter]]:
    """The sharded parameters and buffers of a module: table, name, tensor."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if isinstance(tensor, ShardedParameter):
                    yield table, name, tensor


def _refuse_own_axis(what: str, tensor: ShardedParameter, theirs: Iterable[int]) -> None:
    """Refuses data parallelism over ranks that share a model."""
    shared = sorted(set(dist.get_process_group_ranks(tensor.placing.group)) & set(theirs))
    if len(shared) > 1:
        raise TpCompileError(
            f"{what} over ranks {shared}, which share the model: each holds other parts of its weights",
            where="the model's mesh axis",
            todo=f"make a mesh of two axes, {_OTHER_AXIS}, and give {what} the other one: "
            "DistributedDataParallel(model, process_group=mesh.get_group('data')) or "
            "fully_shard(model, mesh=mesh['data']); with one axis, train without it, on the same batches",
        )


def _construct_ddp(construct: Callable[[], None], call: dict[str, Any]) -> None:
    """``DistributedDataParallel`` is given the leaves in which gradients arrive."""
    held = list(_sharded(call["module"]))
    if held:
        mesh, group = call.get("device_mesh"), call.get("process_group")
        group = mesh.get_group() if mesh is not None else group or dist.group.WORLD
        _refuse_own_axis("DistributedDataParallel", held[0][2], dist.get_process_group_ranks(group))
    for table, name, tensor in held:
        table[name] = tensor._local_tensor
    try:
        construct()
    finally:
        for table, name, tensor in held:
            table[name] = tensor
    for _, _, tensor in held:
        tensor.averaged = True


def _construct_fsdp(construct: Callable[[], None], call: dict[str, Any]) -> None:
    for _, _, tensor in _sharded(call["module"]):
        _refuse("FullyShardedDataParallel flattens", tensor, "use torch.distributed.fsdp.fully_shard instead")
    construct()


def _construct_zero(construct: Callable[[], None], call: dict[str, Any]) -> None:
    groups = list(call["params"])
    params = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    for tensor in params:
        if isinstance(tensor, ShardedParameter):
            todo = "use the optimizer itself: the state of every rank is that of its parts already"
            _refuse("ZeroRedundancyOptimizer broadcasts", tensor, todo)
    call["params"] = groups
    construct()


def _loads_parts(original: Callable[..., None]) -> Callable[..., None]:
    """``load_state_dict`` of optimizers: it takes whole states, and what ``torch.save`` wrote of parts."""

    @functools.wraps(original)
    def load(self: Any, state_dict: Any) -> None:
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = dict(zip(saved, (p for g in self.param_groups for p in g["params"]), strict=False))
        state = parts_of_state(state_dict["state"], params)
        original(self, {**state_dict, "state": state})

    return load


def _construct_parametrization(construct: Callable[[], None], call: dict[str, Any]) -> None:
    """The first thing that ``register_parametrization`` does; its second is to write into the weight."""
    module = sys._getframe(2).f_locals.get("module")
    held = _sharded(module) if isinstance(module, nn.Module) else ()
    for tensor in (call["original"], *(tensor for _, _, tensor in held)):
        if isinstance(tensor, ShardedParameter):
            raise TpCompileError(
                "a parametrization of a sharded model's weights, which its programs would not notice",
                where=tensor.placing.name,
                todo="register it before parallelize",
            )
    construct()


def _orthogonal(original: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """It draws numbers into a plain tensor, on every rank its own, and copies what becomes of them."""
    if isinstance(tensor, ShardedParameter):
        _refuse(
            "nn.init.orthogonal_ draws numbers for",
            tensor,
            "initialise the weights before parallelize, or load them",
        )
    return original(tensor, *args, **kwargs)


def _refuse(what: str, tensor: ShardedParameter, todo: str) -> None:
    raise TpCompileError(
        f"{what} parameters, of which this rank has a part", where=tensor.placing.name, todo=todo
    )


def _find_node(original: Any, tensor: Any) -> Any:
    """The node of autograd that hooks on several tensors wait for; gradients arrive at another one here."""
    _refuse_result(tensor)
    if isinstance(tensor, ShardedParameter) and tensor.is_leaf:
        _refuse("torch.autograd.graph waits for", tensor, "use a hook on each: parameter.register_hook(...)")
    return original(tensor)


def _tell_pipelining(module: Any) -> None:
    """Schedules that compute gradients of weights later look for where these arrive: at the leaves."""
    of_inputs, of_weights = module.stage_backward_input, module.stage_backward_weight

    def stage_backward_input(outputs: Any, grads: Any, inputs: Any, weights: Iterable[Tensor]) -> Any:
        return of_inputs(outputs, grads, inputs, map(_leaf, weights))

    def stage_backward_weight(weights: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        return of_weights(map(_leaf, weights), *args, **kwargs)

    module.stage_backward_input, module.stage_backward_weight = stage_backward_input, stage_backward_weight


def _leaf(p: Tensor) -> Tensor:
    return local_tensor(p) if isinstance(p, ShardedParameter) else p


def _refuse_result(tensor: Any) -> None:
    """Refuses a result of which this rank has a part: its gradient arrives there, and not at the result."""
    if getattr(type(tensor), "GRADIENT_AT_PART", False):
        raise TpCompileError(
            "autograd is asked for the gradient of a result of which this rank has a part",
            where="a result that is gathered when it is used",
            todo="call retain_grad() on it, then backward() without inputs",
        )


def _fully_shard_states(original: Any, module: nn.Module, *args: Any) -> Any:
    """What ``fully_shard`` collects first; nothing is changed yet."""
    mesh = sys._getframe(1).f_locals["mesh"]
    for _, _, tensor in _sharded(module):
        _refuse_own_axis("fully_shard", tensor, mesh.mesh.flatten().tolist())
        if isinstance(tensor._spec, UnsayableSpec):
            todo = "use DistributedDataParallel over the other axis of the mesh"
            _refuse("fully_shard cannot divide uneven, packed or shared parts of", tensor, todo)
    return original(module, *args)


def _run_backward(original: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """``backward(inputs=...)``, ``autograd.grad``: gradients of parameters are those of their leaves too."""
    inputs = args[3]
    for each in inputs:
        _refuse_result(each)
    if not any(isinstance(p, ShardedParameter) and p.is_leaf for p in inputs):
        return original(outputs, *args, **kwargs)
    if args[2]:
        raise TpCompileError(
            "second derivatives do not see through the collectives of a sharded model",
            where="create_graph=True",
            todo="take first derivatives only",
        )
    leaves = [local_tensor(p) for p in inputs if isinstance(p, ShardedParameter) and p.is_leaf]
    both = (*inputs, *leaves)
    if kwargs["accumulate_grad"]:
        return original(outputs, *args[:3], both, *args[4:], **kwargs)
    unused = kwargs.pop("allow_unreachable", args[4] if len(args) > 4 else False)
    found = original(outputs, *args[:3], both, True, **kwargs)
    inner = iter(found[len(inputs) :])
    result = [_gradient(p, g, inner) for p, g in zip(inputs, found[: len(inputs)], strict=True)]
    if not unused and any(g is None for g in result):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return tuple(result)


def _gradient(p: Any, outer: Tensor | None, inner: Iterator[Tensor | None]) -> Tensor | None:
    """The gradient of an input: what has come to it, and what has come to the leaf inside of it."""
    if not (isinstance(p, ShardedParameter) and p.is_leaf):
        return outer
    p.placing.check_gradient()
    found = [g for g in (next(inner), None if outer is None else p.part_of(outer)) if g is not None]
    return ShardedParameter(sum(found[1:], found[0]), p.placing) if found else None
