"""Checks of arguments: what a signature says of a call's arguments holds, or the call is refused.

The annotations are the specification. ``Must`` adds to a type what the type does not say:

    def plan(model: nn.Module, ranks: Annotated[int, Must("a positive whole number", lambda n: n > 0)]): ...
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from tpcompile.errors import TpCompileError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Must:
    """What a value must be beyond its type.

    Attributes:
        be: as text, with its article.
        holds: whether a value of the type is so.
    """

    be: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Must("a positive number", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Must("a number that is not negative", lambda x: 0 <= x < math.inf)]

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 80

_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
    Mapping: "a mapping",
    Sequence: "a list or tuple",
    Callable: "a function",
    type: "a class",
}


def checked(function: F) -> F:
    """Refuses calls of a function whose arguments are not as its annotations say.

    Raises:
        TpCompileError: (the decorated function) before it begins.
    """

    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return well_called(typing.cast(F, call))


def well_called(function: F) -> F:
    """Refuses calls of a function that its signature does not fit, whatever the values."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as misfit:
                names = ", ".join(name for name in signature.parameters if name not in ("self", "cls"))
                where = function.__qualname__.removesuffix(".__init__")
                raise TpCompileError(f"the call {misfit}", where=where, todo=f"it takes {names}") from None
            raise

    return typing.cast(F, call)


def checked_fields(kind: type[T]) -> type[T]:
    """Refuses instances of a dataclass whose fields are not as its annotations say."""
    fill = well_called(kind.__init__)

    @functools.wraps(fill)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        fill(self, *args, **kwargs)
        check_arguments(kind, vars(self))

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def check_arguments(
    function: Callable[..., Any] | type, arguments: Mapping[str, Any], where: str = ""
) -> None:
    """Compares arguments with the annotations of a function, or values with those of a class's fields.

    Args:
        function: what is called.
        arguments: by name; others than it has are not looked at.
        where: what an error says of where it is, if not the function's name.

    Raises:
        TpCompileError: with the first that does not fit.
    """
    for name, hint in _hints(function).items():
        if name in arguments and not _can_be(arguments[name], hint):
            what, where = f"{name} is {short(arguments[name])}", where or function.__qualname__
            raise TpCompileError(what, where=where, todo=f"give {_text(hint)}")


def short(value: Any) -> str:
    """A value as text for an error, on one line and not long, whatever it is."""
    return " ".join(_SHORT.repr(value).split())


@functools.cache
def _hints(function: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(function, include_extras=True)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = () if isinstance(function, type) else inspect.signature(function).parameters.values()
    others = {"return", *(p.name for p in parameters if p.kind in several)}
    return {name: hint for name, hint in hints.items() if name not in others}


def _can_be(value: Any, hint: Any) -> bool:
    try:
        return _fits(value, hint)
    except Exception:  # its own methods fail: it is of no use
        return False


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin is Annotated:
        first, *musts = inside
        return _fits(value, first) and all(must.holds(value) for must in musts if isinstance(must, Must))
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return any(value is one or (isinstance(value, str) and value == one) for one in inside)
    kind: Any = origin or hint
    if kind is Callable:
        return callable(value)
    if kind in (int, float):  # a truth value is not a number here
        numbers = (int,) if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool) and value == value
    if not isinstance(value, kind):
        return False
    if issubclass(kind, Mapping) and inside:
        return all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if issubclass(kind, Sequence) and kind is not str:
        each = inside[0] if inside else Any
        return not isinstance(value, str | bytes) and all(_fits(v, each) for v in value)
    return True


def _text(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((must.be for must in inside[1:] if isinstance(must, Must)), _text(inside[0]))
    if origin in (Union, types.UnionType):
        return ", ".join(map(_text, inside[:-1])) + f" or {_text(inside[-1])}"
    if origin is Literal:
        return " or ".join(map(repr, inside))
    kind = origin or hint
    if kind is Sequence and inside and inside[0] is not Any:
        return f"a list or tuple, each of it {_text(inside[0])}"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
