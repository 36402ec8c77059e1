"""A module of a custom strategy as one operator of the captured graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import every_name, lent, named_tensor
from tpcompile.ir.placements import Placement, Shard
from tpcompile.ir.torch_internals import TorchDispatchMode

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")
# The modules whose calls are captured now, by key; only those who run the graph at global shapes look here.
_CAPTURED: dict[str, nn.Module] = {}


@dataclass(frozen=True)
class Wrapped:
    """A module of a custom strategy, for the time of a capture.

    It stands for the module's forward. All its fields are plain: they, and not what a
    strategy does, are what the captured graph depends on.

    Attributes:
        module: the module.
        key: names its strategy, and equal modules alike.
        path: its name in the model.
        weights: its parameters and buffers by name.
        whole: numbers of the weights that all ranks hold as they are.
        input: how the first input is placed.
        output: how the result is placed.
        summed: whether ranks have summands of the gradients of what is whole.
    """

    module: nn.Module
    key: str
    path: str
    weights: tuple[str, ...]
    whole: tuple[int, ...]
    input: Placement
    output: Placement
    summed: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The operator that stands for the module."""
        if torch.is_autocast_enabled(args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"):
            raise TpCompileError(
                "a custom strategy's module cannot be captured under autocast",
                where=self.path,
                todo="cast the model instead",
            )
        if kwargs or not args or not all(isinstance(a, Tensor) for a in args):
            raise TpCompileError(
                "a custom strategy's module must be called with tensors by position, and nothing else",
                where=self.path,
                todo="name the module's linear layers in the plan instead",
            )
        for module in self.module.modules():  # an equal one may run instead of it: noted is what this one is
            for name in list(vars(module)):
                getattr(module, name)
        weights = [named_tensor(self.module, name) for name in self.weights]
        lie = str(self.input), str(self.output)
        call = torch.ops.tpcompile.opaque_module
        result: Tensor = call(list(args), weights, self.key, *lie, self._summed(args))
        return result

    def _summed(self, args: Sequence[Tensor]) -> list[int]:
        """The operands whose gradients the compiler must add up: the whole ones."""
        if not self.summed:
            return []
        first = 1 if isinstance(self.input, Shard) else 0
        return [*range(first, len(args)), *(len(args) + i for i in self.whole)]


def opaque_module(
    inputs: list[Tensor],
    weights: list[Tensor],
    key: str,
    input_lies: str,
    output_lies: str,
    summed: list[int],
) -> Tensor:
    """The module as it was before it was divided: the meaning of the operator at global shapes.

    Raises:
        TpCompileError: the module is not being captured, does not return one tensor, or changes its buffers.
    """
    module = _CAPTURED.get(key)
    if module is None:
        raise TpCompileError(
            f"the module of {key!r} is not being captured", where="custom strategy", todo="report this"
        )
    names = [name for name, _ in every_name(module)]
    versions = [w._version for w in weights]
    with lent(module, dict(zip(names, weights, strict=True))), _NoRandomness(key):
        result = type(module).forward(module, *inputs)
    if not isinstance(result, Tensor):
        raise TpCompileError(
            f"the module's result is a {type(result).__name__}",
            where=key,
            todo="name modules with one tensor as their result in the plan",
        )
    if versions != [w._version for w in weights]:
        raise TpCompileError("the module changes its own buffers", where=key, todo="keep it out of the plan")
    return result.clone() if any(result is x for x in inputs) else result


_LIBRARY.define(
    "opaque_module(Tensor[] inputs, Tensor[] weights, str key, str input_lies, str output_lies, int[] summed)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Composite: export keeps it as one node, fake tensors run the module, and gradients come by themselves.
_LIBRARY.impl("opaque_module", opaque_module, "CompositeImplicitAutograd")


class _NoRandomness(TorchDispatchMode):
    """Refuses random numbers: inside of an opaque module nobody could tell which ranks must draw alike."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TpCompileError(
                f"a module of a custom strategy draws random numbers ({func})",
                where=self.key,
                todo="call model.eval(), or set its dropout probabilities to 0",
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def captured_as_operators(wrapped: Sequence[Wrapped]) -> Iterator[None]:
    """Lets modules appear as operators in what is captured inside the block."""
    try:
        for each in wrapped:
            _CAPTURED.setdefault(each.key, each.module)
            each.module.__dict__["forward"] = each
        yield
    finally:
        for each in wrapped:
            each.module.__dict__.pop("forward", None)
            _CAPTURED.pop(each.key, None)
