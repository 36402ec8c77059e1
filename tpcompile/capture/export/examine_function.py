"""Looks at what a ``torch.autograd.Function`` does, forward and backward, before it becomes an operator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tpcompile.errors import CannotCapture
from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.torch_internals import (
    DisableTorchFunction,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tree_leaves,
    unset_fake_temporarily,
)

from .explain_failure import here

Run = Callable[[list[Tensor], list[int]], list[Tensor]]

# Elementwise, although torch does not tag them so; what has sizes in its arguments has nothing else there.
_ELEMENTWISE = {"detach", "alias", "clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "scalar_tensor"}
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like"}
_SIZED = {"view", "_unsafe_view", "new_zeros", "new_ones", "new_empty", "zeros", "ones", "empty"}
_PRIMES = (5, 7, 11, 13, 17, 19, 23)


def is_elementwise(run: Run, name: str, inputs: Sequence[Tensor]) -> bool:
    """Whether every element of a function's results, and of its gradients, follows from those at its place.

    It is run on tensors without values whose sizes are unknowns: what depends on a size shows.

    Args:
        run: the function.
        name: its name.
        inputs: the tensors that it is called with.

    Raises:
        CannotCapture: it does what ranks could not do alike: draws random numbers, writes into its
            operands, or uses a weight that it is not given.
    """
    clean = DisableTorchFunction()
    with clean, unset_fake_temporarily(), disable_proxy_modes_tracing():
        try:
            events = _record(run, name, inputs, [tuple(map(_hint, x.shape)) for x in inputs])
        except CannotCapture:
            raise
        except Exception as error:
            raise CannotCapture(
                f"the backward of {name} cannot be looked at: {error}",
                where=here(),
                todo="write it without branches on tensor values, and with torch's operators only",
            ) from error
        shapes = {tuple(map(_expression, x.shape)) for x in inputs if x.ndim}
        if len(shapes) != 1 or not all(_may_be_elementwise(func) for func, *_ in events):
            return False
        unknown = ShapeEnv()
        sizes = tuple(_unknown(unknown, i) for i in range(len(next(iter(shapes)))))
        try:
            events = _record(run, name, inputs, [sizes if x.ndim else () for x in inputs], unknown)
        except Exception:  # the user's own code may not run on unknown sizes, whatever the reason
            return False
    expected = {(), tuple(map(_expression, sizes))}
    return not unknown.guards and all(_keeps_places(event, expected) for event in events)


def _unknown(env: ShapeEnv, dim: int) -> Any:
    from tpcompile.ir.dynamo_internals import ConstantSource

    hint = _PRIMES[dim % len(_PRIMES)]
    symbol = env.create_symbol(hint, ConstantSource(f"size{dim}"), DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=hint)


def _record(
    run: Run, name: str, inputs: Sequence[Tensor], shapes: Sequence[Any], env: ShapeEnv | None = None
) -> list[tuple[Any, ...]]:
    """All operators of forward and backward: what they are, what they are given, what they give.

    With an ``env``, whatever can have a gradient has one: what is frozen now may be trained later.
    """
    mode = FakeTensorMode(shape_env=env or ShapeEnv(), allow_non_fake_inputs=True)
    recorder = _Recorder(name, mode)
    with torch.enable_grad(), mode:
        given = [
            torch.empty(shape, dtype=x.dtype, device=x.device).requires_grad_(
                x.requires_grad or (env is not None and has_fractions(x))
            )
            for shape, x in zip(shapes, inputs, strict=True)
        ]
        wanted = [x for x in given if x.requires_grad]
        before = [x._version for x in given]
        with recorder:
            made = run(given, [])
            flowing = [m for m in made if m.requires_grad]
            if flowing and wanted:
                seeds = [torch.empty_like(m) for m in flowing]
                torch.autograd.grad(flowing, wanted, seeds, allow_unused=True)
        if before != [x._version for x in given]:
            raise CannotCapture(
                f"the autograd function {name} writes into a tensor that it is given",
                where=here(),
                todo="let it make a new one",
            )
    return recorder.events


def refuse_dropout(function: type[Function], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a call of a function with a dropout, which its kernel may draw for itself.

    Raises:
        CannotCapture: its ``dropout_p`` is not 0.
    """
    names = list(inspect.signature(function.forward).parameters)
    names = names[function.setup_context is Function.setup_context :]  # without ctx
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if given.get("dropout_p"):
        raise CannotCapture(
            f"the autograd function {function.__qualname__} has a dropout_p: ranks would draw for themselves",
            where=here(),
            todo="call model.eval(), or set the dropout of attention to 0",
        )


class _Recorder(TorchDispatchMode):
    def __init__(self, name: str, mode: FakeTensorMode) -> None:
        super().__init__()
        self.name, self.mode = name, mode
        self.events: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotCapture(
                f"the autograd function {self.name} draws random numbers ({func}), another on every rank",
                where=here(),
                todo="draw them before, and give them to it",
            )
        for x in given:
            foreign = isinstance(x, FakeTensor) and x.fake_mode is not self.mode
            if foreign or isinstance(x, nn.Parameter):
                raise CannotCapture(
                    f"the autograd function {self.name} uses a tensor that it is not given ({func})",
                    where=here(),
                    todo="give weights and values as arguments of apply",
                )
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:  # a question
            self.events.append((func, given, tree_leaves(result)))
        return result


def _may_be_elementwise(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return torch.Tag.pointwise in func.tags or name in _ELEMENTWISE | _LIKE | _SIZED


def _keeps_places(event: tuple[Any, ...], expected: set[Any]) -> bool:
    func, given, made = event
    if not _may_be_elementwise(func):
        return False
    tensors = [x for x in (*given, *made) if isinstance(x, Tensor)]
    sized = func._schema.name.removeprefix("aten::") in _SIZED
    numbers = (
        () if sized else [x for x in given if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)]
    )
    return not numbers and all(tuple(map(_expression, x.shape)) in expected for x in tensors)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
