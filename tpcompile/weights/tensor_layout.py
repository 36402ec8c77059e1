"""How one tensor is laid out over the ranks of a mesh axis, and which part of it this rank holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import copied_along
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout
from tpcompile.ir.torch_internals import (
    DTensorSpec,
    FakeTensor,
    TensorMeta,
    is_traceable_wrapper_subclass,
)
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.lost_ranks import telling
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.strategies.custom.custom_modules import CustomModules


class UnsayableSpec(DTensorSpec):
    """The specification of a layout that no ``DTensor`` can have: what divides it further would be wrong."""

    @property
    def num_shards_map(self) -> Any:
        """What FSDP asks before it divides a parameter once more.

        Raises:
            TpCompileError: always.
        """
        raise TpCompileError(
            "FSDP cannot divide a parameter whose parts are uneven, packed, or shared by some of the ranks",
            where="fully_shard",
            todo="use DistributedDataParallel over the other axis of the mesh",
        )


class TensorLayout:
    """The layout of a parameter, which its gradient and an optimizer's state share.

    Args:
        param: its segments, from the layout of the model.
        axis_sizes: the sizes of the sub-axes.
        axis: the mesh axis.
        custom: cuts what only a custom strategy can.

    Attributes:
        shape: of the whole tensor.
        local_shape: of this rank's part.
        whole: whether every rank holds all of it.
        computed: whether parts are not elements of the whole: a custom strategy has computed with them.
    """

    def __init__(
        self, param: ParamLayout, axis_sizes: Sequence[int], axis: MeshAxis, custom: CustomModules
    ) -> None:
        self.param, self.axis, self.custom = param, axis, custom
        self.layout = WeightLayout(tuple(axis_sizes), {param.name: param})
        self.name, self.rank, self.shape = param.name, axis.rank, torch.Size(param.shape)
        self.local_shape = torch.Size(self.layout.local_shape(param.name, axis.rank))
        self.whole = param.is_whole
        self.computed = param.selection is not None and param.selection.runs is None
        self._key = (
            self.layout.axis_sizes,
            param.shape,
            param.segments,
            param.packed_dim,
            param.selection,
            axis,
        )
        self._hash = hash(self._key[:4])
        self._specs: dict[torch.dtype, DTensorSpec] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorLayout) or self is other:
            return self is other
        return self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorLayout:
        return self

    def text(self) -> str:
        """The layout, to compare with that of a file."""
        return repr(self._key[:-1])

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share the tensor."""
        return self.axis.group

    def check_whole(self, value: Tensor) -> None:
        """Refuses what cannot be cut as the whole tensor.

        Raises:
            TpCompileError: it has another shape, or is a tensor of another kind (a quantised one).
        """
        if value.shape != self.shape:
            raise TpCompileError(
                f"a tensor of shape {tuple(value.shape)} for a weight of {tuple(self.shape)}",
                where=self.name,
                todo="give the whole tensor; every rank takes its part",
            )
        if is_traceable_wrapper_subclass(value):
            raise TpCompileError(
                f"a {type(value).__name__} for a sharded weight: how to divide it is not known",
                where=self.name,
                todo="quantise the model, or change its weights, before parallelize; or give a plain tensor",
            )

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own (the tensor itself if it stays whole)."""
        if self.whole:
            return full
        if self.computed:
            return self.custom.local_part(self.name, full, self.rank)
        return self.layout.shard(self.name, full, self.rank)

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, on every rank (the part itself, if it is the whole).

        Raises:
            TpCompileError: it is read while something is traced, which would not see the collective.
        """
        if self.whole:
            return local
        if isinstance(local, FakeTensor) or local.is_meta or torch.compiler.is_compiling():
            raise TpCompileError(
                "a sharded weight is read in code that is traced, or before it has values",
                where=self.name,
                todo="read it outside of the traced code, by full_tensor()",
            )
        what = f"gather {self.name} ({local.dtype})"
        exchange(self.group, what, None)  # another weight's part would be taken for one of this one
        with telling(self.group, what):
            whole = gather(local, self)
        assert whole is not None, "all ranks get it"
        return whole

    def check_gradient(self, gradient: Tensor | None = None) -> None:
        """Refuses the gradient of what is not made of elements of the whole: it would be another one.

        Args:
            gradient: the part's, of which nobody may want a gradient in turn.

        Raises:
            TpCompileError: a custom strategy has computed the part; or there is to be a second derivative.
        """
        if gradient is not None and gradient.requires_grad:
            raise TpCompileError(
                "second derivatives (create_graph) do not see through the collectives of a sharded model",
                where=self.name,
                todo="take first derivatives only",
            )
        if self.computed:
            raise TpCompileError(
                "the gradient of a part that a custom strategy has computed, not cut out of the parameter",
                where=self.name,
                todo="freeze the parameter, or let partition_tensor take elements as they are",
            )

    def segments(self, local: Tensor) -> list[Tensor]:
        """The parts of a local tensor of which ``copies`` says how many ranks hold the same."""
        return self.layout.segments_of(self.name, local, self.rank)

    @functools.cached_property
    def copies(self) -> list[int]:
        """How many ranks hold the same of each segment."""
        axis_sizes = self.layout.axis_sizes
        return [math.prod(axis_sizes[i] for i in copied_along(s, axis_sizes)) for s in self.param.segments]

    def spec(self, dtype: torch.dtype) -> DTensorSpec:
        """The layout as ``DTensor`` would have it; where it cannot, one that must not be divided further."""
        if dtype not in self._specs:
            dim = self._dim()
            placement = Replicate() if dim is None else Shard(dim)
            strides = torch.empty(self.shape, device="meta").stride()
            kind = DTensorSpec if self._is_said_by(dim) else UnsayableSpec
            meta = TensorMeta(self.shape, strides, dtype)
            self._specs[dtype] = kind(self.axis.mesh, (placement,), tensor_meta=meta)
        return self._specs[dtype]

    def _dim(self) -> int | None:
        """The first dimension that is divided."""
        full, mine = self.shape, self.local_shape
        flat = [[d for d, dim in enumerate(s.atoms) for _ in dim] for s in self.param.segments]
        found = [
            dims[at]
            for s, dims in zip(self.param.segments, flat, strict=True)
            for at in s.shards
            if at is not None
        ]
        return min(found) if found else next((d for d in range(len(full)) if full[d] != mine[d]), None)

    def _is_said_by(self, dim: int | None) -> bool:
        """Whether a DTensor on a mesh of one axis, divided along one dimension, is laid out like this."""
        if dim is None or self.param.selection is not None:
            return self.whole
        order = self.axis.mesh.mesh.flatten().tolist()
        if order != sorted(order):  # parts go by ascending ranks, DTensor's by the mesh
            return False
        ranks, size = self.layout.ranks, self.shape[dim]
        chunk = -(-size // ranks)
        for rank in range(ranks):
            start = min(chunk * rank, size)
            boxes = self.layout.ranges(self.name, rank)
            if len(boxes) != 1 or boxes[0].sizes[dim] != min(chunk, size - start):
                return False
            if (
                boxes[0].offsets[dim] != start
                or math.prod(boxes[0].sizes) * size != self.shape.numel() * (boxes[0].sizes[dim])
            ):
                return False
        return True


def gather(local: Tensor, where: TensorLayout, to: int | None = None) -> Tensor | None:
    """A whole tensor, as bytes on the way: uneven parts are filled up to the largest.

    Args:
        local: this rank's part.
        where: how the whole is laid out.
        to: the rank that gets it, in memory of the CPU; by default all of them.
    """
    layout, size = where.layout, local.element_size()
    shapes = [layout.local_shape(where.name, r) for r in range(layout.ranks)]
    sent = torch.zeros(max(map(math.prod, shapes)) * size, dtype=torch.uint8, device=local.device)
    sent[: local.numel() * size] = local.detach().contiguous().flatten().view(torch.uint8)
    received = [torch.empty_like(sent) for _ in shapes] if to in (None, where.rank) else None
    if to is None:
        dist.all_gather(received, sent, group=where.group)
    else:
        dist.gather(sent, received, group=where.group, group_dst=to)
    if received is None:
        return None
    flat = [each.view(local.dtype) if to is None else each.view(local.dtype).cpu() for each in received]
    parts = {r: flat[r][: math.prod(shape)].reshape(shape) for r, shape in enumerate(shapes)}
    return layout.assemble(where.name, parts)
