"""Modules of custom strategies as they run on one rank: the user's functions on local tensors."""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import every_name, lent
from tpcompile.strategies.custom.custom_strategy import CustomStrategy

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")
_LOCAL: weakref.WeakValueDictionary[str, LocalModule] = weakref.WeakValueDictionary()

Whole = tuple[tuple[Any, ...], torch.Size, tuple[int, ...]]
"""Placements, shape and strides of the DTensor that a local weight is a part of."""


@dataclass(eq=False)
class LocalModule:
    """One kind of module of a custom strategy, as it runs on this rank; repeated layers share it.

    Attributes:
        module: a module like all of its kind but for the weights.
        strategy: the user's strategy.
        mesh: the mesh of one dimension.
        weights: per weight, the DTensor that the strategy makes of it, or None for a plain tensor.
        handle: the name under which the operator finds it: of this process alone, because torch keeps
            compiled programs that name it.
    """

    module: nn.Module
    strategy: CustomStrategy
    mesh: DeviceMesh
    weights: tuple[Whole | None, ...]
    handle: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        # Later it is a guarded class, whose forward is for calls from outside of a program.
        self.kind = type(self.module)
        _LOCAL[self.handle] = self

    def run(self, inputs: list[Tensor], weights: list[Tensor], sizes: list[int]) -> Tensor:
        """The module between the strategy's two functions.

        Raises:
            TpCompileError: the result does not have the local sizes that follow from the declared layout
                (-1: any).
        """
        given = [self._as_dtensor(w, whole) for w, whole in zip(weights, self.weights, strict=True)]
        names = (name for name, _ in every_name(self.module))
        with lent(self.module, dict(zip(names, given, strict=True))):
            args = self.strategy.before(self.module, tuple(inputs), self.mesh)
            result = self.strategy.after(self.module, self.kind.forward(self.module, *args), self.mesh)
        got = list(result.shape)
        if len(got) != len(sizes) or any(n not in (-1, m) for m, n in zip(got, sizes, strict=True)):
            raise self.strategy.error(
                f"the result has the local shape {got}, where output_layouts {self.strategy.output} "
                f"means {['any' if n == -1 else n for n in sizes]}",
                "declare the output_layouts that _prepare_output_fn returns",
            )
        return result

    def _as_dtensor(self, weight: Tensor, whole: Whole | None) -> Tensor:
        if whole is None:
            return weight
        placements, shape, stride = whole
        made: Tensor = DTensor.from_local(
            weight, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made


def local_module(inputs: list[Tensor], weights: list[Tensor], handle: str, sizes: list[int]) -> Tensor:
    """A custom strategy's module on local tensors; autograd goes through the user's functions.

    Raises:
        TpCompileError: the model that the module belongs to is gone.
    """
    found = _LOCAL.get(handle)
    if found is None:
        raise TpCompileError(
            "a custom strategy's module is gone",
            where="custom strategy",
            todo="keep the model whose graph this is, or shard it again",
        )
    result = found.run(inputs, weights, sizes)
    # A fresh tensor: the operator's result may be none of its operands.
    return result.clone() if any(result is x for x in (*inputs, *weights)) else result


_LIBRARY.define(
    "local_module(Tensor[] inputs, Tensor[] weights, str handle, int[] sizes) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Composite, as the collectives: eager autograd and torch.compile see through it.
_LIBRARY.impl("local_module", local_module, "CompositeImplicitAutograd")
