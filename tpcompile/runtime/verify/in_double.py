"""A model's python in double precision, also where it asks for another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpcompile.ir.torch_internals import tree_map

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class _InDouble(TorchFunctionMode):
    """Reads every type of real numbers that a call names as that of doubles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_wider, (args, kwargs or {}))
        return _CASTS.get(func, func)(*args, **kwargs)


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """Whole numbers times a number of python are doubles in here, in a program as where it was captured."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Python in here computes in double precision, where it says otherwise too: a norm or a loss in float32.

    A model's rounding is a billionth then of what it is, so that small faults stand out.
    """
    with double_by_default(), _InDouble():
        yield


def widened(tree: Any) -> Any:
    """Tensors of real numbers in a tree, as doubles."""
    return tree_map(lambda x: x.to(_WIDER.get(x.dtype, x.dtype)) if isinstance(x, Tensor) else x, tree)


def _wider(leaf: Any) -> Any:
    return _WIDER.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf
