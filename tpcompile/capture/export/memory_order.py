"""Whether what a traced model does depends on the order of an argument's elements in memory.

A program is given contiguous tensors. Python that asks for strides would be answered differently for others;
and ``x.reshape(-1)`` shares memory with ``x`` or is a copy, as the order of ``x`` is: who writes into one
of them then writes into both, or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import CannotCapture
from tpcompile.ir.torch_internals import FakeTensor, tree_leaves

from .explain_failure import here
from .shots import storage

STRIDES = (
    *(Tensor.stride, Tensor.is_contiguous, Tensor.dim_order),
    *(Tensor.as_strided, torch.as_strided, Tensor.as_strided_, torch.as_strided_copy),
    *(Tensor.as_strided_scatter, torch.as_strided_scatter),
)
"""They ask for the order, or follow it."""
_MAY_COPY = {"reshape", "reshape_as", "contiguous", "flatten", "ravel"}
_OWN_ORDER = {
    *("linear", "bilinear", "embedding", "embedding_bag", "one_hot"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}
"""What gives new tensors, in an order that is not their arguments'."""


class MemoryOrder:
    """Follows the tensors whose order is that of an argument, while a model is traced.

    Attributes:
        asked: python has asked for an order, or depends on it.
    """

    def __init__(self) -> None:
        self.asked = False
        self._following: dict[int, Tensor] = {}  # by their memory; held, so that no other gets it
        self._shared: set[int] = set()

    def begin(self, arguments: Sequence[Any]) -> None:
        """The arguments of the call that is traced from here on."""
        self._follow(arguments)

    def ask(self, tensors: Sequence[Tensor]) -> None:
        """Notes that python asks for the order of elements of some tensors.

        Raises:
            CannotCapture: of a weight that is not contiguous, as its parts will be.
        """
        self.asked = True
        if any(isinstance(x, nn.Parameter) and not x.is_contiguous() for x in tensors):
            raise CannotCapture(
                "the model's forward asks for the order of a weight's elements in memory, which is to change",
                where=here(),
                todo="make the weight contiguous before parallelize",
            )

    def call(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        """Calls a function of torch.

        Args:
            func: the function.
            args: its arguments.
            kwargs: others.
            given: the tensors among them.
        """
        before = {x: x._version for x in _followed(given)}
        result = func(*args, **kwargs)
        self.asked |= any(
            storage(x) in self._shared for x, version in before.items() if x._version != version
        )
        name = getattr(func, "__name__", "")
        if name not in _OWN_ORDER and any(storage(x) in self._following for x in before):
            self._follow(result)
            if name in _MAY_COPY or (name == "to" and "memory_format" in kwargs):
                self._shared.update(storage(x) for x in _followed((given[0], result)))
        return result

    def _follow(self, values: Any) -> None:
        self._following.update((storage(x), x) for x in _followed(values))


def _followed(values: Any) -> list[Tensor]:
    """The tensors that have memory to follow: what ``vmap`` makes of one has none."""
    return [x for x in tree_leaves(values) if isinstance(x, FakeTensor) and not x.is_inference()]
