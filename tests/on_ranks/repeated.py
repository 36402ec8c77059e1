"""What the ranks do in ``test_repeated_layers``: a model with more layers than are captured."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.helpers.toys import Mlp

LAYERS = 8


def deep() -> Any:
    """A small model with the same weights on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 52, "num_attention_heads": 4, "head_dim": 8}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=67, num_hidden_layers=LAYERS, num_key_value_heads=2, **sizes)
    ).eval()


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| / max |reference|."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-20))


def compiled_gradients() -> dict[str, Any]:
    """Errors of the loss, the logits and the worst gradient, compiled, and how the program came about."""
    model = deep()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    call = {"input_ids": ids, "labels": ids, "use_cache": False}
    tpcompile.parallelize(model, mesh, example_kwargs=call, dynamic=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [each(**call) for each in (compiled, whole)]
    for result in results:
        (result.loss + result.logits.square().mean()).backward()
    expected, layout = dict(whole.named_parameters()), model.plan.layout
    gradients = [
        error(p.grad.to_local(), layout.shard(name, expected[name].grad, dist.get_rank()))
        for name, p in model.named_parameters()
    ]
    (program,) = model.programs
    outlined = program.outlined
    calls = 0 if outlined is None else len(outlined[0].graph.find_nodes(op="call_module"))
    errors = {name: error(*(result[name] for result in results)) for name in ("loss", "logits")}
    return {**errors, "gradients": max(gradients), "calls": calls}


class Residual(nn.Module):
    """What it hands on is a sum with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.mlp(x)
        return y


def divided_between_layers() -> float:
    """A plan that leaves what layers hand on divided: the last one's is gathered, as the model's result."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(Residual() for _ in range(LAYERS)))
    x = torch.randn(3, 5, 12)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    pins = {"*.up": tpcompile.Shard(1), "*.down": tpcompile.Shard(0)}
    model = tpcompile.parallelize(copy.deepcopy(whole), mesh, (x,), plan=pins)
    return error(model(x), whole(x))


def planned_unlike() -> tuple[float, float, str]:
    """Layers of which the first two are not divided alike: errors of result and gradients, and notes."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(32, 32) for _ in range(LAYERS)))
    x = torch.randn(64, 32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = tpcompile.parallelize(copy.deepcopy(whole), mesh, (x,), dynamic=False)
    results = [each(x) for each in (model, whole)]
    for y in results:
        y.square().mean().backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    gradients = [error(p.grad.full_tensor(), q.grad) for p, q in pairs]
    return error(*results), max(gradients), "\n".join(model.programs[0].captured.notes)


def tokens() -> dict[str, Any]:
    """Greedy tokens and hidden states, whose programs have inputs and results per layer."""
    model = deep()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(2))
    tpcompile.parallelize(model, mesh)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        equal = torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
        call = {"input_ids": ids, "use_cache": False, "output_hidden_states": True}
        states = [each(**call).hidden_states for each in (model, whole)]
    notes = [note for program in model.programs for note in program.captured.notes]
    return {
        "equal": equal,
        "states": max(error(a, b) for a, b in zip(*states, strict=True)),
        "one by one": any("one by one" in note for note in notes),
    }
