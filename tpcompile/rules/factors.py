"""The factors of every dimension in a graph, found by unifying what the operators' rules say.

A rule says which dimensions of one operator's operands and results are the same factor. Put
together over a whole graph, a dimension of a weight is known to be ``(groups repeats head_dim)``
because three operators later a view and an attention treat it so. Each dimension becomes an ordered
list of atoms, major first; atoms are kept in a union-find, and splitting one splits it everywhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from tpcompile.ir.nodes import operands, producer, results, tensor_of
from tpcompile.ir.sizes import Size, divide, sizes_of

from .expert_rows import Carrier, find_carriers
from .rule import Labels, Rule
from .table import rule_of

Place = tuple[int, int]  # dimension, position of the factor in it


@dataclass(frozen=True)
class OpFactor:
    """One atom of one node's computation: something that can be divided there.

    Attributes:
        atom: its class in the graph.
        size: its size.
        inputs: per operand, where it stands (None: the operand does not have it).
        outputs: per result, likewise.
        reduce: how results without it are completed (``sum``, ``max``), or ``""``.
    """

    atom: int
    size: Size
    inputs: tuple[Place | None, ...]
    outputs: tuple[Place | None, ...]
    reduce: str


@dataclass(frozen=True)
class Known:
    """What is known of a value from elsewhere.

    Attributes:
        sizes: per dimension its factors, major first; none for a dimension of which nothing is known.
        divided: what is divided already, by how many ranks, one sub-axis after the other.
    """

    sizes: Sequence[Sequence[Size]]
    divided: Sequence[tuple[Place | None, int]] = ()


class Factors:
    """Rules and factors of all nodes of one graph.

    What is divided already stays in one piece, or is split in units that are on one rank each. A call that
    would have it in others cannot divide it.

    Args:
        graph: the graph, with ``meta["val"]``.
        known: what is known of its values.
        rule_of: gives the rule of a call, or says why it has none.

    Attributes:
        rules: per call node its rule, or why it has none.
        carriers: per call node, how it can begin or carry rows that belong to experts.
    """

    def __init__(
        self,
        graph: Graph,
        known: Mapping[Node, Known] | None = None,
        rule_of: Callable[[Node], Rule | str] = rule_of,
    ) -> None:
        self._rule_of = rule_of
        self.rules: dict[Node, Rule | str] = {}
        self._parent: list[int] = []
        self._size: list[Size] = []
        self._children: dict[int, tuple[int, int]] = {}
        self._dims: dict[tuple[Node, int], list[int]] = {}
        self._factors: dict[Node, tuple[OpFactor, ...]] = {}
        self._stuck: dict[Node, set[str]] = {}
        self._letters: dict[Node, dict[str, int]] = {}
        self._ranks: dict[int, int] = {}
        for node in graph.nodes:
            self._add(node)
            if known and node in known:
                self._know(node, known[node])
        self.carriers: dict[Node, tuple[Carrier, ...]] = find_carriers(graph, self.rules)

    # Reading.

    def atoms(self, value: Node, dim: int) -> list[int]:
        """The atoms of one dimension of a value, major first (none for a dimension of size 1)."""
        node, result = producer(value)
        root = self._dims[node, result][dim]
        return list(self._leaves(root)) if self._size[root] != 1 else []

    def atom_sizes(self, value: Node) -> tuple[tuple[Size, ...], ...]:
        """The sizes of the factors of every dimension."""
        rank = len(sizes_of(tensor_of(value)))
        return tuple(tuple(self._size[a] for a in self.atoms(value, d)) for d in range(rank))

    def places(self, value: Node) -> dict[Place, int]:
        """All places of a value at which it could be divided, with their atoms."""
        rank = len(sizes_of(tensor_of(value)))
        return {(d, i): a for d in range(rank) for i, a in enumerate(self.atoms(value, d))}

    def size(self, atom: int) -> Size:
        """The size of an atom."""
        return self._size[self._find(atom)]

    def op_factors(self, node: Node) -> tuple[OpFactor, ...]:
        """What can be divided in a node's computation, in the order of its letters."""
        if node not in self._factors:
            self._factors[node] = tuple(self._op_factors(node))
        return self._factors[node]

    def stuck_atoms(self, besides: Container[Node] = ()) -> set[int]:
        """Atoms that some call with a rule has but cannot divide: a softmax's, a rotation's, a part count.

        Args:
            besides: calls that do not count.
        """
        found: set[int] = set()
        for node, letters in self._letters.items():
            if node in besides:
                continue
            divisible = {factor.atom for factor in self.op_factors(node)}
            found.update(a for root in letters.values() for a in self._leaves(root) if a not in divisible)
        return found

    # Building.

    def _new(self, size: Size) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def _know(self, node: Node, known: Known) -> None:
        """Gives the dimensions of a value their factors."""
        for dim, sizes in enumerate(known.sizes):
            atoms = [self._new(size) for size in sizes]
            for place, ranks in known.divided:
                if place is not None and place[0] == dim:
                    self._ranks[atoms[place[1]]] = self._ranks.get(atoms[place[1]], 1) * ranks
            self._unify([self._dims[node, 0][dim]], atoms)

    def _find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _leaves(self, atom: int) -> Iterator[int]:
        root = self._find(atom)
        if root in self._children:
            for child in self._children[root]:
                yield from self._leaves(child)
        else:
            yield root

    def _unify(self, left: list[int], right: list[int]) -> bool:
        """Makes two lists of atoms equal, major first; False where they have no common factors."""
        a = [leaf for x in left for leaf in self._leaves(x)]
        b = [leaf for x in right for leaf in self._leaves(x)]
        while a and b:
            x, y = self._find(a[0]), self._find(b[0])
            if x in self._children or y in self._children:  # split since the lists were made
                a[:1], b[:1] = list(self._leaves(x)), list(self._leaves(y))
                continue
            if x == y:
                a.pop(0), b.pop(0)
                continue
            size_x, size_y = self._size[x], self._size[y]
            if size_x == size_y:
                self._parent[max(x, y)] = min(x, y)
                self._pass_ranks(max(x, y), min(x, y))
                a.pop(0), b.pop(0)
            elif not (self._split(x, y) or self._split(y, x)):
                return False
        return not a and not b

    def _split(self, atom: int, major: int) -> bool:
        """Splits an atom into another and a rest, if it has one and no unit of it is on two ranks."""
        rest = divide(self._size[atom], self._size[major])
        if rest is None or (atom in self._ranks and divide(self._size[major], self._ranks[atom]) is None):
            return False
        self._children[atom] = (major, self._new(rest))
        self._pass_ranks(atom, major)
        return True

    def _pass_ranks(self, atom: int, to: int) -> None:
        """What an atom is divided by already divides the one that takes its place."""
        if atom in self._ranks:
            self._ranks[to] = math.lcm(self._ranks[atom], self._ranks.get(to, 1))

    def _add(self, node: Node) -> None:
        if node.op == "output" or node.target is operator.getitem:
            return
        for i, tensor in enumerate(results(node)):
            self._dims[node, i] = [self._new(s) for s in sizes_of(tensor)]
        if node.op != "call_function" or not results(node):
            return
        rule = self.rules[node] = self._rule_of(node)
        if isinstance(rule, str):
            return
        letters = self._letters[node] = {k: self._new(s) for k, s in rule.sizes.items()}
        stuck = self._stuck[node] = set()
        values = [*(producer(o) for o in operands(node)), *((node, i) for i in range(len(results(node))))]
        for (owner, result), labels in zip(values, rule.inputs + rule.outputs, strict=True):
            for dim, names in zip(self._dims[owner, result], labels, strict=True):
                # A size of 1 that the rule knows as an expression is equal for some inputs only.
                unlike = self._size[dim] == 1 and any(self._size[letters[n]] != 1 for n in names)
                if names and (unlike or not self._unify([dim], [letters[n] for n in names])):
                    stuck.update(names)

    def _op_factors(self, node: Node) -> Iterator[OpFactor]:
        rule = self.rules.get(node)
        if not isinstance(rule, Rule):
            return
        leaves = {name: list(self._leaves(root)) for name, root in self._letters[node].items()}
        inputs, outputs = ([_places(t, leaves) for t in side] for side in (rule.inputs, rule.outputs))
        for name in rule.sizes:
            if name in rule.whole or name in self._stuck[node]:
                continue
            if any(name in twice for _, twice in inputs + outputs):
                continue
            reduce = rule.reduce.get(name, "")
            if (
                any(name not in at and i not in rule.fixed for i, (at, _) in enumerate(outputs))
                and not reduce
            ):
                continue
            for k, atom in enumerate(leaves[name]):
                read, made = (tuple(_shift(at.get(name), k) for at, _ in side) for side in (inputs, outputs))
                yield OpFactor(atom, self._size[atom], read, made, reduce)


def _places(labels: Labels, leaves: dict[str, list[int]]) -> tuple[dict[str, Place], set[str]]:
    """Where the first atom of every letter of a tensor stands, and the letters that stand there twice."""
    found: dict[str, Place] = {}
    twice = set()
    for dim, names in enumerate(labels):
        position = 0
        for name in names:
            if name in found:
                twice.add(name)
            found[name] = (dim, position)
            position += len(leaves[name])
    return found, twice


def _shift(place: Place | None, by: int) -> Place | None:
    return (place[0], place[1] + by) if place else None
