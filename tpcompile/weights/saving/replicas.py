"""Of several replicas of a model the first one writes files: that they are replicas is looked at before."""

from __future__ import annotations

import warnings

from torch import nn

from tpcompile.errors import TpCompileError
from tpcompile.ranks.describe import describe_value
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.weights.sharded_parameter import local_tensor

_TODO = "save a state dict of each model by itself: model.full_state_dict(), or sharded_state_dict() with "
_TODO += "torch.distributed.checkpoint"


def refuse_other_models(model: nn.Module, axis: MeshAxis | None, where: str) -> None:
    """Refuses to write one of several models for all of them, as of the stages of a pipeline.

    All ranks call this whose calls are made together (``MeshAxis.everyone``). A slice of a mesh does not say
    whether others call, too: its ranks that write nothing are warned.

    Args:
        model: the model.
        axis: the mesh axis; None if the model is on one rank.
        where: the method that was called.

    Raises:
        TpCompileError: on all ranks: weights of some are not those of the first replica.
    """
    if axis is None or len(axis.rows) == 1:
        return
    if not axis.shared:
        if axis.replica:
            warnings.warn(
                f"{where} writes nothing here: ranks {list(axis.rows[0])} write, which the mesh has for the "
                f"first replica of the model. If this is another model, as a stage of a pipeline, {_TODO}",
                stacklevel=3,
            )
        return
    held = ((name, local_tensor(value).detach()) for name, value in model.named_parameters())
    lines = [f"{name}: {describe_value(value)}" for name, value in held]
    first: dict[int, list[str]] = {}
    for place, theirs in exchange(axis.everyone, f"{where}: weights of replicas", (axis.rank, lines)):
        mine = first.setdefault(place, theirs)
        if mine != theirs:
            pairs = zip(mine, theirs, strict=False)
            other = next((line for line, their in pairs if line != their), "how many there are")
            raise TpCompileError(
                "the mesh's other axes have other models, not replicas, of which one would be written",
                where=f"{where}, {other.split(': ')[0]}",
                todo=_TODO,
            )
