"""Tensors that a caller carries from call to call (a KV cache) and that stay divided between programs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import Placement, R, Shard, split_evenly
from tpcompile.ir.sizes import Size
from tpcompile.ir.torch_internals import TreeSpec
from tpcompile.rules.factors import Factors

from .export.captured import Captured


@dataclass(frozen=True)
class Held:
    """How a carried tensor is placed.

    Attributes:
        atoms: per dimension its factors, empty for a dynamic dimension (which is never divided).
        places: per sub-axis the dimension and factor that is divided, or None.
    """

    atoms: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int] | None, ...]

    def whole(self, local: Tensor) -> Tensor:
        """A valueless tensor of the whole size, from a rank's part.

        Raises:
            TpCompileError: the part has another rank than the tensor that was handed out.
        """
        if local.ndim != len(self.atoms):
            raise TpCompileError(
                f"a cache tensor has {local.ndim} dimensions, {len(self.atoms)} were handed out",
                where="past_key_values",
                todo="give the cache back as the model returned it",
            )
        shape = [math.prod(self.atoms[d]) if d in self.divided else s for d, s in enumerate(local.shape)]
        return torch.empty(shape, dtype=local.dtype, device="meta")

    def part(self, given: Tensor, axis_sizes: Sequence[int], coordinates: Sequence[int]) -> Tensor:
        """A rank's part, from the whole tensor; what is a part already comes back as it is.

        Args:
            given: what the caller brings.
            axis_sizes: the sizes of the sub-axes.
            coordinates: the rank's position on each.

        Raises:
            TpCompileError: it is neither.
        """
        whole = self.whole(given)
        part, local = given, list(whole.shape)
        for dim in self.divided:
            sizes, first = list(self.atoms[dim]), [0] * len(self.atoms[dim])
            for ranks, at, shard in zip(axis_sizes, coordinates, self.places, strict=True):
                if shard is not None and shard[0] == dim:
                    mine = split_evenly(sizes[shard[1]], ranks)
                    first[shard[1]] += sum(mine[:at])
                    sizes[shard[1]] = mine[at]
            local[dim] = math.prod(sizes)
            if given.shape == whole.shape:
                split = part.unflatten(dim, self.atoms[dim])
                for factor, (start, size) in enumerate(zip(first, sizes, strict=True)):
                    split = split.narrow(dim + factor, start, size)
                part = split.flatten(dim, dim + len(sizes) - 1)
        if list(part.shape) != local:
            raise TpCompileError(
                f"a cache tensor has the shape {list(given.shape)}, {local} was handed out to this rank",
                where="past_key_values",
                todo=f"give the cache back as the model returned it, or whole: {list(whole.shape)}",
            )
        return part.contiguous()

    @property
    def divided(self) -> set[int]:
        """The dimensions that are divided."""
        return {shard[0] for shard in self.places if shard is not None}

    @property
    def placed(self) -> tuple[Placement, ...]:
        """Its placement on every sub-axis, in its own factors."""
        return tuple(R if place is None else Shard(*place) for place in self.places)

    def placements(self, factors: Factors, value: Any) -> tuple[Placement, ...]:
        """The same places among the (perhaps finer) factors of a program's value.

        Raises:
            TpCompileError: the program splits the dimension in other units.
        """
        return tuple(self._placement(factors.atom_sizes(value), shard) for shard in self.places)

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
    """The position of a factor of one factorisation in a finer one of the same dimension.

    If it is split there, then in units that are on one rank each (see ``Factors``): these are divided alike.
    """
    major, product = math.prod(atoms[:factor]), 1
    for position, size in enumerate(finer):
        if product == major and isinstance(size, int) and atoms[factor] % size == 0:
            return position
        product *= size
    return None


def mark_caches(captured: Captured) -> Captured:
    """The same program with the results that belong to a cache marked as divided.

    Where layers are left out, a captured result stands for several of the whole program's: all must be. In
    a tuple a cache is named by its position, ``[1][0]['keys']``; it will be given back by name.
    """
    returned = cache_leaves(captured.out_spec)
    flags = [
        spec.kind == "state" or (i < len(returned) and returned[i])
        for i, spec in enumerate(captured.whole_outputs)
    ]
    blocks = captured.blocks
    if blocks is None:
        return replace(captured, outputs=tuple(map(_marked, captured.outputs, flags)))
    whole = {derived.output for derived, flag in zip(blocks.results, flags, strict=True) if not flag}
    short = [at not in whole for at in range(len(captured.outputs))]
    flags = [short[derived.output] for derived in blocks.results]
    return replace(
        captured,
        outputs=tuple(map(_marked, captured.outputs, short)),
        blocks=replace(blocks, outputs=tuple(map(_marked, blocks.outputs, flags))),
    )


def _marked(spec: OutputSpec, divided: bool) -> OutputSpec:
    return replace(spec, divided=True, name=_given_back(spec.name)) if divided else spec


def _given_back(name: str) -> str:
    return re.sub(r"^\[\d+\]", "past_key_values", name)


def cache_leaves(spec: TreeSpec, inside: bool = False) -> list[bool]:
    """Per leaf of a structure, whether it is in a cache: a class that calls itself one."""
    if spec.is_leaf():
        return [inside]
    within = inside or (isinstance(spec.type, type) and any(c.__name__ == "Cache" for c in spec.type.__mro__))
    return [leaf for child in spec.children() for leaf in cache_leaves(child, within)]


def held_outputs(
    names: Sequence[tuple[str, Any]], factors: Factors, placements: Mapping[Any, Sequence[Placement]]
) -> dict[str, Held]:
    """How the marked results of a program are placed.

    Args:
        names: name and value of each marked result.
        factors: the program's factors.
        placements: per value, its placement on every sub-axis.
    """
    found = {}
    for name, value in names:
        layout = factors.atom_sizes(value)
        atoms = tuple(
            tuple(int(s) for s in dim) if all(isinstance(s, int) for s in dim) else () for dim in layout
        )
        places = tuple((p.dim, p.factor) if isinstance(p, Shard) else None for p in placements[value])
        found[name] = Held(atoms, places)
    return found
