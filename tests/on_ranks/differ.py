"""What the ranks do in ``test_differ``: one is given something else, or makes something else of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import refusal
from tpcompile.ir import markers
from tpcompile.lowering import lower_markers
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.ranks.compare_calls import compare_call
from tpcompile.ranks.compare_sent import Sent, compare_sent
from tpcompile.ranks.turns import own_turn
from tpcompile.rules import table

X = torch.linspace(-1, 1, 24).reshape(2, 12)


class Scaled(Mlp):
    """With a dropout, a buffer, and a number as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("offset", torch.arange(12.0))

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        y: Tensor = self.drop(super().forward(x) * scale + self.offset)
        return y


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"
    option: int = 0

    def apply(self, program: GlobalProgram) -> bool:
        return False


def made(**options: Any) -> Any:
    """A sharded model that has not run."""
    torch.manual_seed(0)
    return tpcompile.parallelize(Scaled(), mesh(), (X,), **options)


def given_other_things() -> dict[str, str]:
    """What is said where one rank is given something else, by what that is."""
    rank = dist.get_rank()
    cases: dict[str, Callable[[], Any]] = {}

    def case(act: Callable[[], Any]) -> None:
        cases[act.__name__] = act

    @case
    def options_of_a_pass() -> None:
        made(passes=[Nothing(rank)])

    @case
    def versions_of_a_pass() -> None:
        class Other(Nothing):
            def apply(self, program: GlobalProgram) -> bool:
                return bool(0)

        Other.__qualname__ = Nothing.__qualname__
        made(passes=[Other() if rank else Nothing()])

    @case
    def rules() -> None:
        if rank:
            tpcompile.register_rule("aten.relu", "... a -> ... a; whole a")
        try:
            made()
        finally:
            table._USER.clear()

    def changed(change: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        model = Scaled()
        if rank:
            with torch.no_grad():
                change(model)
        tpcompile.parallelize(model, mesh(), (X,))

    @case
    def one_element() -> None:
        changed(lambda model: model.up.weight[7, 5].add_(1e-6))

    @case
    def an_element_of_a_buffer() -> None:
        changed(lambda model: model.offset[3].neg_())

    @case
    def what_is_trained() -> None:
        changed(lambda model: model.up.weight.requires_grad_(False))

    @case
    def a_type_of_weights() -> None:
        changed(lambda model: model.double())

    @case
    def a_mode_of_a_part() -> None:
        changed(lambda model: model.drop.eval())

    @case
    def time_limits() -> None:
        made(timeout=600.0 + rank)

    model = made().eval()
    cases["modes"] = lambda: model.train(not rank)(X)
    cases["sizes_of_a_later_call"] = lambda: model.train()(X.repeat(2 + rank, 1))
    cases["modes_of_a_later_call"] = lambda: model.train(not rank)(X.repeat(5, 1))
    cases["numbers"] = lambda: model.eval()(X, scale=2 + rank)
    cases["batches"] = lambda: model.eval()(X.repeat(3, 1) * (1 + rank))
    cases["lines_of_a_batch"] = lambda: model.eval()(X.repeat(4, 1).roll(rank, 1))
    cases["rounding"] = lambda: model.eval()(X.repeat(5, 1) * (1 + 1e-3 * rank))
    cases["complex_numbers"] = lambda: _compare(torch.full((3,), 1 + rank * 1j))
    cases["a_large_tensor"] = lambda: _compare(torch.ones(2**25, dtype=torch.float16))
    cases["a_sparse_tensor"] = lambda: _compare(torch.eye(3).to_sparse())
    cases["half_precision_by_default"] = _compare_halves
    cases["gradients"] = lambda: model.eval()(X.clone().requires_grad_(not rank))

    def one(second: str = "down") -> Any:
        return model.get_submodule(second if rank else "up").weight

    cases["weights_that_are_gathered"] = lambda: one().full_tensor()
    cases["rows_of_weights"] = lambda: one()[0]
    cases["weights_that_are_compared"] = lambda: torch.equal(one(), one().clone())
    cases["what_is_asked_of_weights"] = lambda: one().norm() if rank else torch.equal(one(), one().clone())
    cases["learning_rates"] = lambda: torch.optim.SGD(model.parameters(), 0.1 + rank).step()
    cases["optimizers"] = lambda: (torch.optim.Adam if rank else torch.optim.SGD)(model.parameters()).step()

    later = made().eval()

    @case
    def sizes_after_many() -> None:
        for rows in range(1, 13):
            later(X.repeat(rows, 1))
        later(X.repeat(20 + rank, 1))

    @case
    def numbers_after_many() -> None:
        for scale in range(2, 13):
            later(X, scale=scale)
        later(X, scale=20 + rank)

    @case
    def batches_after_many() -> None:
        for _ in range(64):
            later(X * (1 + rank))

    @case
    def numbers_that_were_seen() -> None:
        for _ in range(64):
            later(X, scale=5 + rank)

    @case
    def orders_of_models() -> None:
        over = mesh()
        torch.manual_seed(0)
        models = [tpcompile.parallelize(Mlp(), over, (X,)) for _ in "ab"]
        models[1 if rank else 0](X)

    @case
    def orders_of_copies() -> None:
        torch.manual_seed(0)
        one = tpcompile.parallelize(Mlp(), mesh(), (X,))
        copied = copy.deepcopy(one)
        assert all(type(part) is int for part in copied._tp.number), "texts are hashed otherwise elsewhere"
        (copied if rank else one)(X)

    @case
    def orders_of_parameters() -> None:
        parameters = list(model.parameters())
        torch.optim.SGD(parameters[::-1] if rank else parameters, 0.1).step()

    @case
    def later_steps() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 if step < 2 else 0.1 + rank
            optimizer.step()

    @case
    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(rank)):
            model(X)

    return {name: refusal(act) for name, act in cases.items()}


def _compare(x: Tensor) -> None:
    compare_call(mesh().get_group(), "run", "it", ["x"], [x])


def _compare_halves() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        _compare(torch.ones(1024))
    finally:
        torch.set_default_dtype(before)


def makes_other_things() -> list[str]:
    """What is said where one rank's rules or lowering change between two programs."""
    rank, model = dist.get_rank(), made()
    if rank:
        tpcompile.register_rule("aten.relu", "... a -> ... a; whole a")
    messages = [refusal(lambda: model(X[None]))]
    table._USER.clear()
    before = dict(lower_markers._LOWER)
    if rank:
        lower_markers._LOWER[markers.all_reduce] = _twice
    messages.append(refusal(lambda: model(X[None])))
    lower_markers._LOWER.update(before)
    model(X[None])
    return messages


def _twice(low: Any, node: Any) -> Any:
    x, axes = node.args[:2]
    once = low.emit(torch.ops.tpcompile.all_reduce.default, low.map(x), low.groups.name(axes), like=node)
    return low.emit(torch.ops.tpcompile.all_reduce.default, once, low.groups.name(axes), like=node)


def sends(programs: list[list[Sent]]) -> str:
    """What is said of programs of which this rank has one."""
    return refusal(lambda: compare_sent(dist.group.WORLD, programs[dist.get_rank()]))


def reads_other_files(folder: str) -> list[str]:
    """What is said where ranks load other copies, with other arguments, or save and load differently."""
    rank = dist.get_rank()
    where = f"{folder}/{rank}"
    model = tpcompile.from_pretrained(f"{folder}/0", mesh())
    state = model.full_state_dict()
    other = {name: value + rank if name == "lm_head.weight" else value for name, value in state.items()}
    messages = [
        refusal(lambda: tpcompile.from_pretrained(where, mesh())),
        refusal(lambda: tpcompile.from_pretrained(f"{folder}/0", mesh(), rms_norm_eps=1e-6 * (1 + rank))),
        refusal(lambda: model.save_pretrained(f"{folder}/new", max_shard_size="1KB" if rank else "1GB")),
        refusal(lambda: model.save_pretrained(f"{folder}/new", variant="b" if rank else None)),
        refusal(lambda: model.load_state_dict(other)),
        refusal(lambda: model.load_state_dict(state, strict=bool(rank))),
    ]
    assert all(map(torch.equal, model.full_state_dict().values(), state.values()))
    model.load_state_dict(state)
    return messages


def threads() -> tuple[str, bool]:
    """What a thread is told that calls while another is in a call, and whether it may call afterwards."""
    model, told = made().eval(), []
    with own_turn(model._tp.group_name):
        other = threading.Thread(target=lambda: told.append(refusal(lambda: model(X))))
        other.start()
        other.join()
        nested = torch.isfinite(model(X)).all()
    after = threading.Thread(target=lambda: told.append(refusal(lambda: model(X))))
    after.start()
    after.join()
    return told[0], bool(nested) and told[1] == "accepted"
