"""What the rows of the table in ``docs/sharded_modules.md`` say, done on ranks.

A situation that works checks its numbers itself; one that is refused must end in a ``TpCompileError``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import pair

Situation = Callable[[], None]
CASES: dict[str, Situation] = {}
"""By the text of the table's first column."""


def situation(text: str) -> Callable[[Situation], Situation]:
    """Registers what a row of the table says."""

    def register(do: Situation) -> Situation:
        CASES[text] = do
        return do

    return register


def verdicts() -> dict[str, str]:
    """What becomes of every situation on this rank: works, refused, or what is wrong."""
    return {text: _verdict(do) for text, do in CASES.items()}


def _verdict(do: Situation) -> str:
    try:
        do()
    except tpcompile.TpCompileError as error:
        return "refused" if error.todo else f"refused without a way out: {error}"
    except Exception as error:  # anything else is what the table does not say
        return f"{type(error).__name__}: {error}"
    return "works"


def _twins() -> tuple[Any, Any, Tensor]:
    return pair(Mlp)


def _train(model: Any, x: Tensor, make: Callable[[Any], Any], clip: bool = False) -> None:
    optimizer = make(model.parameters())
    for _ in range(2):

        def loss() -> Tensor:
            optimizer.zero_grad()
            value: Tensor = model(x).square().mean()
            value.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return value

        optimizer.step(loss)


def _same_training(make: Callable[[Any], Any], clip: bool = False) -> None:
    whole, sharded, x = _twins()
    for model in (whole, sharded):
        _train(model, x, make, clip)
    torch.testing.assert_close(sharded.full_state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)


@situation("`AdamW`, `SGD` and their like, in every implementation (`foreach`, `fused`)")
def _optimizers() -> None:
    _same_training(lambda p: torch.optim.AdamW(p, 0.01, fused=True))
    _same_training(lambda p: torch.optim.AdamW(p, 0.01, foreach=True))
    _same_training(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))


@situation("`torch.nn.utils.clip_grad_norm_`")
def _clipping() -> None:
    _same_training(lambda p: torch.optim.SGD(p, 0.1), clip=True)


@situation("`LBFGS` and other optimizers that look at whole parameters")
def _lbfgs() -> None:
    _same_training(lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3))


@situation("`copy.deepcopy`, `AveragedModel`")
def _copies() -> None:
    _, sharded, x = _twins()
    for other in (copy.deepcopy(sharded), torch.optim.swa_utils.AveragedModel(sharded)):
        torch.testing.assert_close(other(x), sharded(x))


@situation("python that computes with a parameter: `F.linear(x, model.up.weight)`")
def _outside() -> None:
    whole, sharded, x = _twins()
    torch.testing.assert_close(F.linear(x, sharded.up.weight), F.linear(x, whole.up.weight))
    assert torch.allclose(sharded.down.weight.norm(), whole.down.weight.norm())


@situation("`torch.save(model.state_dict())` and `load_state_dict` on the rank that saved it")
def _own_parts() -> None:
    _, sharded, x = _twins()
    before, file = sharded(x), io.BytesIO()
    torch.save(sharded.state_dict(), file)
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    file.seek(0)
    sharded.load_state_dict(torch.load(file, weights_only=False))
    torch.testing.assert_close(sharded(x), before)


@situation("`load_state_dict` of whole tensors")
def _loading() -> None:
    whole, sharded, x = _twins()
    torch.manual_seed(7)
    new = {name: torch.randn_like(value) for name, value in whole.state_dict().items()}
    whole.load_state_dict(new)
    sharded.load_state_dict(new)
    torch.testing.assert_close(sharded(x), whole(x), rtol=1e-4, atol=1e-5)


@situation("`torch.func.functional_call` with whole tensors, or with others of the parameters' kind")
def _functional() -> None:
    whole, sharded, x = _twins()
    compiled = torch.compile(lambda given: torch.func.functional_call(sharded, given, (x,)), backend="eager")
    parts = {name: p.detach() * 2 for name, p in sharded.named_parameters()}
    for run in (lambda given: torch.func.functional_call(sharded, given, (x,)), compiled):
        mine, theirs = (
            {name: (p.detach() * 2).requires_grad_() for name, p in whole.named_parameters()} for _ in "ab"
        )
        want = torch.func.functional_call(whole, theirs, (x,))
        found = run(mine)
        for result in (found, want):
            result.square().sum().backward()
        torch.testing.assert_close(found, want)
        torch.testing.assert_close([p.grad for p in mine.values()], [p.grad for p in theirs.values()])
    torch.testing.assert_close(torch.func.functional_call(sharded, parts, (x,)), want)
    part = {name: p.detach() * 2 for name, p in whole.up.named_parameters()}
    found, want = (torch.func.functional_call(each.up, dict(part), (x,)) for each in (sharded, whole))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(sharded(x), whole(x))


@situation("hooks on a part, registered after `parallelize`")
def _hooks() -> None:
    whole, sharded, x = _twins()
    for model in (whole, sharded):
        model.up.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(sharded(x), whole(x), rtol=1e-4, atol=1e-5)


@situation("`model.to(torch.bfloat16)`, `model.double()`")
def _types() -> None:
    whole, sharded, x = _twins()
    torch.testing.assert_close(sharded.double()(x.double()), whole.double()(x.double()))


@situation("`DistributedDataParallel` over the ranks that share the model")
def _ddp() -> None:
    DistributedDataParallel(_twins()[1])


@situation("`fully_shard`, `FullyShardedDataParallel` over the ranks that share the model")
def _fsdp() -> None:
    sharded = _twins()[1]
    try:
        FullyShardedDataParallel(sharded, device_id=torch.device("cpu"))
    except tpcompile.TpCompileError:
        fully_shard(_twins()[1], mesh=mesh())


@situation("`ZeroRedundancyOptimizer` over the ranks that share the model")
def _zero() -> None:
    _, sharded, x = _twins()
    _train(sharded, x, lambda p: ZeroRedundancyOptimizer(p, torch.optim.AdamW, lr=0.01))


@situation("`torch.save` of the model, pickle")
def _pickles() -> None:
    sharded = _twins()[1]
    try:
        pickle.dumps(sharded)
    except tpcompile.TpCompileError:
        torch.save(sharded, io.BytesIO())


@situation("`load_state_dict` of a rank's parts, of other keys or shapes")
def _other_parts() -> None:
    sharded = _twins()[1]
    sharded.load_state_dict({name: p.to_local().clone() for name, p in sharded.named_parameters()})


@situation("a parameter of another shape; layers added, removed or replaced")
def _structure() -> None:
    sharded = _twins()[1]
    try:
        sharded.up = nn.Linear(12, 24)
    except tpcompile.TpCompileError:
        sharded.extra = nn.Linear(12, 12)


@situation("layers that PEFT puts in (`get_peft_model`, `add_adapter`)")
def _adapters() -> None:
    whole, sharded, x = _twins()
    found = []
    for model in (whole, sharded):
        torch.manual_seed(3)
        adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
        adapted.add_adapter("more", LoraConfig(r=2, target_modules=["down"], init_lora_weights=False))
        adapted.base_model.set_adapter(["default", "more"])
        found.append(adapted(x))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class _Tied(nn.Module):
    """Two parts that share a weight; only the first is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), nn.Linear(12, 20)
        self.second.weight = self.first.up.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


@situation(
    "a weight that is shared with a module outside of the model: gradients, and reading it after a change"
)
def _shared_outside() -> None:
    torch.manual_seed(0)
    whole, x = _Tied(), torch.randn(3, 5, 12)
    outer = copy.deepcopy(whole)
    tpcompile.parallelize(outer.first, mesh(), (x,))
    with torch.no_grad():
        torch.testing.assert_close(outer(x), whole(x))  # nothing has changed yet
    acts: list[Callable[[], Any]] = [
        lambda: outer(x),
        lambda: outer.second.weight.square().sum(),
        lambda: copy.deepcopy(outer.second),
        lambda: tpcompile.parallelize(outer.second, mesh(), (x,)),
    ]
    _all_refused(acts)
    with torch.no_grad():
        outer.first.up.weight.mul_(2)
        whole.first.up.weight.mul_(2)
        _all_refused([lambda: outer(x), lambda: outer.second.weight.tolist()])
        outer.second.weight = outer.first.get_parameter("up.weight")
        torch.testing.assert_close(outer(x), whole(x), rtol=1e-4, atol=1e-5)
    for model in (outer, whole):
        _train(model, x, lambda p: torch.optim.SGD(p, 0.1))
    torch.testing.assert_close(outer.second.weight.full_tensor(), whole.second.weight.detach())
    raise tpcompile.TpCompileError("all were refused", todo="and the way out works")


@situation("torch's helpers `get_state_dict`, `set_model_state_dict`, ... and their options")
def _state_helpers() -> None:
    whole, sharded, x = _twins()
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in (whole, sharded)]
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        model(x).square().mean().backward()
        optimizer.step()
    states = get_state_dict(whole, optimizers[0])
    for asked in ({"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}):
        _, sharded, _ = _twins()
        optimizer = torch.optim.AdamW(sharded.parameters(), 0.05)
        weights, state = states if dist.get_rank() == 0 or len(asked) == 1 else ({}, {})
        set_model_state_dict(sharded, dict(weights), options=StateDictOptions(**asked))
        set_optimizer_state_dict(sharded, optimizer, state, options=StateDictOptions(**asked))
        found = get_state_dict(sharded, optimizer, options=StateDictOptions(full_state_dict=True))
        torch.testing.assert_close((found[0], found[1]["state"]), (states[0], states[1]["state"]))


@situation("parametrizations, `weight_norm`, `torch.ao.quantization`")
def _parametrized() -> None:
    _, sharded, x = _twins()
    before = sharded(x)
    acts: list[Callable[[], Any]] = [
        lambda: nn.utils.parametrize.register_parametrization(sharded.up, "weight", _Doubled()),
        lambda: nn.utils.parametrizations.orthogonal(sharded.up),
        lambda: nn.utils.weight_norm(sharded.up),
        lambda: torch.ao.quantization.quantize_dynamic(sharded, {nn.Linear}),
        lambda: torch.ao.quantization.prepare(sharded, inplace=True),
    ]
    _all_refused(acts)
    torch.testing.assert_close(sharded(x), before)
    raise tpcompile.TpCompileError("all were refused", todo="and nothing has changed")


def _all_refused(acts: list[Callable[[], Any]]) -> None:
    for act in acts:
        try:
            act()
        except tpcompile.TpCompileError as error:
            assert error.todo, error
        else:
            raise AssertionError("accepted")


@situation("other memory or another shape in place: `p.data.set_(x)`, `p.data.t_()`")
def _other_memory() -> None:
    _, sharded, x = _twins()
    before, weight = sharded(x), sharded.up.weight
    acts: list[Callable[[], Any]] = [
        lambda: weight.data.set_(torch.ones(weight.shape)),
        lambda: weight.detach().set_(torch.ones(3).untyped_storage()),
        lambda: weight.data.t_(),
        lambda: weight.data.resize_(3, 4),
        lambda: weight.data[0].unsqueeze_(0),
    ]
    _all_refused(acts)
    torch.testing.assert_close(sharded(x), before)
    raise tpcompile.TpCompileError("all were refused", todo="and nothing has changed")


@situation("random numbers into a parameter: `p.normal_()`")
def _random() -> None:
    with torch.no_grad():
        _twins()[1].up.weight.normal_()


@situation("`torch.autograd.graph.register_multi_grad_hook`, `get_gradient_edge` of parameters")
def _nodes() -> None:
    _, sharded, _ = _twins()
    try:
        torch.autograd.graph.get_gradient_edge(sharded.up.weight)
    except tpcompile.TpCompileError:
        torch.autograd.graph.register_multi_grad_hook([*sharded.parameters()], lambda grads: None)


@situation("second derivatives, `torch.func.grad`, `vmap`, several gradients at once (`is_grads_batched`)")
def _second() -> None:
    _, sharded, x = _twins()
    try:
        torch.func.grad(lambda y: sharded(y).sum())(x)
    except tpcompile.TpCompileError:
        y = sharded(x.requires_grad_())
        try:
            torch.autograd.grad(y, x, torch.ones(2, *y.shape), retain_graph=True, is_grads_batched=True)
        except tpcompile.TpCompileError:
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            first.square().sum().backward()


@situation("`torch.export`, `torch.jit.trace` of a sharded model")
def _export() -> None:
    _, sharded, x = _twins()
    _all_refused(
        [lambda: torch.export.export(sharded, (x,), strict=False), lambda: torch.jit.trace(sharded, x)]
    )
    raise tpcompile.TpCompileError("all were refused", todo="and the way out works")


@situation("`parallelize` of a model that is sharded already")
def _twice() -> None:
    tpcompile.parallelize(_twins()[1], mesh())


@situation("ranks that bring different weights")
def _different_weights() -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.weight[3, 5] += dist.get_rank()
    tpcompile.parallelize(model, mesh(), (torch.zeros(3, 5, 12),))


@situation("ranks that bring different batches to a program's first call")
def _different_batches() -> None:
    _, sharded, _ = _twins()
    sharded(torch.zeros(3 + dist.get_rank(), 5, 12))
