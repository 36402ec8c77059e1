"""What the ranks do in ``test_module_life``: a sharded model is changed, copied, loaded, hooked, trained."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import tpcompile
from tests.helpers import families
from tests.helpers.toys import Attention, Mlp
from tests.on_ranks.models import error, mesh


class Block(nn.Module):
    """Parts in parts; a dropout; numbers that are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = Mlp(), nn.Dropout(0.5), Mlp(inner=16)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.drop(self.first(x))) * self.scale
        return y


class Wide(nn.Module):
    """A layer of wider numbers than those before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Mlp().double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.double())
        return y


X = (3, 5, 12)


def pair(make: Callable[[], nn.Module] = Block, **options: Any) -> tuple[Any, Any, Tensor]:
    """The whole model, the sharded one, and an input."""
    torch.manual_seed(0)
    whole = make().eval()
    sharded = copy.deepcopy(whole)
    x = torch.randn(X)
    return whole, tpcompile.parallelize(sharded, mesh(), (x,), **options), x


def refusal(act: Callable[[], Any]) -> str:
    """What is said against it."""
    try:
        act()
    except tpcompile.TpCompileError as error:
        return str(error)
    return "accepted"


def settings() -> dict[str, Any]:
    """Errors after changes of what captured graphs have baked in; programs are found again."""
    whole, sharded, x = pair()
    found: dict[str, Any] = {}

    def both(label: str, change: Callable[[Any], Any]) -> None:
        for model in (whole, sharded):
            change(model)
        with torch.no_grad():
            found[label] = error(sharded(x), whole(x))

    def only_linear_layers_train(model: Any) -> None:
        model.train()
        model.drop.eval()

    both("a part in another mode", only_linear_layers_train)
    both("back", lambda m: m.eval())
    both("an attribute", lambda m: setattr(m, "scale", 3.0))
    both("train mode, no dropout", lambda m: (setattr(m.drop, "p", 0.0), m.train()))
    both("back to the first", lambda m: (setattr(m.drop, "p", 0.5), setattr(m, "scale", 1.0), m.eval()))
    found["programs"] = len(sharded.programs)
    x = x.double()
    both("another type", lambda m: m.double())
    assert found.pop("another type") < 1e-12, found
    found["layout"] = {p.dtype for p in sharded.plan.layout.params.values()} == {torch.float64}
    return found


def configuration() -> list[Any]:
    """A field of the configuration that is changed after the model was captured."""
    model = families.build("llama", num_hidden_layers=1)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs={"input_ids": families.token_ids(2, 5)})
    ids, found = families.token_ids(3, 7), []
    with torch.no_grad():
        for use_cache in (True, False, True):
            sharded.config.use_cache = use_cache
            found.append("past_key_values" in sharded(ids))
    return [*found, len(sharded.programs)]


def found_out_in_forward() -> list[Any]:
    """Labels tell a classifier what kind of problem it has, which it notes in its configuration."""
    model = families.build("bert_classifier", num_hidden_layers=1)
    call = families.inputs("bert_classifier", 2, 5)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call)
    with torch.no_grad():
        for labels in ({"labels": torch.arange(2)}, {}, {"labels": torch.arange(2)}):
            sharded(**call, **labels)
    return [sharded.config.problem_type, len(sharded.programs)]


def gradients_are_wanted_later() -> float:
    """A frozen model is captured, then its weights, and then an input only, want gradients."""
    whole, sharded, x = pair(lambda: Block().requires_grad_(False))
    sharded(x)
    worst = 0.0
    for frozen in (False, True):
        inputs = []
        for model in (whole, sharded):
            model.requires_grad_(not frozen)
            inputs.append(x.clone().requires_grad_(frozen))
            model(inputs[-1]).square().sum().backward()
        if frozen:
            worst = max(worst, error(inputs[1].grad, inputs[0].grad))
    return max(worst, _gradient_error(whole, sharded))


def checkpointed() -> float:
    """Activation checkpointing around a model that is captured inside of it."""
    torch.manual_seed(0)
    whole = Block().eval()
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh())
    x = torch.randn(X)
    with torch.inference_mode():  # decides where the weights are, which are to be trained all the same
        sharded(torch.zeros(2, 12))
    for model in (whole, sharded):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return _gradient_error(whole, sharded)


def _gradient_error(whole: nn.Module, sharded: Any) -> float:
    layout, rank = sharded.plan.layout, dist.get_rank()
    expected = dict(whole.named_parameters())
    return max(
        max(error(p.grad.full_tensor(), wanted), error(p.grad.to_local(), layout.shard(n, wanted, rank)))
        for n, p in sharded.named_parameters()
        if (wanted := expected[n].grad) is not None
    )


class Remembering(nn.Module):
    """Parts of a tensor are assigned; a buffer is used, and then assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp(inner=16)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[..., :7], y[..., 7:] = self.first(x)[..., 5:], self.second(x)[:1, :1, :5]
        y = y * (1 + self.mean)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean((0, 1))
        return y


def assignments() -> float:
    """Gradients and buffers where forward assigns, of a first and of a second step, that come together."""
    whole, sharded, x = pair(lambda: nn.Sequential(*(Remembering() for _ in range(5))))
    for model in (whole, sharded):
        (model(x) + model(2 * x)).square().sum().backward()
    return max(_gradient_error(whole, sharded), error(sharded.full_state_dict(), whole.state_dict()))


class Showing(nn.Module):
    """Results that show what buffers were before they are written, and buffers that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.register_buffer("a", torch.zeros(12))
        self.register_buffer("b", torch.ones(12))
        self.register_buffer("c", torch.ones(12))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        copied = torch.empty(12)
        copied.copy_(self.a)
        self.a.add_(1)
        before, part = self.b, self.b[1:]
        self.b = self.b + 1
        self.c[:3] += 1  # a view is written: torch's own way is taken
        swapped = self.a.clone()
        self.a.copy_(self.c)
        self.c.copy_(swapped)
        return self.mlp(x), copied, before, part


def shown_buffers() -> float:
    """Three calls without gradients: each shows what the one before has left."""
    whole, sharded, x = pair(Showing)
    with torch.no_grad():
        calls = [(sharded(x), whole(x)) for _ in range(3)]
    worst = max(error(mine, theirs) for call in calls for mine, theirs in zip(*call, strict=True))
    return max(worst, error(sharded.full_state_dict(), whole.state_dict()))


def batch_statistics(names: int = 1) -> float:
    """Evaluated first, then trained: a batch norm between divided convolutions, perhaps under two names."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(14)
    again = (nn.Conv1d(14, 14, 1, bias=False), norm)[: 2 * (names - 1)]
    layers = (nn.Conv1d(5, 14, 1, bias=False), norm, nn.ReLU(), *again, nn.Conv1d(14, 6, 1))
    whole = nn.Sequential(*layers).eval()
    x = torch.randn(X)
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,))
    for model in (whole, sharded):
        model.train()(x).square().sum().backward()
        model.eval()
    worst = _gradient_error(whole, sharded)
    with torch.no_grad():
        worst = max(worst, error(sharded(x), whole(x)))
    assert not sharded.plan.fallbacks
    return max(worst, error(sharded.full_state_dict(), whole.state_dict()))


def copies() -> dict[str, Any]:
    """A deep copy computes and trains by itself; parts are not copied, nothing is pickled."""
    whole, sharded, x = pair()
    with torch.no_grad():
        before = sharded(x)
        twin = copy.deepcopy(sharded)
        same, programs = error(twin(x), before), len(twin.programs)
        for param in twin.parameters():
            param.mul_(2)
        twice = copy.deepcopy(whole)
        for param in twice.parameters():
            param.mul_(2)
        found = {"same": same, "own": error(twin(x), twice(x)), "first": error(sharded(x), before)}
    assert programs == len(twin.programs) == 1
    twin.scale = 2.0
    with torch.no_grad():
        found["settings"] = error(sharded(x), before)
    assert "copy the whole model" in refusal(lambda: copy.deepcopy(sharded.first))
    assert "cannot be pickled" in refusal(lambda: torch.save(sharded, io.BytesIO()))
    return found


def state_dicts() -> dict[str, Any]:
    """Whole state dicts, and the model's own, are loaded, of a part too; others change nothing."""
    whole, sharded, x = pair(lambda: nn.Sequential(Attention(True, 12), Mlp()))
    found = {}
    local = {k: v.clone() for k, v in sharded.state_dict().items()}
    with torch.no_grad():
        first = sharded(x)
        for param in whole.parameters():
            param.mul_(1.5)
        sharded.load_state_dict(whole.state_dict())
        found["whole"] = error(sharded(x), whole(x))
        sharded.load_state_dict(local)
        found["local"] = error(sharded(x), first)
        sharded[1].load_state_dict(whole[1].state_dict())
        sharded[0].load_state_dict(whole[0].state_dict(), assign=True)
        found["parts"] = error(sharded(x), whole(x))
        saved = io.BytesIO()
        torch.save(sharded.state_dict(), saved)
        sharded.load_state_dict(whole.state_dict())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, saved.getvalue())
        read = [torch.load(io.BytesIO(each)) for each in everyone]
        assert "saved by rank" in refusal(lambda: sharded.load_state_dict(read[0]))  # on rank 0 as well
        sharded.load_state_dict(read[dist.get_rank()])
        found["own parts"] = error(sharded(x), whole(x))
        state = whole.state_dict()
        bad = {
            "lacks": {k: v for k, v in state.items() if k != "1.down.bias"},
            "has unexpected": {**state, "2.weight": torch.zeros(3)},
            "of another model": {**state, "1.up.weight": torch.zeros(20, 13)},
            "or parts of tensors": {k: v.to_local() for k, v in local.items()},
        }
        before = {k: v.clone() for k, v in sharded.state_dict().items()}
        for words, wrong in bad.items():
            assert words in refusal(lambda wrong=wrong: sharded.load_state_dict(wrong))  # type: ignore[misc]
        around, other = nn.ModuleList([sharded]), {f"0.{k}": v + dist.get_rank() for k, v in state.items()}
        assert "in another module" in refusal(lambda: around.load_state_dict(other))
        assert all(torch.equal(before[k], v) for k, v in sharded.state_dict().items())
        around.load_state_dict({f"0.{k}": v * 2 for k, v in state.items()})
        found["around"] = error(sharded.full_state_dict(), {k: v * 2 for k, v in state.items()})
    return found


def hooks() -> dict[str, Any]:
    """Hooks on parts of a sharded model run, as long as they are there, and see whole values."""
    whole, sharded, x = pair()
    found: dict[str, Any] = {}
    seen: dict[Any, Any] = {}
    handles = []
    for model in (whole, sharded):
        record = lambda m, a, y, to=model: seen.__setitem__(to, y)  # noqa: E731
        handles += [model.first.up.register_forward_hook(record)]
        handles += [model.second.register_forward_pre_hook(lambda m, a: (a[0] * 2,))]
        handles += [model.drop.register_forward_hook(lambda m, a, y: y + 1)]
        handles += [model.first.register_full_backward_hook(lambda m, gx, gy: (gx[0] * 3,))]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [model(given) for model, given in zip((whole, sharded), inputs, strict=True)]
    for result in results:
        result.square().sum().backward()
    found["result"] = error(results[1].detach(), results[0].detach())
    found["seen"] = error(seen[sharded].detach(), seen[whole].detach())
    found["input's gradient"] = error(inputs[1].grad, inputs[0].grad)
    found["gradients"] = _gradient_error(whole, sharded)
    for handle in handles:
        handle.remove()
    before = len(sharded.programs)
    with torch.no_grad():
        found["removed"] = error(sharded(x), whole(x))
    assert len(sharded.programs) == before
    return found


def changes() -> list[str]:
    """Changes of layers and weights that programs would not notice; the model works as before."""
    whole, sharded, x = pair()

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    def replace_weight() -> None:
        sharded.first.up.weight = nn.Parameter(whole.first.up.weight.detach()[:3])

    def delete_layer() -> None:
        del sharded.first.down

    messages = [
        refusal(lambda: parametrize.register_parametrization(sharded.first.up, "weight", Double())),
        refusal(replace_weight),
        refusal(delete_layer),
        refusal(lambda: sharded.first.add_module("third", nn.ReLU())),
    ]
    new = torch.randn_like(whole.first.up.weight)
    with torch.no_grad():
        assert error(sharded(x), whole(x)) < 1e-5
        for model in (whole, sharded):  # another whole weight is not a change: every rank takes its part
            model.first.up.weight = nn.Parameter(new.clone())
        assert error(sharded(x), whole(x)) < 1e-5
        for _ in range(2):  # past what would notice it, so that the next call does, before it changes others
            vars(sharded.second.down)["forward"] = lambda x: x[..., :12]
            messages.append(refusal(lambda: sharded(2 * x[0])))
        del sharded.second.down.forward
        assert error(sharded(x), whole(x)) < 1e-5
    return messages


def misfits() -> list[str]:
    """Plans and calls that are none for this model."""
    _, sharded, x = pair()
    tp = mesh()
    plan = sharded.plan

    class Wider(Block):
        def __init__(self) -> None:
            super().__init__()
            self.second = Mlp(inner=18)

    world = dist.get_world_size()
    larger = DeviceMesh("cpu", torch.arange(world + 1), _init_backend=False)
    smaller = DeviceMesh("cpu", torch.arange(world - 1))
    if dist.get_rank() == world - 1:
        assert "is not part of the mesh" in refusal(lambda: tpcompile.parallelize(Block(), smaller, (x,)))
    return [
        refusal(lambda: tpcompile.parallelize(Block(), larger, (x,))),
        refusal(lambda: tpcompile.parallelize(Wider(), tp, (x,), plan=plan)),
        refusal(lambda: tpcompile.parallelize(nn.Sequential(Mlp()), tp, (x,), plan=plan)),
        refusal(lambda: tpcompile.parallelize(Block(), tp, (x,), plan=None)),  # type: ignore[arg-type]
        refusal(lambda: tpcompile.parallelize(Block(), tp, (x,), plan={3: "colwise"})),  # type: ignore[dict-item]
        refusal(lambda: sharded(x.to("meta"))),
        refusal(lambda: sharded([1.0, 2.0])),
        refusal(lambda: tpcompile.parallelize(sharded.first, tp, (x,))),
        refusal(lambda: tpcompile.parallelize(nn.Sequential(sharded), tp, (x,))),
    ]


def transformed() -> tuple[dict[str, float], list[str]]:
    """A first call with other weights, the model's own after it; what is said against transformed calls."""
    whole, sharded, x = pair()
    errors = {}
    with torch.no_grad():
        for name in ("parts", "whole ones"):
            model = tpcompile.parallelize(copy.deepcopy(whole), mesh(), compare_calls=True)
            given = model if name == "parts" else whole
            twice = [{n: p.detach() * 2 for n, p in m.named_parameters()} for m in (whole, given)]
            theirs, mine = (
                torch.func.functional_call(m, p, (x,)) for m, p in zip((whole, model), twice, strict=True)
            )
            errors |= {name: error(mine, theirs), f"after {name}": error(model(x), whole(x))}

    def dual() -> None:
        with forward_ad.dual_level():
            sharded(forward_ad.make_dual(x, x))

    messages = [
        refusal(lambda: torch.export.export(sharded, (x,))),
        refusal(lambda: torch.func.jvp(sharded, (x,), (x,))),
        refusal(lambda: torch.func.vmap(sharded)(x[None])),
        refusal(lambda: torch.func.grad(lambda y: sharded(y).sum())(x)),
        refusal(dual),
        refusal(lambda: torch.jit.trace(sharded, x, check_trace=False)),
        refusal(lambda: sharded(distribute_tensor(x, mesh(), [Replicate()]))),
        refusal(lambda: sharded(torch.nested.nested_tensor([x[0], x[0, :1]]))),
    ]
    return errors, messages


def rows_that_do_not_exist() -> list[str]:
    """Looked up in tables of which ranks hold some rows, one of them none."""
    torch.manual_seed(0)
    found = []
    for rows in (2, 7):
        table = nn.Sequential(nn.Embedding(rows, 12))
        ids = torch.zeros(2, 3, dtype=torch.long)
        sharded = tpcompile.parallelize(table, mesh(), (ids,), plan={"0": tpcompile.Shard(0)})
        for wrong in (-1, rows, rows + 20):
            try:
                sharded(torch.tensor([[0, wrong, 1]]))
                found.append("accepted")
            except IndexError as error:
                found.append(str(error))
    return found


def norms() -> float:
    """The worst error of gradient norms and clipped gradients: keys that ranks share, uneven parts, types."""
    worst = 0.0
    for norm_type, last in ((2.0, nn.Identity()), (1.0, Wide()), (float("inf"), nn.Identity())):
        whole, sharded, x = pair(lambda last=last: nn.Sequential(Attention(True, 12), Mlp(inner=21), last))
        for model in (whole, sharded):
            model(x).square().sum().backward()
        theirs = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.3, norm_type)
        mine = sharded.clip_grad_norm_(0.3, norm_type)
        worst = max(worst, error(mine, theirs), _gradient_error(whole, sharded))
    return worst


def scaled() -> float:
    """Gradients of one rank overflow: no rank takes the step."""
    whole, sharded, x = pair()
    for model in (whole, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if step == 1 and (model is whole or dist.get_rank() == 0):
                grad = model.first.up.weight.grad
                (grad if model is whole else grad.to_local())[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    with torch.no_grad():
        return error(sharded(x), whole(x))


def ranks_differ() -> list[str]:
    """One rank is given something else: all are told, before anything else is sent, and all go on after."""
    rank = dist.get_rank()
    tp = mesh()
    _, sharded, x = pair()
    _, strict, _ = pair(compare_calls=True)

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 12), nn.Linear(12, 20)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.table(ids))
            return y

    torch.manual_seed(0)
    ids = torch.arange(6).reshape(2, 3)
    counted = tpcompile.parallelize(Counted(), tp, (ids,))

    def other_weights() -> None:
        torch.manual_seed(rank)
        tpcompile.parallelize(Block(), tp, (x,))

    def other_plan() -> None:
        torch.manual_seed(0)
        tpcompile.parallelize(Block(), tp, (x,), plan={"first.up": "replicate"} if rank else "auto")

    def other_comparisons() -> None:
        tpcompile.parallelize(Block(), tp, (x,), compare_calls=bool(rank))

    def one_bad_plan() -> None:
        tpcompile.parallelize(Block(), tp, (x,), plan={"frist.up": "replicate"} if rank else "auto")

    def other_mode() -> None:
        strict.train(bool(rank))
        strict(x)

    messages = [
        refusal(other_weights),
        refusal(other_plan),
        refusal(other_comparisons),
        refusal(one_bad_plan),
        refusal(lambda: sharded(x[: 2 + rank])),
        refusal(lambda: counted(ids + rank)),
        refusal(other_mode),
    ]
    strict.eval()
    for model, given in ((sharded, x), (strict, x), (counted, ids)):
        model(given)
    return messages
