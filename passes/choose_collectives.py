"""ChooseCollectives: abstract reshards become collectives on sub-axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tpcompile import markers
from tpcompile.errors import TpCompileError
from tpcompile.graph_edit import call
from tpcompile.markers import Axes, Placements
from tpcompile.placements import Partial, Placement, R, Replicate, Shard
from tpcompile.work import Work

from .pipeline import Pass

Step = tuple[Callable[..., Any], tuple[Any, ...], Placements]


@dataclass(frozen=True)
class ChooseCollectives(Pass):
    """Replaces ``reshard`` by all-reduce, reduce-scatter, all-gather, all-to-all or local moves.

    ``P -> R`` all-reduce, ``P -> S`` reduce-scatter, ``S -> R`` all-gather, ``S -> S`` all-to-all;
    ``R -> S``, ``R -> P`` and ``S -> P`` move nothing. Sub-axes that do the same go in one collective,
    and what shrinks a value comes before what moves it.
    """

    name = "choose-collectives"

    def apply(self, work: Work) -> bool:
        found = work.graph.find_nodes(op="call_function", target=markers.reshard)
        for node in found:
            value, src, dst = node.args
            with work.graph.inserting_before(node):
                for target, options, after in steps(src, dst):
                    value = call(work.graph, target, (value, *options), like=node)
                    value.meta["placement"] = after
            node.replace_all_uses_with(value)
            work.graph.erase_node(node)
        return bool(found)


def steps(src: Placements, dst: Placements) -> Iterator[Step]:
    """The moves that bring ``src`` to ``dst``, each with the placement that it leaves.

    Raises:
        TpCompileError: no collective does it.
    """
    now = list(src)

    def move(target: Callable[..., Any], axes: Axes, to: Placement, *options: Any) -> Step:
        for a in axes:
            now[a] = to
        return target, (axes, *options), tuple(now)

    def todo(kind: type, goal: type) -> dict[tuple[Placement, Placement], Axes]:
        pairs: dict[tuple[Placement, Placement], Axes] = {}
        for a, (x, y) in enumerate(zip(now, dst, strict=True)):
            if x != y and isinstance(x, kind) and isinstance(y, goal):
                pairs[x, y] = (*pairs.get((x, y), ()), a)
        return pairs

    _refuse_impossible(src, dst)
    for (_, to), axes in todo(Partial, Shard).items():
        yield move(markers.reduce_scatter, axes, to, to)
    for (x, _), axes in todo(Partial, Replicate).items():
        assert isinstance(x, Partial)
        yield move(markers.all_reduce, axes, R, x.op)
    for (x, to), axes in todo(Shard, Shard).items():
        if len(axes) == 1 and _alone(now, axes, x) and _alone(list(dst), axes, to):
            yield move(markers.all_to_all, axes, to, x, to)
    for place in dict.fromkeys(p for p in now if isinstance(p, Shard)):
        held = [a for a, p in enumerate(now) if p == place]
        leaves = [a for a in held if dst[a] != place and not isinstance(dst[a], Partial)]
        if leaves:
            # Axes divide one after the other: an outer one can only be gathered with those inside it.
            yield move(markers.all_gather, tuple(a for a in held if a >= leaves[0]), R, place)
    for (_, to), axes in todo(Replicate, Shard).items():
        assert isinstance(to, Shard)
        inside = [a for a, p in enumerate(now) if p == to and a > axes[0]]
        if inside:
            yield move(markers.all_gather, tuple(inside), R, to)
            axes = tuple(sorted((*axes, *inside)))
        yield move(markers.take_shard, axes, to, to)
    for (x, to), axes in todo(Shard, Partial).items():
        yield move(markers.pad_shard, axes, to, x)
    for (_, to), axes in todo(Replicate, Partial).items():
        yield move(markers.keep_first, axes, to)


def _alone(placements: list[Placement], axes: Axes, place: Placement) -> bool:
    return all(p != place for a, p in enumerate(placements) if a not in axes)


def _refuse_impossible(src: Placements, dst: Placements) -> None:
    for x, y in zip(src, dst, strict=True):
        if isinstance(y, Partial) and (y.op != "sum" or (isinstance(x, Partial) and x != y)):
            raise TpCompileError(f"no collective brings {x} to {y}", todo="report this plan")
        if isinstance(x, Partial) and x.op != "sum" and isinstance(y, Shard):
            raise TpCompileError(f"no collective brings {x} to {y}", todo="report this plan")
