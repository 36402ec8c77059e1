"""Reads what users ask for when a model is planned, sharded or verified."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import nn

from tpcompile.capture.checkpointing import Asked, Operator, read_checkpointing
from tpcompile.capture.export.default_example import default_example
from tpcompile.capture.export.dynamic_dims import check_dynamic
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.ir.check import Must
from tpcompile.planner.global_program import Pass
from tpcompile.planner.options import Options
from tpcompile.planner.plan import Plan
from tpcompile.planner.search.cost import CostModel, preset
from tpcompile.strategies.custom.custom_strategy import split_plan
from tpcompile.strategies.hf_plan import hf_plan
from tpcompile.strategies.read_rules import Pin, Rules, read_rules

from .check_model import check_model
from .prompt_call import prompt_call

PlanLike = str | Plan | Mapping[str, Pin]
Keywords = Mapping[str, Any] | Literal["generate"] | None
Dynamic = bool | Mapping[str, Mapping[int, bool]]
Bytes = Annotated[float, Must("a positive number of bytes", lambda size: 0 < size < math.inf)]
Passes = Sequence[Annotated[Pass, Must("a Pass with a name", lambda one: isinstance(one.name, str))]]
Checkpointing = Literal["full", "selective", "gathered"] | Sequence[Operator] | Callable[..., Any] | None
Ranks = Annotated[int, Must("a number of ranks, from 1 to 4096", lambda ranks: 0 < ranks <= 4096)]


def example_call(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Keywords = None,
    dynamic: Dynamic = True,
) -> dict[str, Any]:
    """The call to plan a model for: the one that is given, or the default one of a transformers model.

    Raises:
        TpCompileError: none is given, and there is no default; or ``dynamic`` does not fit it.
    """
    example = example_or_default(model, args, kwargs, dynamic, planning=True)
    if example is None:
        raise TpCompileError(
            "an example call is needed to capture this model",
            where=type(model).__name__,
            todo="give example_args or example_kwargs",
        )
    return example


def read_options(
    model: nn.Module,
    plan: PlanLike,
    cost_model: CostModel | str | None,
    device: str,
    dynamic: bool | Mapping[str, Any],
    memory: float | None,
    passes: Sequence[Pass],
    compose: bool | None = False,
    sequence_parallel: bool = False,
    checkpointing: Asked | None = None,
) -> Options:
    check_model(model)
    rules, custom = _rules(model, plan)
    if cost_model is None:
        cost_model = "cpu" if device == "cpu" else "h100"
    cost = cost_model if isinstance(cost_model, CostModel) else preset(cost_model)
    given = plan if isinstance(plan, Plan) else None
    sequence = sequence_parallel or rules.sequence
    if compose is None and not hasattr(model, "main_input_name"):  # transformers' models say what theirs is
        compose = False
    recomputed = read_checkpointing(model, checkpointing)
    return Options(cost, rules, dynamic, memory, tuple(passes), given, custom, compose, sequence, recomputed)


def _rules(model: nn.Module, plan: PlanLike) -> tuple[Rules, dict[str, str]]:
    """What a plan asks of the model's parameters, and its custom strategies by glob."""
    if isinstance(plan, Mapping):
        pins, custom = split_plan(plan)
        return read_rules(model, pins), custom
    if plan in ("hf", "hf-ep"):
        pins, custom = split_plan(hf_plan(model, experts=plan == "hf-ep"))
        return read_rules(model, pins, own=True), custom
    if isinstance(plan, Plan):
        plan.layout.check_model(model)
    elif plan != "auto":
        raise TpCompileError(
            f"unknown plan {plan!r}",
            where="plan",
            todo='give "auto", "hf", "hf-ep", a Plan, or a dict of rules',
        )
    return Rules(), {}


def example_or_default(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Keywords,
    dynamic: Dynamic = True,
    *,
    planning: bool = False,
) -> dict[str, Any] | None:
    if kwargs == "generate":
        kwargs = prompt_call(model)
    example = bind_call(model, args, kwargs) if args or kwargs else _default(model, planning)
    check_dynamic(model, dynamic, example)
    return example


def _default(model: nn.Module, planning: bool) -> dict[str, Any] | None:
    default = default_example(model)
    if default is None:
        return None
    if planning and "use_cache" in inspect.signature(model.forward).parameters:
        default["use_cache"] = False  # caches come layer by layer, and keep repeated layers from being shared
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in default.items()}
    return bind_call(model, (), moved)
