"""Hands a program's graph to Inductor, without dynamo: we have the graph, and know which calls it is for.

The python around a program (finding it, taking caches apart and together) is not compiled: a program that is
missing is captured in the ordinary way, and only other kinds of tensors, or modes of torch, compile again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tpcompile.capture.caches.layers import is_count
from tpcompile.capture.export.captured import Captured
from tpcompile.ir.nodes import runs_others
from tpcompile.ir.torch_internals import (
    GlobalStateGuard,
    TensorGuards,
    get_tracing_state,
    len_torch_dispatch_stack,
)

from .compile_inputs import Extents, Traced, trace_inputs
from .compile_options import backend_of
from .fetch_inputs import Feed, Fetch, make_fetch
from .own_graph import copy_graph, own_graph
from .split_matmuls import LAST_PASS, last_pass
from .symmetric_memory import for_open_sizes, use_symmetric_memory

Step = Callable[[list[Any]], Sequence[Any]]
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
MOST = 16
"""How often a program is compiled; what comes after that runs as it is."""


@dataclass(eq=False)
class _Compiled:
    """What was made for one kind of call.

    Attributes:
        form: what was assumed of the inputs, apart from what the guards look at.
        traced: the inputs that it was traced with, and what follows for their sizes.
        step: takes the values of all placeholders.
    """

    form: tuple[Any, ...]
    traced: Traced
    step: Step


@dataclass(eq=False)
class _Guarded:
    """What was made for one kind of call, and how to know such a call.

    Attributes:
        precision: that of matmuls, of which the modes do not tell "high" from "medium".
        state: torch's modes: gradients, autocast, deterministic algorithms, threads.
        tensors: types, devices, fixed sizes and strides of all inputs, and that none comes twice.
        sizes: what was assumed of sizes that are open.
        step: takes the values of all placeholders.
    """

    precision: str
    state: Any
    tensors: Any
    sizes: Callable[[Sequence[Tensor]], bool]
    step: Step


@dataclass(eq=False)
class CompiledSteps:
    """A program's graph as Inductor has compiled it, once for every kind of call.

    Attributes:
        graph: this rank's graph.
        feeds: where the values of its placeholders come from.
        extents: per placeholder, the sizes of what a call brings; None for what the model has.
        small: the names of extents that may change all the time, if others may not; None: all may.
        options: torch.compile's.
        twice: the placeholders whose tensor an earlier one has as well, as labels often are the input; of
            programs that write to nothing that is given.
        fetch: gives the values of the placeholders.
    """

    graph: GraphModule
    feeds: tuple[Feed | int, ...]
    extents: tuple[Extents | None, ...]
    small: frozenset[str] | None
    options: Mapping[str, Any]
    twice: tuple[int, ...] = ()
    compiled: list[_Compiled] = field(default_factory=list)
    fetch: Fetch = field(init=False)
    guarded: list[_Guarded] = field(default_factory=list)
    _sizes: dict[str, set[int]] = field(default_factory=dict)

    def bind(self, bound: bool) -> None:
        """See ``RankProgram.bind``."""
        self.fetch = make_fetch(self.feeds, bound=bound)

    def __call__(self, given: Sequence[Any]) -> Sequence[Any] | None:
        """Runs a call, compiled first if nothing fits; None if it is to run as it is."""
        if len_torch_dispatch_stack() or get_tracing_state() is not None:
            return None  # somebody looks at single operators, which compiled code does not show
        values, precision = self.fetch(given), torch.get_float32_matmul_precision()
        for at in self.twice:
            values[at] = values[at].view_as(values[at])
        for one in self.guarded:
            if (
                one.precision == precision
                and one.state.check()
                and one.tensors.check(*values)
                and one.sizes(values)
            ):
                return one.step(values)
        step = self._step_for(values)
        return None if step is None else step(values)

    def _step_for(self, values: list[Any]) -> Step | None:
        """What was, or is now, compiled for a call."""
        if len({id(value) for value in values}) < len(values):
            return None  # if a tensor comes twice, what is written to one is written to the other
        if any(type(v) not in _PLAIN or v.is_conj() or v.is_neg() for v in values):
            return None  # compiled code reads memory, without the sign that such a tensor gives to it
        form = _form(values)
        found = next((c for c in self.compiled if c.form == form and c.traced.fits(values)), None)
        if found is None:
            if len(self.compiled) == MOST:
                warnings.warn(
                    f"a program was compiled {MOST} times, for other sizes, types or modes each time: from "
                    "here on calls that fit none of them run as they are",
                    stacklevel=2,
                )
                return None
            traced = trace_inputs(values, self.extents, self._open(values))
            step = _compile(self.graph, traced, self.options)
            found = _Compiled(form, traced.finished(), step)
            self.compiled.append(found)
        tensors = TensorGuards(
            *values,
            dynamic_dims_sizes=found.traced.static_sizes,
            dynamic_dims_strides=found.traced.static_strides,
        )
        precision = torch.get_float32_matmul_precision()
        new = _Guarded(precision, GlobalStateGuard(), tensors, found.traced.sizes, found.step)
        self.guarded = [new, *self.guarded[: 4 * MOST]]
        return found.step

    def _open(self, values: Sequence[Tensor]) -> frozenset[str]:
        """Which extents are to be symbols: those that may change all the time, those that have changed."""
        dynamic = self.options.get("dynamic")
        sizes = {
            extent: size
            for value, extents in zip(values, self.extents, strict=True)
            for extent, size in zip(extents or (), value.shape, strict=extents is not None)
            if isinstance(extent, str)
        }
        for extent, size in sizes.items():
            self._sizes.setdefault(extent, set()).add(size)
        if dynamic is not None:
            return frozenset(sizes) if dynamic else frozenset()
        always = frozenset(sizes) if self.small is None else self.small
        return always | {extent for extent in sizes if len(self._sizes[extent]) > 1}


def compiled_steps(
    module: GraphModule,
    feeds: Sequence[Feed | int],
    captured: Captured,
    options: Mapping[str, Any],
    same: Container[int] = (),
) -> CompiledSteps:
    """A program's graph under Inductor, compiled when calls come.

    With a static cache only the numbers of tokens in it change from step to step: all other sizes are worth
    being compiled for, until they are seen to change.

    Args:
        module: the program.
        feeds: where the values of its placeholders come from.
        captured: what it was captured from.
        options: torch.compile's.
        same: which leaves of the call are the same tensor as an earlier one.
    """
    users = captured.user_inputs
    static = any(spec.in_place for spec in captured.outputs)
    counts = (spec.extents or () for spec in users if is_count(spec.name))
    small = frozenset(extent for each in counts for extent in each if isinstance(extent, str))
    extents = [users[feed].extents if isinstance(feed, int) else None for feed in feeds]
    # A python value of the call is in the graph: its placeholder is there, and nothing reads it.
    kept = [not isinstance(feed, int) or extents[i] is not None for i, feed in enumerate(feeds)]
    graph = own_graph(module, [isinstance(feed, Feed) for feed in feeds], kept)
    kept_feeds, kept_extents = tuple(compress(feeds, kept)), tuple(compress(extents, kept))
    options = use_symmetric_memory(graph, options)
    twice = tuple(at for at, feed in enumerate(kept_feeds) if feed in same and not static)
    return CompiledSteps(graph, kept_feeds, kept_extents, small if static else None, options, twice)


def _form(values: Sequence[Tensor]) -> tuple[Any, ...]:
    """What is compiled into a step beside sizes; no_grad and inference_mode are the same."""
    grad, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    modes = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    return (grad, precision, *modes, *((v.dtype, v.device, grad and v.requires_grad) for v in values))


def _compile(graph: GraphModule, traced: Traced, options: Mapping[str, Any]) -> Step:
    from tpcompile.ir.dynamo_internals import inductor_config

    backend = backend_of(for_open_sizes(options) if traced.symbols else options)
    # The inputs are guarded. Of the results of others' operators nobody knows whether they are as announced.
    own = {"size_asserts": not _of_torch(graph), LAST_PASS: last_pass()}
    with traced.tracing(), inductor_config.patch(own):  # what was asked for takes the place of these
        made = backend(copy_graph(graph), list(traced.values))
    return lambda values: made(*values)


def _of_torch(graph: GraphModule) -> bool:
    """Whether all operators of a graph, and of its regions, are torch's own or collectives."""
    parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
    return not any(runs_others(node) for part in parts for node in part.graph.nodes)
