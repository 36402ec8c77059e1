"""A call signature as JSON, and back: what a program takes, on which sizes it runs, what it gives."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.specs import InputSpec, OutputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import CallSignature

from ..program import RankProgram
from .values import (
    decode,
    decode_state,
    decode_structure,
    encode,
    encode_state,
    encode_structure,
)

_SYMBOL = re.compile(r"[a-z]+\d+")
_FUNCTIONS = ("min", "max", "abs", "int", "float", "bool")
_MATHS = ("ceil", "floor", "trunc", "sqrt")
_PARTS = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Constant),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)


def call_data(program: RankProgram) -> dict[str, Any]:
    """A program's call signature as JSON, but for its graph and where its inputs come from.

    Raises:
        TpCompileError: it is one that a saved program cannot have.
    """
    captured = program.captured
    if captured.writes:
        raise TpCompileError(
            f"the program cannot be saved: forward changes the model's {captured.writes[0].name}",
            where=str(program),
            todo="let it be a buffer, a tensor that forward changes in place; or keep it out of forward",
        )
    tensors = sum(isinstance(leaf, Tensor) for leaf in program.example)
    return {
        "names": list(program.names),
        "example": [_leaf(value) for value in program.example],
        "numbers": sorted(program.numbers),
        "loose": list(program.loose),
        "same": sorted(program.same.items()),
        "wanted": None if program.gradients is None else list(program.gradients[1 : 1 + tensors]),
        "autocast": encode(program.autocast),
        "default": encode(program.default),
        "inputs": [
            [spec.name, None if spec.extents is None else list(spec.extents)] for spec in captured.user_inputs
        ],
        "outputs": [[spec.kind, spec.name, encode(spec.value)] for spec in captured.outputs],
        "call": encode_structure(captured.in_spec),
        "result": encode_structure(captured.out_spec),
        "ranges": sorted([symbol, *bounds] for symbol, bounds in captured.ranges.items()),
        "guards": list(captured.guards),
        "strides": captured.asks_strides,
        "states": [encode_state(state) for state in captured.states],
    }


def captured_of(data: Mapping[str, Any], graph: GraphModule, device: torch.device) -> Captured:
    """What ``call_data`` made JSON of, as a captured program.

    Raises:
        ValueError: it is something else.
    """
    ranges = {
        str(symbol): (int(low), None if high is None else int(high)) for symbol, low, high in data["ranges"]
    }
    if not all(map(_SYMBOL.fullmatch, ranges)):
        raise ValueError("a size has a name that is not one")
    inputs = tuple(
        InputSpec("user", str(name), extents=None if extents is None else tuple(map(_extent, extents)))
        for name, extents in data["inputs"]
    )
    outputs = tuple(
        OutputSpec(kind, str(name), decode(value, device)) for kind, name, value in data["outputs"]
    )
    return Captured(
        graph,
        inputs,
        outputs,
        decode_structure(data["call"], device),
        decode_structure(data["result"], device),
        ranges=ranges,
        guards=tuple(map(_expression, data["guards"])),
        states=tuple(decode_state(state, device) for state in data["states"]),
        asks_strides=bool(data["strides"]),
    )


def example_of(data: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """The leaves of the call that a program was captured for; of tensors the type and the rank.

    Raises:
        ValueError: they are something else.
    """

    def refer(kind: str, value: Any) -> Any:
        dtype, rank = decode(value[0], device), int(value[1])
        if kind not in ("tensor", "parameter") or not 0 <= rank <= 64:  # as many as a tensor can have
            raise ValueError(f"{kind} {str(value)[:80]} is not a kind of value")
        tensor = torch.empty([0] * rank, dtype=dtype, device="meta")
        return nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor

    return tuple(decode(leaf, device, refer) for leaf in data["example"])


def signature_data(signature: CallSignature) -> dict[str, Any]:
    """The parameters of a forward as JSON, without the values of defaults."""
    return {
        "positional": list(signature.positional),
        "positional_only": signature.positional_only,
        "keyword_only": list(signature.keyword_only),
        "required": sorted(signature.required),
        "none_defaults": sorted(signature.none_defaults),
        "var_positional": signature.var_positional,
        "var_keyword": signature.var_keyword,
        "renamed": signature.renamed,
    }


def signature_of_data(data: Mapping[str, Any]) -> CallSignature:
    """What ``signature_data`` made JSON of."""
    return CallSignature(
        tuple(map(str, data["positional"])),
        int(data["positional_only"]),
        tuple(map(str, data["keyword_only"])),
        frozenset(map(str, data["required"])),
        frozenset(map(str, data["none_defaults"])),
        {},
        str(data["var_positional"]),
        bool(data["var_keyword"]),
        {str(old): str(new) for old, new in data["renamed"].items()},
    )


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return encode(value)
    kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
    return {kind: [encode(value.dtype), value.ndim]}


def _extent(extent: Any) -> int | str:
    return extent if type(extent) is int else _expression(extent)


def _expression(text: Any) -> str:
    """An expression over sizes, which is evaluated: arithmetic on symbols, and nothing else.

    Raises:
        ValueError: it is something else.
    """
    parsed = ast.parse(str(text), mode="eval")
    for node in ast.walk(parsed):
        match node:
            case ast.Name(id=name):
                good = _SYMBOL.fullmatch(name) or name in (*_FUNCTIONS, "math")
            case ast.Attribute(value=ast.Name(id="math"), attr=name):
                good = name in _MATHS
            case ast.Call(func=ast.Name(id=name)):
                good = name in _FUNCTIONS
            case ast.Call(func=ast.Attribute()):
                good = not node.keywords
            case ast.Constant(value=value):
                good = isinstance(value, int | float)
            case ast.BinOp(op=ast.Pow(), right=right):
                good = isinstance(right, ast.Constant) and right.value in range(9)
            case _:
                good = isinstance(node, _PARTS)
        if not good:
            raise ValueError(f"{str(text)[:80]!r} is not an expression over sizes")
    return ast.unparse(parsed)
