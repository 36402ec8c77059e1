"""Elementwise operators, and lists of them, on the parts of sharded parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import tree_map

from .gathered_view import changed_by, gathered, local
from .tensor_layout import TensorLayout

aten = torch.ops.aten

_KEEPING: tuple[Any, ...] = (aten.clone, aten.detach, aten.detach_, aten.alias, aten.lift_fresh)
_KEEPING += (aten._to_copy, aten.copy_, aten.zero_, aten.zeros_like, aten.empty_like)
"""What is right for parts that a custom strategy has computed."""


def pointwise(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the parts, if every operand can be cut as the result is laid out."""
    changed = changed_by(func, args, kwargs)
    where: TensorLayout | None = None
    for a in (*changed, *args, *kwargs.values()):
        if isinstance(a, kind):
            where = a.placing
            break
    computed = where is not None and where.computed and func.overloadpacket not in _KEEPING
    if where is None or computed or any(not isinstance(t, kind) or t.placing != where for t in changed):
        return gathered(kind, func, args, kwargs)
    operands = []
    for a in args:
        if isinstance(a, Tensor):
            a = _operand(kind, a, where)
            if a is None:
                return gathered(kind, func, args, kwargs)
        operands.append(a)
    with torch.no_grad():
        out = func(*operands, **tree_map(local(kind), kwargs))
    if changed:
        increment_version([t._local_tensor for t in changed])
        return changed[0]
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


def new(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A new tensor: laid out as this one if it has its shape, else a plain one."""
    tensor, size = args[0], torch.Size(args[1])
    alike = size == tensor.placing.shape
    made = func(tensor._local_tensor, tensor.placing.local_shape if alike else size, *args[2:], **kwargs)
    return kind(made, tensor.placing) if alike else made


def by_list(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lists of tensors, of which those at one position belong together."""
    lists = [a for a in (*args, *kwargs.values()) if _is_list(a)]
    count = max(map(len, lists))
    changed = changed_by(func, args, kwargs)
    wheres: list[TensorLayout | None] = [None] * count
    for given in lists[:1] if changed else lists:
        if len(given) == count:
            wheres = [
                t.placing if where is None and isinstance(t, kind) else where
                for t, where in zip(given, wheres, strict=True)
            ]

    def parts(given: Any) -> Any:
        if not _is_list(given) or len(given) != count:
            return given
        found = [
            t._local_tensor if type(t) is kind and t.placing is where else _part(kind, t, where)
            for t, where in zip(given, wheres, strict=True)
        ]
        if any(given is each for each in changed):
            _refuse_lost(kind, given, found)
        return found

    with torch.no_grad():
        out = func(*map(parts, args), **{name: parts(value) for name, value in kwargs.items()})
    for value in changed:
        if _is_list(value):
            increment_version([t._local_tensor for t in value if isinstance(t, kind)])
    if changed:
        return out
    return [o if where is None else kind(o, where) for o, where in zip(out, wheres, strict=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Tensor)


def _refuse_lost(kind: Any, given: Any, parts: list[Tensor]) -> None:
    """Refuses to write into what is only a copy of a tensor."""
    for tensor, part in zip(given, parts, strict=True):
        if part is not tensor and (type(tensor) is not kind or part is not tensor._local_tensor):
            raise TpCompileError(
                f"of a list that is to be written, a tensor of shape {tuple(tensor.shape)} is laid out "
                "otherwise than the others at its place",
                where=getattr(getattr(tensor, "placing", None), "name", "a plain tensor"),
                todo="make it from the parameter: torch.zeros_like(parameter)",
            )


def _part(kind: Any, t: Any, where: TensorLayout | None) -> Tensor:
    """One tensor of a list, beside others of which the first is laid out like this."""
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
