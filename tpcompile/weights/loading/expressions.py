"""Where the elements of a tensor come from: expressions over tensors that were not read yet.

A checkpoint's tensor is a leaf. Conversions (stack the experts, cut a packed projection, transpose) are
nodes; a box of the result is found in the leaves without making the rest, see ``fill_tensor``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcompile.ir.torch_internals import tree_leaves


@dataclass(frozen=True)
class Expression:
    """A tensor that is known but for its elements.

    Attributes:
        shape: its shape.
        dtype: its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Leaf(Expression):
    """A tensor that can be read.

    Attributes:
        name: what it is called where it is kept.
    """

    name: str

    @property
    def place(self) -> str:
        """Where it is, for an error."""
        return self.name


@dataclass(frozen=True)
class Join(Expression):
    """Tensors one behind the other along a dimension."""

    parts: tuple[Expression, ...] = field(repr=False)
    dim: int


@dataclass(frozen=True)
class Permute(Expression):
    """A tensor with its dimensions in another order: dimension i is dimension ``dims[i]`` of the other."""

    of: Expression
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Cut(Expression):
    """A part along one dimension, from ``start``; its length is in the shape."""

    of: Expression
    dim: int
    start: int


@dataclass(frozen=True)
class AddDim(Expression):
    """A tensor with a dimension of size 1 inserted."""

    of: Expression
    dim: int


@dataclass(frozen=True)
class DropDim(Expression):
    """A tensor without a dimension of size 1."""

    of: Expression
    dim: int


@dataclass(frozen=True)
class Cast(Expression):
    """A tensor in another type."""

    of: Expression


@dataclass(frozen=True)
class Apply(Expression):
    """Any other operator: it needs its operands as a whole.

    Attributes:
        func: the operator.
        args: its arguments, expressions instead of tensors.
        kwargs: its keyword arguments.
        index: which of several results this is, or None.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None


def leaves(expression: Expression) -> Iterator[Leaf]:
    """The tensors that an expression is made of."""
    if isinstance(expression, Leaf):
        yield expression
    elif isinstance(expression, Join):
        for part in expression.parts:
            yield from leaves(part)
    elif isinstance(expression, Apply):
        for operand in tree_leaves((expression.args, expression.kwargs)):
            if isinstance(operand, Expression):
                yield from leaves(operand)
    elif isinstance(expression, Permute | Cut | AddDim | DropDim | Cast):
        yield from leaves(expression.of)
    else:
        raise AssertionError(f"no expression: {expression!r}")
