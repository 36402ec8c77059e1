"""Where the elements of a tensor come from: expressions over tensors that were not read yet.

A checkpoint's tensor is a leaf. Conversions (stack the experts, cut a packed projection, transpose) are
nodes; a box of the result is found in the leaves without making the rest, see ``fill_tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
class Reshape(Expression):
    """A tensor's elements, in their order, in another shape."""

    of: Expression


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A tensor whose elements are there: a constant of a conversion."""

    tensor: Tensor = field(repr=False)


@dataclass(frozen=True)
class Elementwise(Expression):
    """An operator that makes each element of those at its place; operands are broadcast to the shape.

    Attributes:
        func: the operator.
        args: its arguments, expressions instead of tensors.
        kwargs: its keyword arguments.
    """

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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


def operands(expression: Apply | Elementwise) -> list[Expression]:
    """What an operator is applied to."""
    return [x for x in tree_leaves((expression.args, expression.kwargs)) if isinstance(x, Expression)]


def leaves(expression: Expression) -> Iterator[Leaf]:
    """The tensors that an expression is made of."""
    if isinstance(expression, Apply | Elementwise):
        for operand in operands(expression):
            yield from leaves(operand)
    else:
        yield from _leaves(expression, leaves)


def copied(expression: Expression) -> Iterator[Leaf]:
    """The tensors whose own elements an expression has, in another order or type perhaps."""
    if not isinstance(expression, Apply | Elementwise):
        yield from _leaves(expression, copied)


def _leaves(e: Expression, of: Callable[[Expression], Iterator[Leaf]]) -> Iterator[Leaf]:
    if isinstance(e, Leaf):
        yield e
    elif isinstance(e, Join):
        for part in e.parts:
            yield from of(part)
    elif isinstance(e, Permute | Cut | AddDim | DropDim | Cast | Reshape):
        yield from of(e.of)
    elif not isinstance(e, Constant):
        raise AssertionError(f"no expression: {e!r}")
