"""Tensors that ``torch.distributed.checkpoint`` (DCP) can save and load, made of slices of whole parameters.

They follow the protocol of ``torch.distributed._checkpointable``, which DCP's planner asks in
``checkpoint/planner_helpers.py`` and ``checkpoint/utils.py`` (read in torch 2.13). They have to be tensors:
the planner looks for boxes in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.utils._pytree import tree_map_only

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import Region

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SliceTensor(Tensor):
    """A rank's local tensor under the shape of the whole parameter; it can be saved and loaded, no more.

    Attributes:
        local: the local tensor itself: what is loaded is written there.
        regions: the boxes of the whole that it holds.
        written: the offsets of those that this rank saves; others hold the rest too, and save it.
    """

    local: Tensor
    regions: tuple[Region, ...]
    written: frozenset[tuple[int, ...]]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        local: Tensor,
        regions: Sequence[Region] = (),
        written: frozenset[tuple[int, ...]] = frozenset(),
    ) -> SliceTensor:
        """See the attributes."""
        made = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        made.local, made.regions, made.written = local, tuple(regions), written
        return made

    def like(self, local: Tensor) -> SliceTensor:
        """Another tensor that lies as this one, such as a moment of an optimizer."""
        return SliceTensor(self.shape, local, self.regions, self.written)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """What this rank saves (called by DCP)."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, region.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(region), properties, self.size()),
            )
            for region in self.regions
            if region.offsets in self.written
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank wants to load (called by DCP)."""
        return [_chunk(region) for region in self.regions]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """A box, to read or to write (called by DCP)."""
        region = next(r for r in self.regions if r.offsets == tuple(index.offset or ()))
        return region_of(self.local, region)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SliceTensor({tuple(self.shape)}, local={tuple(self.local.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Only what DCP does while it stages an asynchronous save."""
        if func is torch.ops.aten.detach.default:
            return args[0].like(args[0].local)
        if func is torch.ops.aten.new_empty.default:
            return cls(args[1], args[0].local.new_empty((), **(kwargs or {})))
        raise TpCompileError(
            f"{func} of a slice that stands for a whole parameter",
            todo="use its .local, or model.full_state_dict()",
        )


def _chunk(region: Region) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))


class PiecedTensor(Tensor):
    """A region in several pieces, as one tensor: a copy into it is divided, any other use sees it joined.

    DCP's readers call ``narrow``, ``detach``, ``size`` and ``copy_`` on what they fill, its writers turn
    what they save into a plain tensor on the CPU.
    """

    local: Tensor
    along: int
    order: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, order: Tensor) -> PiecedTensor:
        """A local tensor, narrowed to the region but for ``dim``, and the indices of the region there."""
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

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        joined = tree_map_only(PiecedTensor, PiecedTensor.joined, (args, kwargs or {}))
        return func(*joined[0], **joined[1])


def region_of(local: Tensor, region: Region) -> Tensor:
    """A region as a tensor that shares the local tensor's memory."""
    pieces = region.pieces
    for dim, (start, size) in enumerate(zip(region.starts, region.sizes, strict=True)):
        if len(pieces) < 2 or dim != region.dim:
            local = local.narrow(dim, start, min(size, local.shape[dim]))
    if len(pieces) < 2:
        return local
    order = [torch.arange(p.at, p.at + p.length, device=local.device) for p in pieces]
    return PiecedTensor(local, region.dim, torch.cat(order))
