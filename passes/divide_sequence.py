"""DivideSequence: between the blocks each rank computes some of the positions only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call_before, call_behind, replace, with_operands
from tpcompile.ir.markers import (
    all_gather,
    all_reduce,
    all_to_all,
    copy_to_ranks,
    gradient_once,
    keep_first,
    pad_shard,
    reduce_scatter,
    take_shard,
)
from tpcompile.ir.nodes import is_tensor, operands
from tpcompile.ir.placements import Filled, R, Replicate
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.rules.choices import Choice
from tpcompile.rules.rule import Rule

from .insert_gradient_copies import differentiable_values
from .sequence_regions import Positions, SequenceRegion, is_whole
from .wanted_regions import missed, wanted

aten = torch.ops.aten


@dataclass(frozen=True)
class DivideSequence(Pass):
    """Divides the positions of regions that treat them one by one (sequence parallelism).

    An all-reduce becomes a reduce-scatter along the positions, a gather of divided features an all-to-all,
    and an all-gather stands before whatever needs all positions (Korthikanti et al., 2022). As many bytes are
    sent. Sequences of any length are divided, see ``Filled``. Where nothing can be divided, a note says why.

    Attributes:
        modules: divide the regions with something of these modules in them; None: all regions.
        training: gradients are recorded.
    """

    name = "divide-sequence"
    modules: frozenset[str] | None = None
    training: bool = True

    def apply(self, program: GlobalProgram) -> bool:
        positions = Positions(program, norms=self.modules is None)
        regions = [r for r in positions.regions() if wanted(r, self.modules, program.blocks)]
        program.captured.notes += tuple(missed(positions, regions, self.modules))
        differentiable = differentiable_values(program) if self.training and regions else set()
        for region in regions:
            _Divider(positions, region, differentiable).divide()
        return bool(regions)


class _Divider:
    """Divides one region."""

    def __init__(self, positions: Positions, region: SequenceRegion, differentiable: set[Node]) -> None:
        self.positions, self.region, self.differentiable = positions, region, differentiable
        self.graph, self.axes = positions.program.graph, positions.every
        self.nodes = list(region.nodes)
        self.made: dict[tuple[Callable[..., Any], Node], Node] = {}
        self.size = self._whole_size(region.nodes[0])

    def divide(self) -> None:
        """Rewrites what leads into the region, what is in it, and what leads out of it."""
        self.nodes = [self._enter(n) if n.target in (all_reduce, all_gather) else n for n in self.nodes]
        self.inside = set(self.nodes)
        for node in self.nodes:
            if node.target not in (reduce_scatter, all_to_all, operator.getitem):
                self._operands(node)
        for node in filter(is_tensor, self.nodes):
            node.meta["placement"] = (self._place(node) or R,) * len(self.axes)
        for node in filter(is_tensor, self.nodes):
            self._leave(node)

    def _place(self, value: Node) -> Filled | None:
        dim = self.positions.dim(value, self.region.key)
        return None if dim is None else Filled(dim)

    def _whole_size(self, first: Node) -> Any:
        """The number of positions: a number, or a node that stands before the region."""
        place = self._place(first)
        assert place is not None, "entries have positions"
        size = first.meta["val"].shape[place.dim]
        if not isinstance(size, torch.SymInt):
            return size
        for node in self.graph.nodes:
            if node is first:
                break
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and val.node.expr == size.node.expr:
                return node
        source = first.args[0]
        assert isinstance(source, Node)
        return call_before(first, aten.sym_size.int, source, place.dim)

    def _enter(self, node: Node) -> Node:
        """A collective that leads into the region, instead of one that leads to the whole value."""
        target, options = (reduce_scatter, ()) if node.target is all_reduce else (all_to_all, node.args[2:3])
        new = call_before(node, target, node.args[0], self.axes, *options, self._place(node))
        replace(node, new)
        return new

    def _operands(self, node: Node) -> None:
        """Brings in what a call reads from outside; whole operands get gradients from all ranks."""
        factor = self.positions.factor(node, self.region.key)
        assert factor is not None, "it was found by its factor"
        places = [None if place is None else Filled(place[0]) for place in factor.inputs]
        node.args, node.kwargs = with_operands(node, map(self._brought_in, operands(node), places))
        inputs = tuple(R if place is None else place for place in places)
        outputs = tuple(Filled(p[0]) for p in factor.outputs if p is not None)
        node.meta["choices"] = (Choice(inputs, outputs, factor),) * len(self.axes)

    def _brought_in(self, value: Node, place: Filled | None) -> Node:
        if value in self.inside:
            return value
        if place is not None:
            return self._once(take_shard, value, place)
        return self._once(copy_to_ranks, value) if value in self.differentiable else value

    def _once(self, target: Callable[..., Any], value: Node, *options: Any) -> Node:
        """A marker behind a value, shared by all that want it."""
        if (target, value) not in self.made:
            placement = (*options, R)[:1] * len(self.axes)
            made = call_behind(value, target, value, self.axes, *options, placement=placement)
            self.made[target, value] = made
        return self.made[target, value]

    def _leave(self, value: Node) -> None:
        """Gathers a value for all that needs it whole."""
        place = self._place(value)
        gathered: Node | None = None
        users = [user for user in value.users if user not in self.inside]
        partial = any(map(self._is_copied, users))
        for user in users:
            if user.target is aten.sym_size.int:
                if place is not None and user.args[1] == place.dim:
                    user.replace_all_uses_with(self.size)
                    self.graph.erase_node(user)
            elif user.target is keep_first and user.args[1] == self.axes:
                user.target, user.args = pad_shard, (value, self.axes, place, self.size)  # type: ignore[assignment]
            else:
                gathered = gathered or self._gather(value, place, partial)
                self._hand_on(value, gathered, user, partial)

    def _gather(self, value: Node, place: Filled | None, partial: bool) -> Node:
        args = (value, self.axes, place, self.size, partial)
        return call_behind(value, all_gather, *args, placement=(R,) * len(self.axes))

    def _hand_on(self, old: Node, new: Node, user: Node, partial: bool) -> None:
        """Gives a user a whole value, of whose gradient each rank has a summand if it is ``partial``.

        A copy to the ranks is not needed then. Users that have the whole gradient give it once.
        """
        if not partial:
            user.replace_input_with(old, new)
        elif self._is_copy(user):
            rest = tuple(a for a in self.axes if a not in user.args[1])  # type: ignore[operator]
            replace(user, self._gradient_once(new, rest) if rest else new)
        elif self._is_copied(user):
            user.replace_input_with(old, new)
            for reader in list(user.users):
                self._hand_on(user, user, reader, partial)
        else:
            user.replace_input_with(old, self._gradient_once(new, self.axes))

    def _gradient_once(self, value: Node, axes: tuple[int, ...]) -> Node:
        found = (u for u in value.users if u.target is gradient_once and u.args[1] == axes)
        if (known := next(found, None)) is not None:
            return known
        return call_behind(value, gradient_once, value, axes, placement=value.meta["placement"])

    def _is_copy(self, node: Node) -> bool:
        whole = all(isinstance(p, Replicate) for p in node.meta.get("placement", ()))
        return node.target is copy_to_ranks and whole

    def _is_copied(self, node: Node) -> bool:
        """Whether a value that each rank uses differently is made of the one that is read, linearly."""
        if self._is_copy(node):
            return True
        rule = self.positions.factors.rules.get(node)
        if not isinstance(rule, Rule) or not all(map(is_whole, node.meta.get("choices") or ())):
            return False
        given = [i for i, o in enumerate(operands(node)) if o.meta["val"].dtype.is_floating_point]
        linear = len(given) == 1 and frozenset(given) in rule.linear
        return linear and any(map(self._is_copied, node.users))
