"""Which of transformers' styles express a plan.

transformers has styles for modules whose weight is divided by rows or columns. What runs between two of
them must then do with local values. A **region** is a set of calls that hand divided values on to each
other. It can be left as it is if matmuls by columns begin it, matmuls by rows end it, and nothing in it
takes a conversion or another parameter's part. In any other region each matmul gets the style that takes
and gives whole values, which is right anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tpcompile.ir.names import starred
from tpcompile.ir.nodes import module_path, operands, producer
from tpcompile.ir.placements import Partial, Placement, Shard
from tpcompile.planner.search.must_divide import weight_root
from tpcompile.rules.rule import Rule

from .global_program import GlobalProgram

LOST = "lost"
"""The style of what has none."""

_ALONE = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
_LOOKUPS = ("embedding_rowwise", "embedding_colwise")
_STYLES = {(0, 0): "colwise", (0, 1): "packed_colwise", (1, 0): "rowwise", (1, 1): "packed_rowwise"}
"""By the divided dimension of the last two, and the factor in it."""

Placements = tuple[Placement, ...]


@dataclass(frozen=True)
class Use:
    """A matmul or lookup of a parameter.

    Attributes:
        name: what a rule names, ``*`` for numbers: the module, or the parameter of a stack of experts.
        style: the style of the weight's placement, ``replicate``, or ``LOST``.
        stack: it is a stack of experts, whose module sums what they give.
    """

    name: str
    style: str
    stack: bool = False


class ExportedStyles:
    """The styles of a planned program.

    Args:
        program: the program.
        ranks: how many ranks share it.
    """

    def __init__(self, program: GlobalProgram, ranks: int) -> None:
        self.program, self.ranks, self.factors = program, ranks, program.planned_factors
        self.params = set(program.params())
        self.calls = list(program.decisions[0].nodes)
        self.uses = {node: use for node in self.calls if (use := self._use(node)) is not None}
        self._parent = {node: node for node in self.calls}
        self.broken: set[Node] = set()
        self.gathered: set[Node] = set()
        self.split: set[Node] = set()

    def rules(self) -> dict[str, str]:
        """Module or parameter -> style; ``LOST`` for what is divided without one."""
        self._connect()
        names = self._broken_names()
        found: dict[str, str] = {}
        for node, use in self.uses.items():
            style = use.style
            if use.name in names and style not in ("replicate", *_LOOKUPS):
                style = LOST if use.stack else _ALONE.get(style, LOST)
            elif node in self.gathered or node in self.split:
                style = _ALONE.get(style, style)
            found[use.name] = style
        stacks = {use.name for use in self.uses.values() if use.stack and found[use.name] != "replicate"}
        owners = {name.rpartition(".")[0] for name in stacks if found[name] != LOST}
        return found | dict.fromkeys(sorted(owners), "moe_tp_experts")

    # Matmuls.

    def _use(self, node: Node) -> Use | None:
        rule = self.factors.rules.get(node)
        if not isinstance(rule, Rule) or not rule.contraction:
            return None
        for i, operand in enumerate(operands(node)):
            root = weight_root(operand, self.params, rows=True)
            if root is not None and i not in rule.once:
                stack = root.meta["val"].ndim == 3
                name = self.program.sources[root].spec.name if stack else module_path(node)
                return Use(starred(name), self._style(node, root), stack)
        return None

    def _style(self, node: Node, root: Node) -> str:
        places = {d.params[root] for d in self.program.decisions}
        place = next(iter(places))
        if len(places) > 1 or self.program.sources[root].order >= 0:
            return LOST
        if not isinstance(place, Shard):
            return "replicate"
        atoms = self.factors.atom_sizes(root)[place.dim]
        # transformers cuts rows into equal pieces, whatever a head is.
        if len(atoms) > 1 and int(atoms[place.factor]) % self.ranks:
            return LOST
        if place.factor > 1 or (place.factor == 1 and atoms[0] != 2):
            return LOST
        rank = root.meta["val"].ndim
        if node.target is torch.ops.aten.embedding.default:
            return _LOOKUPS[place.dim] if place.factor == 0 else LOST
        if rank == 2 and (node.target is not torch.ops.aten.linear.default or operands(node)[1] is not root):
            return LOST
        return _STYLES.get((place.dim - (rank - 2), place.factor), LOST)

    # Regions.

    def _connect(self) -> None:
        """Joins calls that hand divided values on, and finds what transformers would not do."""
        for node in self.calls:
            use = self.uses.get(node)
            if use is not None and use.style == LOST:
                self.broken.add(node)
            if use is None and self._divided(node) and self._sums(node):
                self.broken.add(node)  # a statistic of what is divided
            for i, operand in enumerate(operands(node)):
                self._edge(node, i, operand)
        for out in self.program.outputs():
            if isinstance(out, Node) and producer(out)[0] in self._parent and self._divides(self._have(out)):
                self._leave(producer(out)[0])
        for node in self.gathered:
            if any(u in self._parent and self._wants(u, node) for u in node.users):
                self.broken.add(node)

    def _edge(self, node: Node, index: int, value: Node) -> None:
        have = self._have(value)
        want = tuple(d.need(node, index) for d in self.program.decisions)
        if weight_root(value, self.params, rows=True) is not None:
            if self._divides(want) and node not in self.uses and not self._rearranges(node):
                self.broken.add(node)  # another parameter's part
            return
        source = producer(value)[0]
        if have == want:
            if self._divides(have) and source in self._parent:
                self._join(source, node)
                if self.uses.get(source, Use("", "")).style in _LOOKUPS:
                    self.broken.add(node)
        elif self._divides(want):
            if not self._divides(have) and self._is(node, "rowwise") and not self._sums_in(have):
                self.split.add(node)
            else:
                self.broken.add(node)
                if source in self._parent and self._divides(have):
                    self.broken.add(source)
        elif self._divides(have):
            self._leave(source)

    def _leave(self, source: Node) -> None:
        """A divided value becomes whole behind a call."""
        if self._is(source, "colwise"):
            self.gathered.add(source)
        elif self.uses.get(source, Use("", "")).style not in _LOOKUPS:
            self.broken.add(source)

    def _broken_names(self) -> set[str]:
        """The names in broken regions; what is broken in one layer is so in all, for ``*`` names them all."""
        names: set[str] = set()
        regions: dict[Node, set[str]] = {}
        styles: dict[str, set[tuple[str, bool]]] = {}
        for node, use in self.uses.items():
            regions.setdefault(self._root(node), set()).add(use.name)
            alone = node in self.gathered or node in self.split
            styles.setdefault(use.name, set()).add((use.style, alone))
        names |= {name for name, ways in styles.items() if len(ways) > 1}
        roots = {self._root(node) for node in self.broken}
        while True:
            roots |= {root for root, members in regions.items() if members & names}
            grown = names.union(*(regions.get(root, set()) for root in roots))
            if grown == names:
                return names
            names = grown

    # Placements.

    def _have(self, value: Node) -> Placements:
        return tuple(d.output(value) for d in self.program.decisions)

    def _wants(self, user: Node, value: Node) -> bool:
        """Whether a user takes a value divided."""
        wants = [
            d.need(user, i)
            for d in self.program.decisions
            for i, o in enumerate(operands(user))
            if o is value
        ]
        return self._divides(tuple(wants))

    def _divided(self, node: Node) -> bool:
        return any(d.nodes[node].factor is not None for d in self.program.decisions)

    def _sums(self, node: Node) -> bool:
        return any(isinstance(o, Partial) for d in self.program.decisions for o in d.nodes[node].outputs)

    def _is(self, node: Node, style: str) -> bool:
        return node in self.uses and self.uses[node].style.endswith(style) and not self.uses[node].stack

    def _rearranges(self, node: Node) -> bool:
        return weight_root(node, self.params, rows=True) is not None

    @staticmethod
    def _divides(placements: Placements) -> bool:
        return any(isinstance(p, Shard) for p in placements)

    @staticmethod
    def _sums_in(placements: Placements) -> bool:
        return any(isinstance(p, Partial) for p in placements)

    # Sets of calls.

    def _root(self, node: Node) -> Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def _join(self, one: Node, other: Node) -> None:
        self._parent[self._root(other)] = self._root(one)
