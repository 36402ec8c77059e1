"""A sharded model at work: its programs, its weights, and how a call finds its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_unflatten

from .caches import Held, held_outputs
from .capture import Captured, flatten_call, leaf_names
from .capture.bind_call import CallSignature
from .capture.program import InputSpec
from .capture.repeated_layers import whole_outputs
from .compile_program import Compiled, Compiler
from .errors import TpCompileError
from .layout import WeightLayout
from .lowering.local_shapes import LocalShapes
from .lowering.lower_graph import SOURCE
from .plan import Plan
from .shell import shard_weights, tensors_by_name, unsharded
from .work import Source, Work


@dataclass(frozen=True)
class Feed:
    """Where the value of a placeholder comes from: a parameter, buffer or constant, or a segment of one.

    Attributes:
        module: the module that holds it.
        name: its name there.
        constant: the value itself, for a constant of the graph.
        segment: dimension, start and length of the segment in the local tensor, or None for all of it.
    """

    module: nn.Module | None
    name: str
    constant: Tensor | None = None
    segment: tuple[int, int, int] | None = None

    def get(self) -> Tensor:
        """The value as it is now (optimizers and ``load_state_dict`` may have replaced it)."""
        if self.constant is not None:
            return self.constant
        assert self.module is not None
        value = getattr(self.module, self.name)
        return value if self.segment is None else value.narrow(*self.segment)


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
        outlined: the graph with repeated layers as calls of a submodule, for ``torch.compile``, and its
            feeds; None if no layers repeat often enough.
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
    outlined: tuple[GraphModule, tuple[Feed | int, ...]] | None = None

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], training: bool) -> bool:
        """Whether a call is one of this program's; plain python, so that dynamo can trace it."""
        if names != self.names or training != self.training or len(leaves) != len(self.example):
            return False
        if autocast_of(leaves) != self.autocast:
            return False
        sizes: dict[str, int] = {}
        for given, mine, spec in zip(leaves, self.example, self.captured.user_inputs, strict=True):
            if isinstance(mine, Tensor) != isinstance(given, Tensor):
                return False
            if isinstance(mine, Tensor):
                if given.dtype != mine.dtype or given.ndim != mine.ndim:
                    return False
                for size, extent in zip(given.shape, spec.extents or (), strict=False):
                    # Sizes that are one to the program are made one for dynamo, before the first layer.
                    if size != (extent if isinstance(extent, int) else sizes.setdefault(extent, size)):
                        return False
            elif type(given) is not type(mine) or given != mine:
                return False
        return True

    def run(self, leaves: Sequence[Any]) -> Any:
        """Runs this rank's graph and rebuilds the model's output."""
        given = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
        graph_module, feeds = self.graph_module, self.feeds
        if self.outlined is not None and torch.compiler.is_dynamo_compiling():
            graph_module, feeds = self.outlined
        inputs = [given[feed] if isinstance(feed, int) else feed.get() for feed in feeds]
        # Not as a module: global module hooks (a FLOP counter's) are for the model, and trip over segments.
        flat = graph_module.forward(*inputs)
        if self.mutated:
            for feed, new in zip(self.mutated, flat[len(flat) - len(self.mutated) :], strict=True):
                with torch.no_grad():
                    feed.get().copy_(new)
        return self.captured.unflatten(flat)

    def __str__(self) -> str:
        arguments = ", ".join(
            f"{spec.name}: {'x'.join(map(str, spec.extents))}"
            if spec.extents is not None
            else f"{spec.name}={spec.value}"
            for spec in self.captured.user_inputs
        )
        return f"({arguments}) {'train' if self.training else 'eval'}"


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
    """

    compiler: Compiler
    signature: CallSignature
    original: type[nn.Module]
    layout: WeightLayout | None = None
    programs: list[Program] = field(default_factory=list)
    caches: dict[str, Held] = field(default_factory=dict)

    def call(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs a call on its program, which is captured if there is none yet."""
        bound = self.bind(args, kwargs)
        leaves, spec = flatten_call(bound)
        names = tuple(bound)
        for program in self.programs:
            if program.fits(names, leaves, model.training):
                same = torch.compiler.is_compiling() or (
                    program.captured.in_spec == spec and program.captured.accepts(leaves) is None
                )
                if same and program.autocast is None:
                    return program.run(leaves)
                if same:
                    with torch.autocast(device_of(leaves), enabled=False):
                        return program.run(leaves)
        return _capture_and_run(self, model, bound, leaves)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call as keyword arguments in the order of the signature."""
        try:
            return self.signature.bind(args, kwargs)
        except ValueError as error:
            raise TpCompileError(
                f"the call does not fit the model's forward, which {error}",
                where=f"{self.original.__name__}.forward",
                todo="give the arguments as you would call the model",
            ) from None

    def capture(self, model: nn.Module, bound: dict[str, Any]) -> Program:
        """Compiles a program for a call; the first one also decides where the weights lie.

        Raises:
            TpCompileError: the call cannot be captured, planned or lowered; the model is unchanged.
        """
        if self.compiler.options.dynamic is False:
            self._refuse_new_shapes(bound)
        with unsharded(model, self.original, self.layout):
            compiled = self.compiler.compile(model, self._whole_caches(bound), self.layout, self.caches)
        self.caches = {**hand_out(compiled.planned), **self.caches}
        if self.layout is None:
            self.layout = compiled.plan.layout
            shard_weights(model, self.layout, self.compiler.rank)
        leaves, _ = flatten_call(bound)
        program = Program(
            compiled=compiled,
            captured=local_extents(compiled, self.compiler.rank),
            graph_module=compiled.local,
            plan=compiled.plan,
            training=model.training,
            autocast=autocast_of(leaves),
            names=tuple(bound),
            example=tuple(x.to("meta") if isinstance(x, Tensor) else x for x in leaves),
            feeds=make_feeds(model, compiled, compiled.local, self.compiler.rank),
            outlined=None
            if compiled.outlined is None
            else (
                compiled.outlined,
                make_feeds(model, compiled, compiled.outlined, self.compiler.rank),
            ),
            mutated=tuple(
                Feed(*tensors_by_name(model)[o.name])
                for o in compiled.planned.captured.outputs
                if o.kind == "buffer_mutation"
            ),
        )
        self.programs.append(program)
        return program

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

    def _refuse_new_shapes(self, bound: dict[str, Any]) -> None:
        leaves, _ = flatten_call(bound)
        for program in self.programs:
            same = program.names == tuple(bound) and len(leaves) == len(program.example)
            if same and (why := program.captured.accepts(leaves)) is not None:
                raise TpCompileError(
                    f"the call has other shapes than the program was captured for: {why}",
                    todo="parallelize with dynamic=True, or keep to the captured shapes",
                )


# Under torch.compile(fullgraph=True) the reason is the error; without fullgraph the graph breaks here.
@torch.compiler.disable(reason="no program was captured for this call: call model.capture(...) with it first")
def _capture_and_run(runtime: Runtime, model: nn.Module, bound: dict[str, Any], leaves: Sequence[Any]) -> Any:
    program = runtime.capture(model, bound)
    with torch.autocast(device_of(leaves), enabled=False):
        return program.run(leaves)


def hand_out(planned: Work) -> dict[str, Held]:
    """How the caches that a program returns lie."""
    factors = planned.planned_factors
    assert factors is not None, "the program must be planned"
    carried = planned.carried(factors)
    results = planned.outputs()
    if planned.blocks is None:
        every = [(spec.name, at) for at, spec in enumerate(planned.captured.outputs)]
    else:
        every = [(derived.name, derived.output) for derived in planned.blocks.results]
    named = [(name, out) for name, at in every if isinstance(out := results[at], Node) and out in carried]
    placements = {out: carried[out] or tuple(d.output(out) for d in planned.decisions) for _, out in named}
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
        return Feed(*places[name], segment=(dim, sum(sizes[: source.order]), sizes[source.order]))

    return tuple(feed(node.meta[SOURCE]) for node in local.graph.find_nodes(op="placeholder"))
