"""A tensor that records what is done to it instead of doing it.

transformers' conversions (``transformers.core_model_loading``) are ordinary torch code. Run on lazy tensors
they give expressions, from which a rank reads its slices only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import disabled_torch_function_impl, tree_map_only

from .expressions import AddDim, Apply, Cast, Cut, DropDim, Expression, Join, Permute

aten = torch.ops.aten
_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class LazyTensor(Tensor):
    """A valueless tensor on the CPU that knows its expression; its strides are those of a fresh one."""

    expression: Expression

    @staticmethod
    def __new__(cls, expression: Expression) -> LazyTensor:
        """A tensor of the expression's shape and type."""
        made = Tensor._make_wrapper_subclass(
            cls, torch.Size(expression.shape), dtype=expression.dtype, device=torch.device("cpu")
        )
        made.expression = expression
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> LazyTensor:
        return self

    __torch_function__ = disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Records a call."""
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.expression, (args, kwargs or {}))
        if func._schema.is_mutable:
            raise TpCompileError(
                f"a weight conversion changes a tensor in place ({func})",
                where="transformers' conversion of weights",
                todo="write the conversion with operators that return a new tensor",
            )
        rule = _RULES.get(func)
        found = rule(*args, **kwargs) if rule is not None else _apply(func, args, kwargs)
        return tree_map_only(Expression, LazyTensor, found)


def _apply(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator without a rule; its results' shapes come from running it on valueless tensors."""

    if _LOOKS & set(func.tags):
        raise TpCompileError(
            f"a weight conversion looks at values ({func})",
            where="transformers' conversion of weights",
            todo="write the conversion without decisions that depend on weights",
        )

    def empty(e: Expression) -> Tensor:
        return torch.empty(e.shape, dtype=e.dtype, device="meta")

    fake_args, fake_kwargs = tree_map_only(Expression, empty, (args, kwargs))
    result = func(*fake_args, **fake_kwargs)
    if isinstance(result, Tensor):
        return Apply(tuple(result.shape), result.dtype, func, args, kwargs)
    parts = [Apply(tuple(r.shape), r.dtype, func, args, kwargs, i) for i, r in enumerate(result)]
    return type(result)(parts)


def _same(of: Expression, *args: Any, **kwargs: Any) -> Expression:
    return of


def _cast(of: Expression, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Expression:
    return of if dtype is None or dtype == of.dtype else Cast(of.shape, dtype, of)


def _permute(of: Expression, dims: Sequence[int]) -> Expression:
    order = tuple(d % len(of.shape) for d in dims)
    return Permute(tuple(of.shape[d] for d in order), of.dtype, of, order)


def _transpose(of: Expression, dim0: int, dim1: int) -> Expression:
    order = list(range(len(of.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(of, order)


def _t(of: Expression) -> Expression:
    return _permute(of, range(len(of.shape))[::-1])


def _cat(parts: Sequence[Expression], dim: int = 0) -> Expression:
    parts = [p for p in parts if p.shape != (0,)] or list(parts[:1])  # cat skips these
    dim %= len(parts[0].shape)
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    for part in parts:
        if part.shape[:dim] + part.shape[dim + 1 :] != parts[0].shape[:dim] + parts[0].shape[dim + 1 :]:
            raise ValueError(f"shapes {parts[0].shape} and {part.shape} cannot be joined along {dim}")
    return Join(tuple(shape), dtype, tuple(_cast(p, dtype=dtype) for p in parts), dim)


def _stack(parts: Sequence[Expression], dim: int = 0) -> Expression:
    dim %= len(parts[0].shape) + 1
    if len({p.shape for p in parts}) > 1:
        raise ValueError(f"shapes {sorted({p.shape for p in parts})} cannot be stacked")
    return _cat([_unsqueeze(p, dim) for p in parts], dim)


def _unsqueeze(of: Expression, dim: int) -> Expression:
    dim %= len(of.shape) + 1
    return AddDim(of.shape[:dim] + (1,) + of.shape[dim:], of.dtype, of, dim)


def _drop(of: Expression, dim: int) -> Expression:
    return DropDim(of.shape[:dim] + of.shape[dim + 1 :], of.dtype, of, dim)


def _squeeze(of: Expression, dim: int) -> Expression:
    dim %= len(of.shape)
    return _drop(of, dim) if of.shape[dim] == 1 else of


def _narrow(of: Expression, dim: int, start: int, length: int) -> Expression:
    return Cut(of.shape[:dim] + (length,) + of.shape[dim + 1 :], of.dtype, of, dim, start)


def _slice(
    of: Expression, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Expression:
    dim %= len(of.shape)
    begin, stop, stride = slice(start, end, step).indices(of.shape[dim])
    if stride != 1:
        found: Expression = _apply(aten.slice.Tensor, (of, dim, start, end, step), {})
        return found
    return _narrow(of, dim, begin, max(0, stop - begin))


def _select(of: Expression, dim: int, index: int) -> Expression:
    dim %= len(of.shape)
    return _drop(_narrow(of, dim, index % of.shape[dim], 1), dim)


def _unbind(of: Expression, dim: int = 0) -> list[Expression]:
    return [_select(of, dim, i) for i in range(of.shape[dim])]


def _split_sizes(of: Expression, sizes: Sequence[int], dim: int = 0) -> list[Expression]:
    dim %= len(of.shape)
    return [_narrow(of, dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _split(of: Expression, size: int, dim: int = 0) -> list[Expression]:
    total = of.shape[dim]
    return _split_sizes(of, [min(size, total - at) for at in range(0, total, size)] or [0], dim)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh.default: _same,
    aten._to_copy.default: _cast,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
}
