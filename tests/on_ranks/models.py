"""What the ranks do in ``test_spmd_models``: functions that travel to the processes by their import path."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tpcompile
from tests.helpers import families
from tpcompile.ir.torch_internals import TorchDispatchMode

CAPTURED = (2, 16)
OTHER = (3, 19)


def mesh() -> DeviceMesh:
    """All ranks as one axis, over gloo: ranks may share a card, which NCCL refuses."""
    return init_device_mesh(
        families.device().type,
        (dist.get_world_size(),),
        mesh_dim_names=("tp",),
        backend_override={"tp": "gloo"},
    )


def build(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A family or an edge case, with other fields of its configuration if given; the same on every rank."""
    if name in families.FAMILIES:
        return families.build(name, dtype, **fields)
    return families.EDGE_CASES[name](dtype=dtype, **fields)


def call(name: str, sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of a family or an edge case."""
    if name in families.FAMILIES:
        return families.inputs(name, *sizes, dtype)
    return families.causal_inputs(*sizes)


def error(mine: Any, theirs: Any) -> float:
    """max |difference| / max |reference| over all tensors of an output."""
    pairs = zip(families.tensors(mine).items(), families.tensors(theirs).items(), strict=True)
    worst = 0.0
    for (name, x), (other, y) in pairs:
        assert name == other and x.shape == y.shape
        worst = max(worst, float((x.double() - y.double()).abs().max() / y.double().abs().max()))
    return worst


def gradient_error(whole: nn.Module, sharded: Any) -> float:
    """The worst error of a trained parameter's gradient."""
    theirs, mine = dict(whole.named_parameters()), dict(sharded.named_parameters())
    return max(error(p.grad.full_tensor(), theirs[name].grad) for name, p in mine.items() if p.requires_grad)


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def forward(name: str, backend: str = "", fields: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Errors of a forward as captured and at other sizes, and whether the state dict comes back."""
    model = build(name, **fields)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call(name, CAPTURED))
    # Sizes are left open from the beginning: Inductor's compiler takes most of the time.
    run = torch.compile(sharded, fullgraph=True, dynamic=True, backend=backend) if backend else sharded
    found: dict[str, Any] = {}
    with torch.no_grad():
        for label, sizes in (("captured", CAPTURED), ("other", OTHER)):
            mine, theirs = run(**call(name, sizes)), whole(**call(name, sizes))
            found[label] = error(mine, theirs)
            found["type"] = type(mine) is type(theirs)
    state, expected = sharded.full_state_dict(), whole.state_dict()
    found["state"] = state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )
    found["programs"] = len(sharded.programs)
    found["devices"] = {tensor.device.type for tensor in sharded.state_dict().values()}
    return found


def half(name: str) -> tuple[float, float]:
    """Distances from the float32 result: of the sharded bf16 model, and of the whole bf16 model."""
    exact = build(name, num_hidden_layers=1)
    rounded = build(name, torch.bfloat16, num_hidden_layers=1)
    whole = copy.deepcopy(rounded)
    sharded = tpcompile.parallelize(rounded, mesh(), example_kwargs=call(name, CAPTURED))
    with torch.no_grad():
        inputs = call(name, CAPTURED)
        reference = exact(**inputs)
        return error(sharded(**inputs), reference), error(whole(**inputs), reference)


def gradients(name: str) -> float:
    """The worst relative error of any parameter's gradient against the slice of the unsharded one."""
    model = build(name, num_hidden_layers=1)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call(name, CAPTURED))
    output = families.FAMILIES[name].output
    for each in (sharded, whole):
        result = families.tensors(each(**call(name, OTHER)))[output]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
        (result * weights.to(result.device)).sum().backward()
    layout, rank = sharded.plan.layout, dist.get_rank()
    expected = dict(whole.named_parameters())
    worst = 0.0
    for key, param in sharded.named_parameters():
        theirs = expected[key].grad
        assert (param.grad is None) == (theirs is None), f"{key} has a gradient on one side only"
        if param.grad is not None and theirs is not None:
            piece = layout.shard(key, theirs, rank)
            worst = max(
                worst,
                float((param.grad.to_local() - piece).abs().max() / theirs.abs().max().clamp_min(1e-20)),
            )
    return worst


def permuted() -> float:
    """On a mesh that names its ranks in another order: the error of the logits."""
    model = build("two_kv_heads", num_hidden_layers=1)
    whole = copy.deepcopy(model)
    order = DeviceMesh(families.device().type, [3, 1, 0, 2])
    sharded = tpcompile.parallelize(model, order, example_kwargs=call("two_kv_heads", CAPTURED))
    with torch.no_grad():
        return error(sharded(**call("two_kv_heads", OTHER)), whole(**call("two_kv_heads", OTHER)))


def refusals() -> list[str]:
    """Bad requests, each with the message it gets; the model must work afterwards."""
    tp = mesh()
    model = families.build("two_towers")
    example = families.inputs("two_towers", *CAPTURED)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attempts: list[tuple[Any, dict[str, Any]]] = [
        (tp, {"axis": "dp"}),
        (tp, {"plan": {"valve": "colwise"}}),
        (tp, {"plan": {"query": "sideways"}}),
        (tp, {"plan": {"norm": tpcompile.Shard(3)}}),
        (tp, {"plan": "best"}),
        (tp, {"memory": 10}),
        ("not a mesh", {}),
        (tp, {"cost_model": "abacus"}),
    ]
    messages = []
    for where, options in attempts:
        try:
            tpcompile.parallelize(model, where, example_kwargs=example, **options)
            messages.append("accepted")
        except tpcompile.TpCompileError as refusal:
            messages.append(str(refusal))
    try:
        tpcompile.parallelize(model, tp, example_kwargs={"query": example["query"]})
        messages.append("accepted")
    except tpcompile.TpCompileError as refusal:
        messages.append(str(refusal))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), (
        "a refusal changed the model"
    )
    sharded = tpcompile.parallelize(model, tp, example_kwargs=example)
    try:
        tpcompile.parallelize(sharded, tp, example_kwargs=example)
        messages.append("accepted")
    except tpcompile.TpCompileError as refusal:
        messages.append(str(refusal))
    return messages


def ranks_differ() -> str:
    """Rank 1 brings another model with the same weights: every rank must be told, and none may hang."""
    activation = nn.Tanh() if dist.get_rank() == 1 else nn.ReLU()
    model = nn.Sequential(nn.Linear(40, 48), activation, nn.Linear(48, 40))
    try:
        tpcompile.parallelize(model, mesh(), (torch.zeros(3, 40),))
    except tpcompile.TpCompileError as refusal:
        return str(refusal)
    return "accepted"


class Branching(nn.Module):
    """Control flow that depends on data, on one rank only."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 40)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.branch and y.sum() > 0:
            return -y
        return y


def one_rank_fails() -> str:
    """A rank that cannot capture tells the others."""
    try:
        tpcompile.parallelize(Branching(dist.get_rank() == 1), mesh(), (torch.zeros(3, 40),))
    except tpcompile.TpCompileError as refusal:
        return str(refusal)
    return "accepted"


def fixed_shapes() -> tuple[str, int]:
    """With ``dynamic=False`` another shape is refused."""
    example = families.inputs("two_towers", *CAPTURED)
    model = families.build("two_towers")
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, dynamic=False)
    try:
        sharded(**families.inputs("two_towers", *OTHER))
    except tpcompile.TpCompileError as refusal:
        return str(refusal), len(sharded.programs)
    return "accepted", len(sharded.programs)


def programs() -> dict[str, Any]:
    """Other signatures are captured over the same weights; compile asks for that beforehand."""
    model = build("llama", num_hidden_layers=1)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call("llama", CAPTURED))
    masked = call("llama", CAPTURED)
    masked["attention_mask"] = torch.ones_like(masked["input_ids"])
    masked["attention_mask"][0, :5] = 0
    found: dict[str, Any] = {}
    try:
        with torch.no_grad():
            torch.compile(sharded, fullgraph=True, backend="eager")(**masked)
        found["compile"] = "accepted"
    except Exception as refusal:
        found["compile"] = str(refusal)
    torch._dynamo.reset()
    sharded.capture(**masked)
    states = call("llama", OTHER) | {"output_hidden_states": True}
    with torch.no_grad():
        found["masked"] = error(sharded(**masked), whole(**masked))
        found["hidden"] = error_of_tuple(sharded(**states).hidden_states, whole(**states).hidden_states)
        found["compiled"] = error(
            torch.compile(sharded, fullgraph=True, backend="eager")(**masked), whole(**masked)
        )
    found["programs"] = [str(p) for p in sharded.programs]
    return found


def error_of_tuple(mine: Any, theirs: Any) -> float:
    """The worst error over a tuple of tensors."""
    return max(error(x, y) for x, y in zip(mine, theirs, strict=True))


def saved_plan(path: str) -> dict[str, Any]:
    """A plan saved by rank 0, loaded by all, gives the same weights and results."""
    model = build("phi3", num_hidden_layers=1)
    whole = copy.deepcopy(model)
    first = tpcompile.parallelize(copy.deepcopy(model), mesh(), example_kwargs=call("phi3", CAPTURED))
    if dist.get_rank() == 0:
        first.plan.save(path)
    dist.barrier()
    loaded = tpcompile.Plan.load(path)
    second = tpcompile.parallelize(model, mesh(), example_kwargs=call("phi3", CAPTURED), plan=loaded)
    with torch.no_grad():
        worst = error(second(**call("phi3", OTHER)), whole(**call("phi3", OTHER)))
    same = loaded.layout == first.plan.layout == second.plan.layout
    return {"error": worst, "same": same, "text": str(loaded)}
