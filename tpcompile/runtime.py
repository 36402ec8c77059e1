"""A sharded model at work: its programs, its weights, and how a call finds its program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import TreeSpec, tree_unflatten

from .caches import Held, held_outputs
from .capture import Captured, flatten_call, leaf_names
from .capture.bind_call import CallSignature
from .capture.call_results import given_caches, states_of
from .capture.program import InputSpec
from .capture.repeated_layers import whole_outputs
from .capture.size_check import Check, size_check
from .compile_program import Compiled, Compiler
from .compile_step import Step, compile_step, mark_open_sizes
from .entries import Entry, can_compose, divided_paths, entered, open_paths, original_call, without_guards
from .errors import CannotCapture, TpCompileError
from .fetch_inputs import Feed, Fetch, make_fetch
from .layout import WeightLayout
from .lowering.local_shapes import LocalShapes
from .lowering.lower_graph import SOURCE
from .plan import Plan
from .shell import shard_more_weights, shard_weights, tensors_by_name, unsharded
from .work import Source, Work


@dataclass
class Program:
    """One call signature of a sharded model.

    Attributes:
        compiled: the program at global shapes, planned and rewritten.
        captured: what it was captured from, the sizes of caches as this rank holds them.
        graph_module: this rank's lowered graph.
        plan: what was decided.
        training: ``model.training`` when it was captured.
        autocast: the autocast type when it was captured, or None; its casts are in the graph.
        names: the arguments that are given.
        example: the leaves of the call that it was captured for, tensors without their values.
        feeds: where each placeholder's value comes from; a number stands for a leaf of the call.
        mutated: per buffer that the program changes, where it is.
        entry: the submodule that is called, "" for the model itself.
        check: whether the sizes of a call's leaves are ones that it runs on.
        outlined: the graph with repeated layers as calls of a submodule, for ``torch.compile``, and what
            fetches its inputs; None if no layers repeat often enough.
        steps: its compiled steps, by torch.compile's options.
    """

    compiled: Compiled
    captured: Captured
    graph_module: GraphModule
    plan: Plan
    training: bool
    autocast: torch.dtype | None
    names: tuple[str, ...]
    example: tuple[Any, ...]
    feeds: tuple[Feed | int, ...]
    mutated: tuple[Feed, ...]
    check: Check
    entry: str = ""
    outlined: tuple[GraphModule, Fetch] | None = None
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fetch = make_fetch(self.feeds)

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], training: bool) -> bool:
        """Whether a call is one of this program's, by its structure apart; dynamo can trace it."""
        if names != self.names or training != self.training or len(leaves) != len(self.example):
            return False
        if autocast_of(leaves) != self.autocast:
            return False
        for given, mine in zip(leaves, self.example, strict=True):
            if isinstance(mine, Tensor) != isinstance(given, Tensor):
                return False
            if isinstance(mine, Tensor):
                if given.dtype != mine.dtype or given.ndim != mine.ndim:
                    return False
            elif type(given) is not type(mine) or given != mine:
                return False
        return self.check(leaves)

    def run(
        self, leaves: Sequence[Any], bound: Mapping[str, Any], options: dict[str, Any] | None = None
    ) -> Any:
        """Runs this rank's graph, rebuilds the model's output and updates the caches of the call.

        Args:
            leaves: the call, flat.
            bound: the call.
            options: torch.compile's, if the graph is to run under it.
        """
        given = [x.contiguous() if isinstance(x, Tensor) else None for x in leaves]
        if options is None or torch.compiler.is_compiling():
            return self.captured.unflatten(self.step(given), bound)
        key = repr(sorted(options.items()))
        if key not in self.steps:
            mark_open_sizes(self.captured, given)
            self.steps[key] = compile_step(self.step, f"step_{id(self)}", options)
        return self.captured.unflatten(self.steps[key](given), bound)

    def step(self, given: Sequence[Any]) -> Sequence[Any]:
        """Runs this rank's graph on the tensors of a call; the flat results."""
        graph_module, fetch = self.graph_module, self.fetch
        # What is asked of the sizes must be known to dynamo before the first layer, which stands for others.
        if self.outlined is not None and torch.compiler.is_dynamo_compiling() and self.check(given):
            graph_module, fetch = self.outlined
        # Not as a module: global module hooks (a FLOP counter's) are for the model, and trip over segments.
        flat: Sequence[Any] = graph_module.forward(*fetch(given))
        if self.mutated:
            for feed, new in zip(self.mutated, flat[len(flat) - len(self.mutated) :], strict=True):
                with torch.no_grad():
                    feed.get().copy_(new)
        return flat

    def __str__(self) -> str:
        arguments = ", ".join(
            f"{spec.name}: {'x'.join(map(str, spec.extents))}"
            if spec.extents is not None
            else f"{spec.name}={spec.value}"
            for spec in self.captured.user_inputs
        )
        return f"{self.entry}({arguments}) {'train' if self.training else 'eval'}"


@dataclass
class Runtime:
    """Everything that a sharded module knows beyond the original one.

    Attributes:
        compiler: makes programs for this model on this mesh.
        signature: the original forward's.
        original: the original class of the module.
        layout: where the weights lie; None until the first program decides it.
        programs: one per call signature.
        caches: how tensors lie that programs handed out to be given back, by name.
        divided: the paths of modules with divided weights in them.
        composed: the modules, with the arguments given, that run as python over their parts.
        pieces: the paths of modules that get programs under them although nothing of them is divided yet.
        compile_options: torch.compile's for every program, or None to run them as they are.
    """

    compiler: Compiler
    signature: CallSignature
    original: type[nn.Module]
    layout: WeightLayout | None = None
    programs: list[Program] = field(default_factory=list)
    caches: dict[str, Held] = field(default_factory=dict)
    divided: frozenset[str] = frozenset()
    composed: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    pieces: frozenset[str] = frozenset()
    compile_options: dict[str, Any] | None = None

    def call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> Any:
        """Runs a call of the model, or of a submodule, on its program, captured if there is none."""
        bound = self.bind(args, kwargs, entry)
        path = entry.path if entry is not None else ""
        training = model.get_submodule(path).training
        leaves, spec = flatten_call(bound)
        names = tuple(bound)
        program = self.find(names, leaves, spec, training, path)
        if program is None:
            if (path, names) not in self.composed:
                answer = _capture_and_run(self, model, bound, path)
                if answer is not NotImplemented:
                    return answer
            return original_call(model, self.original, path, (entry or self).signature, bound)
        if program.autocast is None:
            return program.run(leaves, bound, self.compile_options)
        with torch.autocast(device_of(leaves), enabled=False):
            return program.run(leaves, bound, self.compile_options)

    def find(
        self, names: tuple[str, ...], leaves: Sequence[Any], spec: TreeSpec, training: bool, path: str = ""
    ) -> Program | None:
        """The program of a call, of the model or of the submodule at ``path``, if it was captured."""
        for program in self.programs:
            if program.entry == path and program.fits(names, leaves, training):
                if program.captured.in_spec == spec:
                    return program
        return None

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> dict[str, Any]:
        """The call as keyword arguments in the order of the signature."""
        try:
            return (entry or self).signature.bind(args, kwargs)
        except ValueError as error:
            raise TpCompileError(
                f"the call does not fit the model's forward, which {error}",
                where=f"{(entry or self).original.__name__}.forward",
                todo="give the arguments as you would call the model",
            ) from None

    def capture(self, model: nn.Module, bound: dict[str, Any], path: str = "") -> Program:
        """Compiles a program for a call; the first one also decides where the weights lie.

        Args:
            model: the sharded model.
            bound: the call.
            path: the submodule that is called, "" for the model itself.

        Raises:
            TpCompileError: the call cannot be captured, planned or lowered; the model is unchanged.
        """
        if self.compiler.options.dynamic is False:
            self._refuse_new_shapes(bound, path)
        with unsharded(model, self.original, self.layout), without_guards(model), entered(model, path):
            compiled = self.compiler.compile(model, self._whole_caches(bound), self.layout, self.caches)
        self.caches = {**hand_out(compiled.planned), **self.caches}
        if self.layout is None:
            self.layout = compiled.plan.layout
            shard_weights(model, self.layout, self.compiler.rank, compiled.planned.custom)
        else:
            layout, decided = compiled.plan.layout, set(self.layout.open) - set(compiled.plan.layout.open)
            shard_more_weights(model, layout, self.compiler.rank, decided)
            self.layout = layout
        self.divided = divided_paths(model, self.layout)
        self.pieces = open_paths(model, self.layout) if self.composed else frozenset()
        leaves, _ = flatten_call(bound)
        captured = local_extents(compiled, self.compiler.rank)
        program = Program(
            compiled=compiled,
            captured=captured,
            graph_module=compiled.local,
            plan=compiled.plan,
            training=model.get_submodule(path).training,
            autocast=autocast_of(leaves),
            names=tuple(bound),
            example=tuple(x.to("meta") if isinstance(x, Tensor) else x for x in leaves),
            feeds=make_feeds(model, compiled, compiled.local, self.compiler.rank),
            outlined=None
            if (outlined := compiled.outlined) is None
            else (outlined, make_fetch(make_feeds(model, compiled, outlined, self.compiler.rank))),
            mutated=tuple(
                Feed(*tensors_by_name(model)[o.name])
                for o in compiled.planned.captured.outputs
                if o.kind == "buffer_mutation"
            ),
            entry=path,
            check=size_check(captured),
        )
        self.programs.append(program)
        return program

    def try_first(self, model: nn.Module, bound: dict[str, Any]) -> TpCompileError | None:
        """Captures a call; returns why it cannot be captured if its parts are to be captured instead.

        Raises:
            TpCompileError: it is refused for another reason, or is not to be composed.
        """
        try:
            self.capture(model, bound)
        except TpCompileError as error:
            if not self.compiler.options.compose or not _is_capture_failure(error):
                raise
            return error
        return None

    def compose(self, model: nn.Module, path: str, names: tuple[str, ...], error: TpCompileError) -> bool:
        """Whether a call that could not be captured runs as python over the module's parts from now on."""
        wanted = self.compiler.options.compose and _is_capture_failure(error)
        if not wanted or not can_compose(model, path, self.layout):
            return False
        self.composed.add((path, names))
        self.pieces = open_paths(model, self.layout)
        where = f"{path or type(model).__name__}({', '.join(names)})"
        warnings.warn(
            f"{where} runs as python over parts that are captured by themselves, because it cannot be "
            f"captured as a whole: {error}",
            stacklevel=2,
        )
        return True

    def divide_caches(self, bound: dict[str, Any]) -> None:
        """Leaves of caches that the caller brings whole only this rank's parts.

        Raises:
            TpCompileError: a cache is of another size than this model's.
        """
        if self.layout is None or not self.caches:
            return
        axes, at = self.layout.axes, self.layout.coordinates(self.compiler.rank)
        for name, cache in given_caches(bound).items():
            own = {name: cache}
            mine = [
                self.caches[leaf_name].part(leaf, axes, at) if leaf_name in self.caches else leaf
                for leaf_name, leaf in zip(leaf_names(own), flatten_call(own)[0], strict=True)
            ]
            left = iter(mine)
            for state in states_of(name, cache):
                state.put(cache, [next(left) for _ in range(state.count)])

    def _whole_caches(self, bound: dict[str, Any]) -> dict[str, Any]:
        """The call with tensors of whole, valueless caches in the place of this rank's parts."""
        if not self.caches:
            return bound
        leaves, spec = flatten_call(bound)
        whole = [
            self.caches[name].whole(leaf) if isinstance(leaf, Tensor) and name in self.caches else leaf
            for name, leaf in zip(leaf_names(bound), leaves, strict=True)
        ]
        found: dict[str, Any] = tree_unflatten(whole, spec)
        return found

    def _refuse_new_shapes(self, bound: dict[str, Any], path: str) -> None:
        leaves, _ = flatten_call(bound)
        for program in self.programs:
            same = program.names == tuple(bound) and len(leaves) == len(program.example)
            if same and program.entry == path and (why := program.captured.accepts(leaves)) is not None:
                raise TpCompileError(
                    f"the call has other shapes than the program was captured for: {why}",
                    todo="parallelize with dynamic=True, or keep to the captured shapes",
                )


def _is_capture_failure(error: TpCompileError) -> bool:
    """Whether an error says, on this rank or on another, that python code cannot be captured."""
    return isinstance(error, CannotCapture) or CannotCapture.__name__ in error.what


# Under torch.compile(fullgraph=True) the reason is the error; without fullgraph the graph breaks here.
@torch.compiler.disable(reason="no program was captured for this call: call model.capture(...) with it first")
def _capture_and_run(runtime: Runtime, model: nn.Module, bound: dict[str, Any], path: str) -> Any:
    runtime.divide_caches(bound)
    leaves, spec = flatten_call(bound)
    training = model.get_submodule(path).training
    program = runtime.find(tuple(bound), leaves, spec, training, path)
    if program is None:
        try:
            program = runtime.capture(model, bound, path)
        except TpCompileError as error:
            if not runtime.compose(model, path, tuple(bound), error):
                raise
            return NotImplemented
    with torch.autocast(device_of(leaves), enabled=False):
        return program.run(leaves, bound, runtime.compile_options)


def hand_out(planned: Work) -> dict[str, Held]:
    """How the caches that a program returns lie."""
    factors = planned.planned_factors
    assert factors is not None, "the program must be planned"
    placements = planned.handed_out(factors)
    results = planned.outputs()
    if planned.blocks is None:
        every = [(spec.name, at) for at, spec in enumerate(planned.captured.outputs)]
    else:
        every = [(derived.name, derived.output) for derived in planned.blocks.results]
    named = [(name, out) for name, at in every if isinstance(out := results[at], Node) and out in placements]
    return held_outputs(named, factors, placements)


def local_extents(compiled: Compiled, rank: int) -> Captured:
    """The captured program, with the sizes of given caches as a rank holds them."""
    work = compiled.planned
    factors = work.planned_factors
    assert factors is not None, "the program must be planned"
    shapes = LocalShapes(factors, work.axes, WeightLayout(work.axes, {}).coordinates(rank))
    local = {
        work.sources[n].spec.name: shapes.shape(n, placements)
        for n, placements in work.given(factors).items()
    }
    inputs, outputs = work.captured.inputs, work.captured.outputs
    if work.blocks is not None:
        local |= {leaf: local[twin] for (twin, _), leaf in work.blocks.leaves.items() if twin in local}
        inputs = (*(spec for spec in inputs if spec.kind != "user"), *work.blocks.users)
        outputs = whole_outputs(work.captured)

    def adapt(spec: InputSpec) -> InputSpec:
        sizes = local.get(spec.name)
        if sizes is None or spec.extents is None:
            return spec
        extents = tuple(
            size if isinstance(size, int) else extent
            for size, extent in zip(sizes, spec.extents, strict=True)
        )
        return replace(spec, extents=extents)

    own = {f.name: getattr(work.captured, f.name) for f in fields(Captured)}
    return Captured(**{**own, "inputs": tuple(map(adapt, inputs)), "outputs": outputs})


def autocast_of(leaves: Sequence[Any]) -> torch.dtype | None:
    """The autocast type that is on for a call's device, or None."""
    device = device_of(leaves)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def device_of(leaves: Sequence[Any]) -> str:
    """The device type of a call."""
    return next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")


def make_feeds(model: nn.Module, compiled: Compiled, local: GraphModule, rank: int) -> tuple[Feed | int, ...]:
    """Where each placeholder of a rank's graph gets its value."""
    places = tensors_by_name(model)
    work, layout = compiled.planned, compiled.plan.layout
    leaves = {spec.name: i for i, spec in enumerate(work.captured.user_inputs)}

    def feed(source: Source) -> Feed | int:
        name = source.spec.name
        if source.spec.kind == "user":
            return leaves[name]
        if source.spec.kind == "constant":
            return Feed(None, name, work.captured.constants[name])
        if source.order < 0:
            return Feed(*places[name])
        dim = layout.params[name].packed_dim
        sizes = [s[dim] for s in layout.segment_shapes(name, rank)]
        if source.count == len(sizes):
            return Feed(*places[name])
        mine = sizes[source.order : source.order + source.count]
        return Feed(*places[name], segment=(dim, sum(sizes[: source.order]), sum(mine)))

    return tuple(feed(node.meta[SOURCE]) for node in local.graph.find_nodes(op="placeholder"))
