"""What the ranks do in ``test_recompute``."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import tpcompile
from tests.on_ranks.models import Calls, error, gradient_error, mesh
from tpcompile.ir.torch_internals import functorch_config

F64 = torch.float64
BACKEND = "aot_eager_decomp_partition"  # all of torch's compiler but code
WIDE, INNER = 32, 97  # which ranks have unequal parts of: what they recompute must not depend on that
X = (4, 6, WIDE)


class Block(nn.Module):
    """A block without attention; everything in it but its input is worth recomputing."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDE, dtype=F64)
        self.up, self.down = nn.Linear(WIDE, INNER, dtype=F64), nn.Linear(INNER, WIDE, dtype=F64)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.drop(self.down(F.gelu(self.up(self.norm(x))))))


class Tower(nn.Module):
    """Blocks, which forward itself may checkpoint.

    Args:
        layers: how many.
        own: torch's ``use_reentrant``, where forward checkpoints.
        drop: the dropout of the blocks.
    """

    def __init__(self, layers: int = 3, own: bool | None = None, drop: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDE, WIDE, dtype=F64)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(layers))
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.own is None else checkpoint(block, x, use_reentrant=self.own)
        return x


class ByHand(nn.Module):
    """A rank's part of a ``Tower`` as people write it, its blocks under torch's checkpointing."""

    def __init__(self, whole: Tower) -> None:
        super().__init__()
        self.first, self.blocks = whole.first, whole.blocks
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD.group_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(self._block, block, x, use_reentrant=False)
        return x

    def _block(self, block: Any, x: Tensor) -> Tensor:
        rows = slice(self.rank * INNER // self.ranks, (self.rank + 1) * INNER // self.ranks)
        y = torch.ops.tpcompile.copy_to_ranks(block.norm(x), self.group)
        y = F.linear(
            F.gelu(F.linear(y, block.up.weight[rows], block.up.bias[rows])), block.down.weight[:, rows]
        )
        return x + torch.tanh(torch.ops.tpcompile.all_reduce(y, self.group) + block.down.bias)


class Counted:
    """Counts the bytes that autograd keeps beside weights, in eager mode."""

    def __init__(self, model: nn.Module) -> None:
        weights = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        self.known = {w.untyped_storage().data_ptr() for w in weights}
        self.kept: dict[int, int] = {}

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        with saved_tensors_hooks(self._keep, lambda x: x):
            return call()

    def _keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self.kept.values())


def kept_by_compiled(result: Tensor, model: nn.Module) -> int:
    """The bytes that the backward of compiled code keeps beside weights."""
    counted = Counted(model)
    for node in _backward_nodes(result):
        for x in getattr(node, "saved_tensors", ()):
            if isinstance(x, Tensor):
                counted._keep(x)
    return counted.bytes


def _backward_nodes(result: Tensor) -> Iterator[Node]:
    seen: set[Node] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions]
            yield node


def step(model: nn.Module, x: Tensor) -> tuple[int, Counter[str]]:
    """A forward and backward; the bytes that autograd keeps between them, and the calls of backward."""
    counted = Counted(model)
    result = counted.run(lambda: model(x))
    with Calls() as calls:
        result.square().sum().backward()
    return counted.bytes, calls.counts


def keep_activations(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy of a user's."""
    return CheckpointPolicy.MUST_SAVE if "gelu" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, dict[str, Any]] = {
    "not": {},
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "by name": {"checkpointing": ["all_reduce", torch.ops.aten.gelu.default]},
    "by policy": {"checkpointing": keep_activations},
    "own": {"own": False},
    "with sequence parallelism": {"checkpointing": "full", "sequence_parallel": True},
}


def ways() -> dict[str, dict[str, Any]]:
    """Gradients, what is kept, and what the plan says, for every way to ask for it."""
    torch.manual_seed(0)
    x, whole = torch.randn(X, dtype=F64), Tower()
    found = {}
    step(whole, x)
    for name, asked in WAYS.items():
        options = dict(asked)
        model = Tower(own=options.pop("own", None))
        model.load_state_dict(whole.state_dict())
        sharded = tpcompile.parallelize(model, mesh(), (x,), dynamic=False, **options)
        kept, calls = step(sharded, x)
        with torch.no_grad():
            forward = error(sharded(x), whole(x))
        found[name] = {
            "kept": kept,
            "errors": (gradient_error(whole, sharded), forward),
            "text": [line for line in str(sharded.plan).splitlines() if "recomputed" in line],
            "calls": {op: calls[op] for op in ("addmm", "gelu", "all_reduce")},
        }
    found["by hand"] = {"kept": step(ByHand(whole), x)[0]}
    return found


def compiled() -> dict[str, dict[str, Any]]:
    """The same under torch.compile, and with programs that are compiled by themselves."""
    torch.manual_seed(0)
    x, whole = torch.randn(X, dtype=F64), Tower()
    whole(x).square().sum().backward()
    found = {}
    for name in ("not", "full", "selective", "full, each program", "within a budget"):
        options = dict(WAYS.get(name.partition(",")[0], {}))
        if "each" in name:
            options["compile"] = {"backend": BACKEND}
        model = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,), dynamic=False, **options)
        model.zero_grad()
        torch.compiler.reset()
        run = model if "each" in name else torch.compile(model, fullgraph=True, backend=BACKEND)
        with functorch_config.patch(activation_memory_budget=0.5 if "budget" in name else 1.0):
            result = run(x)
        kept = kept_by_compiled(result, model)
        result.square().sum().backward()
        found[name] = {"kept": kept, "gradients": gradient_error(whole, model)}
    return found


def dropout() -> dict[str, float]:
    """Gradients with dropout, recomputed and not: the same masks."""
    x = torch.randn(X, dtype=F64, generator=torch.Generator().manual_seed(1))
    gradients = {}
    for name in ("not", "full", "selective"):
        torch.manual_seed(0)
        model = tpcompile.parallelize(Tower(drop=0.5), mesh(), (x,), dynamic=False, **WAYS[name])
        torch.manual_seed(2)
        step(model, x)
        gradients[name] = [p.grad.full_tensor() for p in model.parameters()]
    pairs = itertools.combinations(gradients.values(), 2)
    worst = max(error(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))
    return {"error": worst, "largest": max(float(g.abs().max()) for g in gradients["not"])}


class Normed(nn.Module):
    """Layers with statistics of all batches."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            [nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12)]
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(nn.Sequential(*layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def statistics() -> float:
    """Running statistics are written once, not again when layers are recomputed."""
    torch.manual_seed(0)
    whole, x = Normed().double(), torch.randn(8, 12, dtype=F64)
    model = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,), dynamic=False, checkpointing="full")
    for each in (whole, model):
        each(x).square().sum().backward()
    theirs, mine = dict(whole.named_buffers()), model.full_state_dict()
    worst = max(error(mine[name].double(), b.double()) for name, b in theirs.items())
    return max(worst, gradient_error(whole, model))


def switched(after: bool) -> dict[str, Any]:
    """transformers' own switch, before a model is sharded or after."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        dtype=F64,
    )
    whole = LlamaForCausalLM(config).train().to(F64)
    whole.model.embed_tokens.requires_grad_(not after)  # then gradients depend on a hook that the switch adds
    ids = torch.arange(32).reshape(2, 16)
    call = {"input_ids": ids}  # no labels: transformers takes its loss in float32

    def train(model: Any) -> int:
        counted = Counted(model)
        counted.run(lambda: model(**call).logits.square().mean()).backward()
        return counted.bytes

    model, kept = copy.deepcopy(whole), {}
    reentrant = {"use_reentrant": after}
    whole.gradient_checkpointing_enable(reentrant)
    kept["unsharded"] = train(whole)
    if not after:
        model.gradient_checkpointing_enable(reentrant)
    model = tpcompile.parallelize(model, mesh(), example_kwargs=call, dynamic=False)
    if after:
        kept["off"] = train(model)
        model.zero_grad()
        model.gradient_checkpointing_enable(reentrant)
    kept["on"] = train(model)
    text = [line for line in str(model.programs[-1].plan).splitlines() if "recomputed" in line]
    return {
        "kept": kept,
        "gradients": gradient_error(whole, model),
        "programs": len(model.programs),
        "text": text,
    }
