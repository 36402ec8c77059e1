"""Splits a mesh axis into sub-axes where some unit count asks for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

from torch.fx import Node

from tpcompile.rules.factors import Factors


def sub_axes(ranks: int, units: Iterable[int]) -> tuple[int, ...]:
    """Sub-axes of an axis, major first, such that each unit count fills a prefix of them.

    8 ranks and 2 key heads give (2, 4): keys are divided over the first and whole on the second,
    queries are divided over both. Counts that share no factor with the ranks ask for nothing.
    """
    cuts = [1]
    for cut in sorted({math.gcd(u, ranks) for u in units if u < ranks}):
        if cut > cuts[-1] and cut % cuts[-1] == 0:
            cuts.append(cut)
    cuts.append(ranks)
    return tuple(b // a for a, b in itertools.pairwise(cuts) if b > a) or (ranks,)


def unit_counts(factors: Factors, params: Mapping[Node, str], candidates: set[int]) -> set[int]:
    """Counts that stand in front of another count in a parameter's dimension: ``(groups repeats dim)``."""
    found: set[int] = set()
    for param in params:
        for dim in range(param.meta["val"].ndim):
            atoms = factors.atoms(param, dim)
            for atom in atoms[:-2]:
                size = factors.size(atom)
                if atom in candidates and isinstance(size, int):
                    found.add(size)
    return found
