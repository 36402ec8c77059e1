"""The moves that change a placement on several sub-axes: which collectives, on which axes, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tpcompile.errors import TpCompileError

from . import markers
from .markers import Axes, Placements
from .placements import Owned, Partial, Placement, R, Replicate, Shard

Step = tuple[Callable[..., Any], tuple[Any, ...], Placements]
"""A marker, its options, and the placement that it leaves."""


def steps(src: Placements, dst: Placements) -> Iterator[Step]:
    """The moves that bring ``src`` to ``dst``, each with the placement that it leaves.

    Raises:
        TpCompileError: no collective does it.
    """
    _refuse_impossible(src, dst)
    # Rows of experts are masked first, which leaves sums, and are whole before they belong to anybody.
    entered = tuple(R if isinstance(y, Owned) and x != y else y for x, y in zip(src, dst, strict=True))
    moves = _Moves(list(src), entered)
    yield from moves.mask()
    yield from moves.enter()
    yield from moves.reduce()
    yield from moves.exchange()
    yield from moves.leave()
    yield from moves.enter()
    yield from moves.keep()
    moves.dst = dst
    yield from moves.disown()


class _Moves:
    """The placements on the way, and the moves that are possible from there.

    Axes that divide the same factor do so one after the other, in their order. So an axis can only be
    added or taken away inside all others that divide it; those further inside have to leave before.
    """

    def __init__(self, now: list[Placement], dst: Placements) -> None:
        self.now, self.dst = now, dst

    def mask(self) -> Iterator[Step]:
        """``O -> P``, whatever comes then."""
        for place in dict.fromkeys(p for p in self.now if isinstance(p, Owned)):
            axes = self._axes(lambda x, y, place=place: x == place and y != place)  # type: ignore[misc]
            if axes:
                yield self._move(markers.mask_rows, axes, Partial(), place)

    def disown(self) -> Iterator[Step]:
        """``R -> O``: nothing moves, but each rank will have a part of the gradient."""
        for place in dict.fromkeys(p for p in self.dst if isinstance(p, Owned)):
            axes = self._axes(lambda x, y, place=place: x != place and y == place)  # type: ignore[misc]
            if axes:
                yield self._move(markers.copy_to_ranks, axes, place)

    def enter(self) -> Iterator[Step]:
        """``R -> S`` and ``P -> S``, wherever it is possible; what moves nothing comes first."""
        kinds: tuple[type[Placement], ...] = (Replicate, Partial)
        while entering := next((e for kind in kinds for e in self._entering(kind)), None):
            place, axes = entering
            whole = isinstance(self.now[axes[0]], Replicate)
            yield self._move(markers.take_shard if whole else markers.reduce_scatter, axes, place, place)

    def reduce(self) -> Iterator[Step]:
        """``P -> R``."""
        ops = dict.fromkeys(p.op for p in self.now if isinstance(p, Partial))
        for op in ops:
            axes = self._axes(lambda x, y, op=op: x == Partial(op) and isinstance(y, Replicate))  # type: ignore[misc]
            if axes:
                yield self._move(markers.all_reduce, axes, R, op)

    def exchange(self) -> Iterator[Step]:
        """``S -> S``, where the innermost axes of one factor become the innermost of another."""
        while movable := next((e for e in self._entering(Shard) if self._innermost(e[1])), None):
            to, axes = movable
            yield self._move(markers.all_to_all, axes, to, self.now[axes[0]], to)

    def leave(self) -> Iterator[Step]:
        """``S -> R`` and ``S -> P``, with whatever stands inside, or in the way of an axis that enters."""
        for place in self._held():
            held, wanted = self._dividing(place), self._wanting(place)
            changed = {*held} ^ {*wanted}
            leaving = [a for a in held if changed and a >= min(changed)]
            while leaving:
                to_sum = isinstance(self.dst[leaving[-1]], Partial)
                axes: Axes = ()
                while leaving and isinstance(self.dst[leaving[-1]], Partial) == to_sum:
                    axes = (leaving.pop(), *axes)
                if to_sum:
                    yield self._move(markers.pad_shard, axes, Partial(), place)
                else:
                    yield self._move(markers.all_gather, axes, R, place)

    def keep(self) -> Iterator[Step]:
        """``R -> P``."""
        if axes := self._axes(lambda x, y: isinstance(x, Replicate) and isinstance(y, Partial)):
            yield self._move(markers.keep_first, axes, Partial())

    def _entering(self, kind: type[Placement]) -> Iterator[tuple[Shard, Axes]]:
        """Places that axes now placed as ``kind`` could divide next, with those axes."""
        for place in dict.fromkeys(p for p in self.dst if isinstance(p, Shard)):
            held, wanted = self._dividing(place), self._wanting(place)
            if held == wanted[: len(held)]:
                axes = wanted[len(held) :]
                same = next((i for i, a in enumerate(axes) if self.now[a] != self.now[axes[0]]), len(axes))
                if axes and isinstance(self.now[axes[0]], kind):
                    yield place, axes[:same]

    def _move(self, target: Callable[..., Any], axes: Axes, to: Placement, *options: Any) -> Step:
        for a in axes:
            self.now[a] = to
        return target, (axes, *options), tuple(self.now)

    def _axes(self, wanted: Callable[[Placement, Placement], bool]) -> Axes:
        return tuple(a for a, (x, y) in enumerate(zip(self.now, self.dst, strict=True)) if wanted(x, y))

    def _innermost(self, axes: Axes) -> bool:
        """Whether no axis that divides the same factor is further inside than these."""
        place = self.now[axes[0]]
        return isinstance(place, Shard) and axes == self._dividing(place)[-len(axes) :]

    def _held(self) -> list[Shard]:
        return list(dict.fromkeys(p for p in self.now if isinstance(p, Shard)))

    def _dividing(self, place: Shard) -> Axes:
        return self._axes(lambda x, _: x == place)

    def _wanting(self, place: Shard) -> Axes:
        return self._axes(lambda _, y: y == place)


def _refuse_impossible(src: Placements, dst: Placements) -> None:
    for x, y in zip(src, dst, strict=True):
        to_summands = isinstance(y, Partial) and x != y and (y.op != "sum" or isinstance(x, Partial))
        from_extreme = isinstance(x, Partial) and x.op != "sum" and isinstance(y, Shard)
        if to_summands or from_extreme:
            raise TpCompileError(
                f"no collective brings {x} to {y}",
                where="the collectives of a program",
                todo="report this plan",
            )
