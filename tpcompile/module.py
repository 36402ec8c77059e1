"""What a sharded model can do beyond the original: capture, print, show its plan, give its weights back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from .checkpoint import sharded_state_dict
from .entries import FixedModules
from .errors import TpCompileError
from .gather_weights import full_state_dict
from .plan import Plan
from .print_graph import graph_text
from .runtime import Program, Runtime


class ShardedModule(FixedModules):
    """Mixed into the class of a parallelised model; everything else is the original's."""

    _tp: Runtime

    @property
    def plan(self) -> Plan:
        """The plan of the last program.

        Raises:
            TpCompileError: nothing was captured yet.
        """
        return self._last().plan

    @property
    def graph_module(self) -> GraphModule:
        """This rank's lowered graph of the last program: local shapes and collectives."""
        return self._last().graph_module

    @property
    def programs(self) -> list[Program]:
        """One program per call signature, of the model and of submodules called alone, as they came."""
        return list(self._tp.programs)

    def capture(self, *args: Any, **kwargs: Any) -> Program:
        """Compiles a program for these arguments over the same weights, without running it.

        Raises:
            TpCompileError: the call cannot be captured or planned; the model is unchanged.
        """
        return self._tp.capture(self, self._tp.bind(args, kwargs))

    def print_graph(self) -> None:
        """Prints the last program: global shapes, placements, collectives."""
        print(graph_text(self._last().compiled.rewritten.graph))

    def full_state_dict(self) -> dict[str, Tensor]:
        """The ordinary state dict, unsharded, with the original names, on every rank.

        All ranks must call it. It holds the whole model once per rank.
        """
        return full_state_dict(self, self._tp)

    def sharded_state_dict(self, *, tied: bool = True) -> dict[str, Any]:
        """The state dict for ``torch.distributed.checkpoint``: slices that know the whole they belong to.

        ``dcp.save(model.sharded_state_dict(), checkpoint_id=...)`` writes a checkpoint that any number of
        ranks, and the model before it was sharded, can load; loading is in place. See ``checkpoint``.

        Args:
            tied: whether a tied parameter comes under each of its names, as the unsharded model wants it, or
                only under the first.
        """
        return sharded_state_dict(self, self._tp, tied)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what a rank holds are slices, which no other program could read.

        Raises:
            TpCompileError: always.
        """
        raise TpCompileError(
            "a sharded model cannot be written by save_pretrained yet",
            todo="write full_state_dict(), or use torch.distributed.checkpoint with sharded_state_dict()",
        )

    def _last(self) -> Program:
        own = [program for program in self._tp.programs if not program.entry]
        if not own:
            raise TpCompileError(
                "nothing was captured yet",
                todo="call the model, or model.capture(...), or give example_args to parallelize",
            )
        return own[-1]


def is_sharded(model: nn.Module) -> bool:
    """Whether a module came from ``parallelize``."""
    return isinstance(model, ShardedModule)
