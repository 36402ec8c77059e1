"""What the ranks do in ``test_randomness``."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import call, error, mesh
from tests.on_ranks.module_life import refusal

DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}


def train() -> dict[str, Any]:
    """A training step of GPT-2 on two ranks, and on one with the same seed: the same dropout and step."""
    model = families.build("gpt2", torch.float64, num_hidden_layers=5, **DROPOUT).train()
    alone = copy.deepcopy(model)
    given = call("gpt2", (3, 7), torch.float64)
    example = call("gpt2", (2, 16), torch.float64)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example)
    single = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    whole = tpcompile.parallelize(alone, single, axis="tp", example_kwargs=example)
    # Ranks that were seeded differently take the first one's seed.
    torch.manual_seed(7)
    theirs = whole(**given).logits
    torch.manual_seed(7 + dist.get_rank())
    mine = sharded(**given).logits
    found: dict[str, Any] = {"forward": error(mine.detach(), theirs.detach())}
    for logits in (mine, theirs):
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
        (logits * weights).sum().backward()
    layout, expected = sharded.plan.layout, dict(whole.named_parameters())
    worst = 0.0
    for key, param in sharded.named_parameters():
        grad = expected[key].grad
        assert param.grad is not None and grad is not None, key
        piece = layout.shard(key, grad, dist.get_rank())
        worst = max(
            worst, float((param.grad.to_local() - piece).abs().max() / grad.abs().max().clamp_min(1e-12))
        )
    found["gradients"] = worst
    before = {k: p.grad.to_local() for k, p in sharded.named_parameters()}
    sharded.zero_grad()
    torch.manual_seed(7)
    (checkpoint(lambda: sharded(**given).logits, use_reentrant=False) * weights).sum().backward()
    found["checkpointed"] = all(
        torch.equal(before[k], p.grad.to_local()) for k, p in sharded.named_parameters()
    )
    with torch.no_grad():
        torch.manual_seed(7)
        found["again"] = torch.equal(sharded(**given).logits, mine)
        found["other"] = not torch.allclose(sharded(**given).logits, mine)
    streams = [n.args[2] for n in sharded.graph_module.graph.nodes if "uniform" in str(n.target)]
    found["layers"] = len(set(streams)) == len(streams) == 1 + 5 * 3
    return found


class Linear(nn.Module):
    """Linear in its second weight, whatever the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)
        self.inner, self.outer = nn.Dropout(0.3), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.down(self.inner(self.up(x))))


@torch.library.custom_op("on_ranks::shifted", mutates_args=())
def shifted(x: Tensor, noise: float) -> Tensor:
    """Without a word about the numbers that it draws."""
    return x + (noise * torch.rand(x.shape) if noise else 1.0)


shifted.register_fake(lambda x, noise: torch.empty_like(x))
shifted.register_autograd(lambda ctx, grad: (grad, None))


class Shifted(nn.Module):
    """Layers with an operator of the user's, and a dropout."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.layers, self.noise = nn.ModuleList(nn.Linear(12, 12) for _ in range(2)), noise

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.ops.on_ranks.shifted(layer(x), self.noise), 0.5, self.training)
        return x


def foreign() -> list[str]:
    """What is said of operators of the user's, with and without noise, recomputed and compiled or not."""
    found, x = [], torch.randn(4, 12)
    for noise in (0.0, 0.5):
        for options in ({}, {"checkpointing": "full", "compile": {"backend": "aot_eager"}}):
            model = tpcompile.parallelize(Shifted(noise), mesh(), (x,), **options)
            before = torch.get_rng_state()
            found += [refusal(lambda model=model: model(x).sum().backward())]  # type: ignore[misc]
            found += [str(torch.equal(torch.get_rng_state(), before))]
            found += [refusal(lambda model=model: model.eval()(x))]  # type: ignore[misc]
    return found


def compiled() -> dict[str, Any]:
    """Dropout under ``torch.compile``: backward has forward's masks, ranks agree, calls differ."""
    torch.manual_seed(3)
    x = torch.randn(64, 64)
    model = Linear().train()
    sharded = tpcompile.parallelize(model, mesh(), example_args=(x,), dynamic=False)
    # Its partitioner decides what is computed again in backward; code for it would take half a minute.
    run = torch.compile(sharded, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.manual_seed(dist.get_rank())
    y = run(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    loss = (y * weights).sum()
    loss.backward()
    # The loss is linear in each weight, so that weight * gradient adds up to it if the masks are the same.
    parts = torch.stack([(w.detach() * w.grad).sum() for w in (sharded.up.weight, sharded.down.weight)])
    everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, y.detach().contiguous())
    return {
        "consistent": float((parts - loss.detach()).abs().max() / loss.detach().abs()),
        "agree": all(torch.equal(other, y) for other in everyone),
        "other": not torch.allclose(run(x), y),
        "rate": float((y == 0).double().mean()),
    }
