"""Any type of transformers as a tiny model with inputs of its own: no type is known by name."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from benchmarks.tiny_configs import CUTS, Cut, mended, small_config
from benchmarks.tiny_inputs import running_call, told, wants_other_numbers
from tests.helpers import families

SEARCH = 30.0
"""Processor seconds after which no further sizes are tried."""

LARGEST_RESULT = 1e5
"""Weights are made smaller where results are larger."""


def tiny_model(kind: str, auto: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a type that runs, in eval mode, and the arguments of a call.

    Args:
        kind: the type, as in ``AutoConfig.for_model``.
        auto: the name of an auto class.
        dtype: of weights and inputs.

    Raises:
        Exception: what the usual sizes failed with, if no others work either.
    """
    failed: list[Exception] = []
    cuts, start = list(CUTS), time.process_time()
    while cuts and (not failed or time.process_time() < start + SEARCH):
        cut = cuts.pop(0)
        try:
            return _built(kind, auto, dtype, cut)
        except ImportError:
            raise
        except Exception as error:
            failed.append(error)
            if wants_other_numbers(error):
                break
            if other := mended(cut, error):
                cuts.insert(0, other)
    raise told(failed)


def _built(kind: str, auto: str, dtype: torch.dtype, cut: Cut) -> tuple[nn.Module, dict[str, Any]]:
    config = small_config(kind, cut)
    # Where a type has several classes, transformers looks for one of these and takes the first else.
    config.architectures = config.architectures or []
    with torch.device("meta"):
        size = parameters_of(getattr(transformers, auto).from_config(config)) / 1e6
    if size > cut.largest:
        raise ValueError(f"the small configuration has {size:.0f} million parameters")
    model = families.prepare(getattr(transformers, auto).from_config(config), dtype)
    _keep_sound_small(model)
    inputs = running_call(model, dtype)
    for _ in range(4):
        if _largest(model, inputs) > LARGEST_RESULT:
            _halve(model)
    return model, inputs


@torch.no_grad()
def _largest(model: nn.Module, inputs: dict[str, Any]) -> float:
    results = [x for x in tree_leaves(model(**inputs)) if torch.is_tensor(x) and x.is_floating_point()]
    return max((float(x[x.isfinite()].abs().max()) for x in results if x.isfinite().any()), default=0.0)


@torch.no_grad()
def _halve(model: nn.Module) -> None:
    """Makes matrices smaller: of numbers that grow from layer to layer no sine or difference is exact."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(0.5)


@torch.no_grad()
def _keep_sound_small(model: nn.Module) -> None:
    """Scales kernels over time so that many of them keep values small: of 1e12 no sine is exact."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d) and (weight := module._parameters.get("weight")) is not None:
            if weight.numel() > 1:
                weight.mul_(math.prod(weight.shape[1:]) ** -0.5 / weight.std())


def default_problem(kind: str, auto: str) -> str:
    """Why a type cannot be built from its own default configuration either, or an empty text."""
    try:
        with torch.device("meta"):
            getattr(transformers, auto).from_config(AutoConfig.for_model(kind))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def parameters_of(model: nn.Module) -> int:
    """How many numbers the model has."""
    return sum(math.prod(p.shape) for p in model.parameters())
