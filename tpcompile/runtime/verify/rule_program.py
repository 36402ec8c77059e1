"""One call of an operator, run on simulated ranks in every way that its rule offers.

Its inputs are laid out as a choice wants them, all ranks run the really lowered graph in lockstep, and
what they compute is put together as the choice says. Nothing here knows rules: only what placements mean.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.specs import InputSpec, OutputSpec
from tpcompile.ir.graph_edit import call
from tpcompile.ir.markers import reshard
from tpcompile.ir.nodes import operands
from tpcompile.ir.placements import Owned, Partial, Placement, R, Replicate
from tpcompile.ir.torch_internals import FakeTensorMode
from tpcompile.passes.annotate_placements import AnnotatePlacements
from tpcompile.passes.choose_collectives import ChooseCollectives
from tpcompile.passes.insert_gradient_copies import InsertGradientCopies
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import Choice, choices
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

TOLERANCE = 1e-10
_TOLERANCES = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor argument: how its random values are made. One object used twice is one value."""

    shape: tuple[int, ...]
    make: Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of one operator.

    Attributes:
        op: the operator.
        args: its arguments; tensors are given as ``Operand``.
        kwargs: its keyword arguments.
        gradients: whether gradients are compared too, where the operator has any.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    gradients: bool = True

    def __str__(self) -> str:
        def text(arg: Any) -> str:
            if isinstance(arg, Operand):
                return "x".join(map(str, arg.shape)) or "scalar"
            if isinstance(arg, list | tuple):
                return "[" + ",".join(map(text, arg)) + "]"
            return str(arg)

        named = [f"{k}={text(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}({', '.join([*map(text, self.args), *named])})"


def map_operands(arg: Any, change: Callable[[Operand], Any]) -> Any:
    if isinstance(arg, Operand):
        return change(arg)
    if isinstance(arg, list | tuple):
        return type(arg)(map_operands(a, change) for a in arg)
    if isinstance(arg, dict):
        return {k: map_operands(v, change) for k, v in arg.items()}
    return arg


def operands_of(case: Case) -> list[Operand]:
    found: dict[Operand, None] = {}
    map_operands((case.args, case.kwargs), lambda o: found.setdefault(o))
    return list(found)


class RuleProgram:
    """A case as a graph of one call, with values for its inputs.

    Attributes:
        unplaced: the program; ``placed`` gives copies that carry choices.
        node: the call.
        inputs: the whole values of the placeholders.
        expected: the whole results, flat.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        torch.manual_seed(seed)
        found = operands_of(case)
        self.inputs = [o.make(o.shape) for o in found]
        self.expected = self.compute(case.args, case.kwargs, dict(zip(found, self.inputs, strict=True)))
        graph = self._graph(found)
        specs = tuple(InputSpec("param", f"x{i}", extents=o.shape) for i, o in enumerate(found))
        outputs = tuple(OutputSpec("user", f"y{i}") for i in range(len(self.expected)))
        module = GraphModule(torch.nn.Module(), graph)
        self.unplaced = GlobalProgram(Captured(module, specs, outputs, None, None), 1)  # type: ignore[arg-type]
        self.node = next(n for n in module.graph.nodes if n.op == "call_function")
        self.factors = Factors(module.graph)
        self.rule = self.factors.rules.get(self.node, "it has no results")

    def compute(self, args: Any, kwargs: Any, values: dict[Operand, Tensor]) -> list[Tensor]:
        """The operator on real tensors."""
        args, kwargs = map_operands((args, kwargs), lambda o: values[o])
        return _tensors(self.case.op(*args, **kwargs))

    def _graph(self, found: list[Operand]) -> Graph:
        graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
        nodes = {}
        for i, (operand, value) in enumerate(zip(found, self.inputs, strict=True)):
            nodes[operand] = graph.placeholder(f"x{i}")
            nodes[operand].meta["val"] = mode.from_tensor(value, static_shapes=True)
        args, kwargs = map_operands((self.case.args, self.case.kwargs), lambda o: nodes[o])
        call = graph.call_function(self.case.op, args, kwargs)
        fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            call.meta["val"] = self.case.op(*fake_args, **fake_kwargs)
        graph.output(tuple(self._results(graph, call)))
        return graph

    def _results(self, graph: Graph, call: Node) -> Iterator[Node]:
        if isinstance(call.meta["val"], Tensor):
            yield call
            return
        for i, val in enumerate(call.meta["val"]):
            if isinstance(val, Tensor):
                item = graph.call_function(operator.getitem, (call, i))
                item.meta["val"] = val
                yield item

    @property
    def tolerance(self) -> float:
        """Rounding of the least precise numbers in the case."""
        return max(_TOLERANCES.get(x.dtype, TOLERANCE) for x in (*self.inputs, *self.expected))

    def choices(self, ranks: int = 2) -> list[Choice]:
        """Everything that the rule offers, if a value that is used twice is wanted in one placement."""
        fewest = ranks if isinstance(self.rule, Rule) and self.rule.nonempty else 2
        found = choices(self.node, self.factors, lambda factor: factor.size >= fewest, (fewest,))
        return [s for s in found if self.wants(s) is not None]

    def pairs(self, ranks: int = 4) -> Iterator[tuple[Choice, Choice]]:
        """Choices on two sub-axes: what says whose rows are whose has to be whole on both."""
        found = self.choices(ranks)
        for pair in itertools.product(found, found):
            rows = {o.ids for choice in pair for o in choice.outputs if isinstance(o, Owned)}
            at = [i for i, operand in enumerate(operands(self.node)) if operand.name in rows]
            if all(choice.inputs[i] == R for choice in pair for i in at):
                yield pair

    def placed(
        self, axis_sizes: tuple[int, ...], chosen: Sequence[Choice], gradients: bool = False
    ) -> GlobalProgram:
        """The program with one choice per sub-axis, its inputs placed as these want."""
        placed = self.unplaced.copy()
        node = next(n for n in placed.graph.nodes if n.op == "call_function" and n.target is self.case.op)
        places = placed.graph.find_nodes(op="placeholder")
        for ranks, choice in zip(axis_sizes, chosen, strict=True):
            params = dict(zip(places, self.wants(choice) or [], strict=True))
            placed.decisions.append(Assignment(ranks, {node: choice}, params))
        placed.decided = Factors(placed.graph)
        AnnotatePlacements().apply(placed)
        InsertGradientCopies(gradients).apply(placed)
        _complete(placed)
        return placed

    def wants(self, choice: Choice) -> list[Placement] | None:
        """The placement of every placeholder; None if one of them is wanted in two."""
        wants: dict[Operand, set[Placement]] = {}
        at = iter(choice.inputs)
        map_operands((self.case.args, self.case.kwargs), lambda o: wants.setdefault(o, set()).add(next(at)))
        return [w.pop() for w in wants.values()] if all(len(w) == 1 for w in wants.values()) else None

    def layouts(self) -> tuple[list[Any], list[Any]]:
        """The sizes of the factors of the inputs, and of the results."""
        inputs, outputs = self.unplaced.graph.find_nodes(op="placeholder"), self.unplaced.outputs()
        return list(map(self.factors.atom_sizes, inputs)), list(map(self.factors.atom_sizes, outputs))  # type: ignore[arg-type]


def _complete(placed: GlobalProgram) -> None:
    """Completes what ranks can't be seen to have right by themselves: extremes, and rows of experts.

    Only of a complete maximum it is known who attains it, and gets the gradient; rows of others become zeros.
    """
    out = placed.graph.output_node()
    results: tuple[Node, ...] = out.args[0]  # type: ignore[assignment]
    for result in results:
        src = result.meta["placement"]
        dst = tuple(map(completed, src))
        if dst != src:
            with placed.graph.inserting_before(out):
                out.replace_input_with(result, call(placed.graph, reshard, (result, src, dst), like=result))
    ChooseCollectives().apply(placed)


def completed(placement: Placement) -> Placement:
    """How a result of a way is placed once it is completed."""
    if isinstance(placement, Owned):
        return Partial()
    return Replicate() if isinstance(placement, Partial) and placement.op != "sum" else placement


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]
