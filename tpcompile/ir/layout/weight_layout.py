"""How the parameters of a model are placed on the ranks: an artefact of its own, apart from any program.

A parameter is one or more segments (a packed ``[q k v]`` has three). A segment is a box in the
parameter seen as the product of its factors; on each axis of the mesh one factor of it may be
divided. From this follow each rank's local shape and the index ranges that it holds, whatever the
packing, and however uneven the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError

from .index_ranges import PiecedBox, Range, pieced_boxes
from .segment import Box, Segment, whole_segment
from .selection import Selection, selection_from_json


@dataclass(frozen=True)
class ParamLayout:
    """One parameter or buffer.

    Attributes:
        name: its original name.
        shape: its whole shape.
        dtype: its type.
        segments: its parts; several are held one behind the other along ``packed_dim``.
        packed_dim: the dimension in which segments differ.
        selection: what each rank holds, if a custom strategy divides it in a way that segments cannot say;
            the segment is then the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[Segment, ...]
    packed_dim: int = 0
    selection: Selection | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds the parameter as it is."""
        one = len(self.segments) == 1 and self.selection is None
        return one and all(shard is None for shard in self.segments[0].shards)


@dataclass(frozen=True)
class WeightLayout:
    """Where every parameter and buffer of a model is.

    Attributes:
        axis_sizes: the sizes of the mesh axis' sub-axes, major first; their product is its size.
        params: per original name, its layout.
        split_groups: the packed matmuls whose parameters are held in segments.
        undecided: parameters that no program has used yet: whole, until the first one that does decides.
    """

    axis_sizes: tuple[int, ...]
    params: Mapping[str, ParamLayout]
    split_groups: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """How many ranks share the model."""
        return math.prod(self.axis_sizes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """A rank's position on every sub-axis."""
        found = []
        for size in reversed(self.axis_sizes):
            rank, at = divmod(rank, size)
            found.append(at)
        return tuple(reversed(found))

    def rank(self, coordinates: Sequence[int]) -> int:
        """The rank at a position on every sub-axis."""
        found = 0
        for size, at in zip(self.axis_sizes, coordinates, strict=True):
            found = found * size + at
        return found

    def boxes(self, name: str, rank: int) -> list[tuple[Segment, Box]]:
        """What a rank holds of a parameter: per segment the index ranges of its factors."""
        at = self.coordinates(rank)
        return [(s, s.local_box(self.axis_sizes, at)) for s in self.params[name].segments]

    def segment_shapes(self, name: str, rank: int) -> list[tuple[int, ...]]:
        """The local shape of each segment."""
        if (selection := self.params[name].selection) is not None:
            return [selection.shapes[rank]]
        return [s.local_shape(b) for s, b in self.boxes(name, rank)]

    def span(self, name: str, rank: int, first: int, count: int) -> tuple[int, int, int]:
        """Where some segments are in a rank's local tensor: the dimension, the start and the length."""
        dim = self.params[name].packed_dim
        sizes = [s[dim] for s in self.segment_shapes(name, rank)]
        return dim, sum(sizes[:first]), sum(sizes[first : first + count])

    def local_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of the local tensor: all segments, one behind the other."""
        shapes = self.segment_shapes(name, rank)
        dim = self.params[name].packed_dim
        total = sum(s[dim] for s in shapes) if len(shapes) > 1 else 0
        return shapes[0] if len(shapes) == 1 else shapes[0][:dim] + (total,) + shapes[0][dim + 1 :]

    def shard(self, name: str, full: Tensor, rank: int) -> Tensor:
        """A rank's slice of a whole parameter, contiguous, sharing no memory with it.

        Raises:
            TpCompileError: the tensor has another shape than the layout was made for.
        """
        layout = self.params[name]
        if tuple(full.shape) != layout.shape:
            raise TpCompileError(
                f"shape {tuple(full.shape)} where the plan has {layout.shape}",
                where=name,
                todo="make the plan for this model",
            )
        if layout.selection is not None:
            return layout.selection.take(name, full, rank).contiguous()
        parts = [s.take(full, box) for s, box in self.boxes(name, rank)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.packed_dim)
        return whole.clone(memory_format=torch.contiguous_format)

    def segments_of(self, name: str, local: Tensor, rank: int) -> list[Tensor]:
        """The segments of a rank's local tensor, as views."""
        layout = self.params[name]
        if len(layout.segments) == 1:
            return [local]
        sizes = [s[layout.packed_dim] for s in self.segment_shapes(name, rank)]
        return list(local.split(sizes, dim=layout.packed_dim))

    def assemble(self, name: str, locals_: Mapping[int, Tensor]) -> Tensor:
        """The whole parameter from the local tensors of all ranks."""
        layout = self.params[name]
        first = next(iter(locals_.values()))
        full = torch.empty(layout.shape, dtype=first.dtype, device=first.device)
        if layout.selection is not None:
            layout.selection.assemble(name, full, locals_)
            return full
        parts = {rank: self.segments_of(name, local, rank) for rank, local in locals_.items()}
        boxes = {rank: self.boxes(name, rank) for rank in locals_}
        for i, segment in enumerate(layout.segments):
            segment.put(full, [(boxes[rank][i][1], parts[rank][i]) for rank in locals_])
        return full

    def ranges(self, name: str, rank: int) -> list[Range]:
        """What a rank holds of a parameter: the fewest boxes of the whole that are boxes of the local tensor.

        Boxes of two ranks are the same or have nothing in common; those of all ranks make up the whole.
        """
        if (selection := self.params[name].selection) is not None:
            return selection.ranges(name, rank)
        return [part for box in self.pieced_boxes(name, rank) for part in box.ranges()]

    def pieced_boxes(self, name: str, rank: int) -> list[PiecedBox]:
        """As ``ranges``, but fewer: a box of the whole may be in pieces in the local tensor.

        Raises:
            TpCompileError: a custom strategy divides the parameter in a way that no boxes say.
        """
        if (selection := self.params[name].selection) is not None:
            selection.refuse_boxes(name)
        param = self.params[name]
        return pieced_boxes(
            param.shape, param.segments, param.packed_dim, self.axis_sizes, self.coordinates(rank)
        )

    def check_model(self, model: nn.Module) -> None:
        """Refuses a model that this is not a layout of.

        Raises:
            TpCompileError: the model has other parameters, or in other shapes.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        shapes = {name: tuple(tensor.shape) for name, tensor in named}
        wrong = [f"{n} is not in the plan" for n in shapes if n not in self.params]
        wrong += [f"{n} is not in the model" for n in self.params if n not in shapes]
        wrong += [
            f"{n} has shape {shapes[n]}, the plan is for {p.shape}"
            for n, p in self.params.items()
            if n in shapes and shapes[n] != p.shape
        ]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise TpCompileError(
                f"the plan is for another model: {wrong[0]}{more}", where="plan", todo="plan again"
            )

    def held(self, rank: int) -> float:
        """Bytes of parameters and buffers that a rank holds."""
        return sum(self.local_bytes(name, rank) for name in self.params)

    def local_bytes(self, name: str, rank: int) -> int:
        """Bytes of one parameter or buffer on a rank."""
        return math.prod(self.local_shape(name, rank)) * self.params[name].dtype.itemsize

    @property
    def fullest(self) -> float:
        """Bytes on the rank that holds the most."""
        return max(self.held(rank) for rank in range(self.ranks))

    def to_json(self) -> dict[str, Any]:
        """A form for ``json``; ``from_json`` reads it."""
        return {
            "axes": list(self.axis_sizes),
            "groups": list(self.split_groups),
            "open": list(self.undecided),
            "params": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "packed_dim": p.packed_dim,
                    "segments": [
                        {"factors": s.factors, "box": s.box, "atoms": s.atoms, "shards": s.shards}
                        for s in p.segments
                    ],
                    "selection": None if p.selection is None else asdict(p.selection),
                }
                for p in self.params.values()
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> WeightLayout:
        """Reads what ``to_json`` wrote."""

        def segments(items: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
            for s in items:
                factors, atoms = (tuple(tuple(map(int, d)) for d in s[key]) for key in ("factors", "atoms"))
                box = tuple((int(a), int(b)) for a, b in s["box"])
                yield Segment(factors, box, atoms, tuple(s["shards"]))

        params = {
            p["name"]: ParamLayout(
                p["name"],
                tuple(p["shape"]),
                getattr(torch, p["dtype"]),
                tuple(segments(p["segments"])),
                int(p["packed_dim"]),
                selection_from_json(p.get("selection")),
            )
            for p in data["params"]
        }
        return WeightLayout(tuple(data["axes"]), params, tuple(data["groups"]), tuple(data.get("open", ())))


def whole_layout(name: str, tensor: Tensor, axis_count: int) -> ParamLayout:
    """The layout of a parameter that every rank holds as a whole."""
    shape = tuple(int(s) for s in tensor.shape)
    return ParamLayout(name, shape, tensor.dtype, (whole_segment(shape, axis_count),))
