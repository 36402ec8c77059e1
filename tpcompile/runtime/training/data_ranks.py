"""The ranks that hold the same part of a model, one for each batch: what they keep equal, and how.

``DistributedDataParallel`` would do it while backward runs. It wants the weights to be divided before the
first batch is seen, and read by nobody but the model's forward (TRL multiplies by the head's weight itself).
So gradients are averaged after backward instead, once for each update.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.ir.torch_internals import resolve_process_group
from tpcompile.ranks.agree import compare
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.lost_ranks import telling
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.ranks.own_groups import backend_of, find_group, limit_of, make_group
from tpcompile.weights.sharded_parameter import ShardedParameter
from tpcompile.weights.tensor_layout import TensorLayout

_BUCKET = 32 * 2**20
"""Bytes that travel at a time; as many are copied."""

_DESCRIPTION = "takes other batches"
_GROUPS: dict[tuple[Any, ...], str] = {}


@dataclass
class DataRanks:
    """This rank and those that hold the same part as it, in all instances of the axis of a mesh.

    Attributes:
        size: how many there are, which is how many batches are taken at a time.
        rank: this one's place among them.
        first: whether this is the first rank of all: it writes and logs.
        group_name: what torch knows them by (``MeshAxis`` says why it is a name); empty if there is one only.
    """

    size: int
    rank: int
    first: bool
    group_name: str = ""
    _compared: list[TensorLayout | None] | None = None

    @classmethod
    def of(cls, axis: MeshAxis) -> DataRanks:
        """Those of the ranks that share a model; all ranks of the mesh call this.

        Raises:
            RanksApart: a rank did not come.
        """
        ranks, first = [row[axis.rank] for row in axis.rows], axis.rank == 0 and axis.replica == 0
        if len(ranks) == 1:
            return cls(1, 0, first)
        backend = backend_of(axis.group, axis.device_type)
        return cls(len(ranks), axis.replica, first, _group_of(ranks, backend))

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks, if there are several."""
        return resolve_process_group(self.group_name)  # type: ignore[arg-type]

    @torch.no_grad()
    def copy_first(self, model: nn.Module) -> None:
        """Gives the model on every rank the values that it has on the first.

        Raises:
            TpCompileError: the ranks hold other parts, or another did not come.
        """
        if self.size > 1:
            self._compare(model)
            with telling(self.group, "copy the first rank's weights"):
                self._all(self._copy, (*model.parameters(), *model.buffers()))

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """Replaces gradients with their means over the ranks, and buffers with the first rank's.

        What has no gradient on any rank gets none; what has one on some ranks counts as zero on the others.

        Raises:
            TpCompileError: the ranks hold other parts, or another did not come.
        """
        if self.size > 1:
            with telling(self.group, "average the gradients"):
                used = self._used(model)
                self._all(self._mean, (p.grad for p in used))
                self._all(self._copy, model.buffers())

    def _used(self, model: nn.Module) -> list[Tensor]:
        """The parameters that have a gradient on any rank; now they have one on all."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        layouts = [_layout(p) for p in parameters]  # a call may divide weights that no call before has used
        known = self._compared or []
        same = len(known) == len(layouts) and all(map(operator.is_, layouts, known))
        here = [*(p.grad is not None for p in parameters), not same]
        found = torch.tensor(here, dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        *has_gradient, differs = found.tolist()
        if differs:
            self._compare(model)
            self._compared = layouts
        used: list[Tensor] = list(itertools.compress(parameters, has_gradient))
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return used

    def _compare(self, model: nn.Module) -> None:
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        lines = [f"{name}: {_text(tensor)}" for name, tensor in held.items()]
        todo = "shard the same model in the same way on all ranks; plan= gives all of them one plan"
        compare(self.group, "parts of the model", lines, todo)

    def _mean(self, flat: Tensor) -> None:
        flat /= self.size  # before the sum, which could overflow
        dist.all_reduce(flat, group=self.group)

    def _copy(self, flat: Tensor) -> None:
        dist.broadcast(flat, group=self.group, group_src=0)

    def _all(self, collective: Callable[[Tensor], None], tensors: Iterable[Tensor | None]) -> None:
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        for alike in _buckets(local):
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            collective(flat)
            for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _group_of(ranks: list[int], backend: str) -> str:
    """The name of a group of these ranks, one for all trainers; all ranks of the mesh call this."""
    known = _GROUPS.get((backend, *ranks), "")
    if find_group(known, _DESCRIPTION) is not None:
        return known
    everyone = cast(dist.ProcessGroup, dist.group.WORLD)
    made = make_group(ranks, f"data ranks {ranks}", limit_of(everyone), backend, _DESCRIPTION)
    # Nobody meets for another group while the notes for this one are still there.
    exchange(everyone, "meet the ranks that take other batches", None)
    name = _GROUPS[backend, *ranks] = made.group_name
    return name


def _layout(parameter: Tensor) -> TensorLayout | None:
    return parameter.placing if isinstance(parameter, ShardedParameter) else None


def _text(tensor: Tensor) -> str:
    layout = _layout(tensor)
    where = tuple(tensor.shape) if layout is None else layout.text()
    return f"{tensor.dtype} {where}{', trained' if tensor.requires_grad else ''}"


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that are not empty in their order, those of one type together, some at a time."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > 0:
            kinds.setdefault(tensor.dtype, []).append(tensor)
    for alike in kinds.values():
        bucket, size = [], 0
        for tensor in alike:
            bucket.append(tensor)
            size += tensor.nbytes
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
