"""What the ranks do in ``test_submodules``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import tpcompile
from tests.helpers import families
from tests.helpers.toys import Attention
from tests.on_ranks.models import call, error, mesh

F64 = torch.float64


def parts_of_llama() -> dict[str, Any]:
    """Errors of submodules called on their own, how many programs they took, and what else must hold."""
    model = families.build("llama", F64)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call("llama", (2, 16)))
    ids = families.token_ids(3, 19)
    states = torch.randn(3, 19, 40, dtype=F64, generator=torch.Generator().manual_seed(1))
    names = ("model.embed_tokens", "lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj")
    found: dict[str, Any] = {}
    seen: list[str] = []
    sharded.model.register_forward_hook(lambda *_: seen.append("model"))
    with torch.no_grad():
        for name in names:
            x = ids if "embed" in name else states
            found[name] = error(sharded.get_submodule(name)(x), whole.get_submodule(name)(x))
        for sizes in ((3, 19), (2, 5)):  # the second call uses the first one's program
            mine, theirs = (m.model(families.token_ids(*sizes), use_cache=False) for m in (sharded, whole))
            found[f"model{sizes}"] = error(mine, theirs)
        compiled = torch.compile(sharded.model, fullgraph=True, backend="eager")
        found["compiled"] = error(compiled(ids, use_cache=False), whole.model(ids, use_cache=False))
        found["norm"] = error(sharded.model.norm(states), whole.model.norm(states))
        found["whole call"] = error(sharded(**call("llama", (2, 7))), whole(**call("llama", (2, 7))))
    programs = [program.entry for program in sharded.programs]
    assert programs == ["", *names, "model"], programs
    assert seen == ["model"] * 4, seen  # also in the call of the whole model
    assert sharded.plan is sharded.programs[0].plan
    assert type(sharded.lm_head).__name__ == "Linear" and isinstance(sharded.lm_head, nn.Linear)
    return found


def gradients_of_parts() -> float:
    """The worst error of gradients through submodules with python in between, input gradients included."""
    model = families.build("llama", F64)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call("llama", (2, 16)))
    inputs = []
    for each in (sharded, whole):
        x = torch.randn(3, 19, 40, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        inputs.append(x)
        (each.lm_head(each.model.layers[0].mlp(x).tanh()) ** 2).sum().backward()
    worst = error(inputs[0].grad, inputs[1].grad)
    expected = dict(whole.named_parameters())
    for key, param in sharded.named_parameters():
        theirs = expected[key].grad
        assert (param.grad is None) == (theirs is None), key
        if param.grad is not None and theirs is not None:
            worst = max(
                worst, error(param.grad.to_local(), sharded.plan.layout.shard(key, theirs, mesh().get_rank()))
            )
    return worst


class TwoUses(nn.Module):
    """One of two attentions, of which the second has its projections in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(False), Attention(True)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        y: Tensor = self.second(x) if again else self.first(x)
        return y


def packed_later() -> dict[str, Any]:
    """A packed weight that only a later program uses: errors, whether it comes back, and how it lies."""
    torch.manual_seed(0)
    model, x = TwoUses().double(), torch.randn(2, 7, 20, dtype=F64)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), (x,))
    errors = [error({"y": sharded(x, **call)}, {"y": whole(x, **call)}) for call in ({}, {"again": True}, {})]
    state = sharded.full_state_dict()
    return {
        "error": max(errors),
        "state": all(torch.equal(state[name], value) for name, value in whole.state_dict().items()),
        "shape": tuple(model.second.qkv.weight.to_local().shape),
        "collectives": [c.kind for c in sharded.programs[1].plan.collectives],
    }


class Adapter(nn.Module):
    """Wraps a layer, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 1
        return y


def replaced_layers() -> list[str]:
    """What happens when layers of a sharded model are replaced."""
    model = families.build("llama")
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call("llama", (2, 16)))

    def wrap_projection() -> None:
        attention = sharded.model.layers[0].self_attn
        attention.q_proj = Adapter(attention.q_proj)

    def replace_layer() -> None:
        sharded.model.layers[1] = Adapter(sharded.model.layers[1])

    def replace_head() -> None:
        sharded.lm_head = nn.Linear(40, 300)

    messages = []
    for change in (wrap_projection, replace_layer, replace_head):
        try:
            change()
            messages.append("accepted")
        except tpcompile.TpCompileError as refusal:
            messages.append(str(refusal))
    return messages
