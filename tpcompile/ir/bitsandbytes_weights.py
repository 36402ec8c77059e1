"""bitsandbytes' linear layers, with weights that can be taken apart.

Its weights are parameters with attributes: numbers whose scales lie in an object beside them. Here they
become tensors around plain ones that have the form of matrices, and forward calls the operators that are made
for these (``quantised_linear.py``).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError

from .module_tensors import every_name
from .quantised_linear import dequantise_4bit, dequantise_8bit, linear_4bit, linear_8bit
from .torch_internals import disabled_torch_function_impl

_ORIGINAL = "_tp_bitsandbytes_class"
"""The attribute of a class by which it says which one of bitsandbytes' it stands for."""

_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)
_SKIP = "leave this layer as it is (llm_int8_skip_modules), or quantise it by torchao"


class QuantisedWeight(Tensor):
    """A matrix of few bits, made of plain tensors; its type is the first one's, as bitsandbytes has it.

    PEFT, for one, gives adapters the type of a weight, unless that is of whole numbers.

    Attributes:
        context: what is to be known beside these.
    """

    parts: ClassVar[list[str]]
    context: tuple[Any, ...]

    __torch_function__: Any = disabled_torch_function_impl

    @classmethod
    def of(cls, tensors: Iterable[Tensor], size: Iterable[int], *context: Any) -> Any:
        """A weight around tensors."""
        found = tuple(tensors)
        kind, device = found[0].dtype, found[0].device
        made: Any = Tensor._make_wrapper_subclass(cls, torch.Size(size), dtype=kind, device=device)
        for name, tensor in zip(cls.parts, found, strict=True):
            setattr(made, name, tensor)
        made.context = context
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """The names of its tensors, and what else it has."""
        return self.parts, self.context

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        """The weight with other tensors."""
        return cls.of(map(parts.__getitem__, cls.parts), size, *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _COPIES:
            raise TpCompileError(
                f"a weight of bitsandbytes is given to {func}",
                where=cls.__name__,
                todo="only its layer computes with it; ask for weight.dequantize()",
            )
        names, context = args[0].__tensor_flatten__()
        parts = {name: func(getattr(args[0], name), **(kwargs or {})) for name in names}
        return cls.__tensor_unflatten__(parts, context, args[0].shape, None)


class FourBit(QuantisedWeight):
    """A weight of ``linear_4bit``.

    Its context: that of the operator, the type that it had, and whether its scales were quantised. They are
    numbers here: bitsandbytes quantises them in blocks that go over the ends of rows.
    """

    parts = ["packed", "scales"]
    packed: Tensor
    scales: Tensor

    @property
    def quant_type(self) -> str:
        """As bitsandbytes calls it; PEFT reads it, and the next one."""
        return str(self.context[1])

    @property
    def compress_statistics(self) -> bool:
        """See ``quant_type``."""
        return bool(self.context[3])

    def linear(self, x: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """The layer."""
        block, code, *_ = self.context
        return linear_4bit(x, self.packed, self.scales, bias, block, code)

    def dequantize(self) -> Tensor:
        """The matrix."""
        block, code, kind, _ = self.context
        return dequantise_4bit(self.packed, self.scales, block, code, kind)


class EightBit(QuantisedWeight):
    """A weight of ``linear_8bit``; its context: the threshold."""

    parts = ["numbers", "scales"]
    numbers: Tensor
    scales: Tensor

    def linear(self, x: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """The layer."""
        return linear_8bit(x, self.numbers, self.scales, bias, *self.context, training)

    def dequantize(self) -> Tensor:
        """The matrix."""
        return dequantise_8bit(self.numbers, self.scales, torch.float32)


def is_bitsandbytes(tensor: Any) -> bool:
    """Whether a weight is one of bitsandbytes', quantised or to be quantised."""
    library = _library()
    return library is not None and isinstance(tensor, (library.Params4bit, library.Int8Params))


def concerns(model: nn.Module) -> bool:
    """Whether a model has such weights."""
    return _library() is not None and any(is_bitsandbytes(tensor) for _, tensor in every_name(model))


def as_whole(weight: Any, where: str, layer: Any) -> nn.Parameter:
    """A weight of bitsandbytes over the same memory; on ``meta`` one that it has not quantised will do.

    Raises:
        TpCompileError: blocks go over the ends of its rows, it is not quantised yet, or was rearranged.
    """
    four = isinstance(weight, _library().Params4bit)
    state = weight.quant_state if four else None
    quantised = state is not None if four else weight.dtype == torch.int8
    if not four and layer.state.has_fp16_weights:
        _refuse("it is quantised anew in every call", where, "give has_fp16_weights=False")
    if not quantised and not weight.is_meta:
        _refuse("it is not quantised", where, "move the model to its device before: that quantises it")
    made = _four_bit(weight, state, where) if four else _eight_bit(weight, layer.state)
    return nn.Parameter(made, requires_grad=False)


def _four_bit(weight: Any, state: Any, where: str) -> Any:
    rows, columns = size = weight.shape if state is None else state.shape
    block = weight.blocksize if state is None else state.blocksize
    if columns % block:
        _refuse(f"its rows of {columns} numbers are no whole blocks of {block}", where, _SKIP)
    if state is None:
        packed = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
        scales = weight.new_empty((rows, columns // block), dtype=torch.float32)
        context = block, weight.quant_type, weight.dtype, weight.compress_statistics
        return FourBit.of((packed, scales), size, *context)
    if getattr(state, "packing_format_for_cpu", False):
        _refuse(
            "a call on the CPU has rearranged it, and rounded its scales",
            where,
            "load the model again, and parallelize it before it is called",
        )
    scales = state.absmax
    if state.nested:
        read, inner = torch.ops.bitsandbytes.dequantize_blockwise, state.state2
        scales = read(scales, inner.absmax, inner.code, inner.blocksize, torch.float32) + state.offset
    packed = weight.data.view(torch.uint8).view(rows, columns // 2)
    scales = scales.view(rows, columns // block)
    return FourBit.of((packed, scales), size, block, state.quant_type, state.dtype, state.nested)


def _eight_bit(weight: Any, state: Any) -> Any:
    scales = weight.SCB if weight.SCB is not None else state.SCB  # where it is from the first call on
    if weight.is_meta:
        scales = weight.new_empty(weight.shape[:1], dtype=torch.float32)
    numbers = weight.data if weight.dtype == torch.int8 else torch.empty_like(weight.data, dtype=torch.int8)
    return EightBit.of((numbers, scales), weight.shape, state.threshold)


def wrap(model: nn.Module) -> None:
    """Gives bitsandbytes' layers weights that can be taken apart.

    Raises:
        TpCompileError: see ``as_whole``; nothing was changed.
    """
    made: dict[int, Any] = {}
    layers = [(path, layer) for path, layer in model.named_modules() if _forward_of(layer) is not None]
    for path, layer in layers:
        weight = layer._parameters["weight"]
        if id(weight) not in made:
            made[id(weight)] = (
                as_whole(weight, f"{path}.weight", layer) if is_bitsandbytes(weight) else weight
            )
    for _, layer in layers:
        layer._parameters["weight"] = made[id(layer._parameters["weight"])]
        kind: Any = type(layer)
        layer.__class__ = _class_of(kind, _forward_of(layer))
        _forget(layer)


def states_of(modules: Iterable[nn.Module]) -> dict[int, dict[str, Any]]:
    """What ``give_back`` needs to know of weights before they are wrapped: all but their numbers."""
    weights = ((id(module), module._parameters.get("weight")) for module in modules)
    found = {at: vars(weight) for at, weight in weights if is_bitsandbytes(weight)}
    return {at: {k: v for k, v in s.items() if k not in ("CB", "SCB")} for at, s in found.items()}


def give_back(modules: Iterable[nn.Module], states: Mapping[int, dict[str, Any]]) -> None:
    """Undoes ``wrap``.

    Args:
        modules: of which some are bitsandbytes' layers.
        states: see ``states_of``.
    """
    made: dict[int, Any] = {}
    for layer in modules:
        kind: Any = type(layer)
        weight: Any = layer._parameters.get("weight")
        if id(layer) not in states or not isinstance(weight, QuantisedWeight):
            continue
        layer.__class__, state, key = vars(kind)[_ORIGINAL], states[id(layer)], id(weight)
        if key not in made:
            made[key] = weight, _given_back(weight, state)
        layer._parameters["weight"] = made[key][1]
        if isinstance(weight, FourBit):
            layer.__dict__["quant_state"] = state["quant_state"]


def _given_back(weight: QuantisedWeight, state: Mapping[str, Any]) -> Any:
    if isinstance(weight, FourBit):
        packed = weight.packed.view(-1, 1).view(state["quant_storage"])
        return _library().Params4bit(packed, requires_grad=False, **state)
    assert isinstance(weight, EightBit)
    more = {**state, "CB": weight.numbers, "SCB": weight.scales}
    return _library().Int8Params(weight.numbers, requires_grad=False, **more)


def _forget(layer: Any) -> None:
    """Lets a layer go of what it holds of the whole weight beside its parameter."""
    if hasattr(layer, "quant_state"):
        layer.__dict__["quant_state"] = None
    else:
        state = layer.__dict__["state"] = copy.copy(layer.state)
        state.CB = state.SCB = state.idx = None


def _library() -> Any:
    """bitsandbytes' layers, if anybody has imported it."""
    return getattr(sys.modules.get("bitsandbytes"), "nn", None)


def _forward_of(layer: nn.Module) -> Callable[..., Tensor] | None:
    """What takes the place of a layer's forward; None if that is not bitsandbytes' own."""
    library = _library()
    kinds = (
        {} if library is None else {library.Linear4bit: _forward_4bit, library.Linear8bitLt: _forward_8bit}
    )
    return next((f for kind, f in kinds.items() if type(layer).forward is kind.forward), None)


@functools.cache
def _class_of(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """A class of bitsandbytes' layers, whose forward takes weights that can be taken apart."""
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**body, _ORIGINAL: kind, "forward": forward})


def _forward_4bit(self: Any, x: Tensor) -> Tensor:
    """In the layer's own type, if it has one."""
    return _cast(self, x, self.compute_dtype or x.dtype).to(x.dtype)


def _forward_8bit(self: Any, x: Tensor) -> Tensor:
    return _cast(self, x, x.dtype)


def _cast(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    found: Tensor = layer.weight.linear(x.to(dtype), bias, layer.training)
    return found


def _refuse(why: str, where: str, todo: str) -> NoReturn:
    raise TpCompileError(f"a weight of bitsandbytes cannot be divided: {why}", where=where, todo=todo)
