"""Makes transformers' models ready for export: experts, and hooks that record results of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.ir.block_scaled import BlockScaled
from tpcompile.ir.unwrap import is_wrapped, wrappings

_QUANTISED = "tpcompile_quantised"
"""What is captured of quantised experts, as transformers' table calls it."""

_EXPORTABLE = ("batched_mm", "grouped_mm", _QUANTISED)
_INSTALLED = "_output_capturing_hooks_installed"
_FIELD = "_experts_implementation_internal"
_SWITCHED_BY = "transformers.integrations.moe"  # whose use_experts_implementation decorates a forward
_RECORDED_BY = "transformers.utils.output_capturing"  # whose capture_outputs does


def _expert_configs(model: nn.Module) -> list[Any]:
    """Return the distinct configs that expert layers look their implementation up in."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, _FIELD) and _switches(type(module)):
            found[id(config)] = config
    return list(found.values())


def choose_experts_implementation(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Return the implementation to capture with, or None if the model has no switchable experts.

    A configured choice that can be exported is kept. The python loop over the experts that were hit
    depends on data; it is replaced by ``batched_mm`` on the CPU (every dtype, every width) and by
    ``grouped_mm`` elsewhere.
    """
    configs = _expert_configs(model)
    if not configs:
        return None
    configured = {getattr(config, _FIELD) for config in configs}
    if len(configured) == 1 and next(iter(configured)) in _EXPORTABLE:
        return str(next(iter(configured)))
    first = next(iter(model.parameters()), None)
    device = device or (first.device if first is not None else torch.device("cpu"))
    if device.type in ("cpu", "meta") or (first is not None and first.dtype == torch.float64):
        return "batched_mm"
    return "grouped_mm"


@contextmanager
def exportable_experts(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the model's experts use an exportable implementation inside the block, and the old one after."""
    chosen = choose_experts_implementation(model, device)
    configs = _expert_configs(model)
    before, quantised = [getattr(config, _FIELD) for config in configs], _has_quantised(model)
    try:
        for config, old in zip(configs, before, strict=True):
            wanted = old if old in _EXPORTABLE else chosen
            setattr(config, _FIELD, _QUANTISED if quantised and old != "batched_mm" else wanted)
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            setattr(config, _FIELD, old)


def _has_quantised(model: nn.Module) -> bool:
    """Whether a model has experts that are quantised; then ``_QUANTISED`` exists from here on."""
    found = any(len(wrapping.size) == 3 for *_, wrapping in wrappings(model))
    if found:
        _table()[_QUANTISED] = _quantised_experts
    return found


def _quantised_experts(experts: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Any:
    """A grouped matmul, for which all experts are dequantised; where few are asked for, these and no others.

    Args:
        experts: the module.
        hidden_states: of shape [tokens, hidden].
        index: experts of each token, of shape [tokens, chosen].
        weights: what each counts, of this shape too.
    """
    rows, kept = index.numel(), isinstance(experts.down_proj, BlockScaled)
    few = kept and isinstance(rows, int) and rows < experts.num_experts
    forward = _table()["batched_mm" if few else "grouped_mm"]
    return forward(experts if kept else _Dequantised(experts), hidden_states, index, weights)


class _Dequantised:
    """A module of experts whose weights are dequantised when they are read, if they are torchao's.

    These have hardly any operation that a program can have for experts. Those that round activations too
    stay as they are: there is nothing else that computes the same.
    """

    def __init__(self, experts: Any) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        alone = is_wrapped(value) and getattr(value, "act_quant_kwargs", value) is None
        return value.dequantize() if alone else value


def _table() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def install_output_hooks(model: nn.Module) -> None:
    """Does what transformers' models do in the first call that asks for hidden states or attentions.

    They leave hooks on their layers, which later calls find; a captured program has them in it.
    """
    for module in model.modules():
        recorded = _decorated(type(module).forward, _RECORDED_BY)
        if recorded and not any(hasattr(m, _INSTALLED) for m in module.modules()):
            from tpcompile.ir.hf_internals import maybe_install_capturing_hooks

            maybe_install_capturing_hooks(module)


def _switches(kind: type) -> bool:
    """Whether a class, or one that it extends, is of experts whose implementation can be switched."""
    return any(_decorated(vars(base).get("forward"), _SWITCHED_BY) for base in kind.__mro__)


def _decorated(forward: Any, by: str) -> bool:
    """Whether one of transformers' modules, by its name, has decorated a forward."""
    while forward is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == by:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
