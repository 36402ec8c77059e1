"""Normalises a call of a model, so that equal calls look equal however they were written."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import SequenceKey, TreeSpec, tree_flatten, tree_flatten_with_path

_STAR = "*"

Sizes = tuple[tuple[int, Sequence[int] | int], ...]
"""Sizes of tensors, and numbers, by their places among a call's leaves."""


class OpenNumber(int):
    """A number among the arguments of a call that is to travel as a symbol: it has had other values."""


@dataclass(frozen=True)
class CallSignature:
    """The parameters of a forward, in plain tuples that dynamo can trace.

    Attributes:
        positional: names that can be given by position, in order.
        positional_only: how many of them can only be given by position.
        keyword_only: names that can only be given by keyword, in order.
        required: names without a default.
        none_defaults: names whose default is None.
        defaults: the defaults of ``positional``'s optional names.
        var_positional: the name behind ``*``, or "".
        var_keyword: whether any other keyword is taken.
        renamed: older names of keywords, and what they are called now.
    """

    positional: tuple[str, ...]
    positional_only: int
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    none_defaults: frozenset[str]
    defaults: dict[str, Any]
    var_positional: str
    var_keyword: bool
    renamed: dict[str, str]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return argument name -> value in the signature's order; raise ValueError if it does not fit."""
        if len(args) > len(self.positional) and not self.var_positional:
            raise ValueError(f"takes {len(self.positional)} positional arguments, {len(args)} were given")
        given = dict(zip(self.positional, args, strict=False))
        keyword_names = (*self.positional[self.positional_only :], *self.keyword_only)
        extra = {}
        for keyword, value in kwargs.items():
            name = self.renamed.get(keyword, keyword)
            if name is not keyword and name in kwargs:
                warnings.warn(f"both {keyword} and {name} are given: {name} is taken", stacklevel=2)
                continue  # as transformers does, whose decorator does not come to see it
            if name in given:
                raise ValueError(f"argument {name!r} was given twice")
            if name in keyword_names:
                given[name] = value
            elif self.var_keyword and name not in self.positional:
                extra[name] = value
            else:
                raise ValueError(f"has no keyword argument {name!r}")
        for name in self.required:
            if name not in given:
                raise ValueError(f"misses the argument {name!r}")
        bound = self._in_order(given, self.positional)
        if len(args) > len(self.positional):
            bound[_STAR + self.var_positional] = tuple(args[len(self.positional) :])
        bound.update(self._in_order(given, self.keyword_only))
        bound.update(extra)
        return bound

    def bind_or_refuse(self, args: Sequence[Any], kwargs: Mapping[str, Any], owner: str) -> dict[str, Any]:
        """As ``bind``, for a call of the user's of the forward of a class.

        Raises:
            TpCompileError: the call does not fit the signature.
        """
        try:
            return self.bind(args, kwargs)
        except ValueError as error:
            raise TpCompileError(
                f"the call does not fit the model's forward, which {error}",
                where=f"{owner}.forward",
                todo="give the arguments as you would call the model",
            ) from None

    def _in_order(self, given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: given[name]
            for name in names
            if name in given and not (given[name] is None and name in self.none_defaults)
        }

    def unbind(self, bound: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the args and kwargs with which the forward is called; the inverse of ``bind``."""
        rest = dict(bound)
        star = rest.pop(_STAR + self.var_positional, ()) if self.var_positional else ()
        by_position = self.positional if star else self.positional[: self.positional_only]
        while by_position and by_position[-1] not in rest and not star:
            by_position = by_position[:-1]
        args = [rest.pop(name) if name in rest else self.defaults[name] for name in by_position]
        return (*args, *star), rest


def signature_of(model: nn.Module) -> CallSignature:
    """Return the signature of ``model.forward``; kept per function, so that a call costs a look-up."""
    return _signature(getattr(model.forward, "__func__", model.forward), hasattr(model.forward, "__func__"))


@lru_cache(maxsize=512)
def _signature(forward: Callable[..., Any], is_method: bool) -> CallSignature:
    parameters = list(inspect.signature(forward).parameters.values())[1 if is_method else 0 :]
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    named = [*positional, *keyword_only]
    return CallSignature(
        positional=tuple(p.name for p in positional),
        positional_only=sum(p.kind is kinds.POSITIONAL_ONLY for p in positional),
        keyword_only=tuple(p.name for p in keyword_only),
        required=frozenset(p.name for p in named if p.default is kinds.empty),
        none_defaults=frozenset(p.name for p in named if p.default is None),
        defaults={p.name: p.default for p in positional if p.default is not kinds.empty},
        var_positional=next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), ""),
        var_keyword=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
        renamed=_renamed(forward),
    )


def _renamed(forward: Callable[..., Any] | None) -> dict[str, str]:
    """Keywords that decorators of transformers (``deprecate_kwarg``) give their new names.

    The two names of one argument must not look like two: what a cache holds is known by its name.
    """
    found: dict[str, str] = {}
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is not None and {"old_name", "new_name"} <= {*code.co_freevars}:
            cells = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True))
            old, new = cells["old_name"].cell_contents, cells["new_name"].cell_contents
            if new is not None:
                found[old] = new
        forward = getattr(forward, "__wrapped__", None)
    return found


def bind_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Normalise a call to one dict in the order of the forward's signature.

    Arguments that equal a default of None are dropped; what goes into ``*args`` is kept as one tuple
    under ``"*args"``; other keywords of ``**kwargs`` follow at the end.

    Raises:
        TpCompileError: the call does not fit the signature.
    """
    return signature_of(model).bind_or_refuse(args, kwargs or {}, type(model).__name__)


def call_model(model: nn.Module, bound: Mapping[str, Any]) -> Any:
    """Call the model with a normalised call; a ``__call__`` of its class runs around programs."""
    args, kwargs = signature_of(model).unbind(bound)
    return nn.Module.__call__(model, *args, **kwargs)


def flatten_call(bound: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Flatten a normalised call to its leaves; None and python values are leaves too."""
    return tree_flatten(bound)


def sizes_of_call(leaves: Sequence[Any], places: Sequence[int]) -> Sizes:
    """The sizes of a call's tensors, and its numbers; the hash of these is the same in every process.

    Args:
        leaves: the call, flat.
        places: the leaves that count: sizes of caches follow from earlier calls.
    """
    found = ((at, leaves[at]) for at in places)
    return tuple(
        (at, x.shape if isinstance(x, Tensor) else x) for at, x in found if isinstance(x, (Tensor, int))
    )


def identical(leaves: Sequence[Any], places: Sequence[int]) -> dict[int, int]:
    """Which tensors of a call are the same object as an earlier one, by their places: python may ask.

    Args:
        leaves: the call, flat.
        places: those to look at; dynamo, which can trace this, compares each with each.
    """
    if not is_dynamo_compiling():
        ids = [id(leaves[at]) for at in places if isinstance(leaves[at], Tensor)]
        if len(set(ids)) == len(ids):
            return {}
    found: dict[int, int] = {}
    for i, at in enumerate(places):
        for before in places[:i]:
            if at not in found and isinstance(leaves[at], Tensor) and leaves[before] is leaves[at]:
                found[at] = before
    return found


def leaf_names(bound: dict[str, Any]) -> list[str]:
    """Return each leaf's key path: ``input_ids``, ``inputs[0]``, ``past_key_values[0]['keys']``."""
    return [join_path(path) for path in leaf_paths(bound)]


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Any, ...]]:
    """Return each leaf's path of keys; a type registered without keys has its children numbered."""

    def is_child(node: Any) -> bool:
        return node is not tree or (is_leaf is not None and is_leaf(node))

    children, spec = tree_flatten(tree, is_leaf=is_child)
    if spec.is_leaf():
        return [()]
    try:
        keys = [path for path, _ in tree_flatten_with_path(tree, is_leaf=is_child)[0]]
    except ValueError:
        keys = [(SequenceKey(i),) for i in range(len(children))]
    pairs = zip(keys, children, strict=True)
    return [(*key, *rest) for key, child in pairs for rest in leaf_paths(child, is_leaf)]


def join_path(path: Sequence[Any]) -> str:
    """A leaf's key path as text."""
    root = getattr(path[0], "key", None) if path else None
    rest = path[1:] if isinstance(root, str) else path
    return (root.lstrip(_STAR) if isinstance(root, str) else "") + "".join(map(str, rest))
