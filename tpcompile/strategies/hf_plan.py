"""The plans that transformers' configs and classes bring with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import checked, short


@checked
def hf_plan(model_or_config: Any, *, experts: bool = False) -> dict[str, str]:
    """A model's own tensor-parallel plan, as transformers puts it together.

    The config's ``base_model_tp_plan`` of every part, under the names that the part has in the whole,
    and the class's ``_tp_plan`` (the head). The result is a copy, to be changed at will and given to
    ``parallelize(plan=...)``.

    Args:
        model_or_config: a transformers model, or a config of a causal language model.
        experts: rules of ``base_model_ep_plan`` in place of those for the same modules: each rank
            has whole experts.

    Raises:
        TpCompileError: the model has no plan (none for its experts).
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else model_of(model_or_config)
    plan = _assembled(model, "tp")
    if experts:
        dispatched = _assembled(model, "ep")
        if not dispatched:
            raise _missing(model, "expert-parallel plan", '"experts": "ep" rules of your own')
        taken = tuple(dispatched)
        plan = {k: v for k, v in plan.items() if not any(k == t or k.startswith(t + ".") for t in taken)}
        plan |= dispatched
    if not plan:
        raise _missing(model, "tensor-parallel plan", 'plan="auto"')
    return plan


def model_of(config: Any) -> nn.Module:
    """A model without weights (on ``meta``) from a transformers config.

    Raises:
        TpCompileError: it is not a config that transformers knows a causal language model for.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise TpCompileError(
            f"{short(config)} is neither a model nor a config",
            where="model_or_config",
            todo="give a model or its config",
        )
    todo = "give the model itself, made under torch.device('meta')"
    with refusing("no causal language model can be made", where=type(config).__name__, todo=todo):
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _assembled(model: nn.Module, kind: str) -> dict[str, str]:
    """The plan of a model and all its parts; transformers keeps what it put together on the instances."""
    found = getattr(model, f"_{kind}_plan", None)
    plan: dict[str, str] = dict(found) if isinstance(found, Mapping) else {}
    config = getattr(model, "config", None)
    if not plan and getattr(model, "base_model", None) is model:
        plan |= getattr(config, f"base_model_{kind}_plan", None) or {}
    if not plan:
        for name, child in model.named_children():
            plan |= {f"{name}.{key}": style for key, style in _assembled(child, kind).items()}
    return plan


def _missing(model: nn.Module, what: str, instead: str) -> TpCompileError:
    return TpCompileError(
        f"{type(model).__name__} has no {what}", where="plan", todo=f"use {instead}, which needs none"
    )
