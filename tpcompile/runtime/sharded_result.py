"""A program's result that stays sharded until somebody uses it, such as the logits beside a loss.

Whoever uses it has the whole tensor: every operation takes the gathered one, with its gradient, and gives
plain tensors. All ranks gather it together, once; its shape, its type and its text are known without that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.hooks import RemovableHandle

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import ancestors, is_number
from tpcompile.ir.torch_internals import (
    DisableTorchFunctionSubclass,
    resolve_process_group,
    tree_leaves,
    tree_map,
)
from tpcompile.lowering.collective_moves import own_slice
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.lost_ranks import telling
from tpcompile.ranks.turns import own_turn

all_gather = torch.ops.tpcompile.all_gather.default


@dataclass(frozen=True)
class Gathers:
    """How a result is put together: one gather after the other.

    Attributes:
        steps: the arguments of each: group, dimension, sizes on its ranks, and which of them this one is.
        turn: the name of the group over which only one thread may be in a call.
    """

    steps: tuple[tuple[str, int, tuple[int, ...], int], ...]
    turn: str = ""

    def shape(self, part: torch.Size) -> list[int]:
        """The shape of the whole."""
        found = list(part)
        for _, dim, sizes, _ in self.steps:
            found[dim] = sum(sizes)
        return found

    def gather(self, part: Tensor, what: str) -> Tensor:
        """The whole tensor; every rank must ask for it.

        Raises:
            RanksApart: one asks for another result, runs a program, or does not come.
        """
        for group, dim, sizes, index in self.steps:
            ranks = resolve_process_group(group)  # type: ignore[arg-type]
            exchange(ranks, what, None)
            with telling(ranks, what):
                part = all_gather(part, group, dim, list(sizes), index)
        return part

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        for _, dim, sizes, index in reversed(self.steps):
            whole = own_slice(whole, dim, list(sizes), index)
        return whole


class ShardedResult(Tensor):
    """A result of which this rank holds a part.

    Attributes:
        part: this rank's part, through which gradients flow.
        gathers: how the whole is put together.
        asked: what ranks are to do that gather it, equal on all of them.
    """

    GRADIENT_AT_PART: ClassVar = True  # what tells autograd's functions that ask for it of the result

    part: Tensor
    gathers: Gathers
    asked: str
    _whole: Tensor | None

    @staticmethod
    def of(part: Tensor, gathers: Gathers, asked: str) -> ShardedResult:
        """The result of which this is a part; see the attributes."""
        made: ShardedResult = _Whole.apply(part, gathers)
        made.part, made.gathers, made.asked, made._whole = part, gathers, asked, None
        return made

    def _like(self, part: Tensor) -> ShardedResult:
        """What follows from this result, or its gradient."""
        return ShardedResult.of(part, self.gathers, f"{self.asked} or what follows from it")

    def whole(self) -> Tensor:
        """The whole tensor; all ranks gather it together when it is first asked for.

        Raises:
            TpCompileError: another thread is in a call of the model.
        """
        if self._whole is None:
            # Whoever asks first may not want a gradient, but somebody else may, of what is the same tensor.
            with own_turn(self.gathers.turn), torch.inference_mode(False), torch.enable_grad():
                self._whole = self.gathers.gather(self.part, self.asked)
        return self._whole

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor; who trains in mixed precision casts all results."""
        if args or kwargs or self._whole is not None:
            return self.whole().float(*args, **kwargs)
        return self if self.dtype == torch.float32 else self._like(self.part.float())

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The gradient, if ``retain_grad`` was called."""
        grad = self.part.grad if self.part.retains_grad else None
        return None if grad is None else self._like(grad)

    def retain_grad(self) -> None:
        """As of any tensor."""
        self.part.retain_grad()

    def register_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        """As of any tensor, but that the hook may not give another gradient.

        Raises:
            TpCompileError: it does, in backward.
        """

        def run(grad: Tensor) -> None:
            given = self._like(grad)
            new = hook(given)
            if new is not None and new is not given:
                _refuse(
                    "a hook changes the gradient of a sharded result", "compute the loss from a clone() of it"
                )

        return self.part.register_hook(run)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        sizes = "x".join(map(str, self.shape))
        return f"ShardedResult({sizes}, {self.dtype}, a part of {'x'.join(map(str, self.part.shape))} here)"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes with the whole tensor; what it looks like is known without it.

        Raises:
            TpCompileError: ``autograd.grad``, or ``backward(inputs=...)``, is asked for its gradient.
        """
        kwargs = dict(kwargs or {})
        if func in _KNOWN:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DIFFERENTIATE and _holds(kwargs.get("inputs", args[1] if len(args) > 1 else ())):
            _refuse(
                "autograd is asked for the gradient of a sharded result",
                "call retain_grad() on it, then backward() without inputs",
            )
        whole = tree_map(_whole_of, (tuple(args), kwargs))
        return func(*whole[0], **whole[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What comes here past python, such as operands of a collective."""
        whole = tree_map(lambda a: _whole_of(a).detach() if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*whole[0], **whole[1])


class _Whole(torch.autograd.Function):
    """From a part to the result, for gradients of what is computed past ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, gathers: Gathers) -> Tensor:
        ctx.gathers = gathers
        return Tensor._make_wrapper_subclass(
            ShardedResult, gathers.shape(part.shape), dtype=part.dtype, device=part.device
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gathers.cut(_whole_of(grad)), None


def _whole_of(value: Any) -> Any:
    return value.whole() if isinstance(value, ShardedResult) else value


def _holds(values: Any) -> bool:
    return any(isinstance(v, ShardedResult) for v in tree_leaves(values))


def _refuse(what: str, todo: str) -> NoReturn:
    raise TpCompileError(what, where="a result that is gathered when it is used", todo=todo)


_METHODS = [
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "element_size",
    "get_device",
    "__len__",
]
_CHECKS = ["is_floating_point", "is_complex", "is_contiguous", "__hash__"]
_PROPERTIES = [
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "requires_grad",
    "grad_fn",
    "is_leaf",
    "itemsize",
]
_KINDS = ["nbytes", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta"]
_KNOWN = {
    *(getattr(Tensor, name) for name in (*_METHODS, *_CHECKS)),
    *(getattr(Tensor, name).__get__ for name in (*_PROPERTIES, *_KINDS)),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
"""What is the same of a result as long as it is not gathered."""
_DIFFERENTIATE = (torch.autograd.grad, torch.autograd.backward)


def defer_gathers(
    program: GraphModule, specs: Sequence[OutputSpec], turn: str = ""
) -> tuple[GraphModule, dict[int, Gathers]]:
    """A rank's program without the gathers of results that a loss is computed from, and these gathers.

    Args:
        program: the lowered program; it stays as it is.
        specs: its outputs.
        turn: see ``Gathers``.
    """
    results: list[Any] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    found: dict[int, Gathers] = {}
    above = ancestors(out for out, spec in zip(results, specs, strict=True) if _is_loss(out, spec))
    for at, spec in enumerate(specs):
        if spec.kind == "user" and not spec.divided and isinstance(results[at], Node):
            value, steps = _source(results[at])
            if steps and value in above:
                results[at], found[at] = value, Gathers(tuple(steps), turn)
    if not found:
        return program, found
    graph, moved = Graph(program), dict[Node, Node]()  # of the program, whose modules it may call
    graph.graph_copy(program.graph, moved)
    graph.output(map_arg(tuple(results), moved.__getitem__))
    graph.eliminate_dead_code()
    return GraphModule(program, graph, "LocalProgram"), found


def _is_loss(value: Any, spec: OutputSpec) -> bool:
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(tensor, Tensor) and is_number(tensor) and spec.kind == "user" and not spec.divided


def _source(value: Node) -> tuple[Node, list[tuple[str, int, tuple[int, ...], int]]]:
    """What a result is gathered from, and how; the gathers serve nothing else."""
    steps: list[tuple[str, int, tuple[int, ...], int]] = []
    while value.target is all_gather and all(u.op == "output" or u.target is all_gather for u in value.users):
        part, group, dim, sizes, index = value.args
        steps.insert(0, (group, dim, tuple(sizes), index))  # type: ignore[arg-type]
        value = part  # type: ignore[assignment]
    return value, steps
