"""Takes down what runs: the operators with their work and dependencies, and how much memory is alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpcompile.ir.markers import Axes
from tpcompile.ir.torch_internals import current_autograd_node, tree_leaves
from tpcompile.lowering.join_gradients import sends_joined

from .live_bytes import LiveBytes
from .operations import arithmetic, extent, is_fused, traffic

Label = tuple[str, object]
"""Forward, backward or update, and which part of it: a period of repeated layers, or what is around them."""

_SENDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


class Transfer(NamedTuple):
    """A collective: its kind, the bytes of the whole value, how many ranks take part, over which sub-axes.

    ``joined``: it is one message for weights of all layers, which is the larger the more there are.
    """

    kind: str
    bytes: int
    ranks: int
    joined: bool = False
    axes: Axes = ()
    axis_sizes: Axes = ()


@dataclass(frozen=True)
class Operation:
    """An operator that was run.

    Attributes:
        label: where in the program.
        operations: arithmetic.
        traffic: bytes that it reads and writes.
        dtype: the type that it computes in.
        fused: whether a compiler would fuse it with others.
        after: the events whose results it reads.
        sent: what it sends, for a collective.
    """

    label: Label
    operations: float
    traffic: float
    dtype: torch.dtype
    fused: bool
    after: tuple[int, ...]
    sent: Transfer | None = None


class Moment(NamedTuple):
    """What is alive when most is: bytes that the program has made, and of these the gradients of weights."""

    live: int
    gradients: int


class Recorder(LiveBytes):
    """Records a run on tensors without values.

    Args:
        where: says in which part of the program an operator is that is run now.
        axis_sizes: the sizes of the sub-axes, by which groups of ranks are named.

    Attributes:
        events: what was run, in order.
        peaks: per part of the program, the moment when most was alive.
        gradients: bytes of gradients that weights have by now.
    """

    def __init__(self, where: Callable[[], Label], axis_sizes: Sequence[int]) -> None:
        super().__init__()
        self.events: list[Operation] = []
        self.peaks: dict[Label, Moment] = {}
        self.gradients = 0
        self._where, self._axes = where, axis_sizes
        self._writers: dict[int, int] = {}
        self._turn: tuple[Label, int] = (("", None), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it really does; the version without values would make a copy
        label = self._where()
        before = self._moment(label)
        result = func(*args, **(kwargs or {}))
        returned = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        made = [self.hold(x) for x in returned]
        if any(made) or func._schema.is_mutable:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self._note(label, func, args, given, returned, result)
        self.peaks[label] = max(before, self._moment(label))
        return result

    def forget(self, first: int) -> None:
        """Forgets the events from the one with this number on: what they wrote was there before."""
        del self.events[first:]
        self._writers = {key: number for key, number in self._writers.items() if number < first}

    def _moment(self, label: Label) -> Moment:
        return max(self.peaks.get(label, Moment(0, 0)), Moment(self.live, self.gradients))

    def _note(
        self, label: Label, func: Any, args: Any, given: list[Tensor], returned: list[Tensor], result: Any
    ) -> None:
        keys = [x.untyped_storage()._cdata for x in given]
        after = self._after(label, {self._writers[k] for k in keys if k in self._writers})
        one = (returned or given)[0].dtype
        sent = self._sent(func, args, given, returned) if func.namespace == "_c10d_functional" else None
        # What a collective reads and writes is in its links' rate.
        moved = 0.0 if sent is not None else traffic(func, given, returned)
        work = arithmetic(func, args, result)
        fused = is_fused(func)
        self.events.append(Operation(label, work, moved, one, fused, after, sent))
        written = returned if not func._schema.is_mutable else [*returned, given[0]]
        for value in written:
            self._writers[value.untyped_storage()._cdata] = len(self.events) - 1

    def _after(self, label: Label, written: set[int]) -> tuple[int, ...]:
        """The events behind which one comes: those that have written what it reads.

        What is run again in backward could come at any time, by what it reads: it waits for its turn, the end
        of the operators before its part of the program.
        """
        if self.events and label != self._turn[0]:
            computed = (n for n in reversed(range(len(self.events))) if self.events[n].sent is None)
            self._turn = label, next(computed, 0)
        if label[0] == "backward" and not any(self.events[n].label[0] == "backward" for n in written):
            written = {*written, self._turn[1]}
        return tuple(sorted(written))

    def _sent(self, func: Any, args: Any, given: list[Tensor], returned: list[Tensor]) -> Transfer | None:
        kind = _SENDS.get(func._opname)
        if kind is None:
            return None
        axes = tuple(int(axis) for axis in str(args[-1]).split(","))
        ranks = math.prod(self._axes[axis] for axis in axes)
        size = extent(returned[0]) if kind == "all_gather" else extent(given[0])
        whole = size * ranks if kind == "all_to_all" else size
        joined = sends_joined(current_autograd_node())
        return Transfer(kind, whole, ranks, joined, axes, tuple(self._axes))

    def _release(self, key: int, size: int) -> None:
        super()._release(key, size)
        self._writers.pop(key, None)
