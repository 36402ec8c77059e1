"""One call signature of a sharded model: this rank's graph, what it is for, and how it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.capture.caches.layers import with_counts
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.look_inside import first_unlike
from tpcompile.capture.export.size_check import size_check
from tpcompile.compile_program import Compiled
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import Sizes, identical
from tpcompile.planner.plan import Plan
from tpcompile.planner.report.notebook import graph_html

from .compile_options import in_cpp
from .compile_step import CompiledSteps, compiled_steps
from .drawn_numbers import Draws
from .fetch_inputs import Feed, make_fetch
from .named_run import run_named, somebody_watches
from .settings import Reads, found_out_once
from .sharded_result import Gathers, ShardedResult, defer_gathers
from .value_checks import checks_among, refuse_failed
from .write_buffers import write_buffers


@dataclass
class RankProgram:
    """What a rank runs for one call signature of a sharded model.

    Attributes:
        compiled: the program at global shapes, planned and rewritten.
        captured: what it was captured from, the sizes of caches as this rank holds them.
        graph_module: this rank's lowered graph.
        plan: what was decided.
        training: ``model.training`` when it was captured.
        autocast: the autocast type when it was captured, or None; its casts are in the graph.
        default: the default type of floating point numbers then.
        names: the arguments that are given.
        example: the leaves of the call that it was captured for, tensors without their values.
        feeds: where each placeholder's value comes from; a number stands for a leaf of the call.
        mutated: per buffer that the program changes, where it is.
        entry: the submodule that is called, "" for the model itself.
        numbers: which leaves are numbers that travel as sizes.
        outlined: the graph with repeated layers as calls of a submodule, for ``torch.compile``, and where its
            inputs come from; None if no layers repeat often enough.
        steps: what it was compiled to, by torch.compile's options.
        types: the number of the weights' types that it was captured for.
        reads: what its trace has read.
        state: a number for the attributes that had been read before.
        loose: the places of the call's leaves that belong to no cache.
        same: which of these are the same tensor as an earlier one.
        gradients: what python has found when it asked whether gradients are recorded; None: it did not ask.
        root: the model.
        seen: the sizes and numbers of calls of it that ranks have compared.
        number: tells it from other programs of the model; equal on all ranks.
        calls: how many had results of which ranks keep a part.
    """

    compiled: Compiled
    captured: Captured
    graph_module: GraphModule
    plan: Plan
    training: bool
    autocast: torch.dtype | None
    default: torch.dtype
    names: tuple[str, ...]
    example: tuple[Any, ...]
    feeds: tuple[Feed | int, ...]
    mutated: tuple[Feed, ...]
    types: int
    state: int
    reads: Reads
    root: nn.Module
    loose: tuple[int, ...] = ()
    same: dict[int, int] = field(default_factory=dict)
    gradients: tuple[bool, ...] | None = None
    entry: str = ""
    numbers: frozenset[int] = frozenset()
    outlined: tuple[GraphModule, tuple[Feed | int, ...]] | None = None
    steps: dict[str, CompiledSteps] = field(default_factory=dict)
    seen: set[Sizes] = field(default_factory=set)
    calls: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        self._short: dict[int, tuple[GraphModule, dict[int, Gathers]]] = {}
        self.check = size_check(self.captured)
        self.checks = checks_among(self.captured.outputs)
        draws = Draws(self.graph_module.graph)
        self.draws = draws if draws.operator else None
        self.bind(True)

    def bind(self, bound: bool) -> None:
        """Makes what fetches inputs; again when weights become other tensors, or modules' tables others.

        Args:
            bound: whether the weights are sharded parameters, the leaves of which stay the same.
        """
        self.fetch = make_fetch(self.feeds)
        self.graph_compiled, feeds = self.outlined or (self.graph_module, self.feeds)
        self.fetch_compiled = make_fetch(feeds, bound=bound)
        self.fetch_mutated = make_fetch(self.mutated, bound=bound)
        self._bound = bound
        for steps in self.steps.values():
            steps.bind(bound)

    @property
    def counted(self) -> str:
        """What its python changes at a call and depends on, perhaps without an end; ``""``: nothing."""
        captured = self.captured
        found = (w.name for w in captured.writes if w.may_differ and w.is_read(captured.reads))
        return next(found, "")

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], training: bool) -> bool:
        """Whether a call is one of this program's, apart from its structure; dynamo can trace it."""
        if names != self.names or not self.is_like(leaves) or identical(leaves, self.loose) != self.same:
            return False
        return self.fits_now(leaves, training)

    def is_like(self, leaves: Sequence[Any]) -> bool:
        """Whether leaves have the types, ranks and python values of those that this was captured for."""
        if len(leaves) != len(self.example):
            return False
        return first_unlike(leaves, self.example, self.numbers) is None

    def fits_now(self, leaves: Sequence[Any], training: bool) -> bool:
        """Whether a call whose leaves are like the example's is one of its, by torch's modes and sizes."""
        modes = (training, autocast_of(leaves), torch.get_default_dtype())
        if modes != (self.training, self.autocast, self.default):
            return False
        if self.gradients is not None and gradients_of(leaves, self._trained()) != self.gradients:
            return False
        return self.check(with_counts(leaves, self.numbers)) and (
            self.compiled.differentiable or not self._is_differentiated(leaves)
        )

    def _trained(self) -> tuple[bool, ...]:
        """Which weights want gradients; dynamo, which must not trace them, finds it out once."""
        return self._trained_now() if torch.compiler.is_dynamo_compiling() else trained_weights(self.feeds)

    @found_out_once
    def _trained_now(self) -> tuple[bool, ...]:
        return trained_weights(self.feeds)

    def _is_differentiated(self, leaves: Sequence[Any]) -> bool:
        """Whether gradients of a call will be asked for."""
        weights = (f.held() for f in self.feeds if isinstance(f, Feed) and f.module)
        wanted = (isinstance(x, Tensor) and x.requires_grad for part in (weights, leaves) for x in part)
        return torch.is_grad_enabled() and any(wanted)

    def run(
        self, leaves: Sequence[Any], bound: Mapping[str, Any], options: dict[str, Any] | None = None
    ) -> Any:
        """Runs this rank's graph, rebuilds the model's output and updates the caches of the call.

        Args:
            leaves: the call, flat.
            bound: the call.
            options: torch.compile's, if the graph is to run under it.

        Raises:
            TpCompileError: gradients are recorded, and a constant would lose its own.
        """
        if self.captured.detached and torch.is_grad_enabled():
            name = self.captured.detached[0]
            raise TpCompileError(
                f"forward uses a tensor that wants a gradient and is not a part of the model ({name})",
                where=name,
                todo="let it be a parameter, and modules in lists be in an nn.ModuleList; "
                "or call the model under torch.no_grad()",
            )
        leaves = with_counts(leaves, self.numbers)
        given = [x.contiguous() if isinstance(x, Tensor) else None for x in leaves]
        flat: Sequence[Any] | None = None
        gathers: dict[int, Gathers] = {}
        generators = self.draws.begin(device_of(leaves)) if self.draws is not None else None
        if options is not None and not torch.compiler.is_compiling():
            steps, gathers = self._compiled(options)
            flat = steps(given)
        if flat is None:
            flat, gathers = self._plain(given)
        if generators is not None:
            generators.refuse_draws()
        refuse_failed(self.checks, flat)
        if self.mutated:
            write_buffers(self.mutated, self.fetch_mutated(()), self.captured.outputs, flat)
        if gathers:
            flat = self._sharded(flat, gathers)
        return self._rebuild(flat, bound, leaves)

    def _sharded(self, flat: Sequence[Any], gathers: Mapping[int, Gathers]) -> list[Any]:
        """Results of which this rank has a part, as such; they are told apart by the number of the call."""
        self.calls += 1
        name = f"gather result {{}} of call {self.calls} of {self}"
        return [
            ShardedResult.of(x, gathers[i], name.format(i)) if i in gathers else x for i, x in enumerate(flat)
        ]

    def _compiled(self, options: dict[str, Any]) -> tuple[CompiledSteps, dict[int, Gathers]]:
        grad = torch.is_grad_enabled()
        key = f"{sorted(options.items())} {grad}"
        # Gradients through regions, as torch's compiler makes them, came out wrong.
        plain = (self._for_gradients or self.graph_module, self.feeds)
        whole, feeds = (not grad and not in_cpp(options) and self.outlined) or plain
        module, gathers = self.short(whole)
        if key not in self.steps:
            self.steps[key] = compiled_steps(module, feeds, self.captured, options, self.same)
            self.steps[key].bind(self._bound)
        return self.steps[key], gathers

    @property
    def _for_gradients(self) -> GraphModule | None:
        """The graph for calls that record gradients, if it is another, and they do."""
        if not torch.is_grad_enabled():
            return None
        if torch.compiler.is_dynamo_compiling():
            self._make_for_gradients()
        return self.compiled.lowered.training

    @found_out_once
    def _make_for_gradients(self) -> bool:
        """Makes it, which dynamo must not trace."""
        return self.compiled.lowered.training is not None

    def short(self, graph: GraphModule) -> tuple[GraphModule, dict[int, Gathers]]:
        """One of this rank's graphs without the gathers that wait until somebody uses what they give."""
        if id(graph) not in self._short:
            turn = getattr(getattr(self.root, "_tp", None), "group_name", "")
            self._short[id(graph)] = defer_gathers(graph, self.captured.outputs, turn)
        return self._short[id(graph)]

    def _rebuild(self, flat: Sequence[Any], bound: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
        """The model's result; what its python leaves behind is left behind."""
        for write in self.captured.writes:
            if torch.compiler.is_dynamo_compiling() and write.is_read(self.captured.reads):
                raise TpCompileError(
                    f"forward changes {write.name}, which it reads: compiled code would not notice",
                    where=write.name,
                    todo="use parallelize(compile=True) instead of torch.compile around the model",
                )
            write.write(self.root, flat)
        return self.captured.unflatten(flat, bound, () if torch.compiler.is_dynamo_compiling() else leaves)

    def _plain(self, given: Sequence[Any]) -> tuple[Sequence[Any], dict[int, Gathers]]:
        """Runs this rank's graph on the tensors of a call; dynamo may trace it, with all results whole."""
        graph_module, fetch = self.graph_module, self.fetch
        # What is asked of the sizes must be known to dynamo before the first layer, which stands for others.
        if torch.compiler.is_dynamo_compiling() and self.check(given):
            graph_module, fetch = self.graph_compiled, self.fetch_compiled
        graph_module = self._for_gradients or graph_module
        gathers: dict[int, Gathers] = {}
        if not torch.compiler.is_compiling():
            graph_module, gathers = self.short(graph_module)
            if somebody_watches():
                return run_named(graph_module, fetch(given)), gathers
        # Not as a module: global module hooks (a FLOP counter's) are for the model, and trip over segments.
        return graph_module.forward(*fetch(given)), gathers

    def _repr_html_(self) -> str:
        return graph_html(self.compiled.rewritten)

    def __str__(self) -> str:
        arguments = ", ".join(
            f"{spec.name}={spec.value}"
            if spec.extents is None
            else f"{spec.name}={spec.extents[0]}"
            if at in self.numbers
            else f"{spec.name}: {'x'.join(map(str, spec.extents))}"
            for at, spec in enumerate(self.captured.user_inputs)
        )
        return f"{self.entry}({arguments}) {'train' if self.training else 'eval'}"


def autocast_of(leaves: Sequence[Any]) -> torch.dtype | None:
    """The autocast type that is on for a call's device, or None."""
    device = device_of(leaves)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def gradients_of(leaves: Sequence[Any], trained: tuple[bool, ...]) -> tuple[bool, ...]:
    """All that python can find out about gradients: whether they are recorded, and wanted of what."""
    return (torch.is_grad_enabled(), *(x.requires_grad for x in leaves if isinstance(x, Tensor)), *trained)


def trained_weights(feeds: Sequence[Feed | int]) -> tuple[bool, ...]:
    """Which weights want gradients."""
    return tuple(f.held().requires_grad for f in feeds if isinstance(f, Feed) and f.module)


def device_of(leaves: Sequence[Any]) -> str:
    """The device type of a call."""
    return next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
