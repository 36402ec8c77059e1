"""Random numbers that are a function of a seed and of an element's place, and of nothing else.

Ranks with the same seed then have the same numbers where they hold the same elements, and the right part of
the whole where they hold a part, without any generator that could run apart; and backward, recomputation and
compiled code find the numbers of forward again. The counter-based generators of Salmon et al. (2011) have
this form. The mixing function is the two-round xor-shift-multiply hash on 32 bits with the best known
avalanche (Wellons, "hash prospector"). It is computed in 64-bit integers, which all devices multiply, with
constants below 2**31, so that no product overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ONE, _TWO = 0x21F0AAAD, 0x735A2D97
_STEP = 0x61C88647
BITS = 24
"""Random bits per number: as many as float32 has."""

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")
_LIBRARY.define(
    "uniform(Tensor like, Tensor? seed, int stream, SymInt[] parts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def uniform(like: Tensor, seed: Tensor | None, stream: int, parts: list[int]) -> Tensor:
    """Numbers in [0, 1), float32, in the shape of ``like``, whose values do not matter.

    Args:
        like: for its shape and device.
        seed: two integers in [0, 2**32), the same on all ranks; None stands for zeros.
        stream: calls with different numbers are independent.
        parts: per dimension of which this rank holds a part: the dimension, how many factors it has, and
            for each, major first, its whole size, its size here, and where this part begins. The whole size
            of the first factor does not matter.
    """
    held = _read(parts)
    one, two = _lanes(seed, stream, like.device)
    for dim in range(like.ndim - 1):
        index = _index(like, dim, held.get(dim))
        one = _mix(((one ^ index) * _STEP) & _MASK)
        two = _mix(((two + index) & _MASK) ^ (dim + 1))
    last = _index(like, like.ndim - 1, held.get(like.ndim - 1)) if like.ndim else one.new_zeros(())
    # The second lane enters between the rounds: two rows are alike only if both lanes agree.
    x = (one + last * _STEP).bitwise_and_(_MASK)
    x = _shift(x, 16).mul_(_ONE).bitwise_and_(_MASK).bitwise_xor_(two)
    x = _shift(_shift(x, 15).mul_(_TWO).bitwise_and_(_MASK), 15)
    return (x >> (32 - BITS)).to(torch.float32).mul_(2.0**-BITS)


_LIBRARY.impl("uniform", uniform, "CompositeImplicitAutograd")


def _lanes(seed: Tensor | None, stream: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pair = torch.zeros(2, dtype=torch.int64, device=device) if seed is None else seed
    keys = (2 * stream + 1) * _STEP & _MASK, (2 * stream + 2) * _STEP & _MASK
    return _mix(_mix(pair[0] ^ keys[0]) ^ pair[1]), _mix(_mix(pair[1] ^ keys[1]) ^ pair[0])


def _mix(x: Tensor) -> Tensor:
    """A bijection of [0, 2**32)."""
    x = ((x ^ (x >> 16)) * _ONE) & _MASK
    x = ((x ^ (x >> 15)) * _TWO) & _MASK
    return x ^ (x >> 15)


def _shift(x: Tensor, by: int) -> Tensor:
    """``x ^ (x >> by)`` in place."""
    return x.bitwise_xor_(x >> by)


def _index(like: Tensor, dim: int, factors: list[tuple[int, int, int]] | None) -> Tensor:
    """The places in the whole of the elements along a dimension, in a shape that broadcasts."""
    own = torch.arange(like.shape[dim], dtype=torch.int64, device=like.device)
    if factors is not None:
        own = _place(own, factors)
    return own.reshape([-1 if d == dim else 1 for d in range(like.ndim)])


def _place(own: Tensor, factors: list[tuple[int, int, int]]) -> Tensor:
    """Local positions, taken apart into those of the factors, put together again in the whole."""
    found, stride = torch.zeros_like(own), 1
    for number, (whole, held, start) in enumerate(reversed(factors)):
        major = number == len(factors) - 1
        found = found + ((own if major else own % max(held, 1)) + start) * stride
        own, stride = own // max(held, 1), stride * whole
    return found


def _read(parts: list[int]) -> dict[int, list[tuple[int, int, int]]]:
    found, at = {}, 0
    while at < len(parts):
        dim, count = parts[at : at + 2]
        numbers = parts[at + 2 : at + 2 + 3 * count]
        found[dim] = list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))
        at += 2 + 3 * count
    return found
