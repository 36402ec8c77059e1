"""What is known of an operator's result and its inputs: is it new, or may it be a view of one of them?"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from tpcompile.ir.torch_internals import (
    DispatchKey,
    FakeTensor,
    OpOverload,
    dispatch_has_kernel_for_dispatch_key,
)

# Composite, without a word about aliases in their schemas, and new whatever they are given.
_NEW = ("aten.linear", "aten.matmul")

DROPOUTS = (F.dropout, torch.dropout)


def is_composite(op: OpOverload) -> bool:
    """Whether torch composes an operator of others."""
    return dispatch_has_kernel_for_dispatch_key(op.name(), DispatchKey.CompositeImplicitAutograd)


def alias_depends(op: OpOverload) -> bool:
    """Whether an operator's result is, or may be, a view of what it is given, by its schema."""
    aliases = any(a.alias_info is not None for a in op._schema.arguments)
    return aliases or torch.Tag.maybe_aliasing_or_mutating in op.tags


def may_alias(node: Node) -> bool:
    """Whether a call's result may share memory with what it is given, or with another call's result."""
    if node.op == "output" or not isinstance(node.meta.get("val"), Tensor | list | tuple):
        return False
    if node.target is operator.getitem:
        several: Node = node.args[0]  # type: ignore[assignment]
        return may_alias(several) or any(n is not node and n.args == node.args for n in several.users)
    if not isinstance(node.target, OpOverload) or alias_depends(node.target):
        return True
    return is_composite(node.target) and not str(node.target).startswith(_NEW)


def returned_argument(node: Node) -> Node | None:
    """The argument that an operator hands back as it is, such as ``x.float()`` where ``x`` is float32.

    What is written into the one is in the other, and grad mode does not matter to it: the result has the
    argument's gradient. Export, which knows values by their tensors, even calls the argument by the name of
    the result from there on, behind a region without gradients too.
    """
    value = node.meta.get("val")
    if not isinstance(value, FakeTensor) or not isinstance(node.target, OpOverload):
        return None
    if node.target._schema.is_mutable:
        return None
    kept = (value.dtype, value.device, str(value.shape))
    given = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), FakeTensor)]
    if not any((v.dtype, v.device, str(v.shape)) == kept for v in (n.meta["val"] for n in given)):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with value.fake_mode, torch.no_grad():
        result = node.target(*args, **kwargs)
    return next((n for n in given if n.meta["val"] is result), None)


def drops_nothing(
    input: Tensor, p: float = 0.5, train: bool = True, inplace: bool = False, training: bool = True
) -> bool:
    """Whether a dropout hands back what it is given, as torch does it; export would take a copy for that."""
    return p == 0 or (not (train and training) and 0 <= p <= 1)
