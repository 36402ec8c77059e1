"""Faults put into rewritten graphs, one at a time: what a proof must refuse, or a run show to be harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir import markers
from tpcompile.ir.graph_edit import behind, call
from tpcompile.ir.placements import R, Shard
from tpcompile.planner.global_program import GlobalProgram

aten = torch.ops.aten
Fault = Callable[[GlobalProgram], Iterator[Callable[[], Any]]]
"""Gives the edits that put this fault into a program, one for each place where it can be put."""

_NONLINEAR = {aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default}


def _other_dim(place: Any) -> Any:
    return replace(place, dim=place.dim - 1 if place.dim else 1)


def _calls(program: GlobalProgram, *targets: Any) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in targets]


def _dropped(*targets: Any) -> Fault:
    """What stands for a change of placement is not there."""

    def fault(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
        for node in _calls(program, *targets):
            yield lambda node=node: node.replace_all_uses_with(node.args[0])

    return fault


def _twice(*targets: Any) -> Fault:
    """What stands for a change of placement is there twice."""

    def fault(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
        for node in _calls(program, *targets):
            yield lambda node=node: _again(node)

    return fault


def _again(node: Node) -> None:
    with node.graph.inserting_after(node):
        second = call(node.graph, node.target, (node, *node.args[1:]), like=node)  # type: ignore[arg-type]
    second.meta["placement"] = node.meta.get("placement")
    node.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)


def edits_of_options(target: Any, index: int, change: Callable[[Any], Any]) -> Fault:
    """An option of a collective is another one."""

    def fault(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
        for node in _calls(program, target):
            if len(node.args) > index and change(node.args[index]) != node.args[index]:
                yield lambda node=node: node.update_arg(index, change(node.args[index]))

    return fault


def _other_kind(before: Any, after: Any, *options: Any) -> Fault:
    """A collective is one of another kind."""

    def fault(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
        for node in _calls(program, before):
            yield lambda node=node: _retarget(node, after, (*node.args[:2], *options))

    return fault


def _retarget(node: Node, target: Any, args: tuple[Any, ...]) -> None:
    node.target, node.args = target, args


def reduced_behind_nonlinear(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A sum over the ranks is completed behind an operator that is not linear."""
    for node in _calls(program, markers.all_reduce):
        for user in node.users:
            if user.target in _NONLINEAR:
                yield lambda node=node, user=user: _behind(node, user)


def _behind(node: Node, user: Node) -> None:
    user.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
    with user.graph.inserting_after(user):
        late = call(user.graph, markers.all_reduce, (user, *node.args[1:]), like=node)
    user.replace_all_uses_with(late, delete_user_cb=lambda u: u is not late)


def added_on_every_rank(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A value that only the first rank is to add is added by all."""
    yield from _dropped(markers.keep_first)(program)


def copied_late(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """The copy for gradients stands behind one use, which then has the whole value."""
    for node in _calls(program, markers.copy_to_ranks):
        for user in node.users:
            yield lambda node=node, user=user: user.replace_input_with(node, node.args[0])


def copied_where_whole(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A copy for gradients where every rank has the whole gradient."""
    every = tuple(range(len(program.axis_sizes)))
    for node in list(program.graph.nodes):
        placement = node.meta.get("placement")
        if node.op == "call_function" and placement and all(p == R for p in placement) and node.users:
            if node.target not in markers.MARKERS and node.meta["val"].dtype.is_floating_point:
                yield lambda node=node: _copy(node, every)


def _copy(node: Node, axes: tuple[int, ...]) -> None:
    with node.graph.inserting_before(behind(node)):
        copy = call(node.graph, markers.copy_to_ranks, (node, axes), like=node)
    copy.meta["placement"] = node.meta["placement"]
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def segments_swapped(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """What is multiplied together is joined in another order than it is stored in."""
    for node in _calls(program, markers.matmul_merged):
        for index, joined in enumerate(node.args):
            if isinstance(joined, list | tuple):
                yield lambda node=node, index=index, joined=joined: node.update_arg(index, [*joined[::-1]])


FAULTS: dict[str, Fault] = {
    "all-reduce dropped": _dropped(markers.all_reduce),
    "all-reduce twice": _twice(markers.all_reduce),
    "all-reduce of the largest": edits_of_options(markers.all_reduce, 2, lambda _: "max"),
    "all-reduce on other sub-axes": edits_of_options(
        markers.all_reduce, 1, lambda axes: axes[1:] or (axes[0] + 1,)
    ),
    "all-reduce behind a nonlinearity": reduced_behind_nonlinear,
    "all-gather dropped": _dropped(markers.all_gather),
    "all-gather along another dimension": edits_of_options(markers.all_gather, 2, _other_dim),
    "all-gather for other gradients": edits_of_options(markers.all_gather, 4, lambda partial: not partial),
    "reduce-scatter dropped": _dropped(markers.reduce_scatter),
    "reduce-scatter along another dimension": edits_of_options(markers.reduce_scatter, 2, _other_dim),
    "reduce-scatter instead of all-reduce": _other_kind(markers.all_reduce, markers.reduce_scatter, Shard(0)),
    "all-reduce instead of reduce-scatter": _other_kind(markers.reduce_scatter, markers.all_reduce, "sum"),
    "all-to-all dropped": _dropped(markers.all_to_all),
    "all-to-all to another dimension": edits_of_options(markers.all_to_all, 3, _other_dim),
    "shard not taken": _dropped(markers.take_shard),
    "shard of another dimension": edits_of_options(markers.take_shard, 2, _other_dim),
    "added on every rank": added_on_every_rank,
    "kept by the first rank twice": _twice(markers.keep_first),
    "not filled up with zeros": _dropped(markers.pad_shard),
    "rows of other ranks not masked": _dropped(markers.mask_rows),
    "gradient copy dropped": _dropped(markers.copy_to_ranks),
    "gradient copy twice": _twice(markers.copy_to_ranks),
    "gradient copy for some uses": copied_late,
    "gradient copy where it is whole": copied_where_whole,
    "gradient not counted once": _dropped(markers.gradient_once),
    "segments swapped": segments_swapped,
}
