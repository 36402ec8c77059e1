"""Arguments that make no sense are refused before anything happens, by an error that says what to do.

Every public function is called well but for one argument, in the place of which stands something that the
function does not take. Whatever it is, the answer is a ``TpCompileError`` with all of its parts.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import bad_input as on_ranks
from tests.on_ranks.bad_input import Two, X, refusal
from tpcompile import CostModel, ParallelInterface, Partial, Plan, Shard, Strategy, TpCompileError
from tpcompile.lowering.localise import LOCALISERS
from tpcompile.rules import notation, table

ERRORS = ("TpCompileError", "CannotCapture", "OnlyInParts", "RanksApart")
Accepts = Callable[[Any], bool]


def meta() -> nn.Module:
    return Two().to("meta")


def lone_mesh() -> DeviceMesh:
    """A mesh over which nobody is connected."""
    return DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("tp",), _init_backend=False, _rank=0)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def a_rate(value: Any) -> bool:
    return positive(value) or (isinstance(value, float) and value == math.inf)


def positive(value: Any) -> bool:
    return number(value) and value > 0


def not_negative(value: Any) -> bool:
    return number(value) and value >= 0


def same(value: Any) -> bool:
    return value is X


def truth(value: Any) -> bool:
    return isinstance(value, bool)


def nothing(value: Any) -> bool:
    return value is None


def never(value: Any) -> bool:
    return False


def empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


PLAN: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "model": (lambda v: tpcompile.plan(v, 2, (X,)), never),
    "mesh_or_sizes": (lambda v: tpcompile.plan(meta(), v, (X,)), lambda v: whole(v) and 0 < v <= 4096),
    "example_args": (lambda v: tpcompile.plan(meta(), 2, v), never),
    "example_kwargs": (lambda v: tpcompile.plan(meta(), 2, (), v), never),
    "plan": (lambda v: tpcompile.plan(meta(), 2, (X,), plan=v), empty),
    "axis": (lambda v: tpcompile.plan(meta(), 2, (X,), axis=v), nothing),
    "dynamic": (lambda v: tpcompile.plan(meta(), 2, (X,), dynamic=v), lambda v: truth(v) or empty(v)),
    "cost_model": (lambda v: tpcompile.plan(meta(), 2, (X,), cost_model=v), nothing),
    "memory": (lambda v: tpcompile.plan(meta(), 2, (X,), memory=v), lambda v: nothing(v) or positive(v)),
    "sequence_parallel": (lambda v: tpcompile.plan(meta(), 2, (X,), sequence_parallel=v), truth),
}
FIT: dict[str, tuple[Callable[[Any], Any], Accepts]] = {  # what can be is refused for want of tokens
    "model": (lambda v: tpcompile.fit(v, 1e9), never),
    "memory": (lambda v: tpcompile.fit(meta(), v, [2]), positive),
    "ranks": (lambda v: tpcompile.fit(meta(), 1e9, v), never),
    "device": (lambda v: tpcompile.fit(meta(), 1e9, [2], device=v), never),
    "mode": (lambda v: tpcompile.fit(meta(), 1e9, [2], mode=v), never),
    "batch": (lambda v: tpcompile.fit(meta(), 1e9, [2], batch=v), never),
    "seq": (lambda v: tpcompile.fit(meta(), 1e9, [2], seq=v), never),
    "optimizer": (lambda v: tpcompile.fit(meta(), 1e9, [2], optimizer=v), never),
    "checkpointing": (lambda v: tpcompile.fit(meta(), 1e9, [2], checkpointing=v), never),
    "sequence_parallel": (lambda v: tpcompile.fit(meta(), 1e9, [2], sequence_parallel=v), never),
    "plan": (lambda v: tpcompile.fit(meta(), 1e9, [2], plan=v), never),
    "dtype": (lambda v: tpcompile.fit(meta(), 1e9, [2], dtype=v), never),
}
LINT: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "model": (lambda v: tpcompile.lint_plan(v, {"a": "colwise"}, 2, (X,)), never),
    "tp_plan": (lambda v: tpcompile.lint_plan(meta(), v, 2, (X,)), empty),
    "ranks": (lambda v: tpcompile.lint_plan(meta(), {}, v, (X,)), lambda v: whole(v) and 0 < v <= 4096),
    "example_args": (lambda v: tpcompile.lint_plan(meta(), {"a": "colwise"}, 2, v), never),
    "example_kwargs": (lambda v: tpcompile.lint_plan(meta(), {"a": "colwise"}, 2, (), v), never),
    "cost_model": (lambda v: tpcompile.lint_plan(meta(), {}, 2, (X,), cost_model=v), never),
}
VERIFY: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "model": (lambda v: tpcompile.verify(v, 2, (X,)), never),
    "ranks": (lambda v: tpcompile.verify(Two(), v, (X,)), lambda v: whole(v) and 0 < v <= 4096),
    "example_args": (lambda v: tpcompile.verify(Two(), 2, v), never),
    "example_kwargs": (lambda v: tpcompile.verify(Two(), 2, (), v), never),
    "gradients": (lambda v: tpcompile.verify(Two(), 2, (X,), gradients=v), truth),
    "generate": (lambda v: tpcompile.verify(Two(), 2, (X,), generate=v), lambda v: whole(v) and v >= 0),
    "plan": (lambda v: tpcompile.verify(Two(), 2, (X,), plan=v), empty),
    "dynamic": (lambda v: tpcompile.verify(Two(), 2, (X,), dynamic=v), lambda v: truth(v) or empty(v)),
    "cost_model": (lambda v: tpcompile.verify(Two(), 2, (X,), cost_model=v), nothing),
    "memory": (lambda v: tpcompile.verify(Two(), 2, (X,), memory=v), lambda v: nothing(v) or positive(v)),
    "passes": (
        lambda v: tpcompile.verify(Two(), 2, (X,), passes=v),
        lambda v: isinstance(v, list | tuple) and not v,
    ),
    "sequence_parallel": (lambda v: tpcompile.verify(Two(), 2, (X,), sequence_parallel=v), truth),
    "op": (lambda v: tpcompile.check_rule(v, (X,)), never),
    "args of an op": (lambda v: tpcompile.check_rule("aten.relu", v), never),
    "kwargs of an op": (
        lambda v: tpcompile.check_rule("aten.relu", (X,), v),
        lambda v: nothing(v) or empty(v),
    ),
}
COST: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "name": (lambda v: CostModel(v, 1.0, 1.0, 1.0, 1.0), lambda v: isinstance(v, str)),
    "flops": (lambda v: CostModel("", v, 1.0, 1.0, 1.0), a_rate),
    "memory": (lambda v: CostModel("", 1.0, v, 1.0, 1.0), a_rate),
    "latency": (lambda v: CostModel("", 1.0, 1.0, v, 1.0), not_negative),
    "bandwidth": (lambda v: CostModel("", 1.0, 1.0, 1.0, v), a_rate),
    "launch": (lambda v: CostModel("", 1.0, 1.0, 1.0, 1.0, v), not_negative),
}
SHARDS: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "param": (lambda v: tpcompile.get_tensor_shard(v, X, lone_mesh(), 0, 0), same),
    "empty_param": (lambda v: tpcompile.get_tensor_shard(X, v, lone_mesh(), 0, 0), same),
    "device_mesh": (lambda v: tpcompile.get_tensor_shard(X, X, v, 0, 0), never),
    "rank": (
        lambda v: tpcompile.get_tensor_shard(X, X, lone_mesh(), v, 0),
        lambda v: whole(v) and v in (0, 1),
    ),
    "dim": (lambda v: tpcompile.get_tensor_shard(X, X, lone_mesh(), 0, v), lambda v: whole(v) and -3 < v < 2),
    "blocks": (
        lambda v: tpcompile.get_packed_weights(X, X, lone_mesh(), 0, 0, v),
        lambda v: whole(v) and v in (1, 2, 4),
    ),
}
OTHERS: dict[str, tuple[Callable[[Any], Any], Accepts]] = {
    "calibrate": (tpcompile.calibrate, never),
    "from_pretrained": (lambda v: tpcompile.from_pretrained("nowhere", v), never),
    "parallelize": (lambda v: tpcompile.parallelize(Two(), v, (X,)), never),
    "hf_plan model": (tpcompile.hf_plan, never),
    "hf_plan experts": (lambda v: tpcompile.hf_plan(meta(), experts=v), never),  # it has no plan at all
    "to_hf_plan": (tpcompile.to_hf_plan, never),
    "register_rule op": (lambda v: tpcompile.register_rule(v, "a -> a"), never),
    "register_rule rule": (lambda v: tpcompile.register_rule("aten.relu", v), callable),
    "Shard dim": (Shard, whole),
    "Shard factor": (lambda v: Shard(0, v), lambda v: whole(v) and v >= 0),
    "Partial": (Partial, never),
    "Strategy division": (Strategy, never),
    "Strategy whole_input": (lambda v: Strategy("out", v), truth),
    "Strategy whole_result": (lambda v: Strategy("out", whole_result=v), truth),
    "Strategy sequence": (lambda v: Strategy("out", sequence=v), truth),
    "ParallelInterface name": (
        lambda v: ParallelInterface.register(v, Strategy("out")),
        lambda v: isinstance(v, str) and bool(v),
    ),
    "ParallelInterface value": (lambda v: ParallelInterface.register("mine", v), never),
    "Plan.load": (Plan.load, never),
    "Plan.from_json": (Plan.from_json, never),
}
CASES = {"plan": PLAN, "lint_plan": LINT, "fit": FIT, "verify": VERIFY, "CostModel": COST, "shards": SHARDS}
ARGUMENTS = {
    f"{function} {name}": case for function, cases in CASES.items() for name, case in cases.items()
} | OTHERS

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
OBJECTS = [X, int, nn.Linear, Two, object(), refusal, 1j, {1}, (None,), [[]], math.nan, math.inf, -math.inf]
ANYTHING = st.one_of(
    st.sampled_from(OBJECTS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inside: (
            st.lists(inside, max_size=2) | st.dictionaries(st.text() | st.integers(), inside, max_size=2)
        ),
        max_leaves=3,
    ),
)


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a call registers that should have been refused is gone afterwards."""
    before = dict(table._USER), dict(ParallelInterface._global_mapping)
    yield
    for registry, rows in zip((table._USER, ParallelInterface._global_mapping), before, strict=True):
        registry.clear()
        registry.update(rows)


@pytest.mark.parametrize("name", ARGUMENTS)
@settings(FEW)
@given(value=ANYTHING)
def test_what_an_argument_cannot_be(name: str, value: Any) -> None:
    call, accepts = ARGUMENTS[name]
    assume(not accepts(value))
    assert refusal(lambda: call(value)) == "refused"


# What users are given, and need not make.
GIVEN = {
    "Estimate",
    "Fit",
    "GlobalProgram",
    "LoadedProgram",
    "ParallelInterface",
    "Pass",
    "Plan",
    "PlanReport",
    "Report",
    "RuleReport",
    "TensorParallelLayer",
}
FUNCTIONS = [name for name in tpcompile.__all__ if name not in {*GIVEN, "TpCompileError", "checkpoint"}]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_that_do_not_fit_the_signature(name: str) -> None:
    function = getattr(tpcompile, name)
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert refusal(lambda: function(*range(40))) == "refused"
    assert refusal(lambda: function(no_such_argument=1)) == "refused"
    assert not required or refusal(function) == "refused"


# ------------------------------------------------------------------------------------- what types do not say


class Quantised(Tensor):
    """Is not what it looks like: operations on it do something of their own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs)


class Wrapped(Tensor):
    """The same, one level below."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(())


class Failing(dict[Any, Any]):
    """Looks right, and cannot be read."""

    def items(self) -> Any:
        raise RuntimeError("no items")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def special(kind: type[Tensor]) -> nn.Module:
    """A model with a weight of another kind of tensor."""
    model = Two()
    model.register_buffer("table", torch.zeros(3).as_subclass(kind))
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tpcompile.plan(meta(), 10**6, (X,)), "number of ranks, from 1 to 4096"),
        (lambda: tpcompile.plan(meta(), 2, (X,), axis="tp"), "has no axis 'tp'"),
        (lambda: tpcompile.plan(meta(), 2, (X,), memory="1GB"), "memory is '1GB'"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic={"y": {0: True}}), "no argument 'y'"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic={"x": {2: True}}), "x has 2 dimensions"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic={"x": {-3: True}}), "x has 2 dimensions"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic={"x": {0: "yes"}}), "dynamic is"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic={"x": [0]}), "dynamic is"),
        (lambda: tpcompile.plan(meta(), 2, (X,), dynamic=Failing(x=0)), "dynamic is"),
        (lambda: tpcompile.plan(meta(), 2, (X,), plan=Failing(x=0)), "plan is"),
        (lambda: tpcompile.plan(meta(), 2, (X,), plan={"a": Shard(0, 1)}), "not a placement"),
        (lambda: tpcompile.plan(meta(), 2, (X,), plan={"a": Partial()}), "not a placement"),
        (lambda: tpcompile.plan(meta(), 2, (X,), plan={"a.weight": Shard(2)}), "a.weight"),
        (lambda: tpcompile.plan(meta(), 2, (X,), cost_model="b100"), "no cost model named 'b100'"),
        (lambda: tpcompile.plan(torch.compile(Two()), 2, (X,)), "wraps, or has compiled"),  # type: ignore[arg-type]
        (lambda: tpcompile.plan(nn.DataParallel(Two()), 2, (X,)), "wraps, or has compiled"),
        (lambda: tpcompile.plan(torch.jit.script(nn.Linear(16, 2)), 2, (X,)), "wraps, or has compiled"),
        (lambda: tpcompile.plan(nn.LazyLinear(4), 2, (X,)), "lazy layer"),
        (lambda: tpcompile.plan(special(Quantised), 2, (X,)), "table is a Quantised"),
        (lambda: tpcompile.plan(special(Wrapped), 2, (X,)), "table is a Wrapped"),
        (lambda: tpcompile.plan(nn.ModuleList([Two()]), 2, (X,)), "has no forward"),
        (lambda: tpcompile.plan(meta(), lone_mesh(), (X,), axis="dp"), "no axis 'dp'"),
        (lambda: tpcompile.parallelize(Two(), lone_mesh(), (X,)), "no process group"),
        (lambda: tpcompile.parallelize(Two(), None, (X,)), "no process group"),
        (lambda: tpcompile.get_packed_weights(X, X, lone_mesh(), 0, 0, [5, -1]), "blocks"),
        (lambda: tpcompile.get_packed_weights(X, X, lone_mesh(), 0, 0, 10**9), "do not make up"),
        (lambda: tpcompile.plan(nn.Linear(2, 2), 2, (X,)), "cannot be captured"),
        (lambda: tpcompile.Plan.load(""), "not a plan"),
        (lambda: tpcompile.checkpoint.load({}, checkpoint_id="\0"), "cannot be read"),
        (lambda: tpcompile.checkpoint.load({}, checkpoint_id=3), "checkpoint_id is 3"),  # type: ignore[arg-type]
        (lambda: tpcompile.checkpoint.sharded_state_dict(X), "model is"),  # type: ignore[arg-type]
        (lambda: tpcompile.checkpoint.sharded_optimizer_state_dict(Two(), 1), "optimizer is 1"),  # type: ignore[arg-type]
        (lambda: tpcompile.get_tensor_shard(X, X[0], lone_mesh(), 0, 0), "shapes are"),
        (lambda: tpcompile.register_rule("aten.no_such_operator", "a -> a"), "no operator"),
        (lambda: tpcompile.register_rule("nowhere", "a -> a"), "no operator"),
        (lambda: tpcompile.register_rule("aten::relu", "a -> a"), "no operator"),
    ],
)
def test_calls_that_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TpCompileError) as error:
        call()
    assert message in str(error.value) and error.value.where and error.value.todo


@pytest.mark.parametrize(
    "rule",
    [
        *("", "a", "a b", "a -> b -> c", "a - > a", "a a -> a", "... ... -> a", "a? , b -> a", "a -> 2"),
        *("a -> a; what", "a -> a;", "a -> a; whole", "a -> a; whole z", "a -> a; whole a; whole a"),
        *("a -> a; linear 9", "a -> a; linear x", "a -> a; once -1", "a -> a; fixed 1", "a -> a; linear"),
        *("a b -> a; reduce b", "a b -> a; reduce b:mean", "a -> a; contraction a", "a -> a; localize x"),
    ],
)
def test_rules_that_follow_no_notation(rule: str) -> None:
    assert refusal(lambda: tpcompile.register_rule("aten.relu", rule)) == "refused"
    assert "aten.relu" not in table._USER


WORDS = [*"a b 1 ... ? , -> ;".split(), *"whole linear once 0 7 reduce :max contraction".split()]  # noqa: SIM905


@settings(FEW, max_examples=300)
@given(rule=st.lists(st.sampled_from(WORDS)))
def test_rules_are_read_or_refused(rule: list[str]) -> None:
    assert refusal(lambda: tpcompile.register_rule("aten.relu", " ".join(rule))) in ("refused", "accepted")


def test_rules_that_fail_where_they_are_used() -> None:
    """A user's function that raises, or returns something else than a rule."""
    for wrong in (lambda node: 1 / 0, lambda node: 5, lambda node: None, lambda: "no"):
        tpcompile.register_rule("aten.relu", wrong)
        assert refusal(lambda: tpcompile.plan(meta(), 2, (X,))) == "refused"


def test_the_rewrites_that_rules_may_name() -> None:
    assert set(notation.LOCALISERS) == set(LOCALISERS)


# ----------------------------------------------------------------------------------------------- plan files


@pytest.fixture(scope="module")
def saved() -> str:
    return json.dumps(tpcompile.plan(meta(), 2, (X,)).to_json())


def spots(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in nested data."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from spots(value, (*path, key))


@settings(FEW, max_examples=200)
@given(data=st.data())
def test_a_plan_that_was_changed_is_refused(saved: str, data: st.DataObject) -> None:
    """At any place, by anything: also by what a plan may well say."""
    plan = json.loads(saved)
    spot = data.draw(st.sampled_from(list(spots(plan))))
    inside = plan
    for key in spot[:-1]:
        inside = inside[key]
    values = st.sampled_from(
        ["R", "S(0)", "S(1)", "P(sum)", "P(max)", 0, 1, 2, True, [], {}, None, -1, math.nan]
    )
    new = data.draw(values | st.text(max_size=3))
    assume(json.dumps(inside[spot[-1]]) != json.dumps(new))
    if data.draw(st.booleans()):
        inside[spot[-1]] = new
    else:
        del inside[spot[-1]]
    assert refusal(lambda: Plan.from_json(plan)) == "refused"


def test_files_that_are_no_plan(saved: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for text in ("", "[]", "5", "null", "{", '{"version": 2}', "[" * 100_000, saved[:-9], saved + "x", "\0"):
        file.write_text(text)
        assert refusal(lambda: Plan.load(file)) == "refused"
    file.write_bytes(b"\xff\xfe")
    assert refusal(lambda: Plan.load(file)) == refusal(lambda: Plan.load(tmp_path)) == "refused"
    file.write_text(saved)
    plan = Plan.load(file)
    assert str(plan) == str(Plan.from_json(json.loads(saved)))
    for place in (tmp_path, tmp_path / "no" / "folder", "", "\0", 5, None):
        assert refusal(lambda place=place: plan.save(place)) == "refused"  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    for place in (tmp_path, tmp_path / "no" / "folder", "", "\0", 5, None):
        assert refusal(lambda place=place: plan.report(place)) == "refused"  # type: ignore[misc]
    assert refusal(lambda: plan.report(tmp_path / "a", 5)) == "refused"  # type: ignore[arg-type]
    assert refusal(lambda: plan.report(tmp_path / "a", explain=1)) == "refused"  # type: ignore[arg-type]
    for part in (5, None, ["a"], "a"):
        assert refusal(lambda part=part: plan.explain(part)) == "refused"  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- on ranks


def test_every_rank_is_told(tmp_path: Path) -> None:
    """Bad on all ranks, or on the last one only: refused on all, the model as it was, and nobody waits."""
    families.build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    for answers in zip(*run_spmd(on_ranks.refusals, 2, str(tmp_path), timeout=300), strict=True):
        assert set(answers) == {"refused"}, answers


def test_torchruns_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group ``parallelize`` makes one, as ``from_pretrained`` does."""
    assert not dist.is_initialized()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    try:
        model = tpcompile.parallelize(Two(), example_args=(X,))
        assert model.plan.ranks == 1 and dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_every_error_says_where_and_what_to_do() -> None:
    """Of all that is raised in the package; an error that passes another one on takes both from it."""
    package = Path(tpcompile.__file__).parent
    lacking = []
    for folder in (package, package.parent / "passes", package.parent / "lowering"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                    said = {keyword.arg for keyword in node.keywords}
                    if not said >= {"where", "todo"} and None not in said:
                        lacking.append(f"{path}:{node.lineno}")
    assert not lacking
