"""Decides which dimensions of the inputs a capture leaves open, and with which example sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from tpcompile.capture.caches.layers import CAPACITY, SEEN, is_count
from tpcompile.capture.caches.paired import is_cross
from tpcompile.capture.caches.state_layers import is_state
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import leaf_names, signature_of
from tpcompile.ir.nodes import has_fractions

Dims = Mapping[int, bool]
Place = tuple[int, int]
_SMALLEST_OPEN = 2
"""Export decides comparisons of an open size with 0 and 1, which python code and operators take for cases of
their own (``if x.shape[0] == 1``, ``squeeze``, broadcasting): a call with such a size has its own program."""


@dataclass(frozen=True)
class Attempt:
    """One way to try an export.

    Attributes:
        name: what it leaves open, for messages.
        dynamic: torch.export's ``dynamic_shapes`` for the leaves.
        ties: (leaf, dim) pairs that are taken to be one size; see ``_ties``.
        sums: triples of (leaf, dim), the first of which is as long as the other two together.
    """

    name: str
    dynamic: tuple[dict[int, Any] | None, ...]
    ties: tuple[tuple[Place, ...], ...] = ()
    sums: tuple[tuple[Place, Place, Place], ...] = ()


def attempts(
    names: Sequence[str], leaves: Sequence[Any], cached: Sequence[bool], dynamic: bool | Mapping[str, Dims]
) -> Iterator[Attempt]:
    """Yield the ways to export, the most general first, the fully static one last.

    ``Dim.DYNAMIC`` must stay dynamic, ``Dim.AUTO`` may be specialised by the model; some models are
    dynamic in the batch only.
    """
    shapes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves)
    if dynamic is not False:
        wanted = _wanted(names, leaves, cached, dynamic)
        batch_only = [[dim for dim in dims if dim == 0] for dims in wanted]
        guessing = not isinstance(dynamic, Mapping)
        ties = _ties(names, shapes, wanted, cached) if guessing else ()
        sums = _sums(names, shapes, wanted, cached) if guessing else ()
        if any(wanted):
            for name, hint in (
                ("batch and sequence open", Dim.DYNAMIC),
                ("what the model allows open", Dim.AUTO),
            ):
                yield Attempt(name, _spec(shapes, wanted, hint), ties, sums)
        if any(batch_only) and batch_only != wanted:
            yield Attempt("only the first dimension open", _spec(shapes, batch_only, Dim.AUTO))
    yield Attempt("all sizes fixed", tuple(None for _ in leaves))


def check_dynamic(model: nn.Module, dynamic: bool | Mapping[str, Dims], call: dict[str, Any] | None) -> None:
    """Refuses names in ``dynamic`` that no argument has.

    Args:
        model: what is called.
        dynamic: as the user gave it.
        call: a normalised call, if there is one; its leaves may be named as well.

    Raises:
        TpCompileError: with the first such name.
    """
    signature = signature_of(model)
    known = {*signature.positional, *signature.keyword_only, signature.var_positional, *(call or ())}
    known |= set(leaf_names(call)) if call else set()
    for name in dynamic if isinstance(dynamic, Mapping) else ():
        if name not in known and not (signature.var_keyword and call is None):
            raise TpCompileError(
                f"the model has no argument {name!r}",
                where="dynamic",
                todo=f"name one of {', '.join(sorted(known))}",
            )


def _chosen(name: str, leaf: torch.Tensor, dims: Dims) -> list[int]:
    """The dimensions of a leaf that the user leaves open.

    Raises:
        TpCompileError: it has not so many.
    """
    for dim in dims:
        if not -leaf.ndim <= dim < leaf.ndim:
            raise TpCompileError(
                f"{name} has {leaf.ndim} dimensions, and none with the number {dim}",
                where="dynamic",
                todo=f"name dimensions from 0 to {leaf.ndim - 1}",
            )
    return sorted({dim % leaf.ndim for dim, is_open in dims.items() if is_open})


def _spec(shapes: Sequence[Any], wanted: Sequence[Sequence[int]], hint: Any) -> tuple[Any, ...]:
    return tuple(
        None if shape is None else {dim: hint if dim in dims else Dim.STATIC for dim in range(len(shape))}
        for shape, dims in zip(shapes, wanted, strict=True)
    )


def _wanted(
    names: Sequence[str], leaves: Sequence[Any], cached: Sequence[bool], dynamic: bool | Mapping[str, Dims]
) -> list[list[int]]:
    wanted: list[list[int]] = []
    for name, leaf, in_cache in zip(names, leaves, cached, strict=True):
        if not isinstance(leaf, torch.Tensor):
            wanted.append([])
        elif isinstance(dynamic, Mapping) and not _is_number(leaf.shape):
            wanted.append(_chosen(name, leaf, dynamic.get(name, dynamic.get(_root(name), {}))))
        else:
            wanted.append(_open_dims(name, leaf, in_cache))
        wanted[-1] = [dim for dim in wanted[-1] if leaf.shape[dim] >= _SMALLEST_OPEN]
    return wanted


def _ties(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...] | None],
    wanted: Sequence[Sequence[int]],
    cached: Sequence[bool],
) -> tuple[tuple[Place, ...], ...]:
    """Group open dimensions of one meaning (batch, sequence, cache length) and of equal size.

    Left alone, every input gets a batch size of its own, and the keys' and the values' lengths differ as
    far as the graph knows. A later call in which they do differ is captured anew.
    """
    groups: dict[tuple[str, int], list[Place]] = {}
    lengths = _cache_lengths(names, shapes, cached)
    encoded = _cache_lengths(names, shapes, cached, cross=True)
    for leaf, (name, shape, dims, in_cache) in enumerate(zip(names, shapes, wanted, cached, strict=True)):
        for dim in dims:
            kind = _kind(name, shape, dim, in_cache, lengths)
            if kind == "sequence" and shape is not None and shape[dim] in encoded:
                kind = "encoded"
            if kind and shape is not None:
                groups.setdefault((kind, shape[dim]), []).append((leaf, dim))
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _cache_lengths(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...] | None],
    cached: Sequence[bool],
    cross: bool = False,
) -> set[int]:
    """How many tokens the layers of the caches hold, or are to hold; or those of an encoder's states."""
    found = set()
    for name, shape, in_cache in zip(names, shapes, cached, strict=True):
        if in_cache and shape is not None:
            if CAPACITY in name:
                found.add(shape[0])
            elif len(shape) == 4 and not is_state(name) and is_cross(name) == cross:
                found.add(shape[2])
    return found


def _kind(
    name: str, shape: Sequence[int] | None, dim: int, in_cache: bool, lengths: Collection[int]
) -> str | None:
    """What an open dimension means, for as much as it can be told: equal sizes of one kind are tied.

    Args:
        name: of the input.
        shape: its example shape.
        dim: the dimension.
        in_cache: whether it belongs to a cache.
        lengths: the lengths of the caches in the example.
    """
    if shape is None:
        return None
    if is_count(name):
        # A growing sliding layer is as long as what it has seen, until it is full. What was written into
        # a static one, and its size, have nothing to do with each other.
        role = name.rpartition("['")[2]
        return "cache" if role.startswith((SEEN, CAPACITY)) else role
    if dim == 0:
        return None if _is_number(shape) else "batch"
    if in_cache:
        return "encoded" if is_cross(name) else "cache"
    if "mask" in name and len(shape) == 4:
        return "cache" if dim == 3 and shape[dim] in lengths else "sequence"
    if dim == 1:
        return "decoder" if name.startswith("decoder_") else "sequence"
    return None


def _sums(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...] | None],
    wanted: Sequence[Sequence[int]],
    cached: Sequence[bool],
) -> tuple[tuple[Place, Place, Place], ...]:
    """Find a padding mask that covers what is cached and the new tokens: past + new == mask."""
    places = {name: index for index, (name, shape) in enumerate(zip(names, shapes, strict=True)) if shape}
    prefix = "decoder_" if "decoder_input_ids" in places else ""
    mask = places.get(f"{prefix}attention_mask")
    new = places.get(f"{prefix}input_ids", places.get(f"{prefix}inputs_embeds"))
    if mask is None or new is None or 1 not in wanted[mask]:
        return ()
    total, added = shapes[mask][1], shapes[new][1]  # type: ignore[index]
    for index, (shape, in_cache) in enumerate(zip(shapes, cached, strict=True)):
        if (
            shape is not None
            and in_cache
            and 2 in wanted[index]
            and not is_cross(names[index])
            and shape[2] + added == total
        ):
            return (((mask, 1), (index, 2), (new, 1)),)
    return ()


def _is_number(shape: Sequence[int]) -> bool:
    """Whether a leaf of this shape is a number that travels as a size."""
    return tuple(shape[1:]) == (0,)


def _root(name: str) -> str:
    return name.split("[")[0].split(".")[0]


def _open_dims(name: str, leaf: torch.Tensor, in_cache: bool) -> list[int]:
    if leaf.ndim == 0:
        return []
    whole_numbers = not has_fractions(leaf)
    if is_count(name):
        return [0]
    if in_cache:
        return [0, 2] if leaf.ndim == 4 and not is_state(name) else [0]
    if leaf.ndim == 4 and "mask" in name:
        return [0, 2, 3]
    if (whole_numbers and leaf.ndim >= 2) or (leaf.dtype.is_floating_point and leaf.ndim == 3):
        return [0, 1]
    return [0]
