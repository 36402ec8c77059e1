"""Another type system judges what one rank runs: spmd_types, of meta-pytorch, on a fake process group.

A lowered graph runs call by call on meta tensors under ``spmd_types.checker.typecheck()``. The library has
its own types and table of torch's functions. It is told the types of the inputs, what our collectives do
in its terms, and where a contraction leaves summands, which it wants to be declared; all else it derives, and
each value is compared with the placement that our graph claims.

Its local types are R, I, V and P on every sub-axis. They don't say along which dimension or factor a value
varies, nor in which parts: slices that are uneven, packed, filled up or out of order are all V. There is no
partial maximum: what each rank has found is V, and the reduction makes I of it. Rows of experts are V.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, S, SpmdTypeError, V, rules
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import GraphModule, Node
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from tpcompile.ir.markers import Axes
from tpcompile.ir.placements import Partial, Placement, Replicate
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.lowering.state import SOURCE, STANDS_FOR
from tpcompile.planner.global_program import GlobalProgram

aten, ops = torch.ops.aten, torch.ops.tpcompile


@contextlib.contextmanager
def fake_mesh(axes: Axes) -> Iterator[DeviceMesh]:
    """A mesh of this process and of others that do not exist."""
    sizes = tuple(axes) or (1,)
    store = FakeStore()
    dist.init_process_group(backend="fake", rank=0, world_size=int(torch.tensor(sizes).prod()), store=store)
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=tuple(map(str, range(len(sizes)))))
    finally:
        dist.destroy_process_group()


class _Groups:
    """The first rank's groups over sub-axes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.axes = mesh, dict[str, Axes]()

    def name(self, axes: Axes) -> str:
        flat = self.mesh[tuple(map(str, axes))]
        group = (flat if len(axes) == 1 else flat._flatten()).get_group()
        self.axes[group.group_name] = tuple(axes)
        return str(group.group_name)

    def index(self, axes: Axes) -> int:
        return 0


def judge(program: GlobalProgram) -> None:
    """Types the first rank's program of a rewritten graph, forward and backward.

    Raises:
        SpmdTypeError: a type does not fit, or is another one than the graph's placements say.
    """
    with fake_mesh(program.axis_sizes) as mesh:
        groups = _Groups(mesh)
        local = lower_program(program, (0,) * len(program.axis_sizes), groups).local
        with spmd.set_current_mesh(mesh), typecheck():
            _Judged(program, local, groups).run_all()


class _Judged:
    """One rank's program, each value of which has the library's type."""

    def __init__(self, program: GlobalProgram, local: GraphModule, groups: _Groups) -> None:
        self.program, self.graph, self.groups = program, local.graph, groups
        self.held = {
            s.spec.name: n.meta["placement"] for n, s in program.sources.items() if "placement" in n.meta
        }
        self.node, self.values = next(iter(self.graph.nodes)), dict[Node, Any]()

    def run_all(self) -> None:
        for node in self.graph.nodes:
            self.node = node
            try:
                self.values[node] = self.input(node) if node.op == "placeholder" else self.run(node)
            except SpmdTypeError as error:
                raise SpmdTypeError(f"{node.name}: {error}") from error

    def run(self, node: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "output":
            return self.results(args[0])
        meta = torch.device("meta")
        kwargs = {k: meta if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        result = self.call(node.target, args, kwargs)
        for (_, placements), value in zip(node.meta.get(STANDS_FOR) or (), _values(result), strict=False):
            self.claim(value, placements)
        return result

    def results(self, results: Any) -> None:
        """Results are whole, with a whole gradient, but for what stays divided."""
        handed = self.program.handed_out()
        for end, result, spec in zip(
            self.program.outputs(), results, self.program.captured.outputs, strict=True
        ):
            if isinstance(result, Tensor):
                whole = (Replicate(),) * len(self.program.axis_sizes)
                self.claim(result, handed.get(end, whole) if spec.divided else whole, whole=I)  # type: ignore[arg-type]

    def input(self, node: Node) -> Any:
        """An input without values."""
        val, spec = node.meta["val"], node.meta[SOURCE].spec
        if not isinstance(val, Tensor):
            return _hint(val)
        shape = [_hint(size) for size in val.shape]
        learns = spec.kind in ("param", "user") and val.dtype.is_floating_point
        value = torch.empty(shape, dtype=val.dtype, device="meta", requires_grad=learns)
        ((_, placements),) = node.meta.get(STANDS_FOR) or ((None, self.held.get(spec.name)),)
        kinds = {a: V if _divided(p) else I for a, p in enumerate(placements or ())}
        spmd.assert_type(value, {self.axis(a): kinds.get(a, I) for a in range(len(self.program.axis_sizes))})
        return value

    def axis(self, number: int) -> Any:
        return self.groups.mesh.get_group(number)

    def claim(self, value: Tensor, placements: Any, whole: Any = None) -> None:
        """Compares a type with what the graph says; a contraction's summands are declared here."""
        found = spmd.get_local_type(value)
        for a, place in enumerate(placements or ()):
            if not isinstance(place, Replicate):
                wanted = P if place == Partial("sum") else V
            else:
                now = found.get(spmd.normalize_axis(self.axis(a)), I)
                free = not value.requires_grad and now in (R, I)
                wanted = now if free or (whole is None and now in (R, I)) else whole or I
            spmd.assert_type(value, {self.axis(a): wanted})

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "_opname", "")
        if name in _SEVERAL:
            one, of = getattr(ops, _SEVERAL[name]).default, _SEVERAL[name]
            return [self.collective(one, of, (x, args[1]), kwargs) for x in args[0]]
        if getattr(target, "namespace", "") == "tpcompile":
            return (self.collective if name in _MOVES else self.function)(target, name, args, kwargs)
        if target is operator.getitem or not name:
            return target(*args, **kwargs)
        if name.startswith("sym_"):
            with spmd.no_typecheck():
                return target(*args, **kwargs)
        if name in _WRITTEN:
            return _WRITTEN[name](self, target, args, kwargs)
        function = getattr(torch, name, None) or getattr(Tensor, name, None)
        return (function if name in _SAME and function else target)(*args, **kwargs)

    def summands(self, value: Tensor) -> Tensor:
        """What a contraction leaves before its bias is added."""
        self.claim(value, self.claimed())
        return value

    def claimed(self) -> Any:
        """What the graph says of the call that is run, or of what follows from it alone."""
        node = self.node
        while STANDS_FOR not in node.meta and len(node.users) == 1:
            node = next(iter(node.users))
        return node.meta[STANDS_FOR][0][1] if STANDS_FOR in node.meta else ()

    def function(self, target: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A function with a backward of its own: nothing is known of it, so that it takes no summands."""
        with spmd.no_typecheck():
            results = target(*args, **kwargs)
        given = [torch.sigmoid(x) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = [dict(spmd.get_local_type(x)) for x in given]
        assert all(kind == kinds[0] for kind in kinds), "all operands are of one type"
        for value in _values(results):
            spmd.assert_type(value, kinds[0])
        return results

    def collective(self, target: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        """One of our operators: it runs untyped, and the result gets what the library's own rule gives."""
        x: Any = args[0]
        with spmd.no_typecheck():
            result: Tensor = target(*args, **kwargs)
        typed = x
        if name in ("keep_first", "pad_shard", "pad_positions", "gradient_once"):
            wanted = R if name == "gradient_once" else None
            now = spmd.get_local_type(x)
            there = [(a, now[spmd.normalize_axis(self.axis(a))]) for a in range(len(self.program.axis_sizes))]
            into_sum = [p == Partial("sum") for p in self.claimed()]
            axes = tuple(a for a, t in there if t is wanted or (not wanted and into_sum[a] and t is not P))
        else:
            axes = self.groups.axes[args[1]]
        for a in reversed(axes):
            kind, options = _MOVES[name](args)
            typed = getattr(rules, kind)(typed, self.axis(a), **options)
        if typed is x:
            raise SpmdTypeError(f"{name} changes no type")
        rules.output(result, typed)
        return result


_SEVERAL = {"copy_all_to_ranks": "copy_to_ranks", "all_reduce_together": "all_reduce"}
"""Operators of several values, and what each is for one."""

_MOVES: dict[str, Any] = {
    "all_reduce": lambda a: ("all_reduce", {"src": P, "dst": I}),
    "extreme": lambda a: ("all_reduce", {"src": V, "dst": I}),
    "all_gather": lambda a: ("all_gather", {"src": S(a[2]), "dst": I}),
    "gather_positions": lambda a: ("all_gather", {"src": S(a[2]), "dst": R if a[6] else I}),
    "reduce_scatter": lambda a: ("reduce_scatter", {"src": P, "dst": S(a[2])}),
    "scatter_positions": lambda a: ("reduce_scatter", {"src": P, "dst": S(a[2])}),
    "all_to_all": lambda a: ("all_to_all", {"src": S(a[2]), "dst": S(a[3])}),
    "exchange_positions": lambda a: ("all_to_all", {"src": S(a[2]), "dst": S(a[3])}),
    "take_shard": lambda a: ("convert", {"src": I, "dst": S(a[2])}),
    "take_positions": lambda a: ("convert", {"src": I, "dst": S(a[2])}),
    "keep_first": lambda a: ("convert", {"src": I, "dst": P}),
    "pad_shard": lambda a: ("convert", {"src": S(a[1]), "dst": P}),
    "pad_positions": lambda a: ("convert", {"src": S(a[1]), "dst": P}),
    "copy_to_ranks": lambda a: ("convert", {"src": I, "dst": R}),
    "gradient_once": lambda a: ("convert", {"src": R, "dst": I}),
}
"""What each of our operators is to the library."""


def _linear(judged: _Judged, _: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = (*args, None)[:3]
    product = judged.summands(torch.matmul(x, weight.t()))
    return product if bias is None else torch.add(product, bias)


def _addmm(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    bias, left, right = args
    return torch.add(judged.summands(torch.matmul(left, right)), bias)


def _convolution(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    if args[2] is None:
        return target(*args, **kwargs)
    product = judged.summands(target(*args[:2], None, *args[3:], **kwargs))
    return torch.add(product, args[2].reshape(-1, *[1] * (args[1].ndim - 2)))


def _cast(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    """The library calls no cast linear: it goes by its type alone."""
    with spmd.no_typecheck():
        result = target(*args, **kwargs)
    stand_in = torch.clone(args[0])
    spmd.assert_type(result, dict(spmd.get_local_type(stand_in)))
    return result


def _slice(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    with spmd.no_typecheck():
        result = target(*args, **kwargs)
    spmd.assert_type(result, dict(spmd.get_local_type(torch.narrow(args[0], 0, 0, 0))))
    return result


def _expand(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    """Each rank repeats a whole value as often as it has heads: a part then, of equal parts."""
    with spmd.no_typecheck():
        result = target(*args, **kwargs)
    typed, now = args[0], spmd.get_local_type(args[0])
    for a, place in enumerate(judged.claimed()):
        if _divided(place) and now[spmd.normalize_axis(judged.axis(a))] is R:
            typed = rules.reinterpret(typed, judged.axis(a), src=R, dst=V)
    spmd.assert_type(result, dict(spmd.get_local_type(typed)))
    return result


def _view_as(judged: _Judged, target: Any, args: Any, kwargs: Any) -> Any:
    """Of the second value only the shape counts."""
    return torch.reshape(args[0], args[1].shape)


_WRITTEN: dict[str, Any] = {
    "view_as": _view_as,
    "expand": _expand,
    "linear": _linear,
    "addmm": _addmm,
    "convolution": _convolution,
    "conv2d": _convolution,
    "conv1d": _convolution,
    "conv_transpose2d": _convolution,
    "_to_copy": _cast,
    "to": _cast,
    "slice": _slice,
}
"""Calls that are written in the library's terms."""

_SAME = {
    *("add", "sub", "neg", "clone", "detach", "sum", "mean", "cumsum", "cat", "stack", "reshape"),
    *("view", "transpose", "t", "permute", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("select", "gather", "index_select", "split", "chunk", "unbind", "flip", "roll"),
    *("repeat", "div", "mul", "matmul", "mm", "bmm", "dot", "mv", "contiguous", "movedim", "baddbmm"),
    *("arange", "zeros", "ones", "full", "einsum"),
}
"""Calls that are a torch function of the same name and arguments, which the library knows."""


def _divided(place: Placement) -> bool:
    return not isinstance(place, Replicate | Partial)


def _values(result: Any) -> list[Tensor]:
    given = result if isinstance(result, list | tuple) else [result]
    return [value for value in given if isinstance(value, Tensor)]


def _hint(size: Any) -> Any:
    return size if not isinstance(size, torch.SymInt) else size.node.hint
