"""What an operation on sharded parameters does: every result is that of the whole tensors, or there is none.

In this order: collectives, random numbers and other memory are refused; norms and sums add up over the ranks;
elementwise operators, and lists of them, run on the parts where all operands are laid out alike; everything
else gathers its operands, and what torch would return as a view is one of the gathered (``gathered_view``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import RanksApart, TpCompileError
from tpcompile.ir.torch_internals import tree_leaves, tree_map
from tpcompile.ranks.exchange import exchange

from .elementwise import by_list, new, pointwise
from .gathered_view import draws, gathered, local, refuse_random
from .norms import norms, total

aten = torch.ops.aten

Handler = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the class of sharded parameters, the operator, its arguments."""

_BY_ELEMENT = ("_foreach_", "_fused_adam", "_fused_adagrad", "_fused_sgd")
_NOT_BY_ELEMENT = ("_foreach_max", "_foreach_mm", "_foreach_powsum")
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
    if draws(func):
        return _refuse_random
    if torch.Tag.inplace_view in func.tags and func.overloadpacket is not aten.detach_:
        return _refuse_other_memory
    if name in ("_foreach_norm", "linalg_vector_norm", "norm") and "out" not in func._overloadname:
        return _norm
    if func is aten.sum.default:
        return _sum
    if name == "_amp_foreach_non_finite_check_and_unscale_":
        return _unscale
    if func is aten.equal.default:
        return _equal
    if name.startswith(_BY_ELEMENT) and name not in _NOT_BY_ELEMENT:
        return by_list
    if func.overloadpacket in _NEW:
        return new
    if torch.Tag.pointwise in func.tags or func.overloadpacket in _ALIKE:
        return pointwise
    return gathered


# ------------------------------------------------------------------------------------------ what is refused


def _first(kind: Any, args: Any, kwargs: Any) -> Any:
    return next(a for a in tree_leaves((args, kwargs)) if isinstance(a, kind))


def _refuse_collective(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    raise TpCompileError(
        f"{func} would send this rank's part of a weight as if it were all of it",
        where=_first(kind, args, kwargs).placing.name,
        todo="use full_tensor(), or to_local() where the part is meant; DistributedDataParallel and "
        "fully_shard work over another axis of the mesh than the model's",
    )


def _refuse_random(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    refuse_random(func, _first(kind, args, kwargs).placing)


def _refuse_other_memory(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    raise TpCompileError(
        f"{func} would give a sharded weight another shape, or memory that its programs do not know",
        where=_first(kind, args, kwargs).placing.name,
        todo="write values into it, by copy_; or change the model before parallelize",
    )


# ------------------------------------------------------------------------------------------- norms and sums


def _norm(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms of whole tensors; along dimensions, or of unusual orders, of gathered ones."""
    listed = func.overloadpacket is aten._foreach_norm
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    order = 2.0 if order is None else float(order)
    dims = args[2] if len(args) > 2 and not listed else kwargs.get("dim")
    if order <= 0 or dims or kwargs.get("keepdim") or len(args) > 3:
        return gathered(kind, func, args, kwargs)
    dtype = kwargs.get("dtype") or (args[2] if listed and len(args) > 2 else None)
    found = norms(list(args[0]) if listed else [args[0]], order, dtype)
    return found if listed else found[0]


def _sum(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return total(args[0], kwargs.get("dtype"))


def _unscale(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``GradScaler``: an overflow on one rank is one on all."""
    func(*tree_map(local(kind), args), **kwargs)
    where = _first(kind, args, kwargs).placing
    args[1].fill_(max(exchange(where.group, "look for gradients that are not finite", args[1].item())))


def _equal(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first, second = args
    if not (isinstance(first, kind) and isinstance(second, kind) and first.placing == second.placing):
        return bool(gathered(kind, func, args, kwargs))
    mine = (first.placing.name, torch.equal(first._local_tensor, second._local_tensor))
    everyone = exchange(first.placing.group, "compare weights", mine)
    if len({name for name, _ in everyone}) > 1:
        raise RanksApart(
            f"the ranks compare different weights: {', '.join(name for name, _ in everyone)}",
            where=first.placing.name,
            todo="compare the same weights on every rank",
        )
    return all(same for _, same in everyone)
