"""Random programs with random placements prove; a random change of one is proved only if no number changes.

The placements come from dice, not from the planner: any way that a rule has, any part of a weight. So the
proof, the passes and lowering judge each other on programs that no plan would have.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from tests.helpers import programs
from tests.helpers.random_programs import INPUTS, MODEL, random_program
from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.graph_edit import call
from tpcompile.ir.nodes import is_tensor
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.passes.verify_placements import verify_placements
from tpcompile.pipeline import canonical, rewrite
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import choices

AXES = ((2,), (3,), (2, 2), (2, 3))
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
DRAWS = st.tuples(st.integers(0, 2**20), st.integers(3, 7), st.sampled_from(AXES), st.booleans())


def placed(seed: int, calls: int, axes: tuple[int, ...], training: bool) -> GlobalProgram:
    """A random program, rewritten for placements that were drawn."""
    rng = Random(seed)
    program = canonical(random_program(seed, calls, math.prod(axes)).captured, math.prod(axes))
    factors = program.decided = program.factors()
    for axis, ranks in enumerate(axes):
        drawn = Assignment(ranks)
        for node in program.graph.nodes:
            if node.op == "call_function" and is_tensor(node):
                drawn.nodes[node] = rng.choice(choices(node, factors, lambda _: True, axes[: axis + 1]))
        for param in program.params():
            dims = enumerate(factors.atom_sizes(param))
            shards = [Shard(dim, at) for dim, atoms in dims for at in range(len(atoms))]
            drawn.params[param] = rng.choice([R, *shards])
        program.decisions.append(drawn)
    rewrite(program, training=training)
    return program


def change_one(program: GlobalProgram, rng: Random) -> str:
    """Changes one placement, or one marker, at random; says which."""
    every = [n for n in program.graph.nodes if n.target in markers.MARKERS]
    kind = rng.choice(["drop", "twice", "axes", "place", "kind", "insert", "param"] if every else ["insert"])
    node = rng.choice(every) if every else None
    if kind == "insert" or node is None:
        return _inserted(program, rng)
    if kind == "param":
        param, decision = rng.choice(list(program.params())), rng.choice(program.decisions)
        sizes = enumerate(program.planned_factors.atom_sizes(param))
        decision.params[param] = rng.choice([R, *(Shard(dim) for dim, atoms in sizes if atoms)])
        return f"{param} is held as {decision.params[param]}"
    if kind == "drop" and isinstance(node.args[0], Node):
        node.replace_all_uses_with(node.args[0])
    elif kind == "axes":
        node.update_arg(
            1,
            tuple(
                sorted(rng.sample(range(len(program.axis_sizes)), rng.randint(1, len(program.axis_sizes))))
            ),
        )
    elif kind == "place":
        at = [i for i, a in enumerate(node.args) if isinstance(a, Placement)]
        if at:
            node.update_arg(rng.choice(at), _any_shard(node, rng))
    elif kind == "kind" and isinstance(node.args[0], Node):
        axes: Any = node.args[1]
        node.target, node.args = rng.choice(_markers(node, rng, axes))
    elif kind == "twice" and isinstance(node.args[0], Node):
        _again(node)
    return f"{kind} {node.name}"


def _markers(value: Node, rng: Random, axes: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    x: Any = value.args[0] if value.target in markers.MARKERS else value
    return [
        (markers.all_reduce, (x, axes, "sum")),
        (markers.copy_to_ranks, (x, axes)),
        (markers.keep_first, (x, axes)),
        (markers.gradient_once, (x, axes)),
        (markers.all_gather, (x, axes, _any_shard(value, rng))),
        (markers.reduce_scatter, (x, axes, _any_shard(value, rng))),
        (markers.take_shard, (x, axes, _any_shard(value, rng))),
        (markers.pad_shard, (x, axes, _any_shard(value, rng))),
    ]


def _any_shard(value: Node, rng: Random) -> Shard:
    return Shard(rng.randrange(value.meta["val"].ndim))


def _again(node: Node) -> None:
    with node.graph.inserting_after(node):
        second = call(node.graph, node.target, (node, *node.args[1:]), like=node)  # type: ignore[arg-type]
    node.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)


def _inserted(program: GlobalProgram, rng: Random) -> str:
    """A marker where none was, before one use of a value."""
    calls = [
        n for n in program.graph.nodes if n.op == "call_function" and any(map(is_tensor, n.all_input_nodes))
    ]
    user = rng.choice(calls)
    value = rng.choice([n for n in user.all_input_nodes if is_tensor(n)])
    axes = tuple(sorted(rng.sample(range(len(program.axis_sizes)), rng.randint(1, len(program.axis_sizes)))))
    target, args = rng.choice(_markers(value, rng, axes))
    with program.graph.inserting_before(user):
        new = call(program.graph, target, (value, *args[1:]), like=value)
    user.replace_input_with(value, new)
    return f"{target.__name__} of {value} before {user}"


def differs(program: GlobalProgram, whole: list[Any], training: bool) -> str:
    """What is wrong on simulated ranks; "" if nothing is."""
    try:
        for results in programs.run_ranks(program, MODEL, *INPUTS):
            torch.testing.assert_close(results, whole, rtol=1e-9, atol=1e-9)
        if training:
            programs.gradients_agree(program, MODEL, *INPUTS)
    except Exception as error:  # a fault may fail in any way; here it counts that it does
        return f"{type(error).__name__}: {error}"
    return ""


def _whole(seed: int, calls: int, axes: tuple[int, ...]) -> list[Tensor]:
    return programs.run_whole(random_program(seed, calls, math.prod(axes)), MODEL, *INPUTS)


@settings(SETTINGS, max_examples=12)
@given(DRAWS)
def test_random_placements_prove_and_are_right(drawn: tuple[int, int, tuple[int, ...], bool]) -> None:
    seed, calls, axes, training = drawn
    program = placed(seed, calls, axes, training)  # which proves
    assert not differs(program, _whole(seed, calls, axes), training)


@settings(SETTINGS, max_examples=25)
@given(DRAWS, st.integers(0, 2**20))
def test_what_changes_a_number_is_not_proved(drawn: Any, change: int) -> None:
    seed, calls, axes, training = drawn
    program = placed(seed, calls, axes, training)
    what = change_one(program, Random(change))
    try:
        verify_placements(program, training=training)
    except TpCompileError:
        return
    assert not differs(program, _whole(seed, calls, axes), training), what
