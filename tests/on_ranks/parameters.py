"""What the ranks do in ``test_sharded_parameter``: everyday uses, beside the unsharded model's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.models import error, mesh
from tests.on_ranks.module_life import pair, refusal
from tpcompile.errors import TpCompileError
from tpcompile.weights.asked_by_mode import ask_by_mode
from tpcompile.weights.dispatch import dispatch
from tpcompile.weights.sharded_parameter import ShardedParameter

F64 = torch.float64


def _whole(value: Any) -> Tensor:
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach()


def _in_inference_mode(act: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return act()


def _file(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(),
    "product": lambda w: w @ w.T,
    "row": lambda w: w[0],
    "linear": lambda w: F.linear(torch.ones(3, w.shape[1], dtype=w.dtype), w),
    "view": lambda w: w.view(-1)[3:9] * 2,
    "elementwise": lambda w: (w * 2 + 1).sum(),
    "joined": lambda w: torch.cat([w, w]),
    "largest": lambda w: w.max(),
    "largest of a list": lambda w: torch._foreach_max([w.detach()])[0],
    "power sums of a list": lambda w: torch._foreach_powsum([w.detach()], 3)[0],
    "sum in another type": lambda w: (1000 * w.detach()).to(torch.bfloat16).sum(dtype=torch.float64),
    "sum beyond its type": lambda w: (w.detach() * 0 + 300).half().sum(dtype=torch.float32),
    "sum of whole numbers": lambda w: (7 * w.detach()).sum(dtype=torch.int64),
    "small integers": lambda w: (100 * w.detach()).to(torch.int16),
    "small floats": lambda w: w.detach().to(torch.float8_e4m3fn).double(),
    "norm of complex numbers": lambda w: ((1 + 1j) * w.detach()).norm(),
    "row as numbers": lambda w: torch.tensor(w.detach()[1].tolist(), dtype=F64),
    "row as an array": lambda w: torch.from_numpy(w.detach()[1].numpy() * 1),
    "row saved": lambda w: torch.load(_file(w.detach()[1])),
    "copied": lambda w: copy.copy(w),
    "row copied": lambda w: copy.deepcopy(w.detach()[1]),
    "row without autograd": lambda w: _in_inference_mode(lambda: w.view(-1)[3:] * 2),
    "row of what is computed without autograd": lambda w: _in_inference_mode(lambda: (w * 2)[0]),
}
if hasattr(torch, "_foreach_mm"):  # newer than torch 2.12
    READS["products of lists"] = lambda w: torch._foreach_mm([w.detach()], [w.detach().T])[0]


def reads() -> dict[str, float]:
    """Errors of what python computes with a weight, and of the gradients that come of it."""
    whole, sharded, x = pair(lambda: Mlp(inner=21).double())
    x, found = x.double(), {}
    for name, read in READS.items():
        mine, theirs = read(sharded.up.weight), read(whole.up.weight)
        found[name] = error(_whole(mine), _whole(theirs))
    for model in (whole, sharded):
        (
            model(x).square().sum() + F.linear(x, model.up.weight).square().sum() + model.down.weight.norm()
        ).backward()
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    found["gradients"] = max(error(_whole(p.grad), q.grad) for p, q in pairs)
    slopes = [
        torch.autograd.grad(m(x).sum() + m.up.weight.square().sum(), list(m.parameters()))
        for m in (sharded, whole)
    ]
    found["autograd.grad"] = max(error(_whole(a), b) for a, b in zip(*slopes, strict=True))
    with torch.no_grad():
        for model in (whole, sharded):
            model.up.weight[0] = 3.0
    found["written"] = error(_whole(sharded.up.weight), whole.up.weight.detach())
    return found


def reads_of_unasked() -> dict[str, float]:
    """The same where torch does not ask the class what its operators do, as torch 2.11."""

    def unasked(cls: Any, func: Any, *_: Any) -> NoReturn:
        raise AssertionError(f"torch asks what {func} does")

    with ExitStack() as stack:
        changed = [(ShardedParameter, "__torch_function__"), (torch.autograd, "_engine_run_backward")]
        for owner, name in changed:
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        stack.enter_context(mock.patch.object(ShardedParameter, "__torch_dispatch__", classmethod(unasked)))
        ask_by_mode(ShardedParameter, dispatch)
        return reads()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.01, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01, foreach=True),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def optimizers() -> dict[str, float]:
    """Errors of the weights, and of the optimizer's states, after steps of each."""
    twins = pair(lambda: Mlp(inner=21).double())
    found, x = {}, twins[2].double()
    for name, make in OPTIMIZERS.items():
        whole, sharded = copy.deepcopy(twins[0]), copy.deepcopy(twins[1])
        states = []
        for model in (whole, sharded):
            optimizer = make(model.parameters())
            for step in range(3):
                optimizer.step(lambda model=model, optimizer=optimizer: _loss(model, optimizer, x))
                if step == 1:
                    optimizer.load_state_dict(torch.load(_file(optimizer.state_dict())))
            states.append({str(at): dict(s) for at, s in optimizer.state_dict()["state"].items()})
        found[name] = error(sharded.full_state_dict(), whole.state_dict())
        if name != "LBFGS":  # which keeps lists of flat tensors
            found[f"{name}, states"] = max(_state_error(*(s[at] for s in states)) for at in states[0])
    return found


class Typed(nn.Module):
    """Results of the types of a weight and of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(16, 12), Mlp()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mlp(self.embed(ids)).float()
        return y.to(self.embed.weight.dtype), y.to(self.scale.dtype) * self.scale


def retyped() -> list[Any]:
    """Results while weights have other types, which were assigned; then how many programs there are."""
    torch.manual_seed(0)
    whole, ids = Typed().eval(), torch.arange(16).view(2, 8)
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (ids,))
    found = []

    def compare() -> None:
        with torch.no_grad():
            for mine, theirs in zip(sharded(ids), whole(ids), strict=True):
                found.append((str(mine.dtype), str(theirs.dtype), error(mine, theirs)))

    for kind in (torch.bfloat16, torch.float32):
        for model in (whole, sharded):
            model.scale = model.scale.to(kind)
        compare()
    for kind in (torch.float64, torch.float32):
        for model in (whole, sharded):
            for p in model.parameters():
                p.data = p.data.to(kind)
        compare()
    return [found, len(sharded.programs)]


class Branches(nn.Module):
    """Layers that not every call uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Mlp(), Mlp(), Mlp()

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x))) if more else self.first(x)
        return y


def divided_by_another(kind: str) -> list[Any]:
    """What is said of a call that would divide what a wrapper has; whether all else is whole, and works."""
    torch.manual_seed(0)
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    whole, x = Branches().eval(), torch.randn(3, 5, 12)
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), both, (x,), axis="tensor")
    if kind == "fully_shard":
        fully_shard(sharded.third, mesh=both["data"])
    else:
        DistributedDataParallel(sharded, process_group=both.get_group("data"), find_unused_parameters=True)
    said = refusal(lambda: sharded.capture(x, more=True))
    return [said, all(p.placing.whole for p in sharded.second.parameters()), error(sharded(x), whole(x))]


def _loss(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = model(x).square().sum()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss


def _state_error(whole: dict[str, Any], sharded: dict[str, Any]) -> float:
    assert whole.keys() == sharded.keys()
    mine, theirs = ({n: _whole(v) for n, v in s.items() if isinstance(v, Tensor)} for s in (sharded, whole))
    return max((float((mine[n] - theirs[n]).abs().max()) for n in mine), default=0.0)


def by_hand() -> list[Any]:
    """Lists of tensors, as optimizers of others update them; what must not go unnoticed beside them."""
    whole, sharded, x = pair(lambda: Mlp(inner=21).double())
    x = x.double()
    for model in (whole, sharded):
        params = list(model.parameters())
        momenta: list[Tensor] = [torch.zeros_like(p) for p in params]
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            grads: Any = [p.grad for p in params]
            with torch.no_grad():
                signs = torch._foreach_sign(torch._foreach_add(momenta, grads, alpha=0.1))
                torch._foreach_add_(params, signs, alpha=-0.01)
                torch._foreach_lerp_(momenta, grads, 0.5)
    found = error(sharded.full_state_dict(), whole.state_dict())
    params = list(sharded.parameters())
    lost = [torch.zeros(p.shape, dtype=F64) for p in params]
    steps = [torch.zeros(()) for _ in params]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    fused = refusal(
        lambda: torch._fused_adam_(
            params, lost, lost, lost, [], steps, **options, amsgrad=False, maximize=False
        )
    )
    saved = sharded.up.weight.square().sum()
    for p in params:
        p.grad = torch.ones(p.shape, dtype=F64)
    torch.optim.SGD(params, 0.1, foreach=True).step()
    try:
        saved.backward()
        stale = "accepted"
    except RuntimeError as reason:
        stale = str(reason)
    for model in (whole, sharded):  # gradients of another type
        model.zero_grad()
        model.down.weight.grad_dtype = torch.float32
        model(x).square().sum().backward()
        assert model.down.weight.grad.dtype is model.down.weight.grad_dtype is torch.float32
        assert model.up.weight.grad.dtype is F64
    return [found, fused, stale]


def clipped_differently() -> list[str]:
    """What is said of norms that are not the same on all ranks, and whether gradients have stayed."""
    _, model, x = pair()
    model(x).sum().backward()
    before = [p.grad.to_local().clone() for p in model.parameters()]
    rank, params = dist.get_rank(), list(model.parameters())
    first = model.first.up
    said = [
        refusal(lambda: nn.utils.clip_grad_norm_(params, 0.1 + rank)),
        refusal(lambda: nn.utils.clip_grad_norm_(params, 0.1, 2.0 + rank)),
        refusal(lambda: nn.utils.clip_grad_norm_(params, 0.1, error_if_nonfinite=rank == 1)),
        refusal(lambda: nn.utils.clip_grad_norm_(params[rank:], 0.1)),
        refusal(lambda: (first.weight if rank else first.bias).norm()),
    ]
    if all(torch.equal(a, p.grad.to_local()) for a, p in zip(before, params, strict=True)):
        said.append("as they were")
    return said


def refusals() -> list[str]:
    """What is said against uses that cannot be right."""
    _, model, _ = pair(lambda: Mlp(inner=20))
    weight = model.up.weight
    return [
        refusal(lambda: DistributedDataParallel(model)),
        refusal(lambda: fully_shard(model)),
        refusal(lambda: FullyShardedDataParallel(model)),
        refusal(lambda: ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)),
        refusal(lambda: nn.init.normal_(weight)),
        refusal(lambda: nn.init.orthogonal_(weight)),
        refusal(lambda: torch.utils.dlpack.to_dlpack(weight)),
        refusal(lambda: nn.init.normal_(weight[0])),
        refusal(lambda: weight.detach().view(-1)[3:].uniform_()),
        refusal(lambda: F.rrelu(weight, training=True)),
        refusal(lambda: dist.all_reduce(weight.data)),
        refusal(lambda: weight.detach().numpy()),
        refusal(lambda: weight.data_ptr()),
        refusal(lambda: setattr(model.down.weight, "data", weight.data.t())),
        refusal(lambda: torch.load(_file(weight.detach()), weights_only=False).sum()),
        refusal(lambda: weight.full_tensor(grad_placements=[Partial()])),
        refusal(lambda: weight.to_local(grad_placements=[Partial()])),
        refusal(lambda: weight.redistribute(placements=[Replicate()], forward_dtype=torch.float16)),
        refusal(
            lambda: weight.redistribute(init_device_mesh("cpu", (2,), mesh_dim_names=("b",)), [Replicate()])
        ),
        refusal(lambda: _load_from_another_rank(model)),
        refusal(lambda: _read_under_a_hook(weight)),
        _hook_that_fails(model),
        refusal(lambda: _made_before(torch.optim.AdamW)),
        refusal(lambda: _made_before(torch.optim.Adafactor)),
        refusal(lambda: ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1)),
    ]


def _hook_that_fails(model: Any) -> str:
    """What is said where a hook of the user's fails on one rank: the other one would wait."""

    def fail(*_: Any) -> None:
        if dist.get_rank() == 0:
            raise ValueError("failed to take the state dict")

    handle = model.register_state_dict_post_hook(fail)
    try:
        model.full_state_dict()
    except (ValueError, TpCompileError) as error:
        return str(error)
    finally:
        handle.remove()
    return "accepted"


def _made_before(kind: Any) -> None:
    model, x = Mlp(), torch.rand(2, 3, 12)
    optimizer = kind(model.parameters(), 0.1)
    tpcompile.parallelize(model, mesh(), (x,))(x).sum().backward()
    optimizer.step()


def _load_from_another_rank(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones(p.shape)
    optimizer.step()
    saved: list[Any] = [None, None]
    dist.all_gather_object(saved, _file(optimizer.state_dict()).getvalue())
    optimizer.load_state_dict(torch.load(io.BytesIO(saved[1 - dist.get_rank()])))


def _read_under_a_hook(weight: Tensor) -> None:
    weight.register_post_accumulate_grad_hook(lambda p: None)
    weight.square().sum().backward()
