"""What ``torch.distributed.checkpoint`` (DCP) saves and loads of a part of a parameter: boxes of the whole.

``ShardedParameter`` answers DCP's planner with it, by the protocol of ``torch.distributed._checkpointable``,
which ``checkpoint/planner_helpers.py`` and ``checkpoint/utils.py`` ask (read in torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tpcompile.ir.layout.index_ranges import PiecedBox
from tpcompile.ir.torch_internals import disabled_torch_function_impl, tree_map_only

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_items(name: str, local: Tensor, shape: torch.Size, boxes: Sequence[PiecedBox]) -> list[WriteItem]:
    """What a rank can save of a parameter. Of boxes that several ranks hold, DCP's planner keeps one."""
    properties = TensorProperties.create_from_tensor(local)
    return [
        WriteItem(
            MetadataIndex(name, box.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(_chunk(box), properties, shape),
        )
        for box in boxes
    ]


def chunks(boxes: Sequence[PiecedBox]) -> list[ChunkStorageMetadata]:
    """What a rank wants to load."""
    return [_chunk(box) for box in boxes]


def box_at(local: Tensor, boxes: Sequence[PiecedBox], index: MetadataIndex) -> Tensor:
    """A box of a local tensor, to read or to write."""
    return held_box(local, next(r for r in boxes if r.offsets == tuple(index.offset or ())))


def _chunk(box: PiecedBox) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


class PiecedTensor(Tensor):
    """A box in several pieces, as one tensor: a copy into it is divided, any other use sees it joined.

    DCP's readers call ``narrow``, ``detach``, ``size`` and ``copy_`` on what they fill, its writers turn
    what they save into a plain tensor on the CPU.
    """

    local: Tensor
    along: int
    order: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, order: Tensor) -> PiecedTensor:
        """A local tensor, narrowed to the box but for ``dim``, and the indices of the box there."""
        shape = local.shape[:dim] + order.shape + local.shape[dim + 1 :]
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        made.local, made.along, made.order = local, dim, order
        return made

    def joined(self) -> Tensor:
        """A copy in the order of the whole parameter."""
        return self.local.index_select(self.along, self.order)

    def narrow(self, dim: int, start: Any, length: Any) -> Tensor:
        """A part of it, to be read or written."""
        if dim == self.along:
            return PiecedTensor(self.local, dim, self.order.narrow(0, start, length))
        return PiecedTensor(self.local.narrow(dim, start, length), self.along, self.order)

    def detach(self) -> Tensor:
        """Itself: there is no gradient."""
        return self

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Tensor:
        """Writes into the local tensor."""
        bits = _BITS.get(self.local.itemsize, self.local.dtype)  # not every type can be indexed
        source = src.to(self.local.device, self.local.dtype).view(bits)
        self.local.view(bits).index_copy_(self.along, self.order, source)
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """A copy on the CPU."""
        return self.joined().cpu()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """A copy elsewhere."""
        return self.joined().to(*args, **kwargs)

    def untyped_storage(self) -> torch.UntypedStorage:
        """None of its own: a writer that sees this makes a copy."""
        return torch.UntypedStorage(0)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PiecedTensor({tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        joined = tree_map_only(PiecedTensor, PiecedTensor.joined, (args, kwargs or {}))
        return func(*joined[0], **joined[1])


def held_box(local: Tensor, box: PiecedBox) -> Tensor:
    """A box as a tensor that shares the local tensor's memory."""
    pieces = box.pieces
    for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
        if len(pieces) < 2 or dim != box.dim:
            local = local.narrow(dim, start, min(size, local.shape[dim]))
    if len(pieces) < 2:
        return local
    order = [torch.arange(p.at, p.at + p.length, device=local.device) for p in pieces]
    return PiecedTensor(local, box.dim, torch.cat(order))
