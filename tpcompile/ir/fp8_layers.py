"""transformers' fp8 layers, with weights that every operation dequantises.

Over its own weights such a layer calls kernels, which quantise activations too, and exist on some devices
only. Over numbers of two bytes or more it computes as an ordinary one does, and that is what a weight of
``BlockScaled`` looks like.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tpcompile.errors import TpCompileError

from .block_scaled import BlockScaled

_FP8, _MXFP4 = "transformers.integrations.finegrained_fp8", "transformers.integrations.mxfp4"
_SCALE = "_scale_inv"  # what transformers adds to a weight's name for its scales
_ORIGINAL = "_tp_fp8_class"
"""The attribute of a class by which it says which one of transformers' it stands for."""

_TODO = "load the checkpoint by tpcompile.from_pretrained(..., keep_quantised=True), or dequantise it: "
_TODO += "quantization_config={'dequantize': True}"

State = tuple[type[nn.Module], dict[str, bool]]
"""Of a layer its class, and which of its parameters want gradients, in their order."""


def is_fp8(module: nn.Module) -> bool:
    """Whether a layer is one of transformers' that calls kernels for its weights of few bits."""
    library = sys.modules.get(_FP8)
    kinds = () if library is None else (library.FP8Linear, library.FP8Experts)
    return isinstance(module, kinds) and bool(_weights(module))


def concerns(model: nn.Module) -> bool:
    """Whether a model has such layers, or others of transformers' whose weights cannot be taken apart."""
    return any(is_fp8(module) or isinstance(module, _mxfp4()) for module in model.modules())


def wrap(model: nn.Module) -> None:
    """Gives transformers' fp8 layers weights that can be taken apart.

    Raises:
        TpCompileError: a weight has no blocks, other scales, or numbers of 4 bits, a layer a forward of its
            own, or experts are in MXFP4; nothing was changed.
    """
    _refuse_mxfp4(model)
    layers = [(path, layer) for path, layer in model.named_modules() if is_fp8(layer)]
    if not layers:
        return
    dtype = _computed_in(model, {id(layer) for _, layer in layers})
    made: dict[tuple[int, int], nn.Parameter] = {}
    wrapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, layer in layers:
        _refuse_other_forwards(path, layer)
        for name in _weights(layer):
            bits, scale = layer._parameters[name], layer._parameters[name + _SCALE]
            key = id(bits), id(scale)
            if key not in made:
                made[key] = _whole(f"{path}.{name}", layer, bits, scale, dtype)
            wrapped.append((layer, name, made[key]))
    for layer, name, weight in wrapped:
        layer._parameters[name] = weight
        del layer._parameters[name + _SCALE]
    for _, layer in layers:
        kind: Any = type(layer)
        if not issubclass(kind, nn.Linear):
            layer.__class__ = _ordinary_experts(kind)
    warnings.warn(
        f"the model has {len(layers)} fp8 layers, whose kernels round activations too: here weights are "
        "dequantised where something computes with them, and numbers are those of the dequantised model",
        stacklevel=2,
    )


def states_of(modules: Iterable[nn.Module]) -> dict[int, State]:
    """What ``give_back`` needs to know of layers before they are wrapped: all but their numbers."""
    found: dict[int, State] = {}
    for module in modules:
        if is_fp8(module):
            wants = {name: p is not None and p.requires_grad for name, p in module._parameters.items()}
            found[id(module)] = type(module), wants
    return found


def give_back(modules: Iterable[nn.Module], states: Mapping[int, State]) -> None:
    """Undoes ``wrap``.

    Args:
        modules: of which some are fp8 layers.
        states: see ``states_of``.
    """
    made: dict[tuple[int, bool], nn.Parameter] = {}
    for layer in modules:
        before = dict(layer._parameters)
        if id(layer) not in states or not any(isinstance(p, BlockScaled) for p in before.values()):
            continue
        layer.__class__, wants = states[id(layer)]
        layer._parameters.clear()
        for name, wanted in wants.items():
            weight, scales = before.get(name.removesuffix(_SCALE)), name.endswith(_SCALE)
            if isinstance(weight, BlockScaled):
                part, key = weight.scale if scales else weight.qdata, (id(weight), scales)
                layer._parameters[name] = made.setdefault(key, nn.Parameter(part, requires_grad=wanted))
            else:
                layer._parameters[name] = before[name]


def _weights(layer: nn.Module) -> list[str]:
    """The names of a layer's weights of few bits, which have scales."""
    named = layer._parameters.items()
    bits = (name for name, weight in named if weight is not None and weight.element_size() == 1)
    return [name for name in bits if name + _SCALE in layer._parameters]


def _whole(where: str, layer: Any, bits: Any, scale: Any, dtype: torch.dtype) -> nn.Parameter:
    if bits.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise TpCompileError(f"numbers of 4 bits, as {bits.dtype}, in an fp8 layer", where=where, todo=_TODO)
    if layer.block_size is None:
        raise TpCompileError("one scale for a whole weight in fp8", where=where, todo=_TODO)
    try:
        made = BlockScaled.of(bits.detach(), scale.detach(), layer.block_size, dtype)
    except ValueError as error:
        raise TpCompileError(str(error), where=where, todo=_TODO) from None
    return nn.Parameter(made, requires_grad=False)


def _computed_in(model: nn.Module, layers: set[int]) -> torch.dtype:
    """The type of a model's ordinary weights, of which the first is taken."""
    others = (p for m in model.modules() if id(m) not in layers for p in m.parameters(recurse=False))
    floats = (p.dtype for p in others if p.is_floating_point() and p.element_size() > 1)
    return next(floats, torch.get_default_dtype())


def _refuse_other_forwards(path: str, layer: Any) -> None:
    library: Any = sys.modules[_FP8]
    kinds = (library.FP8Linear, library.FP8GroupedLinear, library.FP8Experts)
    if not any(type(layer).forward is kind.forward for kind in kinds):
        what = f"a {type(layer).__name__}, whose forward is not that of transformers' fp8 layers"
        raise TpCompileError(what, where=path, todo=_TODO)


def _mxfp4() -> tuple[type, ...]:
    library = sys.modules.get(_MXFP4)
    return () if library is None else (library.Mxfp4GptOssExperts,)


def _refuse_mxfp4(model: nn.Module) -> None:
    found = [path for path, module in model.named_modules() if isinstance(module, _mxfp4())]
    if found:
        raise TpCompileError(
            f"the experts of {len(found)} layers are in MXFP4, arranged for a kernel of a GPU",
            where=found[0],
            todo=_TODO,
        )


@functools.cache
def _ordinary_experts(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of fp8 experts whose forward is that of transformers' ordinary ones."""
    from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    body |= {_ORIGINAL: kind, "forward": batched_mm_experts_forward}  # also in place of the loop over experts
    made: type[nn.Module] = use_experts_implementation(type(kind.__name__, (kind,), body))
    return made
