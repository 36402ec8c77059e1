"""What the ranks do in ``test_full_states``: torch's state helpers, with each of their options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import tpcompile
from tests.on_ranks.models import mesh
from tpcompile.weights.sharded_parameter import ShardedParameter

IDS = torch.arange(8).reshape(2, 4)
OPTIONS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "on the cpu": {"cpu_offload": True},
    "without frozen ones": {"ignore_frozen_params": True},
    "full, without frozen ones": {"full_state_dict": True, "ignore_frozen_params": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "full and flat": {"full_state_dict": True, "flatten_optimizer_state_dict": True},
}


class Net(nn.Module):
    """With tied, frozen, packed and unevenly divided weights, a number, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 12), nn.Linear(12, 10, bias=False)
        self.up, self.down, self.frozen = nn.Linear(12, 42), nn.Linear(21, 12), nn.Linear(12, 12)
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        gate, value = self.up(self.frozen(self.embed(ids))).chunk(2, -1)
        y: Tensor = self.head(self.down(torch.relu(gate) * value)) * self.scale.sum() * self.factor
        return y


def _trained(sharded: bool, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: Any = Net().double()
    if sharded:
        model = tpcompile.parallelize(model, mesh(), (IDS,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for shift in range(2):
        model((IDS + shift) % 10).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested states by name."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in _flat(v, f"{name}/{k}").items()}
    return {name: value}


def _differs(mine: Any, theirs: Any) -> list[str]:
    """What is not in both states, or not the same; of what is sharded this rank's part is compared."""
    mine, theirs = _flat(mine), _flat(theirs)
    wrong = sorted(mine.keys() ^ theirs.keys())
    for name in mine.keys() & theirs.keys():
        a, b = mine[name], theirs[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
            if isinstance(a, ShardedParameter):
                a, b = a.to_local(), a.placing.cut(b)
            wrong += [] if torch.allclose(a, b) else [name]
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            wrong.append(name)
    return wrong


def helpers() -> dict[str, Any]:
    """Per way to get or set a state what is wrong with it, or what is said against it."""
    rank = dist.get_rank()
    whole, (model, optimizer) = _trained(False), _trained(True)
    target = _trained(True, 5)
    found: dict[str, Any] = {}

    def case(name: str, do: Callable[[], Any]) -> None:
        try:
            found[name] = do()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def left() -> list[str]:
        return _differs(get_state_dict(*target), get_state_dict(*whole))

    def spoil() -> None:
        with torch.no_grad():
            weights = [value for name, value in target[0].state_dict().items() if name != "frozen.weight"]
            for value in (*weights, *(v for state in target[1].state.values() for v in state.values())):
                value.fill_(0.5)

    def get(asked: StateDictOptions) -> list[str]:
        return _differs(
            get_state_dict(model, optimizer, options=asked), get_state_dict(*whole, options=asked)
        )

    def put(states: tuple[Any, Any], **asked: Any) -> list[str]:
        states = copy.deepcopy(states)  # torch's optimizers keep the tensors that they are given
        spoil()
        options = StateDictOptions(**asked)
        set_model_state_dict(target[0], states[0], options=options)
        set_optimizer_state_dict(*target, states[1], options=options)
        return left()

    for name, asked in OPTIONS.items():
        options = StateDictOptions(**asked)
        case(f"get {name}", lambda options=options: get(options))  # type: ignore[misc]
        if len(asked) > 1 and "flatten_optimizer_state_dict" in asked:
            continue  # torch cannot set such a state of any model
        strict = "ignore_frozen_params" not in asked
        states = get_state_dict(model, optimizer, options=options)
        case(f"set {name}", lambda s=states, a=asked, strict=strict: put(s, strict=strict, **a))  # type: ignore[misc]
    everything = get_state_dict(*whole)
    case("set whole", lambda: put(get_state_dict(*whole)))
    case("set full of another model", lambda: put(get_state_dict(*whole), full_state_dict=True))
    first = everything if rank == 0 else ({}, {})
    case("set first rank's", lambda: put(first, full_state_dict=True, broadcast_from_rank0=True))
    part = get_model_state_dict(whole[0], submodules={whole[0].up})
    case(
        "get of parts",
        lambda: _differs(get_model_state_dict(model, submodules={model.up}), part),
    )
    bare = StateDictOptions(keep_submodule_prefixes=False)
    case(
        "get of parts without prefixes",
        lambda: _differs(
            get_model_state_dict(model, submodules={model.up}, options=bare),
            get_model_state_dict(whole[0], submodules={whole[0].up}, options=bare),
        ),
    )
    asked = StateDictOptions(full_state_dict=True)
    lacks = {key: value for key, value in get_model_state_dict(whole[0]).items() if key != "up.bias"}
    case("lacks", lambda: set_model_state_dict(target[0], dict(lacks), options=asked))
    for name, value in (
        ("a slice", torch.zeros(10, dtype=torch.float64)),
        ("other values", torch.full((42,), float(rank)).double()),
    ):
        other = {**lacks, "up.bias": value}
        case(name, lambda other=other: set_model_state_dict(target[0], other, options=asked))  # type: ignore[misc]
    apart = copy.deepcopy(get_state_dict(*whole))
    apart[1]["state"]["up.bias"]["exp_avg"] = torch.full((42,), float(rank)).double()  # type: ignore[index, call-overload]
    case("other states", lambda: put(apart, full_state_dict=True))
    case("afterwards", lambda: put(get_state_dict(*whole), full_state_dict=True))
    return found
