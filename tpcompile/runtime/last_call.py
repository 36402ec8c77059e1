"""Knows a call that equals the last one but for values and sizes, without binding it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompile.capture.export.look_inside import equal
from tpcompile.ir.calls import CallSignature
from tpcompile.ir.torch_internals import TensorGuards, TreeSpec, pytree

from .program import RankProgram


@dataclass(frozen=True)
class _Node:
    """A container in a call: of which type, taken apart how, into what."""

    kind: type
    flatten: Callable[[Any], tuple[Any, Any]]
    context: Any
    children: tuple[_Node | None, ...]
    flat: bool

    def take(self, value: Any, leaves: list[Any]) -> bool:
        """Takes a value apart; False if it is built otherwise."""
        if type(value) is not self.kind:
            return False
        parts, context = self.flatten(value)
        if context != self.context or len(parts) != len(self.children):
            return False
        if self.flat:
            leaves += parts
            return True
        for part, child in zip(parts, self.children, strict=True):
            if child is None:
                leaves.append(part)
            elif not child.take(part, leaves):
                return False
        return True


@dataclass(frozen=True, eq=False)
class LastCall:
    """A call that a program was found for.

    What is not asked here may have changed since: modes, sizes, the model, what its python has read.

    Attributes:
        program: the program.
        rivals: programs before it that only that keeps from being the call's; they would be found first.
        positional: how many arguments were given by position.
        keywords: the others' names, in the order in which they were given.
        sources: per argument of the bound call its name, and which of the given ones it is.
        dropped: which of the given ones are None, as if they had not been given.
        tree: how the bound arguments are built; None for a leaf.
        plain: the places and values of leaves that are no tensors.
        tensors: the places of tensors.
        guards: their types, devices and ranks, whether they want gradients, and that none comes twice.
    """

    program: RankProgram
    rivals: tuple[RankProgram, ...]
    positional: int
    keywords: tuple[str, ...]
    sources: tuple[tuple[str, int], ...]
    dropped: tuple[int, ...]
    tree: tuple[_Node | None, ...]
    plain: tuple[tuple[int, Any], ...]
    tensors: tuple[int, ...]
    guards: Any

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]] | None:
        """A call like this one, bound, and its leaves; None if it is of another kind."""
        if len(args) != self.positional or tuple(kwargs) != self.keywords:
            return None
        given = (*args, *kwargs.values())
        for at in self.dropped:
            if given[at] is not None:
                return None
        bound = {name: given[at] for name, at in self.sources}
        leaves: list[Any] = []
        for value, node in zip(bound.values(), self.tree, strict=True):
            if node is None:
                leaves.append(value)
            elif not node.take(value, leaves):
                return None
        for at, value in self.plain:
            if not equal(leaves[at], value):
                return None
        return (bound, leaves) if self.guards.check(*[leaves[at] for at in self.tensors]) else None


def last_call(
    program: RankProgram,
    earlier: Sequence[RankProgram],
    signature: CallSignature,
    call: tuple[Sequence[Any], Mapping[str, Any]],
    bound: dict[str, Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
) -> LastCall | None:
    """What knows calls like one that a program was found for; None where that takes more than is asked here.

    Args:
        program: the program.
        earlier: the programs before it.
        signature: that of the forward that is called.
        call: its arguments as they were given.
        bound: the call.
        leaves: its leaves.
        spec: how these are put together.
    """
    args, kwargs = call
    given = [*signature.positional[: len(args)], *(signature.renamed.get(key, key) for key in kwargs)]
    tensors = tuple(at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    held = [leaves[at] for at in tensors]
    if (
        program.numbers
        or program.same
        or len({id(tensor) for tensor in held}) < len(held)
        or any(tensor.layout != torch.strided for tensor in held)
        or not {*given} >= bound.keys()
    ):
        return None
    sources = tuple((name, given.index(name)) for name in bound)
    used = {at for _, at in sources}
    likely = [p for p in earlier if p.entry == program.entry and p.captured.in_spec == spec and not p.same]
    open_sizes: list[Any] = [[None] * tensor.ndim for tensor in held]
    return LastCall(
        program=program,
        rivals=tuple(p for p in likely if p.is_like(leaves)),
        positional=len(args),
        keywords=tuple(kwargs),
        sources=sources,
        dropped=tuple(at for at in range(len(given)) if at not in used),
        tree=tuple(map(_node, spec.children())),
        plain=tuple((at, leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)),
        tensors=tensors,
        guards=TensorGuards(*held, dynamic_dims_sizes=open_sizes, dynamic_dims_strides=open_sizes),
    )


def _node(spec: TreeSpec) -> _Node | None:
    if spec.is_leaf():
        return None
    children = tuple(map(_node, spec.children()))
    flatten = pytree.SUPPORTED_NODES[spec.type].flatten_fn
    return _Node(spec.type, flatten, spec.context, children, all(child is None for child in children))
