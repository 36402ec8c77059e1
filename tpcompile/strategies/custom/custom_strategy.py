"""A user's strategy as the compiler sees it: looked up, checked, and called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.placements import Partial, Placement, R, Replicate, Shard
from tpcompile.strategies.parallel_interface import STRATEGIES
from tpcompile.strategies.strategy import Strategy

from .tensor_parallel_layer import METHODS, TensorParallelLayer


@dataclass(frozen=True)
class CustomStrategy:
    """A user's strategy.

    Attributes:
        name: the name in the plan.
        layer: the user's object.
        input: how the first input is placed; a shard's dimension may be negative.
        output: how the result is placed, likewise.
    """

    name: str
    layer: Any
    input: Placement
    output: Placement

    def partition(self, param: Tensor, param_type: str, rank: int, mesh: DeviceMesh) -> Tensor:
        """The user's part of a parameter, of the type of the whole one.

        Raises:
            TpCompileError: it fails, or gives something else.
        """
        empty = torch.empty(param.shape, dtype=param.dtype, device="meta")
        where = f"custom strategy {self.name!r}"
        with refusing("partition_tensor failed", where=where, todo="correct the strategy"):
            part = self.layer.partition_tensor(param, empty, param_type, param.dtype, True, rank, mesh)
        if not isinstance(part, Tensor):
            raise self.error(f"partition_tensor returned a {type(part).__name__}", "return this rank's part")
        if part.dtype != param.dtype:
            raise self.error(
                f"partition_tensor returned {part.dtype} for a {param_type} of {param.dtype}",
                "cast the part to param_casting_dtype",
            )
        return part.detach()

    def before(self, mod: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        """What the module's forward gets."""
        layouts = self.layer.input_layouts, getattr(self.layer, "desired_input_layouts", None)
        given = _method(self.layer, "_prepare_input_fn")(*layouts, mod, inputs, mesh)
        if given is None:
            return inputs
        return given if isinstance(given, tuple) else (given,)

    def after(self, mod: nn.Module, outputs: Any, mesh: DeviceMesh) -> Tensor:
        """The module's local result, in the declared placement.

        Raises:
            TpCompileError: it is not a tensor.
        """
        layouts = self.layer.output_layouts, getattr(self.layer, "use_local_output", True)
        result = _method(self.layer, "_prepare_output_fn")(*layouts, mod, outputs, mesh)
        result = outputs if result is None else result
        if isinstance(result, DTensor):
            wanted = _to_torch(self.output)
            if wanted is not None and tuple(result.placements) != (wanted,):
                result = result.redistribute(placements=(wanted,))
            result = result.to_local()
        if not isinstance(result, Tensor):
            raise self.error(
                f"the module's result is a {type(result).__name__}", "wrap modules with one result"
            )
        return result

    def error(self, what: str, todo: str) -> TpCompileError:
        """An error about this strategy."""
        return TpCompileError(what, where=f"custom strategy {self.name!r}", todo=todo)


def split_plan(plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A plan's pins and its custom strategies, each by glob."""
    custom = {glob: name for glob, name in plan.items() if is_custom(name)}
    return {glob: pin for glob, pin in plan.items() if glob not in custom}, custom


def is_custom(name: Any) -> bool:
    """Whether a name in a plan is that of a user's own strategy."""
    return isinstance(name, str) and name in STRATEGIES and not isinstance(STRATEGIES[name], Strategy)


def resolve(name: str) -> CustomStrategy:
    """The custom strategy of a name.

    Raises:
        TpCompileError: it lacks a method or a layout, or cannot be made without arguments.
    """
    given = STRATEGIES[name]
    where = f"custom strategy {name!r}"
    if isinstance(given, type):
        todo = "give its arguments defaults, or register an instance"
        with refusing(f"{given.__name__}() failed", where=where, todo=todo):
            layer = given()
    else:
        layer = given
    missing = [m for m in METHODS if not _implements(layer, m)]
    if missing:
        raise TpCompileError(
            f"{type(layer).__name__} does not implement {', '.join(missing)}",
            where=where,
            todo="inherit from tpcompile.TensorParallelLayer and implement its three methods",
        )
    placed = [_placement(layer, attribute, where) for attribute in ("input_layouts", "output_layouts")]
    return CustomStrategy(name, layer, *placed)


def _implements(layer: Any, method: str) -> bool:
    own = inspect.getattr_static(type(layer), method, None)
    return own is not None and own is not inspect.getattr_static(TensorParallelLayer, method)


def _method(layer: Any, name: str) -> Callable[..., Any]:
    """A method without ``self``, whether it was written static, for instances, or as a bare function."""
    raw = inspect.getattr_static(type(layer), name)
    if inspect.isfunction(raw) and len(inspect.signature(raw).parameters) == 5:
        return raw
    found: Callable[..., Any] = getattr(layer, name)
    return found


def _placement(layer: Any, attribute: str, where: str) -> Placement:
    """The only placement of a layout, as ours."""
    layouts = getattr(layer, attribute, None)
    only = layouts[0] if isinstance(layouts, list | tuple) and len(layouts) == 1 else layouts
    if isinstance(only, Replicate | Shard | Partial):
        return only
    if isinstance(only, dtensor.Replicate):
        return R
    if type(only) is dtensor.Shard:
        return Shard(only.dim)
    if isinstance(only, dtensor.Partial) and only.reduce_op == "sum":
        return Partial()
    raise TpCompileError(
        f"{attribute} is {layouts!r}",
        where=where,
        todo="set it to a tuple of one placement: Shard(dim), Replicate() or Partial()",
    )


def _to_torch(placement: Placement) -> dtensor.Placement | None:
    """DTensor's placement, if it has one."""
    if isinstance(placement, Shard):
        return dtensor.Shard(placement.dim) if placement.factor == 0 else None
    return dtensor.Partial(placement.op) if isinstance(placement, Partial) else dtensor.Replicate()
