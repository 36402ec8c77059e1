"""Exact minimisation of a sum of small cost tables: bucket elimination (Dechter, 1999).

Variables have small finite domains, tables span a few of them. Eliminating a variable replaces the
tables that mention it by one table over its neighbours, which holds the minimum over its values;
the cheapest bucket goes first. The cost is exponential only in the largest clique so made, which
for graphs of neural networks is three to eight.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import TpCompileError

Table = np.ndarray
LARGEST_BUCKET = 2**26


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
        """Adds a variable and what each of its values costs by itself."""
        self.domains[name] = len(costs)
        self.tables.append(((name,), np.asarray(costs, dtype=float)))

    def table(self, names: tuple[Hashable, ...], costs: Table) -> None:
        """Adds a cost that depends on several variables."""
        self.tables.append((names, costs))

    def cost(self, values: Mapping[Hashable, int]) -> float:
        """The cost of one assignment."""
        return float(sum(t[tuple(values[n] for n in names)] for names, t in self.tables))


def brute_force(problem: Problem) -> tuple[dict[Hashable, int], float]:
    """The same answer by trying everything: the oracle of the tests."""
    names = list(problem.domains)
    candidates = itertools.product(*(range(problem.domains[n]) for n in names))
    best = min((dict(zip(names, c, strict=True)) for c in candidates), key=problem.cost)
    return best, problem.cost(best)


def solve(problem: Problem) -> tuple[dict[Hashable, int], float]:
    """An assignment of least cost, ties broken by the order of the variables and of their values.

    Raises:
        TpCompileError: every assignment is impossible, or a bucket would not fit in memory.
    """
    order = {name: i for i, name in enumerate(problem.domains)}
    buckets: dict[Hashable, dict[int, tuple[tuple[Hashable, ...], Table]]] = {n: {} for n in problem.domains}
    serial = itertools.count()

    def add(names: tuple[Hashable, ...], table: Table) -> None:
        key = next(serial)
        for name in names:
            buckets[name][key] = (names, table)

    for names, table in problem.tables:
        add(names, table)

    def scope(name: Hashable) -> list[Hashable]:
        found = {n for names, _ in buckets[name].values() for n in names} - {name}
        return sorted(found, key=order.__getitem__)

    def width(name: Hashable) -> int:
        size = problem.domains[name]
        for other in scope(name):
            size *= problem.domains[other]
        return size

    heap = [(width(n), order[n], n) for n in problem.domains]
    heapq.heapify(heap)
    done: list[tuple[Hashable, list[Hashable], Table]] = []
    gone: set[Hashable] = set()
    constant = 0.0
    while heap:
        known, rank, name = heapq.heappop(heap)
        if name in gone:
            continue
        current = width(name)
        if current > known:
            heapq.heappush(heap, (current, rank, name))
            continue
        if current > LARGEST_BUCKET:
            raise TpCompileError(
                "the plan's search space is too large", where=str(name), todo="pin some placements"
            )
        others = scope(name)
        total = _combine([name, *others], buckets[name].values(), problem.domains)
        done.append((name, others, total))
        reduced = total.min(axis=0)
        for key, (names, _) in list(buckets[name].items()):
            for n in names:
                buckets[n].pop(key, None)
        gone.add(name)
        if others:
            add(tuple(others), reduced)
        else:
            constant += float(reduced)
        for other in others:
            heapq.heappush(heap, (width(other), order[other], other))
    if not np.isfinite(constant):
        raise TpCompileError("no placement satisfies all constraints", todo="remove a pin")
    values: dict[Hashable, int] = {}
    for name, others, total in reversed(done):
        at = total[(slice(None), *(values[o] for o in others))]
        values[name] = int(at.argmin())
    return values, constant


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
