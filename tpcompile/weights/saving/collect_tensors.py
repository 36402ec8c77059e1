"""Collects whole parameters on one rank, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import tensors_by_name
from tpcompile.weights.loading.expressions import Leaf
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor
from tpcompile.weights.tensor_layout import gather


def leaves_of(model: nn.Module) -> dict[str, Leaf]:
    """The entries of a model's state dict as whole tensors that are yet to be collected, tied ones once.

    Raises:
        TpCompileError: one is neither a parameter nor a buffer.
    """
    names = {id(getattr(*place)): name for name, place in tensors_by_name(model).items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    state = nn.Module.state_dict(model, keep_vars=True)
    found: dict[str, Leaf] = {}
    seen: set[int] = set()
    # Of a tied tensor's names the one that transformers keeps comes first.
    for key in sorted(state, key=lambda k: k in tied):
        tensor = state[key]
        if id(tensor) not in names:
            raise TpCompileError(
                "the state dict has something that is neither a parameter nor a buffer, which would be lost",
                where=key,
                todo="make it a buffer, or write model.full_state_dict()",
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[key] = Leaf(tuple(tensor.shape), tensor.dtype, names[id(tensor)])
    return {key: found[key] for key in state if key in found}


class Collector:
    """Collects the tensors of a sharded model on one rank; all ranks ask for the same, in the same order.

    Args:
        model: the model.
        rank: this rank.
        to: the rank that gets them.
    """

    def __init__(self, model: nn.Module, rank: int, to: int) -> None:
        self.rank, self.to = rank, to
        self._held = {name: getattr(*place) for name, place in tensors_by_name(model).items()}
        self._kept: dict[str, Tensor | None] = {}

    def check(self) -> None:
        """Refuses to save what no whole can be made of.

        Raises:
            TpCompileError: a parameter has no values, or a custom strategy holds other things than elements.
        """
        for name, tensor in self._held.items():
            if (
                isinstance(tensor, ShardedParameter)
                and (selection := tensor.placing.param.selection) is not None
            ):
                selection.held(name, self.rank)
            if isinstance(tensor, DTensor) and not isinstance(tensor, ShardedParameter):
                raise TpCompileError(
                    "FSDP has divided the weight further: ranks would wait for each other",
                    where=name,
                    todo="save with torch.distributed.checkpoint, or write model.full_state_dict()",
                )
            if tensor.is_meta:
                raise TpCompileError(
                    "the weight has no values", where=name, todo="load the model's weights first"
                )

    def collect(self, leaves: Iterable[Leaf]) -> Mapping[str, Tensor | None]:
        """The whole tensors by name, on the rank that gets them; what was collected before is let go."""
        wanted = {leaf.name for leaf in leaves}
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in wanted}
        for name in sorted(wanted - self._kept.keys()):
            self._kept[name] = self._one(self._held[name])
        return self._kept

    def _one(self, tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, ShardedParameter) and not tensor.placing.whole:
            return gather(tensor._local_tensor, tensor.placing, self.to)
        return local_tensor(tensor).detach().cpu() if self.rank == self.to else None
