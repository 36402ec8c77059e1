"""A tensor that records what is done to it instead of doing it.

transformers' conversions (``transformers.core_model_loading``) are ordinary torch code. Run on lazy tensors
they give expressions, from which a rank reads its slices only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import TorchDispatchMode, disabled_torch_function_impl, tree_map_only

from . import make_expression as make
from .expressions import Expression, leaves
from .fill_tensor import Filler
from .read_headers import MappedFiles, Stored
from .reshape_expression import bits, reshape, slice_
from .written_part import Places, parts_of, put

aten = torch.ops.aten
_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_FEW = 1024  # elements of stored tensors that are read where a conversion looks at them


class Buffer:
    """Memory that a conversion has asked for, and writes into part by part.

    Attributes:
        expression: what it holds now.
        sealed: whether something may see it in another way than by its parts, so that it has to stay.
    """

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self.sealed = False


class LazyTensor(Tensor):
    """A valueless tensor on the CPU that knows its expression; its strides are those of a fresh one.

    But for a part of a buffer, which has the strides of a part: ``contiguous()`` is a copy of it.
    """

    _known: Expression
    _buffer: Buffer | None
    _parts: tuple[Places, ...]

    @staticmethod
    def __new__(
        cls,
        expression: Expression,
        buffer: Buffer | None = None,
        parts: tuple[Places, ...] = (),
        like: Any = None,
    ) -> LazyTensor:
        """A tensor of the expression's shape and type, or part of a buffer, with the strides of ``like``."""
        made = Tensor._make_wrapper_subclass(
            cls,
            torch.Size(expression.shape),
            strides=None if like is None else like.stride(),
            dtype=expression.dtype,
            device=torch.device("cpu"),
        )
        made._known, made._buffer, made._parts = expression, buffer, parts
        return made

    @property
    def expression(self) -> Expression:
        """What it holds now."""
        if self._buffer is None:
            return self._known
        found = self._buffer.expression
        for part in self._parts:
            found = part.of(found)
        return found

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
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return _write(func, args, kwargs)
        of = args[0] if args and isinstance(args[0], LazyTensor) else None
        if of is not None and of._buffer is not None and any(r.alias_info for r in func._schema.returns):
            parts = parts_of(func, args, kwargs)
            if parts is not None:
                like = func(torch.empty_strided(of.shape, of.stride(), device="meta"), *args[1:], **kwargs)
                found = parts[-1].of(of.expression) if parts else of.expression
                return LazyTensor(found, of._buffer, of._parts + parts, like)
            of._buffer.sealed = True
        found = _record(func, _expressions(args), {key: _expressions(x) for key, x in kwargs.items()})
        return (
            LazyTensor(found)
            if isinstance(found, Expression)
            else tree_map_only(Expression, LazyTensor, found)
        )

    def write(self, value: Expression, func: Any) -> None:
        """Puts a value of this shape and type into its place.

        Raises:
            TpCompileError: this is not a part of memory that the conversion has asked for.
        """
        new: Expression | None = None
        if self._buffer is not None and not self._buffer.sealed:
            new = put(self._buffer.expression, self._parts, value)
        if self._buffer is None or new is None:
            _refuse_write(func)
        self._buffer.expression = new


class Recording(TorchDispatchMode):
    """Memory that is asked for is lazy: buffers, into which conversions may write lazy tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes a buffer, or calls."""
        kwargs = kwargs or {}
        value = _FACTORIES.get(func)
        if value is None or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return func(*args, **kwargs)
        like = func(*args, **{**kwargs, "device": torch.device("meta")})
        made = make.filled(like.shape, like.dtype, value(*args))
        return LazyTensor(made, Buffer(made))


_FACTORIES: dict[Any, Callable[..., Any]] = {
    aten.empty.memory_format: lambda *args: 0,
    aten.zeros.default: lambda *args: 0,
    aten.ones.default: lambda *args: 1,
    aten.full.default: lambda size, value: value,
}


def _expression(tensor: Tensor) -> Expression:
    return tensor.expression if isinstance(tensor, LazyTensor) else make.constant(tensor)


def _expressions(x: Any) -> Any:
    """An argument of an operator, with expressions for tensors; pytree would take far longer."""
    if isinstance(x, list | tuple):
        return type(x)(_expressions(one) for one in x)
    return _expression(x) if isinstance(x, Tensor) else x


def _write(func: Any, args: Any, kwargs: Any) -> Any:
    """Records ``copy_``, ``mul_``, ``mul(out=...)``: the operator that returns its result, and a write."""
    out = kwargs.get("out")
    target = args[0] if out is None else out
    if not isinstance(target, LazyTensor):
        _refuse_write(func)
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    if name in ("copy", "fill", "zero"):
        new = args[1] if len(args) > 1 else 0
        value = _expression(new) if isinstance(new, Tensor) else make.filled((), target.dtype, new)
    else:
        packet = getattr(aten, name)
        value = packet(*args, **{key: x for key, x in kwargs.items() if key != "out"}).expression
    target.write(make.cast(make.expand(value, target.shape), dtype=target.dtype), func)
    return target


def _refuse_write(func: Any) -> NoReturn:
    raise TpCompileError(
        f"a weight conversion changes a tensor in place ({func})",
        where="transformers' conversion of weights",
        todo="write the conversion with operators that return a new tensor",
    )


def _record(func: Any, args: Any, kwargs: Any) -> Any:
    rule = _RULES.get(func)
    if rule is not None:
        return rule(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return _look(func, args[0])
    if _LOOKS & set(func.tags):
        _refuse_look(func)
    if torch.Tag.pointwise in func.tags:
        return make.elementwise(func, args, kwargs)
    return make.apply(func, args, kwargs)


def _look(func: Any, e: Expression) -> Any:
    """A number that a conversion asks for: read, if that takes a few elements of files (a stored shape)."""
    if sum(leaf.count if isinstance(leaf, Stored) else _FEW + 1 for leaf in leaves(e)) > _FEW:
        _refuse_look(func)
    return Filler(MappedFiles().read).whole(e).item()


def _refuse_look(func: Any) -> NoReturn:
    raise TpCompileError(
        f"a weight conversion looks at values ({func})",
        where="transformers' conversion of weights",
        todo="write the conversion without decisions that depend on weights",
    )


_RULES: dict[Any, Callable[..., Any]] = {
    aten.alias.default: make.same,
    aten.detach.default: make.same,
    aten.clone.default: make.same,
    aten.lift_fresh.default: make.same,
    aten._to_copy.default: make.cast,
    aten.permute.default: make.permute,
    aten.transpose.int: make.transpose,
    aten.t.default: lambda of: make.permute(of, range(len(of.shape))[::-1]),
    aten.cat.default: make.cat,
    aten.stack.default: make.stack,
    aten.unsqueeze.default: make.unsqueeze,
    aten.squeeze.dim: make.squeeze,
    aten.slice.Tensor: slice_,
    aten.select.int: make.select,
    aten.unbind.int: make.unbind,
    aten.split.Tensor: make.split,
    aten.split_with_sizes.default: make.split_sizes,
    aten.expand.default: make.expand,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.view.dtype: bits,
    aten._unsafe_view.default: reshape,
    aten.index.Tensor: make.look_up,
    aten.constant_pad_nd.default: make.pad,
}
