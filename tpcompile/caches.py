"""Tensors that a caller carries from call to call (a KV cache) and that stay divided between programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .capture import Captured
from .capture.repeated_layers import ShortCapture
from .errors import TpCompileError
from .factors import Factors
from .placements import Placement, R, Shard
from .rules.rule import Size


@dataclass(frozen=True)
class Held:
    """How a carried tensor lies.

    Attributes:
        atoms: per dimension its factors, empty for a dynamic dimension (which is never divided).
        shards: per sub-axis the dimension and factor that is divided, or None.
    """

    atoms: tuple[tuple[int, ...], ...]
    shards: tuple[tuple[int, int] | None, ...]

    def whole(self, local: Tensor) -> Tensor:
        """A valueless tensor of the whole size, from a rank's part.

        Raises:
            TpCompileError: the part has another rank than the tensor that was handed out.
        """
        if local.ndim != len(self.atoms):
            raise TpCompileError(
                f"a cache tensor has {local.ndim} dimensions, {len(self.atoms)} were handed out",
                todo="give the cache back as the model returned it",
            )
        divided = {shard[0] for shard in self.shards if shard is not None}
        shape = [math.prod(self.atoms[d]) if d in divided else s for d, s in enumerate(local.shape)]
        return torch.empty(shape, dtype=local.dtype, device="meta")

    def placements(self, factors: Factors, value: Any) -> tuple[Placement, ...]:
        """The same places among the (perhaps finer) factors of a program's value.

        Raises:
            TpCompileError: the program splits the dimension in other units.
        """
        return tuple(self._placement(factors.layout(value), shard) for shard in self.shards)

    def _placement(self, layout: tuple[tuple[Size, ...], ...], shard: tuple[int, int] | None) -> Placement:
        if shard is None:
            return R
        dim, factor = shard
        found = same_place(layout[dim], self.atoms[dim], factor)
        if found is None:
            raise TpCompileError(
                "this call divides a cache in other units than the call that made it",
                where=f"dimension {dim}",
                todo="begin with an empty cache",
            )
        return Shard(dim, found)


def same_place(finer: Sequence[Size], atoms: Sequence[int], factor: int) -> int | None:
    """The position of a factor of one factorisation in a finer one of the same dimension."""
    major, product = math.prod(atoms[:factor]), 1
    for position, size in enumerate(finer):
        if product == major and size == atoms[factor]:
            return position
        product *= size
    return None


def mark_caches(captured: Captured) -> Captured:
    """The same program with the results that belong to a cache marked as divided.

    Where layers are left out, a captured result stands for several of the whole program's: all must be.
    """
    flags = cache_leaves(captured.out_spec)
    blocks = captured.blocks if isinstance(captured, ShortCapture) else None
    sources = range(len(flags)) if blocks is None else [derived.output for derived in blocks.results]
    whole = {at for at, flag in zip(sources, flags, strict=True) if not flag}
    marked = [
        replace(spec, divided=True) if spec.kind == "user" and at not in whole else spec
        for at, spec in enumerate(captured.outputs)
    ]
    return replace(captured, outputs=tuple(marked))


def cache_leaves(spec: TreeSpec, inside: bool = False) -> list[bool]:
    """Per leaf of a structure, whether it lies in a cache: a class that calls itself one."""
    if spec.is_leaf():
        return [inside]
    within = inside or (isinstance(spec.type, type) and any(c.__name__ == "Cache" for c in spec.type.__mro__))
    return [leaf for child in spec.children() for leaf in cache_leaves(child, within)]


def held_outputs(
    names: Sequence[tuple[str, Any]], factors: Factors, placements: Mapping[Any, Sequence[Placement]]
) -> dict[str, Held]:
    """How the marked results of a program lie.

    Args:
        names: name and value of each marked result.
        factors: the program's factors.
        placements: per value, its placement on every sub-axis.
    """
    found = {}
    for name, value in names:
        layout = factors.layout(value)
        atoms = tuple(
            tuple(int(s) for s in dim) if all(isinstance(s, int) for s in dim) else () for dim in layout
        )
        shards = tuple((p.dim, p.factor) if isinstance(p, Shard) else None for p in placements[value])
        found[name] = Held(atoms, shards)
    return found
