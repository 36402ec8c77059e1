"""When two values count as equal: the difference is measured against the largest value, by the type."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.torch_internals import tree_leaves

LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
"""The largest difference, relative to the largest value, that rounding explains in a deep program."""

_MASKED = 1e30
"""What is larger stands for infinity, in a mask; it is not a value that others are measured against."""

_LEAST_MASK, _GAP = 1e3, 100.0
"""So large at least is what stands for infinity, such as -10000, and so much larger than other numbers."""


class TypesSeen(TorchFunctionMode):
    """Notes the types that a model's python computes in.

    They alone say what rounding explains. A program's own types would not do: one with a cast to half
    precision that is not the model's would be measured by what it does wrong.

    Attributes:
        kinds: the types of all results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds = set[torch.dtype]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kinds.update(kinds_of(result))
        return result


def kinds_of(values: Any) -> set[torch.dtype]:
    """The types of the tensors in a tree."""
    return {leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def limit_of(kinds: Iterable[torch.dtype]) -> float:
    """The limit for what is computed in these types: that of the least precise among them."""
    return max((LIMITS.get(kind, 0.1) for kind in kinds if kind.is_floating_point), default=0.0)


def is_rough(limit: float) -> bool:
    """Whether a limit is that of half precision or less, which can hide a wrong number."""
    return limit > LIMITS[torch.float32]


def largest(values: Iterable[Any]) -> float:
    """The largest number among values."""
    real = (v for v in values if isinstance(v, Tensor) and v.numel() and v.dtype.is_floating_point)
    return max((float(v.detach().abs().max()) for v in real), default=0.0)


def difference(got: Any, want: Any, floor: float = 0.0) -> float:
    """How far apart two values are, relative to the largest number in ``want``.

    Args:
        got: a value.
        want: what it should be.
        floor: a scale that the numbers' own is not to be smaller than: what cancels out, as the gradient of
            a bias before a softmax does, leaves rounding behind, which has no scale of its own.

    Returns:
        Infinity if they are of other shapes or types, or not numbers in other places.
    """
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(got) is type(want) and (got is want or bool(got == want)) else math.inf
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if not has_fractions(want):
        return 0.0 if torch.equal(got, want) else math.inf
    got, want = map(_parts, (got, want))
    unlike = ~((got == want) | (got.isnan() & want.isnan()))
    if not unlike.any():
        return 0.0
    sizes, apart = want.abs(), (got - want).abs()
    masked = sizes > _unmasked(sizes[want.isfinite() & (sizes < _MASKED)])
    return max(_relative(apart[unlike & m], sizes[m], floor) for m in (masked, ~masked))


def _parts(x: Tensor) -> Tensor:
    """Numbers as doubles; of complex ones both parts, of which one may be infinite, and the other rounded."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).to(torch.float64)


def _unmasked(sizes: Tensor) -> float:
    """The largest of numbers, but for those of a mask, which are alike, and far above all others."""
    largest = float(sizes.max()) if sizes.numel() else 0.0
    rest = sizes[sizes < 0.9 * largest]
    below = float(rest.max()) if rest.numel() else 0.0
    mask = largest >= _LEAST_MASK and 0.0 < below * _GAP <= largest and sizes.numel() - rest.numel() > 1
    return below if mask else largest


def _relative(apart: Tensor, sizes: Tensor, floor: float) -> float:
    """The largest of some differences, relative to the largest finite size of the values."""
    if not apart.numel():
        return 0.0
    worst, numbers = float(apart.max()), sizes[sizes.isfinite()]
    scale = max(floor, float(numbers.max()) if numbers.numel() else 0.0)
    if not math.isfinite(worst):
        return math.inf
    return worst / scale if scale else math.inf if worst > 1e-30 else 0.0


def agree(got: Any, want: Any, limit: float, floor: float = 0.0) -> bool:
    """Whether two values are equal within a limit."""
    return difference(got, want, floor) <= limit
