"""Weights are quantised while they are loaded, by transformers' quantizer, and stay so."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.bitsandbytes_weights import as_whole, is_bitsandbytes
from tpcompile.ir.module_tensors import every_name
from tpcompile.ir.unwrap import is_wrapped, taken_apart, unwrap

from .dequantise import change_layers
from .expressions import Apply, Expression

_TODO = "use a method of torchao (transformers.TorchAoConfig), or leave quantization_config out"


def quantizer_for(given: Any, where: str) -> HfQuantizer:
    """transformers' quantizer, for a checkpoint that is not quantised.

    Args:
        given: the user's configuration for it, or a dict of its fields.
        where: the checkpoint, for an error.

    Raises:
        TpCompileError: there is none, or it does not quantise single weights while they are loaded.
    """
    fields = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    if fields.get("dequantize"):
        raise TpCompileError(
            "the checkpoint is not quantised, and so cannot be dequantised",
            where=where,
            todo="leave quantization_config out",
        )
    with refusing("nothing can be quantised like this", where=where, todo=_TODO):
        config = AutoQuantizationConfig.from_dict(dict(given)) if isinstance(given, Mapping) else given
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        quantizer.get_quantize_ops()
    return quantizer


def quantise_model(
    model: Any, quantizer: HfQuantizer, expressions: Mapping[str, Expression], dtype: torch.dtype
) -> dict[str, Expression]:
    """Quantises the weights of a model on ``meta`` that the quantizer chooses, and takes them apart.

    Args:
        model: the model, which is changed.
        quantizer: transformers' own.
        expressions: per name what a weight is made of.
        dtype: the model's type.

    Returns:
        The same, with the parts of quantised weights in their place: a part needs the whole weight, of which
        every rank makes all parts before it takes its share.

    Raises:
        TpCompileError: what a weight becomes cannot be taken apart, or it is tied to another one.
    """
    change_layers(model, quantizer, dtype, None)
    alone = _Alone(_copied(model), quantizer)
    uses = Counter(id(tensor) for _, tensor in every_name(model))
    chosen = [name for name in expressions if quantizer.param_needs_quantization(model, name)]
    for name in chosen:
        owner, attribute = _place(model, name)
        weight: Any = owner._parameters[attribute]
        made = alone.quantise(name, weight)
        if uses[id(weight)] > 1 or not is_wrapped(made):
            raise TpCompileError(
                "a weight that is tied to another one would be quantised"
                if is_wrapped(made)
                else f"it would become a {type(made).__name__}, which cannot be divided",
                where=name,
                todo=_TODO,
            )
        owner._parameters[attribute] = nn.Parameter(made, requires_grad=False)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    unwrap(model)
    found = {name: e for name, e in expressions.items() if name not in chosen}
    tensors = dict(every_name(model))
    for name, parts in taken_apart(model).items():
        for part in parts:
            shape, kind = tuple(tensors[part].shape), tensors[part].dtype
            func = functools.partial(alone.part, name, part)
            found[part] = Apply(shape, kind, func, (expressions[name],), {})
    return found


class _Alone:
    """A copy of the model on ``meta``, in which single weights get values and are quantised.

    Args:
        model: the copy.
        quantizer: transformers' own.
    """

    def __init__(self, model: Any, quantizer: HfQuantizer) -> None:
        self._model, self._quantizer = model, quantizer
        self._last: tuple[str, dict[str, Tensor]] = "", {}

    def quantise(self, name: str, weight: Tensor) -> Any:
        """What a weight becomes; the copy is as it was afterwards."""
        owner, attribute = _place(self._model, name)
        before, own = owner._parameters[attribute], dict(vars(owner))
        if weight.is_meta and is_bitsandbytes(weight):  # bitsandbytes would leave it as it is
            return as_whole(weight, name, owner)
        value = nn.Parameter(weight.detach(), requires_grad=False)
        try:
            found = self._quantizer.get_quantize_ops().convert(
                {name: [value]}, model=self._model, full_layer_name=name, missing_keys=set()
            )
            made = found.get(name, owner._parameters[attribute])
            return as_whole(made, name, owner) if is_bitsandbytes(made) else made
        finally:
            vars(owner).clear()
            vars(owner).update(own)
            owner._parameters[attribute] = before

    def part(self, name: str, part: str, weight: Tensor) -> Tensor:
        """One of the tensors that a quantised weight is made of. They are asked for one after the other."""
        if self._last[0] != name:
            owner, attribute = nn.Module(), name.rpartition(".")[2]
            owner.register_parameter(attribute, self.quantise(name, weight))
            unwrap(owner)
            self._last = name, dict(owner.named_parameters())
        return self._last[1][part.rpartition(".")[2]]


def _copied(model: Any) -> Any:
    """A copy over the same tensors. Weights of bitsandbytes forget their layers, which would keep scales."""
    tensors: list[Any] = [tensor for _, tensor in every_name(model)]
    for tensor in filter(is_bitsandbytes, tensors):
        tensor.module = None
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
