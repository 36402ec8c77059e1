"""``torch.autograd.Function.apply``: torch's own, and another one in its place while something is traced.

A model may call it under a name of its own (``act = Act.apply``). Up to torch 2.13 it is a python function,
whose code is exchanged, whoever kept it. Since then it is C: a name is found out when it makes its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any
from unittest.mock import patch

from torch.autograd import Function

from tpcompile.errors import CannotCapture

from .explain_failure import here

_NATIVE: Any = Function.__dict__["apply"]
_HOOKED: Any = getattr(_NATIVE, "__func__", None)  # None where it is C
_NODE = "_backward_cls"
_INSTEAD: list[Callable[..., Any]] = []
_RUNNING: list[type[Function]] = []


def _native_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    _RUNNING.append(cls)
    try:
        return _NATIVE.__get__(None, cls)(*args, **kwargs)
    finally:
        _RUNNING.pop()


own_apply: Callable[..., Any] = _native_apply
"""torch's own ``Function.apply``, given the class, whatever that name runs while something is traced."""
if _HOOKED is not None:
    own_apply = FunctionType(
        _HOOKED.__code__, _HOOKED.__globals__, "apply", _HOOKED.__defaults__, _HOOKED.__closure__
    )


@contextmanager
def instead_of_apply(apply: Callable[..., Any]) -> Iterator[None]:
    """Runs another function for ``Function.apply``, also where somebody has kept it: ``f = F.apply``.

    Raises:
        CannotCapture: (inside of the block) somebody has kept what is C.
    """
    _INSTEAD.append(apply)
    with ExitStack() as stack:
        stack.callback(_INSTEAD.pop)
        if _HOOKED is None:
            made: dict[type[Function], Any] = {}  # of classes that are defined inside of the block
            stack.callback(_give_nodes, made)
            stack.enter_context(patch.object(Function, "apply", classmethod(_run_instead)))
            node = property(partial(_node_of, made), made.__setitem__)
            stack.enter_context(patch.object(type(Function), _NODE, node, create=True))
        else:
            stack.callback(setattr, _HOOKED, "__code__", _HOOKED.__code__)
            _HOOKED.__code__ = _code()
        yield


def _give_nodes(made: Mapping[type[Function], Any]) -> None:
    for cls, node in made.items():
        setattr(cls, _NODE, node)


def _run_instead(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _INSTEAD[-1](cls, *args, **kwargs)


def _node_of(made: Mapping[type[Function], Any], cls: type[Function]) -> Any:
    """What C asks a class for, to make the node of its backward."""
    if not _RUNNING:
        raise CannotCapture(
            f"{cls.__qualname__}.apply was kept under another name, which hides its backward from a trace",
            where=here(),
            todo=f"call {cls.__qualname__}.apply(...) where it is used",
        )
    return made[cls] if cls in made else next(c.__dict__[_NODE] for c in cls.__mro__ if _NODE in c.__dict__)


def _code() -> Any:
    __class__ = None

    def code(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        __class__  # noqa: B018  # torch's code has this variable of an outer scope, so ours must
        from tpcompile.capture.export.function_apply import _INSTEAD

        return _INSTEAD[-1](cls, *args, **kwargs)

    return code.__code__
