"""A python function of single elements, traced: what it reads from outside becomes arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tpcompile.errors import CannotCapture
from tpcompile.ir.torch_internals import (
    FakeTensorMode,
    TorchDispatchMode,
    disable_current_modes,
    tree_leaves,
)

from .explain_failure import here

aten = torch.ops.aten
_FRESH = (aten.lift_fresh.default, aten.lift_fresh_copy.default)


@dataclass(frozen=True)
class Lifted:
    """A traced function.

    Attributes:
        graph: takes the function's own arguments, then the tensors that it reads, then the numbers.
        tensors, numbers: how many it reads.
        text: its code with its constants, the same for functions that do the same with the same names.
    """

    graph: GraphModule
    tensors: int
    numbers: int
    text: str

    def take(self, tensors: Iterator[Tensor], numbers: Iterator[int]) -> tuple[Any, ...]:
        """What it reads, from the tensors and numbers of several functions."""
        return (
            *(next(tensors) for _ in range(self.tensors)),
            *(next(numbers) for _ in range(self.numbers)),
        )


@contextmanager
def alone(mode: FakeTensorMode) -> Iterator[None]:
    """Lets nobody who traces or records see what is done inside of the block; its tensors are of ``mode``."""
    with disable_current_modes(), mode:
        yield


def lift(
    function: Callable[..., Any], kinds: Sequence[torch.dtype], mode: FakeTensorMode, device: Any
) -> tuple[Lifted, list[Tensor], list[Any]]:
    """A function of single elements as a graph, with the tensors and the open sizes that it reads.

    Args:
        function: takes tensors without dimensions; those that index others do so as ``vmap`` would have it.
        kinds: the types of its arguments.
        mode: that of the tensors that it reads.
        device: that of its arguments.

    Raises:
        CannotCapture: it reads a number that depends on open sizes and is no integer, draws random numbers,
            or writes.
    """
    from tpcompile.ir.dynamo_internals import TransformGetItemToIndex

    with torch.no_grad(), alone(mode), TransformGetItemToIndex():
        own = [torch.zeros((), dtype=kind, device=device) for kind in kinds]
        with _Reads(own) as reads:
            function(*own)

        def call(*args: Any) -> Any:
            return function(*args[: len(own)])

        graph = make_fx(call)(*own, *reads.tensors, *reads.numbers)
    for node in graph.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        # As python says it, which torch gives a gradient of its own wherever it runs such functions.
        node.target, node.args = operator.getitem, (node.args[0], tuple(node.args[1]))
    graph.recompile()
    held = {name: value.tolist() for name, value in vars(graph).items() if isinstance(value, Tensor)} | {
        name: value.tolist() for name, value in graph.named_buffers()
    }
    text = f"{graph.code.strip()} {held or ''}"
    return Lifted(graph, len(reads.tensors), len(reads.numbers), text), reads.tensors, reads.numbers


class _Reads(TorchDispatchMode):
    """Finds the tensors and open sizes that calls are given and that no call has made.

    Attributes:
        tensors, numbers: those.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.numbers: list[Any] = []
        self._known = {id(x): x for x in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
            raise CannotCapture(
                f"a function of flex_attention draws random numbers, or writes into a tensor ({func})",
                where=here(),
                todo="draw them before, and compute new tensors",
            )
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, torch.SymFloat | torch.SymBool):
                raise CannotCapture(
                    "a function of flex_attention reads a number that depends on open sizes",
                    where=here(),
                    todo="give it a tensor, or capture with dynamic=False",
                )
            if isinstance(x, torch.SymInt) and all(x.node.expr != n.node.expr for n in self.numbers):
                self.numbers.append(x)
            elif isinstance(x, Tensor) and id(x) not in self._known and func not in _FRESH:
                self._known[id(x)] = x
                self.tensors.append(x)
        made = func(*args, **(kwargs or {}))
        self._known.update((id(x), x) for x in tree_leaves(made) if isinstance(x, Tensor))
        return made
