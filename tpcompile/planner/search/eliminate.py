"""Exact minimisation of a sum of small cost tables: bucket elimination (Dechter, 1999).

Variables have small finite domains, tables span a few of them. Eliminating a variable replaces the
tables that mention it by one table over its neighbours, which holds the minimum over its values;
the cheapest bucket goes first. The cost is exponential only in the largest clique so made, which
for graphs of neural networks is three to eight.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpcompile.errors import OnlyInParts, TpCompileError

Table = np.ndarray
LARGEST_BUCKET = 2**26

_Eliminated = tuple[Hashable, list[Hashable], Table]
"""A variable, its neighbours when it was eliminated, and the cost over all of their values."""


@dataclass
class Problem:
    """A minimisation problem.

    Attributes:
        domains: the number of values of each variable, in the order that breaks ties.
        tables: cost tables; the axes of each belong to the variables beside it.
    """

    domains: dict[Hashable, int] = field(default_factory=dict)
    tables: list[tuple[tuple[Hashable, ...], Table]] = field(default_factory=list)

    def variable(self, name: Hashable, costs: Sequence[float] | Table) -> None:
        """Adds a variable and what each of its values costs by itself; added again, that costs as well."""
        self.domains[name] = len(costs)
        self.tables.append(((name,), np.asarray(costs, dtype=float)))

    def table(self, names: tuple[Hashable, ...], costs: Table) -> None:
        """Adds a cost that depends on several variables; two of them may be the same one."""
        if len(names) == 2 and names[0] == names[1]:
            names, costs = names[:1], np.diagonal(costs)
        self.tables.append((names, costs))

    def cost(self, values: Mapping[Hashable, int]) -> float:
        """The cost of one assignment."""
        return float(sum(t[tuple(values[n] for n in names)] for names, t in self.tables))


def solve(problem: Problem) -> tuple[dict[Hashable, int], float]:
    """An assignment of least cost, ties broken by the order of the variables and of their values.

    Raises:
        TpCompileError: every assignment is impossible.
        OnlyInParts: a bucket would not fit in memory.
    """
    buckets = _Buckets(problem)
    done = list(buckets.eliminate())
    if not np.isfinite(buckets.constant):
        raise TpCompileError("no placement satisfies all constraints", where="plan", todo="remove a pin")
    return _read_back(done), buckets.constant


def extras(problem: Problem) -> dict[Hashable, Table]:
    """For every value of every variable, what the best assignment with it costs more than the best of all.

    Two passes over the same buckets: a bucket's table has the costs of those before it, which they handed up;
    it is then told what all others cost, by the bucket that took over its neighbours.

    Raises:
        OnlyInParts: a bucket would not fit in memory.
    """
    done = list(_Buckets(problem).eliminate())
    rank = {name: at for at, (name, _, _) in enumerate(done)}
    totals: dict[Hashable, tuple[list[Hashable], Table]] = {}
    for name, others, total in reversed(done):
        if others:
            up = total.min(axis=0)
            finite = np.isfinite(up)  # what is not is impossible already
            best = _least(*totals[min(others, key=rank.__getitem__)], others)
            total = total + np.where(finite, best - np.where(finite, up, 0.0), np.inf)
        totals[name] = [name, *others], total
    least = {name: _least(*totals[name], [name]) for name in totals}
    return {name: costs - costs.min() for name, costs in least.items()}


def _least(axes: list[Hashable], total: Table, kept: Sequence[Hashable]) -> Table:
    """The least of a table for all values of some of its variables, in their order."""
    gone = tuple(at for at, name in enumerate(axes) if name not in kept)
    left = [name for name in axes if name in kept]
    table: Table = total.min(axis=gone)
    return np.transpose(table, [left.index(name) for name in kept])


def _read_back(done: list[_Eliminated]) -> dict[Hashable, int]:
    """The best value of each variable, given those of its neighbours, which were eliminated after it."""
    values: dict[Hashable, int] = {}
    for name, others, total in reversed(done):
        at: tuple[Any, ...] = (slice(None), *(values[o] for o in others))
        values[name] = int(total[at].argmin())
    return values


class _Buckets:
    """The tables that mention each variable, while variables are eliminated.

    Attributes:
        constant: what remains when every variable is gone: the least cost.
    """

    def __init__(self, problem: Problem) -> None:
        self.domains = problem.domains
        self.order = {name: i for i, name in enumerate(problem.domains)}
        self.tables: dict[Hashable, dict[int, tuple[tuple[Hashable, ...], Table]]]
        self.tables = {n: {} for n in problem.domains}
        self.serial = itertools.count()
        self.constant = 0.0
        for names, table in problem.tables:
            self._add(names, table)

    def eliminate(self) -> Iterator[_Eliminated]:
        """Eliminates all variables, those with the smallest buckets first.

        Bucket sizes in the heap may be out of date. One that has grown goes back with its new size.

        Raises:
            OnlyInParts: the tables would be too large.
        """
        heap = [(self._width(n), i, n) for n, i in self.order.items()]
        heapq.heapify(heap)
        gone: set[Hashable] = set()
        while heap:
            known, rank, name = heapq.heappop(heap)
            if name in gone:
                continue
            current = self._width(name)
            if current > known:
                heapq.heappush(heap, (current, rank, name))
                continue
            if current > LARGEST_BUCKET:
                raise OnlyInParts(
                    "the plan's search space is too large", where=str(name), todo="pin some placements"
                )
            gone.add(name)
            others, total = self._remove(name)
            yield name, others, total
            for other in others:
                heapq.heappush(heap, (self._width(other), self.order[other], other))

    def _remove(self, name: Hashable) -> tuple[list[Hashable], Table]:
        """Replaces a variable's tables by one over its neighbours; gives these and the sum of its tables."""
        others = self._scope(name)
        total = _combine([name, *others], self.tables[name].values(), self.domains)
        for key, (names, _) in list(self.tables[name].items()):
            for n in names:
                self.tables[n].pop(key, None)
        reduced = total.min(axis=0)
        if others:
            self._add(tuple(others), reduced)
        else:
            self.constant += float(reduced)
        return others, total

    def _add(self, names: tuple[Hashable, ...], table: Table) -> None:
        key = next(self.serial)
        for name in names:
            self.tables[name][key] = (names, table)

    def _scope(self, name: Hashable) -> list[Hashable]:
        found = {n for names, _ in self.tables[name].values() for n in names} - {name}
        return sorted(found, key=self.order.__getitem__)

    def _width(self, name: Hashable) -> int:
        return math.prod(self.domains[n] for n in (name, *self._scope(name)))


def _combine(axes: list[Hashable], tables: object, domains: Mapping[Hashable, int]) -> Table:
    """The sum of tables, spread over the given axes."""
    total = np.zeros([domains[a] for a in axes])
    position = {a: i for i, a in enumerate(axes)}
    for names, table in tables:  # type: ignore[attr-defined]
        order = sorted(range(len(names)), key=lambda i: position[names[i]])
        spread = np.transpose(table, order)
        shape = [1] * len(axes)
        for i in order:
            shape[position[names[i]]] = table.shape[i]
        total += spread.reshape(shape)
    return total
