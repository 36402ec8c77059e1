"""Keeps the backward of every ``torch.autograd.Function``: a call of one is one operator in the graph.

What is traced of such a function is its forward, and autograd's gradient of that is not the user's. The
operator runs the function itself, on whole tensors, or on a rank's parts where it is shown that both of its
directions treat elements one by one (``examine_function``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointFunction

from tpcompile.errors import CannotCapture
from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.torch_internals import TreeSpec, tree_flatten, tree_unflatten

from .checkpoint_calls import CheckpointCalls, ContextFn
from .examine_function import is_elementwise, refuse_dropout
from .explain_failure import here
from .flex_attention import kept_attention
from .function_apply import instead_of_apply, own_apply
from .kept_calls import FUNCTION, KeptCall, Note

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_TENSOR, _SIZE = object(), object()


@dataclass(eq=False)
class FunctionCall(KeptCall):
    """A function with the constants of its calls.

    Attributes:
        function: the user's class.
        leaves: the arguments of ``apply``, flat: constants, and marks where tensors and open sizes stand.
        spec: their structure.
        autocast: device and type of the autocast mode in which it is called.
        result: structure and leaves of what the last call returned, marks where tensors stand.
    """

    function: type[Function]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    autocast: tuple[str, torch.dtype] | None
    result: tuple[TreeSpec, list[Any]] | None = None

    def run(self, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Calls the function; returns the tensors of its result."""
        tensors, numbers = iter(inputs), iter(sizes)
        filled = [
            next(tensors) if leaf is _TENSOR else next(numbers) if leaf is _SIZE else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(filled, self.spec)
        with nullcontext() if self.autocast is None else torch.autocast(*self.autocast):
            leaves, spec = tree_flatten(own_apply(self.function, *args, **kwargs))
        self.result = spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [m.clone() if any(m is x for x in inputs) else m for m in made]

    def rebuild(self, made: list[Tensor]) -> Any:
        """The function's result, of its tensors."""
        assert self.result is not None
        spec, leaves = self.result
        tensors = iter(made)
        return tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in leaves], spec)


@dataclass(frozen=True)
class Kept:
    """What of a trace is more than its operators.

    Attributes:
        functions: the calls of python, by their key.
        regions: what was checkpointed, see ``CheckpointCalls``.
    """

    functions: dict[str, KeptCall]
    regions: dict[str, ContextFn | None]


@contextmanager
def kept_functions(note: Note | None = None) -> Iterator[Kept]:
    """Lets functions appear as operators in what is traced inside the block.

    Args:
        note: is told the key and the arguments of every call, where a run is only written down.

    Yields:
        What was called.
    """
    found: dict[str, KeptCall] = {}
    checkpoints = CheckpointCalls()

    def apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
        if note is None and (get_proxy_mode() is None or not torch.is_grad_enabled()):
            return own_apply(function, *args, **kwargs)
        if function is CheckpointFunction:
            return checkpoints.reentrant(*args)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(map(_can_learn, tensors)):
            result = own_apply(function, *args, **kwargs)
            if not any(map(_can_learn, tree_flatten(result)[0])):  # there is no gradient to keep
                return result
        refuse_dropout(function, args, kwargs)
        call = _find(found, function, leaves, spec, tensors)
        if note is not None:
            note(call.key, tensors)
            return own_apply(function, *args, **kwargs)
        sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
        elementwise = not sizes and is_elementwise(call.run, call.function.__qualname__, tensors)
        return call.rebuild(FUNCTION(tensors, sizes, call.key, elementwise))

    with instead_of_apply(apply), checkpoints.watching(), kept_attention(found, note):
        yield Kept(found, checkpoints.found)


def _can_learn(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and has_fractions(leaf)


def _find(
    found: dict[str, KeptCall],
    function: type[Function],
    leaves: list[Any],
    spec: TreeSpec,
    tensors: list[Tensor],
) -> FunctionCall:
    """The function with these constants, new or as it was called before."""
    marked = tuple(
        _TENSOR if isinstance(leaf, Tensor) else _SIZE if isinstance(leaf, torch.SymInt) else leaf
        for leaf in leaves
    )
    name = f"{function.__module__}.{function.__qualname__}"
    if any(isinstance(leaf, torch.SymFloat | torch.SymBool) for leaf in marked):
        raise CannotCapture(
            f"{name} is given a number that depends on open sizes",
            where=here(),
            todo="give it a tensor, or capture with dynamic=False",
        )
    device = next((t.device.type for t in tensors), "cpu")
    autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    text = ", ".join(repr(leaf) for leaf in marked if isinstance(leaf, _PLAIN))
    for number in itertools.count():
        key = f"{name}({text})#{number}"
        call = found.get(key)
        if call is None:
            call = found[key] = FunctionCall(key, function, marked, spec, autocast)
        assert isinstance(call, FunctionCall)
        same = (call.function, call.spec, call.autocast) == (function, spec, autocast)
        if same and all(map(_equal, call.leaves, marked)):
            return call
    raise AssertionError("unreachable")


def _equal(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)
