"""Calls that run python: one operator in captured graphs, whatever they do inside.

What they are is found by a key, for programs keep the call itself: its code, and what it was given besides
tensors.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import DispatchKey, FakeTensor, dispatch_key_is_excluded

from .explain_failure import here

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")
_CALLS: weakref.WeakValueDictionary[str, KeptCall] = weakref.WeakValueDictionary()

Note = Callable[[str, list[Any]], None]
"""Is told the key and the tensors of a call, where a run is only written down."""


@dataclass(eq=False)
class KeptCall:
    """A call of python; programs that make it keep it alive.

    Attributes:
        key: its name in captured graphs, the same on all ranks: what is called, then its constants.
        handle: its name in this process, because torch keeps compiled programs that name it.
    """

    key: str
    handle: str = field(default_factory=lambda: uuid.uuid4().hex, kw_only=True)

    def __post_init__(self) -> None:
        _CALLS[self.key] = _CALLS[self.handle] = self

    def run(self, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Makes the call; returns the tensors of its result."""
        raise NotImplementedError


def only_shapes(inputs: list[Tensor]) -> bool:
    """Whether torch asks a call for shapes from within an operator, where ``vmap`` does not work.

    It does so where it traces a program again: under autocast, and where operators are to be taken apart.
    """
    return isinstance(inputs[0], FakeTensor) and dispatch_key_is_excluded(DispatchKey.FuncTorchBatched)


def autograd_function(inputs: list[Tensor], sizes: list[int], key: str, elementwise: bool) -> list[Tensor]:
    """A call of python: forward and backward are its own.

    Raises:
        TpCompileError: the model that it belongs to is gone.
    """
    call = _CALLS.get(key)
    if call is None:
        raise TpCompileError(
            f"{key} is gone", where=here(), todo="keep the model whose graph this is, or shard it again"
        )
    return call.run(inputs, sizes)


_LIBRARY.define(
    "autograd_function(Tensor[] inputs, SymInt[] sizes, str key, bool elementwise) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Composite: export keeps it as one node; fake tensors, autograd and torch.compile run the python.
_LIBRARY.impl("autograd_function", autograd_function, "CompositeImplicitAutograd")
FUNCTION = torch.ops.tpcompile.autograd_function.default
