"""What the ranks do in ``test_hf_plan`` and ``test_expert_parallel``."""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import CAPTURED, OTHER, build, call, error, mesh


def load_exported(folder: str, plan: dict[str, str]) -> tuple[float, list[int]]:
    """Plain transformers loads a checkpoint by an exported plan: the logits' error, and a local shape."""
    ranks = {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    # Its own grouped_mm wants widths that are multiples of 16 bytes.
    options: dict[str, Any] = {"experts_implementation": "batched_mm"}
    with mock.patch.dict(os.environ, ranks | {"WORLD_SIZE": str(dist.get_world_size())}):
        whole = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options).eval()
    call_ = families.causal_inputs(*CAPTURED)
    with torch.no_grad():
        mine, theirs = model(**call_).logits, whole(**call_).logits
    local = model.model.layers[0].self_attn.o_proj.weight.to_local()
    return float((mine - theirs).abs().max() / theirs.abs().max()), list(local.shape)


def with_plan(name: str, plan: Any) -> dict[str, Any]:
    """A sharded family under a plan: errors of logits and gradients, and what its user is told."""
    model = build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call(name, CAPTURED), plan=plan)
    found: dict[str, Any] = {"notes": sharded.plan.notes}
    output = families.FAMILIES[name].output
    losses = []
    for each in (sharded, whole):
        result = families.tensors(each(**call(name, OTHER)))[output]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
        (result * weights).sum().backward()
        losses.append(result.detach())
    found["error"] = error({output: losses[0]}, {output: losses[1]})
    expected = dict(whole.named_parameters())
    worst = 0.0
    for key, param in sharded.named_parameters():
        theirs = expected[key].grad
        assert (param.grad is None) == (theirs is None), f"{key} has a gradient on one side only"
        if theirs is not None and param.grad is not None:
            piece = sharded.plan.layout.shard(key, theirs, dist.get_rank())
            worst = max(
                worst,
                float((param.grad.to_local() - piece).abs().max() / theirs.abs().max().clamp_min(1e-20)),
            )
    found["gradients"] = worst
    return found
