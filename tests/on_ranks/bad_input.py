"""What the ranks do in ``test_bad_input``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from tests.on_ranks.models import mesh
from tpcompile import Partial, Shard, TpCompileError
from tpcompile.planner.global_program import Pass

X = torch.ones(4, 16)


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        """Another vector."""
        result: Tensor = self.b(self.a(x).relu())
        return result


def refusal(call: Callable[[], Any]) -> str:
    """Whether a call is refused, with all that an error of ours says; else what it does instead."""
    try:
        call()
    except TpCompileError as error:
        lacks = [part for part in ("what", "where", "todo") if not getattr(error, part)]
        return f"lacks {lacks}: {error}" if lacks else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


PARALLELIZE: list[dict[str, Any]] = [
    {"model": None},
    {"model": Two},
    {"example_args": X},
    {"example_args": (X, X, X)},
    {"example_kwargs": [X]},
    {"example_args": (), "example_kwargs": {"y": X}},
    {"plan": "best"},
    {"plan": {"a": Partial()}},
    {"plan": {"c": Shard(0)}},
    {"plan": {5: Shard(0)}},
    {"dynamic": 5},
    {"dynamic": {"y": {0: True}}},
    {"dynamic": {"x": {4: True}}},
    {"compile": 5},
    {"compile": None},
    {"compile": {"mode": "quick"}},
    {"compile": {"backend": 5}},
    {"compile": {"no_such_option": True}},
    {"cost_model": "b3000"},
    {"memory": "1GB"},
    {"memory": math.nan},
    {"memory": 1},
    {"passes": 5},
    {"passes": [5]},
    {"passes": [Pass]},
    {"passes": ["canonicalise"]},
    {"compose": "no"},
    {"compare_calls": 1},
    {"sequence_parallel": "yes"},
    {"checkpointing": 5},
    {"checkpointing": "half"},
    {"checkpointing": ["aten.no_such_operator"]},
    {"timeout": "60"},
    {"timeout": -1.0},
]

FROM_PRETRAINED: list[dict[str, Any]] = [
    {"name_or_path": 5},
    {"name_or_path": ""},
    {"dtype": 5},
    {"dtype": "floaty"},
    {"config": 5},
    {"model_class": 5},
    {"generation_config": 5},
    {"key_mapping": {"(": "x"}},
    {"key_mapping": 5},
    {"variant": "../x"},
    {"variant": 5},
    {"subfolder": None},
    {"trust_remote_code": "yes"},
    {"attn_implementation": 5},
    {"no_such_field": 5},
    {"revision": 5},
    {"memory": "1GB"},
    {"compile": 5},
    {"dynamic": {"y": {0: True}}},
]


def refusals(folder: str) -> list[str]:
    """The answers to bad calls, on all ranks, then on the last one only; ``folder`` has a llama."""
    tp, last = mesh(), dist.get_rank() == dist.get_world_size() - 1
    answers = []
    for wrong, here in _cases(PARALLELIZE, last):
        model = Two()
        before = copy.deepcopy(model.state_dict())
        asked: dict[str, Any] = {"model": model, "mesh": tp, "example_args": (X,)}
        answer = _refusal(tpcompile.parallelize, asked, wrong, here)
        same = type(model) is Two and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        answers.append(answer if same else f"{wrong}: the model was changed")
    for wrong, here in _cases(FROM_PRETRAINED, last):
        asked = {"name_or_path": folder, "mesh": tp}
        answers.append(_refusal(tpcompile.from_pretrained, asked, wrong, here))
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    for axis in (None, "c", 5):
        asked = {"model": Two(), "mesh": grid, "example_args": (X,), "axis": axis}
        answers.append(_refusal(tpcompile.parallelize, asked, {}, False))
    return answers


def _cases(wrong: list[dict[str, Any]], last: bool) -> list[tuple[dict[str, Any], bool]]:
    """Bad arguments, and whether this rank gives them."""
    return [(each, True) for each in wrong] + [(each, last) for each in wrong[::6]]


def _refusal(call: Callable[..., Any], asked: dict[str, Any], wrong: dict[str, Any], here: bool) -> str:
    answer = refusal(lambda: call(**(asked | wrong if here else asked)))
    return answer if answer == "refused" else f"{wrong}: {answer}"
