"""What an operation on sharded parameters does: every result is that of the whole tensors, or there is none.

In this order: collectives and random numbers are refused; norms and sums add up over the ranks; elementwise
operators, and lists of them (foreach and fused optimizers), run on the parts where all operands are laid out
alike; everything else gathers its operands, and a result that torch would return as a view can be read only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from tpcompile.errors import TpCompileError

from .gathered_view import GatheredView, Source
from .norms import norms, total
from .tensor_layout import TensorLayout

if TYPE_CHECKING:
    from .sharded_parameter import ShardedParameter

aten = torch.ops.aten

Handler = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the class of sharded parameters, the operator, its arguments."""

_RANDOM: tuple[str, ...] = (
    "rand",
    "normal",
    "uniform_",
    "bernoulli",
    "multinomial",
    "poisson",
    "native_dropout",
    "log_normal_",
)
_RANDOM += ("exponential_", "random_", "cauchy_", "geometric_", "binomial")
_ALIKE: tuple[Any, ...] = (
    aten.clone,
    aten.detach,
    aten.alias,
    aten._to_copy,
    aten.copy_,
    aten.fill_,
    aten.zero_,
    aten.zeros_like,
)
_ALIKE += (aten.ones_like, aten.empty_like, aten.full_like, aten.lift_fresh, aten.detach_)


_NEW = (aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full)


def dispatch(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator with sharded operands.

    Args:
        kind: the class of sharded parameters.
        func: an operator of aten.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        TpCompileError: it cannot be right.
    """
    return _handler(func)(kind, func, args, kwargs)


@functools.cache
def _handler(func: Any) -> Handler:
    """What is to be done for an operator."""
    name = func.overloadpacket.__name__
    if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
        return _refuse_collective
    if name.startswith(_RANDOM):
        return _refuse_random
    if name in ("_foreach_norm", "linalg_vector_norm", "norm") and "out" not in func._overloadname:
        return _norm
    if func is aten.sum.default:
        return _sum
    if name == "_amp_foreach_non_finite_check_and_unscale_":
        return _unscale
    if func is aten.equal.default:
        return _equal
    if name.startswith("_fused_") or (name.startswith("_foreach_") and name != "_foreach_max"):
        return _by_list
    if func.overloadpacket in _NEW:
        return _new
    if torch.Tag.pointwise in func.tags or func.overloadpacket in _ALIKE:
        return _pointwise
    return _gathered


# ------------------------------------------------------------------------------------------ what is refused


def _first(kind: Any, args: Any, kwargs: Any) -> ShardedParameter:
    return next(a for a in tree_leaves((args, kwargs)) if isinstance(a, kind))


def _refuse_collective(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    raise TpCompileError(
        f"{func} would send this rank's part of a weight as if it were all of it",
        where=_first(kind, args, kwargs).placing.name,
        todo="use full_tensor(), or to_local() where the part is meant; DistributedDataParallel and "
        "fully_shard work over another axis of the mesh than the model's",
    )


def _refuse_random(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    raise TpCompileError(
        f"{func} of a sharded weight: every rank would draw numbers of its own",
        where=_first(kind, args, kwargs).placing.name,
        todo="initialise before parallelize; or draw a whole tensor, equal on all ranks, and copy_ it",
    )


# ------------------------------------------------------------------------------------------- norms and sums


def _norm(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms of whole tensors; along dimensions, or of unusual orders, of gathered ones."""
    listed = func.overloadpacket is aten._foreach_norm
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    order = 2.0 if order is None else float(order)
    dims = args[2] if len(args) > 2 and not listed else kwargs.get("dim")
    if order <= 0 or dims or kwargs.get("keepdim") or len(args) > 3:
        return _gathered(kind, func, args, kwargs)
    dtype = kwargs.get("dtype") or (args[2] if listed and len(args) > 2 else None)
    found = norms(list(args[0]) if listed else [args[0]], order, dtype)
    return found if listed else found[0]


def _sum(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = total(args[0])
    return found.to(kwargs["dtype"]) if kwargs.get("dtype") is not None else found


def _unscale(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``GradScaler``: an overflow on one rank is one on all."""
    func(*tree_map(_local(kind), args), **kwargs)
    where = _first(kind, args, kwargs).placing
    dist.all_reduce(args[1], dist.ReduceOp.MAX, group=where.group)


def _equal(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first, second = args
    if not (isinstance(first, kind) and isinstance(second, kind) and first.placing == second.placing):
        return bool(_gathered(kind, func, args, kwargs))
    same = torch.tensor(float(torch.equal(first._local_tensor, second._local_tensor)), device=first.device)
    dist.all_reduce(same, dist.ReduceOp.MIN, group=first.placing.group)
    return bool(same)


def _local(kind: Any) -> Callable[[Any], Any]:
    return lambda a: a._local_tensor if isinstance(a, kind) else a


# --------------------------------------------------------------------------------------- element by element


@functools.cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operator writes: positions, or names."""
    arguments = enumerate(func._schema.arguments)
    return tuple(
        a.name if a.kwarg_only else i
        for i, a in arguments
        if a.alias_info is not None and a.alias_info.is_write
    )


def _pointwise(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the parts, if every operand can be cut as the result is laid out."""
    written: list[Any] = [kwargs.get(at) if isinstance(at, str) else args[at] for at in _written(func)]
    where: TensorLayout | None = None
    for a in (*written, *args, *kwargs.values()):
        if isinstance(a, kind):
            where = a.placing
            break
    if where is None or any(not isinstance(t, kind) or t.placing != where for t in written):
        return _gathered(kind, func, args, kwargs)
    operands = []
    for a in args:
        if isinstance(a, Tensor):
            a = _operand(kind, a, where)
            if a is None:
                return _gathered(kind, func, args, kwargs)
        operands.append(a)
    with torch.no_grad():
        out = func(*operands, **tree_map(_local(kind), kwargs))
    if written:
        increment_version([t._local_tensor for t in written])
        return written[0]
    return tree_map(lambda o: kind(o, where) if isinstance(o, Tensor) else o, out)


def _operand(kind: Any, a: Any, where: TensorLayout) -> Tensor | None:
    """A tensor's part for a result that is laid out like this; None if the result has another shape."""
    if isinstance(a, kind):
        if a.placing == where:
            return a._local_tensor
        a = a.placing.gather(a._local_tensor.detach())
    elif isinstance(a, DTensor):
        raise TpCompileError(
            "a sharded weight and a DTensor of another kind are combined",
            where=where.name,
            todo="gather one of them: full_tensor()",
        )
    if a.ndim == 0 or (a.numel() == 1 and a.ndim <= len(where.shape)):
        return a
    try:
        fits = torch.broadcast_shapes(a.shape, where.shape) == where.shape
    except RuntimeError:
        return None
    return where.cut(a.expand(where.shape)) if fits else None


def _new(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A new tensor: laid out as this one if it has its shape, else a plain one."""
    tensor, size = args[0], torch.Size(args[1])
    alike = size == tensor.placing.shape
    made = func(tensor._local_tensor, tensor.placing.local_shape if alike else size, *args[2:], **kwargs)
    return kind(made, tensor.placing) if alike else made


def _by_list(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lists of tensors, of which those at one position belong together."""
    lists = [a for a in (*args, *kwargs.values()) if _is_list(a)]
    count = max(map(len, lists))
    written = bool(_written(func))
    leading = lists[:1] if written else lists
    wheres = [
        next((a[i].placing for a in leading if len(a) == count and isinstance(a[i], kind)), None)
        for i in range(count)
    ]

    def parts(given: Any) -> Any:
        if not _is_list(given) or len(given) != count:
            return given
        return [_part(kind, t, where) for t, where in zip(given, wheres, strict=True)]

    with torch.no_grad():
        out = func(*map(parts, args), **{name: parts(value) for name, value in kwargs.items()})
    if written:
        for at in _written(func):
            value: Any = kwargs.get(at) if isinstance(at, str) else args[at] if at < len(args) else None
            if _is_list(value):
                increment_version([t._local_tensor for t in value if isinstance(t, kind)])
        return out
    return [o if where is None else kind(o, where) for o, where in zip(out, wheres, strict=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Tensor)


def _part(kind: Any, t: Any, where: TensorLayout | None) -> Tensor:
    """One tensor of a list, beside others of which the first is laid out like this."""
    if isinstance(t, kind) and t.placing is where:
        return t._local_tensor
    if where is None:
        return t.placing.gather(t._local_tensor.detach()) if isinstance(t, kind) else t
    part = _operand(kind, t, where)
    if part is None:
        raise TpCompileError(
            f"a list has a tensor of shape {tuple(t.shape)} where others have {tuple(where.shape)}",
            where=where.name,
            todo="give tensors of one shape at each place",
        )
    return part


# ------------------------------------------------------------------------------------------ everything else


def _gathered(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On whole tensors. What is written is cut again."""
    sources: dict[int, Source] = {}

    def whole(a: Any) -> Any:
        if not isinstance(a, kind):
            return a
        if id(a) not in sources:
            sources[id(a)] = Source(a._local_tensor, a.placing)
        return sources[id(a)].whole

    with torch.no_grad():
        out = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    written: list[Any] = [kwargs.get(at) if isinstance(at, str) else args[at] for at in _written(func)]
    if written:
        for t in tree_leaves(written):
            if isinstance(t, kind):
                sources[id(t)].write_back()
        return written[0] if len(func._schema.returns) == 1 and isinstance(written[0], Tensor) else out
    if any(a.alias_info is not None for a in func._schema.arguments):
        base = next((s for s in sources.values() if not s.placing.whole), None)
        if base is not None:
            return tree_map(lambda o: GatheredView(o, base) if isinstance(o, Tensor) else o, out)
    return out
