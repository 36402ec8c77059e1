"""What the ranks do in ``test_axes``: a tensor axis beside a data axis, or beside a pipeline's."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.nn.parallel import DistributedDataParallel

import tpcompile
from tests.on_ranks.models import error
from tpcompile import checkpoint

STEPS, BATCHES = 4, 4
"""Steps of a run, and the batches of each, which replicas share."""


class Block(nn.Module):
    """Attention over four heads, and an MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (part(y).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        z: Tensor = x + self.down(F.silu(self.up(self.second(x))))
        return z


class Toy(nn.Module):
    """A decoder of few blocks, and its loss."""

    def __init__(self, width: int = 16, words: int = 24, blocks: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return token_loss(self.head(x), ids)


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of predicting each token from those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches() -> Tensor:
    """Token ids by step and batch: each step is one of the gradients' mean over its batches."""
    return torch.randint(24, (STEPS, BATCHES, 3, 7), generator=torch.Generator().manual_seed(1))


@functools.cache
def whole_run() -> tuple[nn.Module, Tensor]:
    """The unsharded model after all steps; its losses by step and batch."""
    model, losses = Toy().double(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in batches():
        losses.append(torch.stack([model(ids) for ids in step]))
        losses[-1].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model, torch.stack(losses).detach()


class Run:
    """A sharded model that is trained in one of torch's ways over the other axis.

    Args:
        kind: "ddp", "whole" or "layers" (FSDP2 of the model, or of each block too), "hsdp", or "alone".
        shape: sizes of the mesh: of data and tensor, or of replicas, data and tensor.
        names: of the mesh's axes; those but "replicas" and "data" share the model.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], names: tuple[str, ...] = ()) -> None:
        names = names or ("replicas", "data", "tensor")[-len(shape) :]
        both = init_device_mesh("cpu", shape, mesh_dim_names=names)
        data = both[tuple(name for name in names if name in ("replicas", "data"))]
        shared = tuple(name for name in names if name not in ("replicas", "data"))
        self.kind, self.replicas = kind, data.size()
        self.replica = data.mesh.flatten().tolist().index(both.get_rank())
        self.model: Any = tpcompile.parallelize(
            Toy().double(), both, (batches()[0, 0],), axis=shared, dynamic=False
        )
        self.wrapped: Any = self.model
        if kind == "ddp":
            self.wrapped = DistributedDataParallel(self.model, process_group=data.get_group())
        if kind in ("layers", "hsdp"):
            for block in self.model.blocks:
                fully_shard(block, mesh=data)
        if kind in ("whole", "layers", "hsdp"):
            fully_shard(self.model, mesh=data)
        self.optimizer = torch.optim.AdamW(self.wrapped.parameters(), lr=1e-2)

    @contextlib.contextmanager
    def unsynchronised(self, wanted: bool) -> Iterator[None]:
        """Gradients are added up on this rank only."""
        if self.kind == "ddp" and wanted:
            with self.wrapped.no_sync():
                yield
            return
        if self.kind not in ("ddp", "alone"):
            self.wrapped.set_requires_gradient_sync(not wanted)
        yield

    def train(self, first: int, last: int) -> float:
        """Trains for some steps; how far its losses are from the unsharded model's."""
        worst = 0.0
        for step, expected in zip(batches()[first:last], whole_run()[1][first:last], strict=True):
            mine = range(self.replica, BATCHES, self.replicas)
            for at in mine:
                with self.unsynchronised(at != mine[-1]):
                    loss = self.wrapped(step[at])
                    (loss / len(mine)).backward()
                worst = max(worst, abs(float(loss.detach() - expected[at])))
            nn.utils.clip_grad_norm_(self.wrapped.parameters(), 0.1)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return worst

    def state(self) -> dict[str, Any]:
        """What a checkpoint has."""
        optimizer = checkpoint.sharded_optimizer_state_dict(self.model, self.optimizer)
        return {"model": self.model.sharded_state_dict(), "optimizer": optimizer}

    def load(self, folder: str) -> None:
        """Goes on from a checkpoint."""
        for p in self.model.parameters():
            p.data.zero_()
        state = self.state()
        checkpoint.load(state, checkpoint_id=folder)
        checkpoint.load_sharded_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def data_parallel(folder: str) -> dict[str, dict[str, float]]:
    """Trains in each of torch's ways, and saves on the way: what differs from the unsharded model's.

    All in one launch: what torch finds out for a mesh it keeps for equal ones, whose groups may be gone.
    """
    shapes = {"ddp": (2, 2), "layers": (2, 2), "hsdp": (2, 1, 2)}
    whole, found = whole_run()[0].state_dict(), {}
    for kind, shape in shapes.items():
        run = Run(kind, shape)
        errors = found[kind] = {"before": run.train(0, 2)}
        saving: Any = dcp.async_save(run.state(), checkpoint_id=f"{folder}/{kind}")
        errors["after"] = run.train(2, STEPS)
        saving.result()
        errors["full_state_dict"] = error(run.model.full_state_dict(), whole)
        parts = {name: value.full_tensor() for name, value in run.model.sharded_state_dict().items()}
        errors["sharded_state_dict"] = error(parts, whole)
        gathered = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
        errors["get_model_state_dict"] = error(gathered, whole) if gathered else 0.0
    return found


def resume(wanted: list[tuple[str, str, tuple[int, ...]]], folder: str) -> list[float]:
    """Goes on from checkpoints, in another way and over another mesh: how far losses are off."""
    found = []
    for saved, kind, shape in wanted:
        run = Run(kind, shape)
        run.load(f"{folder}/{saved}")
        found.append(run.train(2, STEPS))
    return found


def resume_unsharded(folder: str) -> float:
    """Goes on without sharding, by torch alone."""
    model, losses = Toy().double(), whole_run()[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    worst = 0.0
    for step, expected in zip(batches()[2:], losses[2:], strict=True):
        found = torch.stack([model(ids) for ids in step])
        found.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, float((found - expected).detach().abs().max()))
    return worst


class Partly(nn.Module):
    """A block that no call uses, and one that only some calls use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused, self.maybe = (Block(16) for _ in range(3))

    def forward(self, x: Tensor, short: bool) -> Tensor:
        x = self.first(x)
        return x if short else self.maybe(x)


def unused_parameters() -> float:
    """``DistributedDataParallel(find_unused_parameters=True)``: how far weights are off."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    xs = torch.randn(2, 3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, model = Partly().double(), Partly().double()
    tpcompile.parallelize(model, both, (xs[0], False), axis="tensor")  # decides on what any call uses
    group = both.get_group("data")
    wrapped = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (whole, wrapped)]
    for short in (False, True, False, True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack([whole(x, short).square().mean() for x in xs]).mean().backward()
        wrapped(xs[both.get_local_rank("data")], short).square().mean().backward()
        names = [[n for n, p in each.named_parameters() if p.grad is None] for each in (whole, model)]
        assert names[0] == names[1] and bool(names[0]), names
        for optimizer in optimizers:
            optimizer.step()
    return error(model.full_state_dict(), whole.state_dict())  # type: ignore[operator]


class Stage(nn.Module):
    """Some of the toy's blocks; with the first its embedding, with the last its head."""

    def __init__(self, toy: Toy, at: int, stages: int) -> None:
        super().__init__()
        self.words = toy.words if at == 0 else nn.Identity()
        size = len(toy.blocks) // stages
        self.blocks = nn.ModuleList(toy.blocks[at * size : (at + 1) * size])
        self.head = toy.head if at == stages - 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def pipelines() -> dict[str, float]:
    """Trains sharded stages by torch's schedules: how far losses and weights are from the whole model's."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
    rank = both.get_local_rank("pipeline")
    return {
        "1F1B": _pipeline(both, [rank], 2, lambda x: Schedule1F1B(x[0], BATCHES, token_loss)),
        "zero bubble": _pipeline(
            both, [rank, 3 - rank], 4, lambda x: ScheduleZBVZeroBubble(x, BATCHES, token_loss)
        ),
    }


def _pipeline(both: DeviceMesh, own: list[int], count: int, schedule: Callable[[list[Any]], Any]) -> float:
    """This rank's stages of so many."""
    whole = Toy(blocks=count).double()
    models: Any = nn.ModuleList(Stage(copy.deepcopy(whole), at, count) for at in own)
    for model in models:
        tpcompile.parallelize(model, both, axis="tensor", dynamic=False)
    group = both.get_group("pipeline")
    stages = [
        PipelineStage(model, at, count, torch.device("cpu"), group=group)
        for model, at in zip(models, own, strict=True)
    ]
    run, worst = schedule(stages), 0.0
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (models, whole)]
    for step in batches()[:2]:
        ids, losses = step.flatten(0, 1), list[Tensor]()
        last = {"target": ids, "losses": losses} if count - 1 in own else {}
        run.step(*([ids] if 0 in own else []), **last)
        expected = torch.stack([whole(part) for part in step])
        expected.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if losses:
            worst = max(worst, float((torch.stack(losses) - expected).detach().abs().max()))
    for model, at in zip(models, own, strict=True):
        worst = max(worst, error(model.full_state_dict(), Stage(whole, at, count).state_dict()))
    return worst
