"""What the ranks do in ``test_checkpoint``: functions that travel to the processes by their import path."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import CAPTURED, build, call, mesh
from tpcompile.compile_program import Compiler
from tpcompile.ir.calls import signature_of
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.planner.options import Options
from tpcompile.planner.search.cost import preset
from tpcompile.runtime.module import ShardedModule
from tpcompile.runtime.runtime import Runtime
from tpcompile.runtime.settings import Settings
from tpcompile.weights import dcp as checkpoint
from tpcompile.weights.shard import shard_weights, sharded_class


def shell(name: str, data: dict[str, Any], empty: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model sharded by a layout, without programs, and its local state as it has to be.

    Args:
        name: the model.
        data: its layout, from another process: capturing on every rank would take most of the time. If it is
            for fewer ranks than there are, several groups of ranks hold the model.
        empty: whether the model's own state is overwritten.
    """
    layout, model = WeightLayout.from_json(data), build(name)
    shape = (dist.get_world_size() // layout.ranks, layout.ranks)
    both = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "tp"))
    compiler = Compiler(Options(preset("cpu"), {}), layout.ranks, both, "tp")
    runtime = Runtime(compiler, signature_of(model), type(model), Settings(model), layout)
    shard_weights(model, runtime.weights())
    model._tp = runtime  # type: ignore[assignment]
    model.__class__ = sharded_class(type(model), ShardedModule)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    if empty:
        spoil(model)
    return model, expected


def spoil(model: nn.Module) -> None:
    """Overwrites all state in place."""
    for value in model.state_dict().values():
        value.fill_(77)


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether a model's local state is this, bit by bit."""
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)


def save(name: str, data: dict[str, Any], folder: str) -> int:
    """Saves a sharded model; how many bytes this rank wrote."""
    model, _ = shell(name, data)
    state = model.sharded_state_dict()  # type: ignore[operator]
    dcp.save(state, checkpoint_id=folder)
    return written(folder)


def written(folder: str) -> int:
    """The bytes of this rank's files."""
    dist.barrier()
    mine = f"__{dist.get_rank()}_"
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.startswith(mine))


def load(name: str, data: dict[str, Any], *folders: str) -> list[bool]:
    """Loads checkpoints, by DCP and by ours; whether the local state is right each time."""
    found = []
    for folder in folders:
        for how in (dcp.load, checkpoint.load):
            model, expected = shell(name, data, empty=True)
            how(model.sharded_state_dict(), checkpoint_id=folder)  # type: ignore[operator]
            found.append(same(model, expected))
    return found


def train(folder: str) -> dict[str, Any]:
    """Steps of AdamW with a checkpoint between, restored in place; also what errors and DCP's extras do."""
    model = build("tied")
    model = tpcompile.parallelize(model, mesh(), example_kwargs=call("tied", CAPTURED))
    optimizer = adamw(model)
    for number in range(2):
        step(model, optimizer, number)
    save_training(model, optimizer, folder)
    dcp.async_save(model.sharded_state_dict(), checkpoint_id=f"{folder}/async").result()
    after_two = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, optimizer, 2)
    after_three = {key: value.clone() for key, value in model.state_dict().items()}
    spoil(model)
    resumed = adamw(model)  # its gradients are there still, its state is not
    load_training(model, resumed, folder)
    found = {"restored": same(model, after_two)}
    step(model, resumed, 2)
    found["resumed"] = same(model, after_three)
    dcp.load(model.sharded_state_dict(), checkpoint_id=f"{folder}/async")
    found["async"] = same(model, after_two)
    found["full"] = {k: v.clone() for k, v in model.full_state_dict().items()}
    found["tied once"] = len(model.state_dict()) - len(model.sharded_state_dict(tied=False))
    found["errors"] = errors(model, folder)
    found["unchanged"] = same(model, after_two)
    found["other states"] = refuse_states(model)
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer in which nothing is at its default."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step; the batch depends on its number."""
    ids = families.token_ids(CAPTURED[0], CAPTURED[1] - number)
    loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def save_training(model: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Model and optimizer in one checkpoint."""
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": checkpoint.sharded_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)


def load_training(model: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """What ``save_training`` wrote, at any number of ranks."""
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": checkpoint.sharded_optimizer_state_dict(model, optimizer),
    }
    checkpoint.load(state, checkpoint_id=folder)
    checkpoint.load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])


def errors(model: Any, folder: str) -> list[str]:
    """What bad requests answer on this rank."""
    state = model.sharded_state_dict()
    norm = "model.norm.weight"
    other = {key: value for key, value in state.items() if key != norm}
    dcp.save(other, checkpoint_id=f"{folder}/lacks")
    dcp.save(other | {norm: torch.ones(7)}, checkpoint_id=f"{folder}/shape")
    dcp.save(other | {norm: "a text"}, checkpoint_id=f"{folder}/text")
    first = state if dist.get_rank() == 0 else other
    attempts: list[Any] = [
        lambda: checkpoint.load(state, checkpoint_id=f"{folder}/lacks"),
        lambda: checkpoint.load(state, checkpoint_id=f"{folder}/shape"),
        lambda: checkpoint.load(state, checkpoint_id=f"{folder}/text"),
        lambda: checkpoint.load(state, checkpoint_id=f"{folder}/nowhere"),
        lambda: checkpoint.load(first, checkpoint_id=f"{folder}/lacks"),
        lambda: dcp.load(state, checkpoint_id=f"{folder}/lacks"),
        lambda: dcp.load(state, checkpoint_id=f"{folder}/shape"),
        lambda: checkpoint.sharded_optimizer_state_dict(nn.Linear(2, 2), adamw(model)),
        lambda: damaged(model, f"{folder}/async"),
    ]
    return [answer(attempt) for attempt in attempts]


def damaged(model: Any, folder: str) -> None:
    """Loads a checkpoint of which one file is cut off."""
    if dist.get_rank() == 0:
        os.truncate(f"{folder}/__0_0.distcp", 64)
    dist.barrier()
    checkpoint.load(model.sharded_state_dict(), checkpoint_id=folder)


def other_states(good: dict[str, Any]) -> list[dict[str, Any]]:
    """Optimizer states that are not this optimizer's."""
    state, (group,) = good["state"], good["param_groups"]
    name, own = next(iter(state.items()))

    def values(**new: Any) -> dict[str, Any]:
        return {"state": {**state, name: {**own, **new}}, "param_groups": [group]}

    def groups(*new: Any) -> dict[str, Any]:
        return {"state": state, "param_groups": [*new]}

    fewer = {key: value for key, value in state.items() if key != name}
    return [
        *(
            {},
            {"state": {}},
            {"param_groups": []},
            {"state": None, "param_groups": None},
            {**good, "more": 1},
        ),
        *({"state": fewer, "param_groups": [group]}, {"state": {**state, "x": {}}, "param_groups": [group]}),
        *(
            {"state": [state], "param_groups": [group]},
            {"state": {**state, name: 3}, "param_groups": [group]},
        ),
        *(values(exp_avg=torch.zeros(3)), values(exp_avg="a"), values(step=torch.zeros(3)), values(more=1)),
        *(groups(), groups(group, group), groups(3), groups({}), groups({**group, "params": ["nowhere"]})),
        *(groups({**group, "lr": [1]}), groups({k: v for k, v in group.items() if k != "lr"})),
    ]


def refuse_states(model: Any) -> list[str]:
    """What is said of states that are not an optimizer's; they are refused on every rank, for any rank's."""
    optimizer = adamw(model)
    states = other_states(checkpoint.sharded_optimizer_state_dict(model, optimizer))
    before = {p: dict(values) for p, values in optimizer.state.items()}
    load = checkpoint.load_sharded_optimizer_state_dict
    found = [answer(lambda state=state: load(model, optimizer, state)) for state in states]  # type: ignore[misc]
    good = checkpoint.sharded_optimizer_state_dict(model, optimizer)
    found.append(answer(lambda: load(model, optimizer, good if dist.get_rank() else {})))
    fresh = adamw(model)
    found.append(answer(lambda: load(model, fresh, {})))
    kept = all(optimizer.state[p][k] is v for p, values in before.items() for k, v in values.items())
    assert kept and not fresh.state and answer(lambda: load(model, fresh, good)) == "accepted"
    return found


def answer(attempt: Any) -> str:
    """The error of an attempt."""
    try:
        attempt()
    except BaseException as error:  # DCP's own is not an Exception
        return f"{type(error).__name__}: {error}"
    return "accepted"


def resume_elsewhere(data: dict[str, Any], folder: str) -> list[bool]:
    """Loads ``train``'s optimizer at another number of ranks; whether it is right against plain torch."""
    model, _ = shell("tied", data, empty=True)
    optimizer = adamw(model)
    load_training(model, optimizer, folder)
    layout, rank = WeightLayout.from_json(data), dist.get_rank()
    whole = build("tied")
    reference = adamw(whole)
    load_whole(whole, reference, folder)
    names = {id(p): name for name, p in whole.named_parameters()}
    expected = {names[id(p)]: entry for p, entry in reference.state.items()}
    found = []
    for name, param in model.named_parameters():
        mine, theirs = optimizer.state[param], expected[name]
        found += [torch.equal(mine["step"], theirs["step"])]
        for key in ("exp_avg", "exp_avg_sq"):
            found.append(torch.equal(mine[key].to_local(), layout.shard(name, theirs[key], rank)))
        found.append(torch.equal(param.to_local(), layout.shard(name, whole.get_parameter(name), rank)))
    return found


def load_whole(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """The same with torch alone, for a model that is not sharded."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
