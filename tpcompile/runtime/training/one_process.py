"""accelerate as the ranks of one model see it: together they are one process that trains.

What is done for several processes (samplers that divide the data, averages, gathered metrics) would be wrong
for ranks that share a model: they take the same batches, and each has the whole loss already. So an
accelerator is told of as many processes as there are instances of the model. If there is one, it does what it
does for an unsharded model alone, number for number; if there are several, what it does for an unsharded
model in as many processes. Only what is written and printed once knows of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import TrainingArguments

from .data_ranks import DataRanks


class _OneProcess(PartialState):
    """The state of the ranks of a model; the first of all ranks is the main process.

    Args:
        of: accelerate's own.
        data: this rank among those that take other batches.
    """

    def __init__(self, of: Any, data: DataRanks) -> None:
        own = {**vars(of), "num_processes": data.size, "process_index": data.rank}
        if of.distributed_type == DistributedType.NO:  # the processes were connected without torchrun
            own["local_process_index"] = dist.get_rank()
        if data.size == 1:
            own["distributed_type"] = DistributedType.NO
        self.__dict__ = {**own, "data": data, "original": of}

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.data.first

    def wait_for_everyone(self) -> None:
        """Waits for the other ranks."""
        dist.barrier()


class _OneProcessOfAccelerator(_OneProcess, AcceleratorState):
    """The same of the state that an accelerator has."""

    def __init__(self, of: AcceleratorState, data: DataRanks) -> None:
        super().__init__(of, data)
        self.__dict__ |= {"parallelism_config": None, "device_mesh": None}


def _as_one_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an accelerator for which accelerate's functions see its processes."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_process(self.state):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def one_process(state: Any) -> Iterator[None]:
    """Lets accelerate's functions see the processes of a state, and torch's have no others by default."""
    shared: dict[str, Any] = PartialState._shared_state
    torch_groups: Any = dist.group
    before, world = dict(shared), torch_groups.WORLD
    shared |= {name: vars(state)[name] for name in ("distributed_type", "num_processes", "process_index")}
    if state.data.size > 1:
        torch_groups.WORLD = state.data.group
    try:
        yield
    finally:
        torch_groups.WORLD = world
        shared |= before


class OneProcessAccelerator(Accelerator):
    """An accelerator for which the ranks of a model are one process."""

    gather = _as_one_process(Accelerator.gather)
    gather_for_metrics = _as_one_process(Accelerator.gather_for_metrics)
    reduce = _as_one_process(Accelerator.reduce)
    pad_across_processes = _as_one_process(Accelerator.pad_across_processes)

    def prepare_model(self, model: Any, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
        """As of any accelerator, without ``DistributedDataParallel`` around it."""
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def wait_for_everyone(self) -> None:
        """Waits for the other ranks."""
        dist.barrier()


def as_one_process(accelerator: Accelerator, data: DataRanks) -> None:
    """Makes an accelerator one for the ranks of a model.

    Args:
        accelerator: has prepared nothing yet.
        data: this rank among those that take other batches.
    """
    accelerator.state = _OneProcessOfAccelerator(accelerator.state, data)
    accelerator.dataloader_config.dispatch_batches = False  # every rank reads a stream itself
    accelerator.__class__ = OneProcessAccelerator


class OneProcessArguments(TrainingArguments):
    """Mixed into the class of training arguments; what is saved of them is of the original class."""

    original: ClassVar[type]

    @property
    def should_save(self) -> bool:
        """Whether this rank writes."""
        return bool(self.distributed_state.is_main_process)

    @property
    def should_log(self) -> bool:
        """Whether this rank logs."""
        state = self.distributed_state
        return bool(state.is_local_main_process if self.log_on_each_node else state.is_main_process)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = object.__new__(self.original)
        plain.__dict__ = {**vars(self), "distributed_state": self.distributed_state.original}
        return plain.__reduce_ex__(1)  # with later protocols, pickle asks for the class of what it was given


def arguments_of_one_process(args: Any, data: DataRanks) -> Any:
    """A copy of ``TrainingArguments`` for the ranks of a model."""
    kind = type(args)
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "original": kind}
    own: Any = object.__new__(type(kind.__name__, (OneProcessArguments, kind), body))
    own.__dict__ = {**vars(args), "distributed_state": _OneProcess(args.distributed_state, data)}
    return own
