"""What the ranks do in ``test_sequence_parallel``."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import CAPTURED, build, call, error, mesh
from tests.on_ranks.randomness import DROPOUT
from tests.on_ranks.repeated import deep
from tpcompile.ir.placements import Filled

SIZES = (CAPTURED, (3, 13), (2, 2), (1, 3))


def divided(program: Any) -> int:
    """How many of a program's values have their positions divided."""
    nodes = program.graph_module.graph.nodes
    return sum(any(isinstance(p, Filled) for p in n.meta.get("placement", ())) for n in nodes)


def worst_gradient(sharded: Any, whole: nn.Module) -> float:
    """The worst relative error of any parameter's gradient against the slice of the unsharded one."""
    worst, expected = 0.0, dict(whole.named_parameters())
    for key, param in sharded.named_parameters():
        theirs = expected[key].grad
        assert param.grad is not None and theirs is not None, key
        piece = sharded.plan.layout.shard(key, theirs, dist.get_rank())
        worst = max(
            worst, float((param.grad.to_local() - piece).abs().max() / theirs.abs().max().clamp_min(1e-20))
        )
    return worst


def _detached(output: Any) -> dict[str, torch.Tensor]:
    return {"logits": output.logits.detach()}


def train(name: str, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Forward and gradients at several sizes, other than captured, shorter than there are ranks."""
    model = build(name, dtype, num_hidden_layers=1)
    whole = copy.deepcopy(model)
    example = call(name, CAPTURED, dtype)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, sequence_parallel=True)
    run = torch.compile(sharded, fullgraph=True, backend="aot_eager") if compiled else sharded
    counters.clear()
    found: dict[str, Any] = {"forward": 0.0, "gradients": 0.0}
    for sizes in SIZES[: 2 if compiled else None]:
        mine, theirs = run(**call(name, sizes, dtype)), whole(**call(name, sizes, dtype))
        found["forward"] = max(found["forward"], error(_detached(mine), _detached(theirs)))
        weights = torch.randn(theirs.logits.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for each, logits in ((sharded, mine.logits), (whole, theirs.logits)):
            each.zero_grad()
            (logits * weights).sum().backward()
        found["gradients"] = max(found["gradients"], worst_gradient(sharded, whole))
    found["divided"], found["notes"] = divided(sharded.programs[0]), sharded.plan.notes
    found["kinds"] = {c.kind for c in sharded.plan.collectives}
    found["graphs"] = counters["stats"]["unique_graphs"]
    return found


def tokens() -> dict[str, Any]:
    """Greedy tokens: a prompt is divided, single tokens are not."""
    model = families.build("llama", num_hidden_layers=1)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(
        model, mesh(), example_kwargs=families.causal_inputs(), sequence_parallel=True
    )
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    found: dict[str, Any] = {"same": True, "steps": 0}
    for cache in ("dynamic", "static"):
        options["cache_implementation"] = cache
        before = len(sharded.programs)
        ids = families.token_ids(2, 7)
        found["same"] &= torch.equal(sharded.generate(ids, **options), whole.generate(ids, **options))
        prompt, step = sharded.programs[before:]
        found[cache] = divided(prompt) > 0
        found["steps"] += divided(step)
        found["note"] = step.plan.notes
    return found


def layers() -> dict[str, Any]:
    """A model with more layers than are captured: compiled; gradients, and all hidden states."""
    model = deep()
    whole = copy.deepcopy(model)
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "use_cache": False}
    tpcompile.parallelize(model, mesh(), example_kwargs=given, sequence_parallel=True, dynamic=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [each(**given).logits for each in (compiled, whole)]
    for logits in results:
        logits.square().mean().backward()
    outlined = model.programs[0].outlined
    found: dict[str, Any] = {
        "logits": error(*({"logits": r.detach()} for r in results)),
        "gradients": worst_gradient(model, whole),
        "calls": 0 if outlined is None else len(outlined[0].graph.find_nodes(op="call_module")),
        "plan": {(c.kind, c.where): c.count for c in model.plan.collectives},
    }
    with torch.no_grad():
        states = [each(**given, output_hidden_states=True).hidden_states for each in (model, whole)]
    found["states"] = max(error({"h": a}, {"h": b}) for a, b in zip(*states, strict=True))
    found["one by one"] = any("one by one" in n for p in model.programs for n in p.captured.notes)
    return found


def dropout() -> dict[str, Any]:
    """A training step of GPT-2 with its dropouts, on all ranks and on one with the same seed."""
    model = families.build("gpt2", torch.float64, num_hidden_layers=1, **DROPOUT).train()
    alone = copy.deepcopy(model)
    example, given = call("gpt2", (2, 16), torch.float64), call("gpt2", (3, 7), torch.float64)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, sequence_parallel=True)
    single = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    whole = tpcompile.parallelize(alone, single, axis="tp", example_kwargs=example)
    losses = []
    for each in (sharded, whole):
        torch.manual_seed(7)
        logits = each(**given).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
        (logits * weights).sum().backward()
        losses.append({"logits": logits.detach()})
    drawn = [n for n in sharded.graph_module.graph.nodes if "uniform" in str(n.target)]
    parts = [n for n in drawn if any(isinstance(p, Filled) for p in n.meta["placement"])]
    return {"forward": error(*losses), "gradients": worst_gradient(sharded, whole), "parts": len(parts)}


def ranks_differ() -> str:
    """One rank asks for it, the other does not."""
    try:
        example = call("llama", CAPTURED)
        ask = dist.get_rank() == 0
        tpcompile.parallelize(build("llama"), mesh(), example_kwargs=example, sequence_parallel=ask)
    except tpcompile.TpCompileError as refusal:
        return str(refusal)
    return "accepted"
