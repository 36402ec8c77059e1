"""Collects whole parameters on one rank, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import tensors_by_name
from tpcompile.weights.gather import is_whole
from tpcompile.weights.loading.expressions import Leaf


def leaves_of(model: nn.Module, layout: WeightLayout | None) -> dict[str, Leaf]:
    """The entries of a model's state dict as whole tensors that are yet to be collected, tied ones once.

    Raises:
        TpCompileError: a parameter is not this rank's slice any more.
    """
    names = {id(getattr(*place)): name for name, place in tensors_by_name(model).items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    state = nn.Module.state_dict(model, keep_vars=True)
    found: dict[str, Leaf] = {}
    seen: set[int] = set()
    # Of a tied tensor's names the one that transformers keeps comes first.
    for key in sorted(state, key=lambda k: k in tied):
        tensor = state[key]
        if not isinstance(tensor, Tensor) or id(tensor) not in names or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        shape, name = tuple(tensor.shape), names[id(tensor)]
        if layout is not None and name in layout.params:
            shape = layout.params[name].shape
        found[key] = Leaf(shape, tensor.dtype, name)
    return {key: found[key] for key in state if key in found}


class Collector:
    """Collects the tensors of a sharded model on one rank; all ranks ask for the same, in the same order.

    Args:
        model: the model.
        layout: where its weights lie, or None if they are whole.
        rank: this rank.
        to: the rank that gets them.
        group: the ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: WeightLayout | None,
        rank: int,
        to: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.layout, self.rank, self.to, self.group = layout, rank, to, group
        self._locals = {name: getattr(*place) for name, place in tensors_by_name(model).items()}
        self._kept: dict[str, Tensor | None] = {}

    def check(self) -> None:
        """Refuses to save what is not a slice of this rank's.

        Raises:
            TpCompileError: a parameter was replaced by something of another shape, or a custom strategy holds
                what no whole can be made of.
        """
        for name, local in self._locals.items():
            shape = expected = tuple(local.shape)
            if self.layout is not None and name in self.layout.params:
                expected = self.layout.local_shape(name, self.rank)
                if (selection := self.layout.params[name].selection) is not None:
                    selection.held(name, self.rank)
            if isinstance(local, DTensor) or local.is_meta or shape != expected:
                kind = "a DTensor" if isinstance(local, DTensor) else f"{shape} on {local.device}"
                raise TpCompileError(
                    f"the local tensor is {kind}, the layout has {expected} for this rank",
                    where=name,
                    todo="keep the parameters as tpcompile made them",
                )

    def collect(self, leaves: Iterable[Leaf]) -> Mapping[str, Tensor | None]:
        """The whole tensors by name, on the rank that gets them; what was collected before is let go."""
        wanted = {leaf.name for leaf in leaves}
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in wanted}
        for name in sorted(wanted - self._kept.keys()):
            self._kept[name] = self._one(name)
        return self._kept

    def _one(self, name: str) -> Tensor | None:
        local = self._locals[name].detach()
        layout = self.layout
        if layout is None or name not in layout.params or is_whole(layout.params[name]):
            return local.cpu() if self.rank == self.to else None
        shapes = [layout.local_shape(name, r) for r in range(layout.ranks)]
        size = local.element_size()
        sent = torch.zeros(max(map(math.prod, shapes)) * size, dtype=torch.uint8, device=local.device)
        sent[: local.numel() * size] = local.contiguous().flatten().view(torch.uint8)
        received = [torch.empty_like(sent) for _ in shapes] if self.rank == self.to else None
        dist.gather(sent, received, group=self.group, group_dst=self.to)
        if received is None:
            return None
        parts = {
            r: received[r][: math.prod(shape) * size].view(local.dtype).reshape(shape).cpu()
            for r, shape in enumerate(shapes)
        }
        return layout.assemble(name, parts)
