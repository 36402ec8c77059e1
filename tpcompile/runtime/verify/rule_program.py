"""One call of an operator, run on simulated ranks in every way that its rule offers.

Its inputs are laid out as a choice wants them, all ranks run the really lowered graph in lockstep, and
what they compute is put together as the choice says. Nothing here knows rules: only what placements mean.
"""

from __future__ import annotations

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
from tpcompile.ir.markers import all_reduce
from tpcompile.ir.placements import Partial, Placement, Replicate, Shard
from tpcompile.ir.torch_internals import FakeTensorMode
from tpcompile.lowering.simulate import run
from tpcompile.passes.annotate_placements import AnnotatePlacements
from tpcompile.passes.insert_gradient_copies import InsertGradientCopies
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import Choice, choices
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

from .assemble import lay_out, put_together

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
        self.rule = self.factors.rules[self.node]

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
        _complete_extremes(placed)
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


def _complete_extremes(placed: GlobalProgram) -> None:
    """Maxima over ranks are completed: only then it is known who attains them, and gets the gradient."""
    out = placed.graph.output_node()
    results: list[Node] = list(out.args[0])  # type: ignore[arg-type]
    for i, result in enumerate(results):
        for op in ("max", "min"):
            axes = tuple(a for a, p in enumerate(result.meta["placement"]) if p == Partial(op))
            if axes:
                with placed.graph.inserting_before(out):
                    results[i] = call(placed.graph, all_reduce, (result, axes, op), like=result)
                results[i].meta["placement"] = tuple(map(_completed, result.meta["placement"]))
    out.args = (tuple(results),)


def _completed(placement: Placement) -> Placement:
    return Replicate() if isinstance(placement, Partial) and placement.op != "sum" else placement


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]


def compare(program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice]) -> None:
    """Runs a choice per sub-axis on all ranks and compares the values.

    Raises:
        AssertionError: the ranks do not compute the whole results.
    """
    placed = program.placed(axis_sizes, chosen)
    with torch.no_grad():
        ranks = run(placed, _feeds(program, placed, axis_sizes))
    _compare(program, axis_sizes, chosen, ranks)


def compare_gradients(program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice]) -> None:
    """The same for gradients: those of whole and partial values are whole, those of divided ones divided.

    Raises:
        AssertionError: a rank's gradient of an input is not what belongs to the input's placement.
    """
    whole = [x.clone().requires_grad_(_differentiable(x)) for x in program.inputs]
    values = dict(zip(operands_of(program.case), whole, strict=True))
    results = program.compute(program.case.args, program.case.kwargs, values)
    used = [i for i, y in enumerate(results) if y.requires_grad]
    if not used:
        return
    seeds = [torch.randn_like(results[i]) for i in used]
    asked = [x for x in whole if x.requires_grad]
    expected = torch.autograd.grad([results[i] for i in used], asked, seeds, allow_unused=True)

    placed = program.placed(axis_sizes, chosen, gradients=True)
    feeds = _feeds(program, placed, axis_sizes)
    leaves = [[x.requires_grad_(_differentiable(x)) for x in feed] for feed in feeds]
    ranks = run(placed, leaves)
    layouts, out_layouts = program.layouts()
    outputs, gradients = [], []
    for i, seed in zip(used, seeds, strict=True):
        placements = [_gradient(s.outputs[i]) for s in chosen]
        gradients += lay_out(seed, out_layouts[i], axis_sizes, placements)
        outputs += [r[i] for r in ranks]
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    flat = [x for feed in leaves for x in feed if x.requires_grad]
    got = torch.autograd.grad([o for o, _ in pairs], flat, [g for _, g in pairs], allow_unused=True)
    found = iter(got)
    by_rank = [[next(found) if x.requires_grad else None for x in feed] for feed in leaves]
    wanted = iter(expected)
    wants = [program.wants(s) or [] for s in chosen]
    for k, x in enumerate(whole):
        if not x.requires_grad:
            continue
        want = next(wanted)
        parts = [
            torch.zeros_like(feed[k]) if grad[k] is None else grad[k]
            for feed, grad in zip(leaves, by_rank, strict=True)
        ]
        placements = [_gradient(w[k]) for w in wants]
        whole_gradient = put_together(parts, layouts[k], axis_sizes, placements, program.tolerance)  # type: ignore[arg-type]
        wanted_gradient = torch.zeros_like(x) if want is None else want
        _close(whole_gradient, wanted_gradient, f"gradient of operand {k}", program.tolerance)


def _differentiable(x: Tensor) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


def _gradient(placement: Placement) -> Placement:
    return placement if isinstance(placement, Shard) else Replicate()


def _feeds(program: RuleProgram, placed: GlobalProgram, axis_sizes: tuple[int, ...]) -> list[list[Tensor]]:
    torch.manual_seed(1)
    layouts, _ = program.layouts()
    columns = []
    for node, value, layout in zip(
        placed.graph.find_nodes(op="placeholder"), program.inputs, layouts, strict=True
    ):
        columns.append(lay_out(value, layout, axis_sizes, [d.params[node] for d in placed.decisions]))
    return [list(row) for row in zip(*columns, strict=True)]


def _compare(
    program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice], ranks: list[Any]
) -> None:
    _, layouts = program.layouts()
    for i, want in enumerate(program.expected):
        placements = [_completed(s.outputs[i]) for s in chosen]
        got = put_together([r[i] for r in ranks], layouts[i], axis_sizes, placements, program.tolerance)
        assert got.dtype == want.dtype, f"result {i} is {got.dtype}, not {want.dtype}"
        _close(got, want, f"result {i}", program.tolerance)


def _close(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
