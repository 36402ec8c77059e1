"""What a sharded model can do beyond the original: capture, print, show its plan, give its weights back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call, leaf_names
from tpcompile.ir.check import Must, checked, well_called
from tpcompile.ir.print_graph import graph_text
from tpcompile.planner.plan import Plan
from tpcompile.planner.report.notebook import plan_html
from tpcompile.ranks.agree import alike, together
from tpcompile.ranks.describe import describe_value
from tpcompile.ranks.turns import own_turn
from tpcompile.weights.dcp import sharded_state_dict
from tpcompile.weights.gather import gathered
from tpcompile.weights.saving.adapters import has_adapters, save_adapters

from .add_program import add_program
from .artifacts.save_program import save_programs
from .copy_model import copy_model
from .print_model import model_text
from .program import RankProgram
from .runtime import Runtime
from .serve_ranks import serve_ranks
from .verify.live import verify_live
from .verify.report import Report
from .verify.tokens import Steps
from .watched_module import WatchedModule

Norm = Annotated[float, Must("a number that is not negative", lambda norm: norm >= 0)]
NormType = Annotated[float, Must("a positive number, or inf", lambda norm: norm > 0)]


class ShardedModule(WatchedModule):
    """Mixed into the class of a parallelised model; everything else is the original's."""

    _tp: Runtime

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """All else is the original class's."""

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
    def programs(self) -> list[RankProgram]:
        """One program per call signature, of the model and of submodules called alone, as they came."""
        return list(self._tp.programs)

    def capture(self, *args: Any, **kwargs: Any) -> RankProgram:
        """Compiles a program for these arguments over the same weights, without running it.

        Raises:
            TpCompileError: the call cannot be captured or planned, or another thread is in one; the model is
                unchanged.
        """
        with own_turn(self._tp.group_name):
            return add_program(self._tp, self, self._tp.bind(args, kwargs))

    def serve_ranks(self) -> AbstractContextManager[bool]:
        """One rank calls the model, and the others follow: for a server, a notebook or a pipeline on rank 0.

        All ranks enter the block together. On rank 0 of the model's ranks it gives True, and every call of
        the model, of ``generate`` and of submodules in it is made by the other ranks too, with the same
        arguments, which travel from it as pickles; calls of several threads take turns. The others get False
        when rank 0 has left the block.

            with model.serve_ranks() as leading:
                if leading:
                    serve(model)

        Calls that record gradients and calls with a cache are refused in it; ``save_pretrained`` and whatever
        else all ranks have to call has to wait until it is over. A failure of a call is raised on rank 0, and
        the others go on.

        Raises:
            TpCompileError: on all ranks: some of them do something else. In the block: a call cannot be told
                to the others, or has failed on one of them.
        """
        return serve_ranks(self, self._tp)

    @checked
    def verify(
        self,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        gradients: bool = True,
        generate: Steps = 0,
    ) -> Report:
        """Runs a call here, and as the unsharded model with the weights that the ranks have, and compares.

        All ranks must call it, with the same call. Each holds the whole model while it runs; what runs is a
        copy of the sharded model, which stays as it is. See ``tpcompile.verify``.

        Args:
            example_args: positional arguments of the call.
            example_kwargs: its keyword arguments.
            gradients: compare gradients as well.
            generate: how many tokens to generate greedily, and to compare.

        Raises:
            TpCompileError: on all ranks: they make different calls, or have different weights.
        """
        bound = self._tp.bind(example_args, example_kwargs or {})
        names, values = leaf_names(bound), flatten_call(bound)[0]
        lines = [f"{name}: {describe_value(value)}" for name, value in zip(names, values, strict=True)]
        modes = [f"training {self.training}, gradients {gradients}, generate {generate}"]
        with alike(self._tp.compiler.group, "verify", [*modes, *lines]):
            return verify_live(self, self._tp, bound, gradients, generate)

    def __repr__(self) -> str:
        return model_text(self, self._tp.layout, self._tp.compiler.rank)

    def _repr_html_(self) -> str | None:
        """The plan; nothing (so that the text is shown) before there is one."""
        return plan_html(self.plan, type(self).__name__) if self._tp.programs else None

    def print_graph(self) -> None:
        """Prints the last program: global shapes, placements, collectives."""
        print(graph_text(self._last().compiled.rewritten.graph))

    @checked
    def full_state_dict(self) -> dict[str, Tensor]:
        """The ordinary state dict, unsharded, with the original names, on every rank.

        Non-persistent buffers are left out, as in ``state_dict``. All ranks must call it. It holds the whole
        model once per rank.
        """
        group = self._tp.compiler.group  # the user's hooks may fail on one rank
        state = together(group, "take the state dict", lambda: nn.Module.state_dict(self, keep_vars=True))
        lines = [f"{name}: {value.dtype}" for name, value in state.items() if isinstance(value, Tensor)]
        with alike(group, "full_state_dict", lines):
            return gathered(state)

    @checked
    def sharded_state_dict(self, *, tied: bool = True) -> dict[str, Any]:
        """The state dict for ``torch.distributed.checkpoint``: slices that know the whole they belong to.

        ``dcp.save(model.sharded_state_dict(), checkpoint_id=...)`` writes a checkpoint that any number of
        ranks, and the model before it was sharded, can load; loading is in place. See ``checkpoint``.

        Args:
            tied: whether a tied parameter comes under each of its names, as the unsharded model wants it, or
                only under the first.
        """
        return sharded_state_dict(self, tied)

    @well_called
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: Any = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes an ordinary checkpoint, which transformers and ``tpcompile.from_pretrained`` can load.

        All ranks must call it; the first one writes. No rank ever holds more than a parameter as a whole,
        and what was in the folder before stays intact until the new checkpoint is complete.

        Args:
            save_directory: the folder; whatever else is in it stays.
            is_main_process: whether this rank may write; the first that may does.
            state_dict: refused, as ``push_to_hub`` and ``distributed_checkpoint`` are.
            push_to_hub: refused.
            max_shard_size: the size of a file, in bytes or such as ``"5GB"``.
            variant: writes ``model.<variant>.safetensors``.
            token: without meaning, as there is no upload.
            save_peft_format: without meaning.
            save_original_format: whether keys and tensors get the form back that they were loaded from.
            distributed_checkpoint: refused.
            kwargs: refused; of a model of PEFT, whose adapters are written as PEFT does, its arguments.

        Raises:
            TpCompileError: on every rank; it cannot be written, or an argument is refused.
        """
        if has_adapters(self):
            asked = {"state_dict": state_dict, "push_to_hub": push_to_hub or None, **kwargs}
            options = {name: value for name, value in asked.items() if value is not None}
            save = super().save_pretrained  # type: ignore[misc]
            return save_adapters(save, self._tp.compiler.axis, save_directory, is_main_process, options)
        from tpcompile.weights.saving.save_pretrained import (  # imports transformers
            SaveRequest,
            save_pretrained,
        )

        refused = {"state_dict": state_dict, "push_to_hub": push_to_hub}
        refused |= {"distributed_checkpoint": distributed_checkpoint, **kwargs}
        wishes = SaveRequest(
            save_directory, is_main_process, max_shard_size, variant, save_original_format, refused
        )
        lines = [
            f"{n}: {describe_value(os.fspath(v) if isinstance(v, os.PathLike) else v)}"
            for n, v in vars(wishes).items()
            if n != "is_main_process"
        ]
        with alike(self._tp.compiler.group, "save_pretrained", lines):
            save_pretrained(self, self._tp.compiler.axis, self._tp.original, wishes)

    @checked
    def save_program(self, folder: str | os.PathLike[str], *, package: bool = False) -> None:
        """Writes the calls that were captured, for ``tpcompile.load_program``, which needs no model.

        All ranks must call it. What is written: each rank's graphs and slices of the weights, of all calls of
        the model that were captured in evaluation mode, without gradients (``docs/artifacts.md``).

        Args:
            folder: a new or empty folder, or one with a program, which is replaced.
            package: with each rank's graphs as native code (AOTInductor) for the sizes that they were
                captured with; it runs only where ``load_program`` is asked to.

        Raises:
            TpCompileError: on every rank; nothing was captured, a program runs code that is not torch's, or
                the folder cannot be written.
        """
        lines = [f"folder: {os.fspath(folder)!r}", f"package: {package}"]
        axis = self._tp.compiler.axis
        with alike(None if axis is None else axis.everyone, "save_program", lines):
            save_programs(self._tp, os.fspath(folder), package)

    @checked
    def clip_grad_norm_(
        self, max_norm: Norm, norm_type: NormType = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of all parameters. All ranks must call it.

        Args:
            max_norm: the largest norm that is left as it is.
            norm_type: 2 for the Euclidean norm, ``inf`` for the largest absolute value, ...
            error_if_nonfinite: whether an infinite norm, or one that is not a number, is an error.

        Returns:
            The norm of all gradients together, before they were scaled; the same on all ranks.

        Raises:
            RuntimeError: the norm is not finite, and that was to be an error.
        """
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type, error_if_nonfinite)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy_model(self, self._tp, memo)

    def _last(self) -> RankProgram:
        own = [program for program in self._tp.programs if not program.entry]
        if not own:
            raise TpCompileError(
                "nothing was captured yet",
                where="programs",
                todo="call the model, or model.capture(...), or give example_args to parallelize",
            )
        return own[-1]
