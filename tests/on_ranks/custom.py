"""What the ranks do in ``test_custom_strategies``."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tpcompile
from tests.helpers import custom_layers, families
from tests.on_ranks.models import call, error, mesh
from tests.on_ranks.module_life import refusal


class Packed(nn.Module):
    """A gated MLP with one packed projection, and an odd width behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 20)
        self.gate_up = nn.Linear(20, 48)
        self.down = nn.Linear(24, 12)
        self.odd = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.inner(x)).chunk(2, -1)
        return self.odd(self.down(nn.functional.silu(gate) * up))


class Shared(nn.Module):
    """Has a layer under two names, and calls it by both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(nn.functional.silu(self.inner(x)))
        return y


def build(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model in float64 with the example's and another call."""
    torch.manual_seed(0)
    if name in ("packed", "shared"):
        one, two = torch.randn(3, 5, 12).double(), torch.randn(2, 7, 12).double()
        return {"packed": Packed, "shared": Shared}[name]().double(), {"x": one}, {"x": two}
    layers, _, name = name.rpartition(" layers of ")
    if layers:
        model = families.build(name, torch.float64, num_hidden_layers=int(layers))
    else:
        model = families.EDGE_CASES[name](dtype=torch.float64, num_hidden_layers=1)
    return model, call(name, (2, 16), torch.float64), call(name, (3, 19), torch.float64)


def equal(name: str, plan: dict[str, Any], compiled: bool = False) -> dict[str, Any]:
    """Errors of forward and gradients against the unsharded model, and whether the weights come back."""
    custom_layers.register()
    model, example, other = build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, plan=plan)
    run = torch.compile(sharded, fullgraph=True, backend="aot_eager") if compiled else sharded
    mine, theirs = run(**other), whole(**other)
    found: dict[str, Any] = {"forward": error(mine, theirs), "text": str(sharded.plan)}
    for result in (mine, theirs):
        result = next(iter(families.tensors(result).values()))
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=result.dtype)
        (result * weights).sum().backward()
    layout, rank = sharded.plan.layout, dist.get_rank()
    expected = dict(whole.named_parameters())
    worst = 0.0
    for key, param in sharded.named_parameters():
        grad = expected[key].grad
        assert param.grad is not None and grad is not None, key
        piece = layout.shard(key, grad, rank)
        worst = max(worst, float((param.grad.to_local() - piece).abs().max() / grad.abs().max()))
    found["gradients"] = worst
    state, full = sharded.full_state_dict(), whole.state_dict()
    found["state"] = all(torch.equal(state[k], full[k]) for k in full)
    found["programs"] = len(sharded.programs)
    found["plain"] = all(type(p.to_local()) is nn.Parameter for p in sharded.parameters())
    return found


def halved() -> tuple[float, list[str]]:
    """A strategy that computes with the values runs, but its weights cannot be given back, nor trained."""
    custom_layers.register()
    model, example, other = build("packed")
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, plan={"inner": "halved_custom"})
    with torch.no_grad():
        sharded.inner.bias.zero_()  # the bias is halved and doubled as well
        whole.inner.bias.zero_()
        wrong = error(sharded(**other), whole(**other))
    weight, slopes = sharded.inner.weight, torch.autograd.grad
    sharded(**other).sum().backward()
    acts = (
        lambda: sharded.full_state_dict(),
        lambda: weight.detach().add_(1),
        lambda: nn.utils.clip_grad_norm_([weight], 1.0),
        lambda: torch.optim.AdamW([weight]).step(),
        lambda: slopes(sharded(**other).sum(), [weight]),
    )
    return wrong, [refusal(act) for act in acts]


def norms() -> dict[str, float]:
    """Errors of norms and sums of what a custom strategy has cut out."""
    custom_layers.register()
    whole, example, _ = build("packed")
    plan = {"odd": "gathering_custom"}
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), example_kwargs=example, plan=plan)
    assert sharded.odd.weight.placing.param.selection is not None
    for model in (whole, sharded):
        model(**example).square().sum().backward()
    asked: dict[str, Callable[[Any], Tensor]] = {
        "sum": lambda m: m.odd.weight.sum(),
        "largest": lambda m: m.odd.weight.norm(float("inf")),
        "clipped": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    }
    params = list(sharded.parameters())
    said = refusal(lambda: nn.utils.clip_grad_norm_(params[dist.get_rank() :], 0.1))
    assert "the ranks have different norms" in said  # before any of them is gathered
    return {name: error(ask(sharded).detach(), ask(whole).detach()) for name, ask in asked.items()}


class Scaled(nn.Linear):
    """A module with python state: a number, a tensor, or a function."""

    state: Any

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.state() if callable(self.state) else self.state)


def own_state() -> dict[str, float]:
    """Errors where modules in repeated layers have other python state than their like, or come to have it."""
    custom_layers.register()
    wrong = {}
    states: dict[str, Callable[[int], Any]] = {
        "tensor": lambda layer: torch.tensor(1.0 + layer),
        "function": lambda layer: lambda: 1.0 + layer,
        "later": lambda layer: 2.0,
    }
    for name, state in states.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(Scaled(8, 16), nn.Linear(16, 8)) for _ in range(6)))
        for layer, block in enumerate(model.double()):
            block[0].state = state(layer)
        whole, x = copy.deepcopy(model), torch.randn(3, 8).double()
        sharded = tpcompile.parallelize(model, mesh(), (x,), plan={"*.0": "colwise_custom"})
        wrong[name] = error(sharded(x), whole(x))
        if name == "later":
            for changed in (4, 0):
                sharded[changed][0].state = whole[changed][0].state = 5.0 + changed
                wrong[f"{name} {changed}"] = error(sharded(x), whole(x))
    return wrong


def loaded(folder: str, other: str) -> tuple[float, bool]:
    """A checkpoint read by slices under custom strategies, one of which cuts unevenly, and written again."""
    custom_layers.register()
    whole = AutoModelForCausalLM.from_pretrained(folder)
    plan = {
        "model.layers.*.self_attn.q_proj": "colwise_custom",
        "model.layers.*.mlp.gate_proj": "gathering_custom",
    }
    sharded = tpcompile.from_pretrained(folder, mesh(), plan=plan)
    assert sharded.plan.layout.params["model.layers.0.mlp.gate_proj.weight"].selection is not None
    given = families.inputs("llama", 3, 19)
    with torch.no_grad():
        wrong = error(sharded(**given), whole(**given))
    sharded.save_pretrained(other)
    back = AutoModelForCausalLM.from_pretrained(other).state_dict()
    return wrong, all(torch.equal(back[k], v) for k, v in whole.state_dict().items())


def refusals() -> list[str]:
    """Bad strategies, each with the message it gets; the model stays as it is."""
    custom_layers.register()
    twice, messages = {"inner": "colwise_custom", "again": "gathering_custom"}, []
    said = refusal(lambda: tpcompile.parallelize(Shared(), mesh(), (torch.randn(3, 12),), plan=twice))
    assert "again, which is inner" in said, said
    plans = [
        {"inner": "no_methods_custom"},
        {"inner": "nothing_custom"},
        {"inner": "wrong_type_custom"},
        {"inner": "never_registered"},
        {"iner": "colwise_custom"},
        {"gate_up": "contiguous_custom"},
        {"odd": "colwise_custom"},
    ]
    model, example, _ = build("packed")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for plan in plans:
        try:
            tpcompile.parallelize(model, mesh(), example_kwargs=example, plan=plan)
            messages.append("accepted")
        except tpcompile.TpCompileError as error:
            messages.append(str(error))
    assert type(model) is Packed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    sharded = tpcompile.parallelize(
        model, mesh(), example_kwargs=example, plan={"inner": "wrong_shape_custom"}
    )
    try:
        sharded(**example)
        messages.append("accepted")
    except tpcompile.TpCompileError as error:
        messages.append(str(error))
    return messages


DOCUMENT = """
from tpcompile import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, tp_plan="auto")
print(model._tp_plan)
automatic = model

tp_plan = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, tp_plan=tp_plan)
print(model._tp_plan)
manual = model

from tpcompile import ParallelInterface

ParallelInterface.register_strategy("colwise_of_the_document", ColwiseParallel)
tp_plan = {"model.layers.*.self_attn.q_proj": "colwise_of_the_document"}
model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, tp_plan=tp_plan)
custom = model

inputs = ids.to(model.device)
outputs = model(inputs)
"""


def document(folder: str) -> dict[str, Any]:
    """Runs the document's snippets, as written but for the import; distances from transformers' model."""
    ids = families.token_ids(2, 9)
    names: dict[str, Any] = {"torch": torch, "model_id": folder, "ids": ids}
    names["ColwiseParallel"] = custom_layers.ColwiseParallel
    with redirect_stdout(io.StringIO()) as printed:
        exec(DOCUMENT, names)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        reference = exact(ids)
        found = {n: error(names[n](ids), reference) for n in ("automatic", "manual", "custom")}
        found["whole"] = error(whole(ids), reference)
    assert "colwise" in printed.getvalue()
    assert names["manual"]._tp_plan["model.layers.*.self_attn.o_proj"] == "rowwise"
    try:
        names["AutoModelForCausalLM"].from_pretrained(folder, tp_size=3)
    except tpcompile.TpCompileError as refusal:
        assert "tp_size is 3" in str(refusal)
        return found
    raise AssertionError("another size was accepted")
