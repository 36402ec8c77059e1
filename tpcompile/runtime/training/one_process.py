"""accelerate as the ranks of one model see it: together they are one process that trains.

What is done for several processes (samplers that divide the data, averages, gathered metrics) would be wrong
for ranks that share a model: they take the same batches, and each has the whole loss already. So an
accelerator is told that it is alone, and does what it does for an unsharded model, number for number. Only
what is written and printed once knows of the other ranks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState


class _OneProcess(PartialState):
    """The state of a rank that is alone with its data; the first of all ranks is the main process."""

    def __init__(self, of: Any) -> None:
        own = {**vars(of), "distributed_type": DistributedType.NO, "num_processes": 1}
        if of.distributed_type == DistributedType.NO:  # the processes were connected without torchrun
            own["process_index"] = own["local_process_index"] = dist.get_rank()
        self.__dict__ = own

    def wait_for_everyone(self) -> None:
        """Waits for the other ranks."""
        dist.barrier()


class _OneProcessOfAccelerator(_OneProcess, AcceleratorState):
    """The same of the state that an accelerator has."""

    def __init__(self, of: AcceleratorState) -> None:
        super().__init__(of)
        self.__dict__ |= {"parallelism_config": None, "device_mesh": None}


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an accelerator for which accelerate's functions see one process."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _one_process():
            return method(self, *args, **kwargs)

    return run


@contextmanager
def _one_process() -> Iterator[None]:
    shared = PartialState._shared_state
    before = shared["distributed_type"]
    shared["distributed_type"] = DistributedType.NO
    try:
        yield
    finally:
        shared["distributed_type"] = before


class OneProcessAccelerator(Accelerator):
    """An accelerator for which the ranks of a model are one process."""

    gather = _alone(Accelerator.gather)
    gather_for_metrics = _alone(Accelerator.gather_for_metrics)
    reduce = _alone(Accelerator.reduce)
    pad_across_processes = _alone(Accelerator.pad_across_processes)

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any accelerator; the workers of all ranks draw the same random numbers.

        Trainer has their seeds follow from the rank: random augmentation would give each other batches.
        """
        seed = getattr(data_loader, "worker_init_fn", None)
        if isinstance(seed, functools.partial) and "rank" in seed.keywords:
            data_loader.worker_init_fn = functools.partial(seed, rank=0)
        return super().prepare_data_loader(data_loader, *args, **kwargs)

    def wait_for_everyone(self) -> None:
        """Waits for the other ranks."""
        dist.barrier()


def as_one_process(accelerator: Accelerator) -> None:
    """Makes an accelerator one for the ranks of a model.

    Args:
        accelerator: has prepared nothing yet.
    """
    accelerator.state = _OneProcessOfAccelerator(accelerator.state)
    accelerator.dataloader_config.dispatch_batches = False  # every rank reads a stream itself
    accelerator.__class__ = OneProcessAccelerator


def arguments_of_one_process(args: Any) -> Any:
    """A copy of ``TrainingArguments`` for the ranks of a model."""
    own = copy.copy(args)
    own.distributed_state = _OneProcess(args.distributed_state)
    return own
