"""Parts of a program that treat positions one by one, between sums over the ranks and what needs them all.

Such a region begins where summands are reduced (or divided features are gathered) and holds the additions,
norms, dropouts and casts that follow, by their sharding rules: positions must be a dimension of their own,
which goes from operands to results untouched. There each rank may have some of the positions only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from tpcompile.ir.markers import all_gather, all_reduce, keep_first, origin
from tpcompile.ir.nodes import is_tensor, operands, producer, results, shape, tensor_of
from tpcompile.ir.placements import Replicate, Shard
from tpcompile.ir.sizes import bytes_of, hint
from tpcompile.ir.torch_internals import OpOverload
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.choices import Choice
from tpcompile.rules.factors import OpFactor
from tpcompile.rules.rule import UNARY, Rule

Key = tuple[int, ...]
"""The atoms of the positions' dimension."""

MOST = 2.0
"""A region of which so much is needed elsewhere that more than twice as many bytes are sent is left whole."""

_LOCALISED = ("", "sizes", "split", "mean")


@dataclass
class SequenceRegion:
    """Nodes that may be computed for some of the positions.

    Attributes:
        key: the atoms of the positions' dimension.
        nodes: in the graph's order.
    """

    key: Key
    nodes: list[Node]


class Positions:
    """Finds regions in a rewritten program.

    Args:
        program: a planned program in which collectives have been chosen.
        norms: regions without a norm are left out.
    """

    def __init__(self, program: GlobalProgram, *, norms: bool = True) -> None:
        self.program, self.factors, self.norms = program, program.planned_factors, norms
        self.every = tuple(range(len(program.axis_sizes)))
        self._ranks: dict[Key, dict[Node, tuple[float, ...]]] = {}

    def regions(self) -> list[SequenceRegion]:
        """All regions that sums lead into; with ``norms``, in which something is done across features."""
        return list(self._regions({entry: key for entry in self.entries() if (key := self.entry_key(entry))}))

    def entry_key(self, entry: Node) -> Key | None:
        """The positions of a value that is made whole here: the dimension along which most sums are reduced.

        On a tie (a batch may be divided as well) the last dimension but one, as a rule, then the largest.
        """
        return max(self.entry_keys(entry), key=lambda key: self._rank(entry, key), default=None)

    def entry_keys(self, entry: Node) -> list[Key]:
        """The dimensions of such a value that may be its positions: all but the last.

        None for a step of one position: it may be of many sequences, but dividing these gains nothing.
        """
        rank = entry.meta["val"].ndim
        if rank < 2 or shape(entry)[-2] == 1:
            return []
        keys = [tuple(self.factors.atoms(origin(entry), d)) for d in reversed(range(rank - 1))]
        return [key for key in keys if key and self.dim(entry, key) is not None]

    def entries(self) -> list[Node]:
        """All-reduces, and gathers of divided features, over all ranks."""
        return [
            n for n in self.program.graph.nodes if n.target in (all_reduce, all_gather) and self._enters(n)
        ]

    def _enters(self, node: Node) -> bool:
        if not is_tensor(node) or node.args[1] != self.every:
            return False
        if node.target is all_reduce:
            return node.args[2] == "sum"
        place = node.args[2]
        return isinstance(place, Shard) and place == Shard(node.meta["val"].ndim - 1)

    def _rank(self, entry: Node, key: Key) -> tuple[float, ...]:
        """How much can be done along a dimension with what an entry leads to."""
        if key not in self._ranks:
            self._ranks[key] = self._ranked(key)
        dim = self.dim(entry, key)
        size = 0.0 if dim is None else hint(entry.meta["val"].shape[dim])
        return (*self._ranks[key].get(entry, (0.0, 0.0, 0.0)), size)

    def _ranked(self, key: Key) -> dict[Node, tuple[float, ...]]:
        """Per entry of a region along a dimension: its entries, those that have it inside, its nodes."""
        keys = {e: self.entry_keys(e) for e in self.entries()}
        found: dict[Node, tuple[float, ...]] = {}
        for region in self._regions({e: key for e, possible in keys.items() if key in possible}):
            entries = [n for n in region.nodes if n in keys]
            inner = sum(keys[e][0] == key for e in entries)
            found |= dict.fromkeys(entries, (float(len(entries)), float(inner), float(len(region.nodes))))
        return found

    def along_all(self, most: float = MOST) -> Iterator[SequenceRegion]:
        """The regions along any dimension."""
        for key in dict.fromkeys(k for e in self.entries() for k in self.entry_keys(e)):
            yield from self._regions({e: key for e in self.entries() if key in self.entry_keys(e)}, most)

    def _regions(self, entries: Mapping[Node, Key], most: float = MOST) -> Iterator[SequenceRegion]:
        keys = self._trimmed(self._grown(entries), entries)
        for nodes in _connected(keys):
            if any(n.target is all_reduce for n in nodes) and self._does_much(nodes):
                if self._sent(nodes, entries) <= most:
                    yield SequenceRegion(keys[nodes[0]], nodes)

    def _sent(self, nodes: list[Node], entries: Mapping[Node, Key]) -> float:
        """Bytes that a forward sends for a region if it is divided, as a multiple of those otherwise."""
        inside = set(nodes)
        reduced = sum(bytes_of(tensor_of(n)) for n in nodes if n in entries)
        gathered = sum(
            bytes_of(tensor_of(n)) for n in nodes if is_tensor(n) and any(map(_needs_all(inside), n.users))
        )
        return (reduced + gathered) / (2 * reduced) if reduced else math.inf  # of no rows

    def dim(self, value: Node, key: Key) -> int | None:
        """The dimension of a value that is its positions; None if there is none, or more than one."""
        rank = value.meta["val"].ndim
        found = [d for d in range(rank) if set(self.factors.atoms(origin(value), d)) & set(key)]
        exact = len(found) == 1 and tuple(self.factors.atoms(origin(value), found[0])) == key
        return found[0] if exact else None

    def _does_much(self, nodes: list[Node]) -> bool:
        """Whether a region is worth dividing: with a norm in it, or whatever somebody has asked for."""
        return any(map(self.is_norm, nodes)) if self.norms else len(nodes) > 1

    def is_norm(self, node: Node) -> bool:
        """Whether a call works across something: it reduces dimensions, or wants them whole to mix them."""
        rule = self.factors.rules.get(node)
        mixes = isinstance(rule, Rule) and bool(rule.whole) and rule.linear != UNARY
        return isinstance(rule, Rule) and bool(rule.reduce or mixes)

    def factor(self, node: Node, key: Key) -> OpFactor | None:
        """The (major) factor of a call that treats positions one by one; None if it does not."""
        rule = self.factors.rules.get(node)
        if not isinstance(rule, Rule) or rule.contraction or rule.declared or rule.localize not in _LOCALISED:
            return None
        if not all(map(is_whole, node.meta.get("choices") or ())) or _reads_sizes(node, rule):
            return None
        found = [[f for f in self.factors.op_factors(node) if f.atom == atom] for atom in key]
        if any(len(each) != 1 for each in found):
            return None
        factors = [each[0] for each in found]
        places = [tuple(f.outputs[i] for f in factors) for i in range(len(results(node)))]
        read = [tuple(f.inputs[i] for f in factors) for i in range(len(operands(node)))]
        read = [each for each in read if any(place is not None for place in each)]
        aligned = all(
            each[0] is not None and each == tuple((each[0][0], i) for i in range(len(key)))
            for each in (*places, *read)
        )
        values = [o for o in operands(node) if self._has(o, key)]
        # A value with positions may stand where they are not what is treated one by one: what is indexed.
        if (
            not aligned
            or not read
            or len(values) != len(read)
            or any(self.dim(o, key) is None for o in values)
        ):
            return None
        outs = [node] if is_tensor(node) else list(node.users)
        return factors[0] if all(self.dim(o, key) is not None for o in outs) else None

    def _has(self, value: Node, key: Key) -> bool:
        rank = value.meta["val"].ndim
        return any(set(self.factors.atoms(origin(value), d)) & set(key) for d in range(rank))

    def _grown(self, entries: Mapping[Node, Key]) -> dict[Node, Key]:
        """Everything that can be reached from entries, in the graph's order."""
        keys: dict[Node, Key] = {}
        for node in self.program.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                if (source := producer(node)[0]) in keys:
                    keys[node] = keys[source]
            elif node in entries:
                keys[node] = entries[node]
            else:
                given = {keys[o] for o in operands(node) if o in keys}
                if len(given) == 1 and self.factor(node, key := given.pop()) is not None:
                    keys[node] = key
        return keys

    def _trimmed(self, keys: dict[Node, Key], entries: Mapping[Node, Key]) -> dict[Node, Key]:
        """Leaves out rearrangements and growing values at the end: what comes before costs less to gather."""
        for node in reversed(list(keys)):
            if node in entries or any(user in keys for user in node.users):
                continue
            inside = [o for o in operands(node) if o in keys]
            if len(inside) != 1 or not is_tensor(node):
                continue
            before, after = (bytes_of(tensor_of(n)) for n in (inside[0], node))
            if after > before or (after == before and rearranges(node, self.factors.rules.get(node))):
                del keys[node]
        return keys


def is_whole(choice: Choice | None) -> bool:
    """Whether every rank computes a call as a whole."""
    if choice is None:
        return True
    places = (*choice.inputs, *choice.outputs)
    return choice.factor is None and all(isinstance(p, Replicate) for p in places)


def rearranges(node: Node, rule: Rule | str | None) -> bool:
    """Whether a call only moves elements of its one operand, or copies them: a view, a transposition."""
    linear = isinstance(rule, Rule) and rule.linear == UNARY and not rule.reduce
    return linear and len(operands(node)) == 1 and not _is_pointwise(node)


def _connected(keys: dict[Node, Key]) -> list[list[Node]]:
    """The nodes in groups that hang together, each in the graph's order."""
    group: dict[Node, list[Node]] = {}
    for node in keys:
        mine = [node]
        for operand in node.all_input_nodes:
            other = group.get(operand)
            if other is not None and other is not mine and node.target not in (all_reduce, all_gather):
                small, large = sorted((mine, other), key=len)
                large += small
                group.update(dict.fromkeys(small, large))
                mine = large
        group[node] = mine
    order = {node: i for i, node in enumerate(keys)}
    unique = {id(nodes): nodes for nodes in group.values()}
    return [sorted(nodes, key=order.__getitem__) for nodes in unique.values()]


def _needs_all(inside: set[Node]) -> Callable[[Node], bool]:
    """Whether a user of a value in a region needs all of its positions."""
    return lambda user: user not in inside and user.target not in (keep_first, torch.ops.aten.sym_size.int)


def _reads_sizes(node: Node, rule: Rule) -> bool:
    """Whether a call takes numbers from the graph that might count positions."""
    if rule.localize == "sizes":
        return False
    return not _is_pointwise(node) and any(not is_tensor(n) for n in node.all_input_nodes)


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
