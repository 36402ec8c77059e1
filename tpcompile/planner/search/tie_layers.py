"""Has repeated layers planned alike, so that the one that stands for others may be put in their place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from tpcompile.capture.repeats.match_periods import Match, match_periods
from tpcompile.errors import TpCompileError
from tpcompile.planner.global_program import GlobalProgram


@dataclass
class Ties:
    """Which nodes are decided together, and how often what is between two layers comes.

    Attributes:
        decided: nodes of earlier periods, with the node of a later one that is computed, or held, alike.
        handed: what one layer hands to the next, with what was handed to it: they arrive alike.
        times: how many nodes of the whole program a conversion of a value stands for, where that is not
            how many the value stands for: the last captured layer hands its result on only once.
    """

    decided: dict[Node, Node] = field(default_factory=dict)
    handed: dict[Node, Node] = field(default_factory=dict)
    times: dict[Node, int] = field(default_factory=dict)

    def leader(self, node: Node) -> Node:
        """The node that a node is decided with."""
        while node in self.decided:
            node = self.decided[node]
        return node

    def handed_with(self, value: Node) -> Node | None:
        """For a value that passes from one layer to the next, the first that does; None for others."""
        return self.handed.get(value) or (value if value in self.handed.values() else None)


def tie_layers(program: GlobalProgram) -> Ties:
    """The ties between the periods that a program has of its repeated layers.

    Raises:
        TpCompileError: the last two periods are not alike, so that the last cannot stand for others.
    """
    ties = Ties()
    if program.blocks is None:
        return ties
    for number, repeat in enumerate(program.blocks.repeats):
        last = match_periods(program.graph, number, repeat.kept - 1)
        ties.decided |= last.pairs
        for given, before in last.carried.items():
            ties.handed[given] = before
            ties.times[given] = 1 + repeat.copies
            if given in last.pairs:
                ties.times[last.pairs[given]] = 1
        for period in range(1, repeat.kept - 1):
            first = _try_match(program, number, period)
            ties.decided |= first.pairs if first is not None else {}
    return ties


def _try_match(program: GlobalProgram, number: int, period: int) -> Match | None:
    """The first period may see other inputs than those after it, and then is planned by itself."""
    try:
        return match_periods(program.graph, number, period)
    except TpCompileError:
        return None
