"""Weights of few bits whose blocks have scales, which stay as they are until something computes with them.

This is how checkpoints of DeepSeek-V3's and Qwen3's kind (fp8, ``weight_scale_inv``) and gpt_oss's (MXFP4)
have their weights. Every operation begins by dequantising, in torch's own operators, so that a captured
program has that arithmetic on the parts, and nothing else is to be known of such a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError

from .torch_internals import disabled_torch_function_impl, tree_leaves, tree_map_only

aten = torch.ops.aten


class BlockScaled(Tensor):
    """A matrix, or one per expert, whose numbers are few bits times the scale of the block that they lie in.

    The last block of a dimension may be cut short.

    Attributes:
        qdata: the bits, ``(..., rows, columns)``: float8 numbers; or bytes of two numbers each, e2m1, the
            first one in the lower half: ``(..., rows, columns / 2)``.
        scale: ``(..., blocks of rows, blocks of columns)``: numbers, or bytes, ``2 ** (byte - 127)``.
        block: how many rows and columns a block has.
        order: which dimension of the parts each of the tensor's is.
    """

    qdata: Tensor
    scale: Tensor
    block: tuple[int, int]
    order: tuple[int, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dequantises before anything is traced: what torch.export sees are operators on the parts."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        rule = _IN_PYTHON.get(func)
        if rule is not None and (found := rule(*args, **kwargs)) is not None:
            return found
        if rule is None and name in _OF_ITSELF and func != Tensor.data.__set__:  # type: ignore[attr-defined]
            return disabled_torch_function_impl(func, types, args, kwargs)
        _refuse_writes(func, args, kwargs)
        return func(*_dequantised(args), **_dequantised(kwargs))

    @classmethod
    def of(
        cls,
        qdata: Tensor,
        scale: Tensor,
        block: Sequence[int],
        dtype: torch.dtype,
        order: Sequence[int] | None = None,
    ) -> BlockScaled:
        """A weight of these parts, of type ``dtype`` for what computes with it.

        Raises:
            ValueError: the scales are not those of its blocks.
        """
        sizes = [*qdata.shape[:-1], qdata.shape[-1] * (2 if qdata.dtype == torch.uint8 else 1)]
        grid = [-(-size // length) for size, length in zip(sizes[-2:], block, strict=True)]
        if list(scale.shape) != [*sizes[:-2], *grid]:
            given = f"scales of shape {list(scale.shape)} for a weight of shape {sizes}"
            raise ValueError(f"{given}, in blocks of {tuple(block)}")
        order = tuple(range(len(sizes)) if order is None else order)
        shape = torch.Size([sizes[d] for d in order])
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qdata.device)
        made.qdata, made.scale, made.block, made.order = qdata, scale, tuple(block), order
        found: BlockScaled = made
        return found

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """The names of its parts, and what else it has."""
        return ["qdata", "scale"], (self.block, self.dtype, self.order)

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        """The weight with other parts."""
        return cls.of(parts["qdata"], parts["scale"], *context)

    def dequantize(self) -> Tensor:
        """The numbers: as transformers' dequantised ones, bit by bit."""
        numbers = _numbers(self.qdata)
        scale = self.scale.to(torch.float32)
        if self.scale.dtype == torch.uint8:
            scale = (scale - 127).exp2()
        shape, block = numbers.shape, list(self.block)
        for dim in (-2, -1):
            if shape[dim] % block[dim]:  # one number for each row or column
                scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, shape[dim])
                block[dim] = 1
        rows, columns = (n // length for n, length in zip(shape[-2:], block, strict=True))
        numbers = numbers.reshape(*shape[:-2], rows, block[0], columns, block[1])
        found = (numbers * scale[..., :, None, :, None]).to(self.dtype).reshape(shape)
        return found.permute(self.order)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = f"{self.dtype} of {self.qdata.dtype} in blocks of {self.block}"
        return f"BlockScaled({list(self.shape)}, {kind})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _BY_PARTS.get(func)
        if rule is not None and (found := rule(func, *args, **kwargs)) is not None:
            return found
        _refuse_writes(func, args, kwargs)
        return func(*_dequantised(args), **_dequantised(kwargs))

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockScaled:
        """The weight with both of its parts changed alike, but for the sizes of their blocks."""
        return self.of(change(self.qdata), change(self.scale), self.block, self.dtype, self.order)


def _numbers(qdata: Tensor) -> Tensor:
    if qdata.dtype != torch.uint8:
        return qdata.to(torch.float32)
    codes = torch.stack([qdata & 15, qdata >> 4], -1).flatten(-2)
    size = (codes & 7).to(torch.bfloat16)  # which has all of these; in float32 it takes four times as long
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6
    size = torch.maximum(torch.maximum(size * 0.5, size - 2), size * 2 - 8)
    return torch.where(codes < 8, size, -size).to(torch.float32)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses to change a weight: it would be what was made of it that changed."""
    name = getattr(func, "__name__", "").partition(".")[0]
    first = args[0] if args else next(iter(kwargs.values()), None)
    inplace = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    written = first if inplace or kwargs.get("inplace") else kwargs.get("out")
    if any(isinstance(one, BlockScaled) for one in tree_leaves(written)):
        raise TpCompileError(
            f"a quantised weight would be changed by {name}",
            where="BlockScaled",
            todo="change what its dequantize() gives, or dequantise the checkpoint while it is loaded",
        )


def _dequantised(given: Any) -> Any:
    return tree_map_only(BlockScaled, BlockScaled.dequantize, given)


# What is done part by part: None where that cannot be.


def _each(func: Any, of: BlockScaled, *args: Any, **kwargs: Any) -> BlockScaled:
    return of.map(lambda part: func(part, *args, **kwargs))


def _moved(func: Any, of: BlockScaled, **kwargs: Any) -> BlockScaled | None:
    dtype = kwargs.pop("dtype", None)
    return _each(func, of, **kwargs) if dtype in (None, of.dtype) else None


def _permuted(of: BlockScaled, *dims: Any) -> BlockScaled:
    order = dims if isinstance(dims[0], int) else dims[0]
    return of.of(of.qdata, of.scale, of.block, of.dtype, [of.order[d] for d in order])


def _transposed(of: BlockScaled, dim0: int = -2, dim1: int = -1) -> BlockScaled:
    dims = list(range(of.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permuted(of, dims)


def _selected(of: BlockScaled, index: Any) -> BlockScaled | None:
    """Some of the experts, where these are surely fewer than all."""
    if not (isinstance(index, Tensor) and index.ndim == 1 and index.dtype != torch.bool):
        return None
    few = isinstance(index.shape[0], int) and index.shape[0] < of.shape[0]
    return of.map(lambda part: part[index]) if few and of.ndim == 3 and of.order[0] == 0 else None


def _stacked(tensors: Sequence[Any], dim: int = 0) -> BlockScaled:
    return _joined(torch.stack, tensors, dim)


def _cat(tensors: Sequence[Any], dim: int = 0) -> BlockScaled:
    return _joined(torch.cat, tensors, dim % tensors[0].ndim)


def _joined(join: Any, tensors: Sequence[Any], dim: int) -> BlockScaled:
    """Weights side by side.

    Raises:
        ValueError: blocks that are cut short would come to lie inside, or the weights are of several kinds.
    """
    first = tensors[0]
    for one in tensors:
        if not isinstance(one, BlockScaled) or one.__tensor_flatten__() != first.__tensor_flatten__():
            raise ValueError("quantised weights are joined with others, or in blocks of other sizes")
    if list(first.order) != list(range(first.ndim)) or (join is torch.stack and dim):
        raise ValueError(f"quantised weights are joined along dimension {dim}, or were transposed before")
    if join is torch.cat:
        for one in tensors[:-1]:
            _refuse_short(one, dim, one.shape[dim])
    parts = [join([getattr(one, part) for one in tensors], dim) for part in ("qdata", "scale")]
    return first.of(*parts, first.block, first.dtype)


def _chunks(of: BlockScaled, chunks: int, dim: int = 0) -> list[BlockScaled]:
    """What was joined, apart again.

    Raises:
        ValueError: a block would be cut.
    """
    if of.shape[dim] % chunks or list(of.order) != list(range(of.ndim)):
        raise ValueError(f"a quantised weight of shape {list(of.shape)} is cut into {chunks}")
    _refuse_short(of, dim % of.ndim, of.shape[dim] // chunks)
    parts = zip(of.qdata.chunk(chunks, dim), of.scale.chunk(chunks, dim), strict=True)
    return [of.of(*pair, of.block, of.dtype) for pair in parts]


def _refuse_short(of: BlockScaled, dim: int, size: int) -> None:
    block = (*[1] * (of.ndim - 2), *of.block)[dim]
    if size % block:
        raise ValueError(f"quantised weights of {size} rows or columns are joined, in blocks of {block}")


def _squeezed(of: BlockScaled, dim: int) -> BlockScaled | None:
    if dim or of.ndim != 3 or list(of.order) != [0, 1, 2]:
        return None
    return of.of(of.qdata.squeeze(0), of.scale.squeeze(0), of.block, of.dtype)


_IN_PYTHON: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _selected,
    Tensor.t: _transposed,
    Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.permute: _permuted,
    torch.permute: _permuted,
    torch.stack: _stacked,
    torch.cat: _cat,
    torch.chunk: _chunks,
    Tensor.chunk: _chunks,
    Tensor.squeeze: _squeezed,
}
_BY_PARTS: dict[Any, Callable[..., BlockScaled | None]] = {
    aten.detach.default: _each,
    aten.alias.default: _each,
    aten.clone.default: _each,
    aten._to_copy.default: _moved,
}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITES = {"__set__", "__setitem__", *(f"__i{name}__" for name in _ARITHMETIC)}
# What asks or says something of a tensor, or copies it; the last ones come down to ``_BY_PARTS``.
_OF_ITSELF = {"__get__", "__set__", "size", "dim", "ndimension", "numel", "nelement", "stride", "data_ptr"}
_OF_ITSELF |= {"is_contiguous", "is_floating_point", "is_complex", "element_size", "get_device"}
_OF_ITSELF |= {"requires_grad_", "contiguous", "detach", "clone", "to", "cpu", "cuda"}
