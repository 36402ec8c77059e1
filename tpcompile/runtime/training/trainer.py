"""What a ``Trainer`` does otherwise when its model is sharded: what all ranks must do, it does on all."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils import serialization
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer

from tpcompile.errors import TpCompileError
from tpcompile.ranks.agree import compare, together
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.runtime.module import ShardedModule
from tpcompile.weights.optimizer_state import whole_state
from tpcompile.weights.saving.adapters import has_adapters

from .data_ranks import DataRanks
from .one_process import arguments_of_one_process, as_one_process, one_process
from .refuse_arguments import refuse_arguments, refuse_own_gathers, refuse_wrapped


def share_model(trainer: Any, model: Any) -> None:
    """Lets the ranks that share a model be one process for the trainer that was given it.

    Args:
        trainer: has made its accelerator, and nothing else yet. With another model it stays as it is.
        model: its model, or None if it has none yet.

    Raises:
        TpCompileError: it is to do what cannot be done with this model.
    """
    axis = _axis_of(model)
    if axis is None or isinstance(trainer, ShardedTraining):
        return
    refuse_arguments(trainer.args, axis, next(model.parameters()).device)
    refuse_own_gathers(type(trainer), axis)
    data = DataRanks.of(axis)
    trainer.args = arguments_of_one_process(trainer.args, data)
    as_one_process(trainer.accelerator, data)
    gather, objects = trainer.accelerator.gather_for_metrics, trainer.args.eval_use_gather_object
    trainer.gather_function = functools.partial(gather, use_gather_object=objects)
    kind: Any = type(trainer)
    trainer.__class__ = _sharded_training(kind)


class ShardedTraining(Trainer):
    """Mixed into the class of a trainer whose model is sharded; everything else is the original's."""

    optimizer: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of any trainer; all ranks must call it, with the same data set."""
        model = _sharded(self.model)
        assert model is not None, "a sharded model stays one"
        refuse_wrapped(self.model)
        model._tp.compare_calls = True
        told = {**self.args.to_dict(), **inspect.signature(super().train).bind(*args, **kwargs).arguments}
        lines = [f"{name}: {told[name]}" for name in sorted(told.keys() - _OF_THE_RANK)]
        compare(self._everyone(), "training arguments", lines, "give every rank the same arguments")
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_for_training(*args, **kwargs)
        _check_optimizer(self.model, self.optimizer)
        self._data_ranks.copy_first(self.model)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As of any trainer; gradients that are used now become means over the batches of this step."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._data_ranks.average_gradients(self.model)
        return loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any trainer; each row counts once.

        Raises:
            TpCompileError: the data are a stream, the last rows of which would count several times.
        """
        if self._data_ranks.size > 1 and isinstance(dataloader.dataset, IterableDataset):
            raise TpCompileError(
                "the evaluation of a stream would count some of its rows several times: each instance of the "
                "model takes as many",
                where="the data of an evaluation",
                todo="give a data set that has a length",
            )
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def store_flos(self) -> None:
        """As of any trainer; ranks that share a model count once."""
        with one_process(self.accelerator.state):
            super().store_flos()

    def is_world_process_zero(self) -> bool:
        """Whether this is the first rank of all."""
        return self._data_ranks.first

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of any trainer; transformers 5.17 leaves out the ranks that write nothing."""
        if self.args.should_save:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Every rank takes part; one writes."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        save = super()._save

        def on_all() -> None:
            if isinstance(self.model, PreTrainedModel) or has_adapters(self.model):
                if self.args.should_save:
                    save(output_dir)
                else:
                    self.model.save_pretrained(output_dir, is_main_process=False)
            elif self._axis().replica == 0:
                state = self.model.full_state_dict()
                if self.args.should_save:
                    save(output_dir, state_dict=state)

        together(self._everyone(), "save the model", on_all)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The whole state in a file as an unsharded trainer's, which any number of ranks can load."""
        optimizer, save = self.optimizer, super()._save_optimizer_and_scheduler

        def on_all() -> None:
            if self._axis().replica != 0:
                return
            state = whole_state(optimizer, to=0)
            try:
                self.optimizer = _Whole(state)
                save(output_dir)
            finally:
                self.optimizer = optimizer

        together(self._everyone(), "save the optimizer", on_all)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The file is mapped: ranks copy only their parts of what is in it."""
        config: Any = serialization.config
        with config.patch({"load.mmap": True}):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """The generators of ranks that share a model are in the same state."""
        if self._axis().rank == 0:
            super()._save_rng_state(output_dir)

    @property
    def _data_ranks(self) -> DataRanks:
        found: DataRanks = self.accelerator.state.data
        return found

    def _everyone(self) -> dist.ProcessGroup | None:
        return self._axis().group if self._data_ranks.size == 1 else dist.group.WORLD

    def _axis(self) -> MeshAxis:
        axis = _axis_of(self.model)
        assert axis is not None, "a sharded model stays one"
        return axis


_OF_THE_RANK = {"local_rank", "logging_dir", "run_name"}
"""Arguments that say where a rank is, or when it has started."""


class _Whole:
    """Stands for an optimizer whose state was gathered."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


@functools.cache
def _sharded_training(original: type) -> type:
    """The class of a trainer whose model is sharded."""
    body = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (ShardedTraining, original), body)


def _sharded(model: Any) -> ShardedModule | None:
    """The sharded model in a model: itself, or what a wrapper has in it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((m for m in modules if isinstance(m, ShardedModule)), None)


def _axis_of(model: Any) -> MeshAxis | None:
    """The ranks that share a model."""
    found = _sharded(model)
    return None if found is None else found._tp.compiler.axis


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuses an optimizer that was made before the model was sharded: it has the weights from before."""
    own = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise TpCompileError(
                    f"the optimizer updates a tensor of shape {tuple(parameter.shape)} that is not a "
                    "parameter of the model",
                    where=f"optimizers, parameter {at}",
                    todo="make the optimizer after parallelize",
                )
