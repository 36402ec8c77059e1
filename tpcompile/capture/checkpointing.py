"""What ``checkpointing=`` asks for: layers are recomputed in backward; what of them is kept all the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import short
from tpcompile.ir.nodes import find_operator, overloads_of
from tpcompile.ir.regions import mark
from tpcompile.ir.torch_internals import OpOverload, OpOverloadPacket
from tpcompile.ranks.describe import describe_code, describe_value

from .export.aliases import is_composite
from .export.captured import Captured
from .export.checkpoint_calls import ContextFn

Operator = str | OpOverload | OpOverloadPacket
Asked = str | Sequence[Operator] | Callable[..., Any]

_MADE_OF = {
    "linear": ("aten.mm", "aten.addmm"),
    "matmul": ("aten.mm", "aten.bmm", "aten.mv", "aten.dot"),
    "scaled_dot_product_attention": (
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    ),
    "all_reduce": ("_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"),
    "all_gather": ("_c10d_functional.all_gather_into_tensor", "_c10d_functional.wait_tensor"),
    "reduce_scatter": ("_c10d_functional.reduce_scatter_tensor", "_c10d_functional.wait_tensor"),
    "all_to_all": ("_c10d_functional.all_to_all_single", "_c10d_functional.wait_tensor"),
}
"""Operators that are taken apart before autograd sees them, by what becomes of them."""

_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SELECTIVE = ("linear", "convolution", "scaled_dot_product_attention", *_COLLECTIVES)
"""What ``"selective"`` keeps: what takes long to compute or to send, and is not large for that."""


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are recomputed, and how.

    Attributes:
        asked: what was asked for, as text; the same on all ranks.
        kept: what of the layers is kept all the same, as text; empty: nothing.
        context_fn: torch's form of it; None: nothing is kept.
        gathers: no layers are recomputed, but what is gathered for linear layers is gathered again.
    """

    asked: str
    kept: str = ""
    context_fn: ContextFn | None = None
    gathers: bool = False


def read_checkpointing(model: nn.Module, asked: Asked | None) -> Checkpointing | None:
    """What a user asks for, checked.

    Raises:
        TpCompileError: it names operators that are not there or that autograd never sees, or the model has
            no lists of layers.
    """
    if asked is None:
        return None
    if asked == "gathered":
        return Checkpointing("gathered", gathers=True)
    if not layers_of(model):
        raise TpCompileError(
            "there is no list of layers (nn.ModuleList, nn.Sequential) to recompute",
            where="checkpointing",
            todo="call torch.utils.checkpoint in forward around what is to be recomputed",
        )
    if asked == "full":
        return Checkpointing("full")
    if callable(asked) and not isinstance(asked, OpOverload | OpOverloadPacket):
        policy = functools.partial(create_selective_checkpoint_contexts, asked)
        code = describe_code(asked) if hasattr(asked, "__qualname__") else describe_value(asked)
        return Checkpointing(code, f"what {getattr(asked, '__name__', 'a policy')} keeps", policy)
    names = SELECTIVE if asked == "selective" else asked
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise TpCompileError(
            f"checkpointing={short(asked)}",
            where="checkpointing",
            todo='give "full", "selective", "gathered", a list of operators to keep, or a policy as for '
            "torch's create_selective_checkpoint_contexts",
        )
    kept = sorted({op for name in names for op in _overloads(name)}, key=str)
    text = ", ".join(dict.fromkeys(map(_text, names)))
    what = "matmuls, attention and collectives" if asked == "selective" else f"results of {text}"
    return Checkpointing(text, what, functools.partial(create_selective_checkpoint_contexts, kept))


def _text(operator: Operator) -> str:
    return str(operator).removesuffix(".default").removeprefix("aten.")


def _overloads(name: Operator) -> Iterator[OpOverload]:
    """The operators that a name stands for, as autograd sees them."""
    plain = name.removeprefix("aten.").removesuffix(".default") if isinstance(name, str) else ""
    if made_of := _MADE_OF.get(plain):
        for each in made_of:
            yield from _overloads(each)
        return
    for op in overloads_of(_named(name) if isinstance(name, str) else name):
        if is_composite(op):
            what = f"autograd does not see {op}: it is taken apart before"
            raise TpCompileError(what, where="checkpointing", todo="name the operators that it is made of")
        yield op


def _named(name: str) -> OpOverload | OpOverloadPacket:
    """An operator by its name: ``mm``, ``aten.mm``, ``aten.mm.default``."""
    found = find_operator(name if "." in name else f"aten.{name}")
    if found is None:
        raise TpCompileError(
            f"there is no operator {name!r}", where="checkpointing", todo='name one as in "mm" or "aten.mm"'
        )
    return found


def layers_of(model: nn.Module) -> frozenset[str]:
    """The paths of the items of a model's outermost lists of layers."""
    found: set[str] = set()
    lists: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") if outer else True for outer in lists)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            lists.append(path)
            found.update(f"{path}.{name}".lstrip(".") for name, _ in module.named_children())
    return frozenset(found)


def mark_layers(captured: Captured, model: nn.Module, asked: Checkpointing | None) -> Captured:
    """Lets the layers of a program be recomputed; inside of them this counts, not what forward says."""
    if asked is None:
        return captured
    if asked.gathers:
        captured.gathers_again = True
        return captured
    layers = layers_of(model)
    regions = dict(captured.regions)
    for node in captured.graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        key = next((key for key, (path, _) in stack.items() if path in layers), None)
        if node.op == "call_function" and key is not None:
            mark(node, key)
            regions[key] = asked.context_fn
    captured.regions = regions
    return captured
