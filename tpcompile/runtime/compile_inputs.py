"""What Inductor traces a program with: tensors without values, with symbols where sizes are open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tpcompile.capture.export.read_guards import to_python
from tpcompile.ir.torch_internals import (
    FakeTensorMode,
    TracingContext,
    functorch_config,
    tracing,
)

_BACKWARD = "force_non_lazy_backward_lowering"
Extents = tuple[int | str, ...]
"""The sizes of a tensor: numbers, and names or expressions of those that are open."""


@dataclass(frozen=True)
class Traced:
    """Inputs of one compilation.

    Attributes:
        mode: the mode of the tensors without values.
        grad: whether gradients are recorded.
        values: these tensors.
        symbols: per symbol, the placeholder and dimension that it is the size of.
        fixed: which placeholders are the model's own: they stay where they are in memory.
        sizes: whether the sizes of inputs are ones that was compiled for, those that are fixed apart.
    """

    mode: Any
    grad: bool
    values: tuple[Tensor, ...]
    symbols: dict[str, tuple[int, int]]
    fixed: tuple[bool, ...]
    sizes: Callable[[Sequence[Tensor]], bool] = bool

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Where compiling takes place."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(tracing(TracingContext(self.mode)))
            # Backward is compiled at once: what it assumes of sizes must be known when calls are chosen.
            if hasattr(functorch_config, _BACKWARD):  # older versions of torch do so where sizes are open
                stack.enter_context(functorch_config.patch({_BACKWARD: True}))
            yield

    @property
    def static_sizes(self) -> list[Any]:
        """Per placeholder the sizes that are compiled in, None where they are open."""
        return [[n if isinstance(n, int) else None for n in value.shape] for value in self.values]

    @property
    def static_strides(self) -> list[Any]:
        """Per placeholder the strides that must be checked; tensors of a call are contiguous."""
        pairs = zip(self.values, self.fixed, strict=True)
        return [list(value.stride()) if fixed else [None] * value.ndim for value, fixed in pairs]

    def fits(self, values: Sequence[Tensor]) -> bool:
        """Whether inputs of the same types are ones that it was compiled for."""
        for value, sizes, strides in zip(values, self.static_sizes, self.static_strides, strict=True):
            held = zip((*value.shape, *value.stride()), (*sizes, *strides), strict=True)
            if any(want is not None and want != have for have, want in held):
                return False
        return self.sizes(values)

    def finished(self) -> Traced:
        """The same after compiling, with what was assumed of the symbols, and nothing more to be assumed."""
        env = self.mode.shape_env
        terms = [f"({s} := values[{at}].shape[{dim}]) >= 2" for s, (at, dim) in self.symbols.items()]
        terms += [f"({to_python(guard.expr)})" for guard in env.guards]
        unknown = {str(s) for guard in env.guards for s in guard.expr.free_symbols} - self.symbols.keys()
        assert not unknown, f"sizes that no input has: {unknown}"
        env.freeze()
        check = eval(f"lambda values: {' and '.join(terms) or 'True'}", {"math": math})
        return replace(self, sizes=check)


def trace_inputs(
    values: Sequence[Tensor], extents: Sequence[Extents | None], open_extents: frozenset[str]
) -> Traced:
    """Tensors without values like those of a call.

    Args:
        values: those of all placeholders.
        extents: per placeholder the names of its sizes; None for what the model has.
        open_extents: the names of sizes that are to be symbols.
    """
    from tpcompile.ir.dynamo_internals import ConstantSource

    mode = FakeTensorMode(shape_env=ShapeEnv())
    env: Any = mode.shape_env
    grad = torch.is_grad_enabled()
    sizes: dict[str, Any] = {}
    symbols: dict[str, tuple[int, int]] = {}

    def size(at: int, dim: int, extent: int | str, hint: int) -> Any:
        if not isinstance(extent, str) or extent not in open_extents or hint < 2:
            return hint
        if extent not in sizes:
            source = ConstantSource(f"size{len(sizes)}")
            symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC)
            symbols[str(symbol)] = at, dim
            sizes[extent] = env.create_symintnode(symbol, hint=hint, source=source)
        return sizes[extent]

    def fake(at: int, value: Tensor, named: Extents | None) -> Tensor:
        if named is None:
            made: Tensor = mode.from_tensor(value.detach(), static_shapes=True)
        else:
            pairs = zip(named, value.shape, strict=True)
            shape = tuple(size(at, dim, extent, hint) for dim, (extent, hint) in enumerate(pairs))
            with mode:
                made = torch.empty(shape, dtype=value.dtype, device=value.device)
        return made.requires_grad_(grad and value.requires_grad)

    with torch.inference_mode(False):
        fakes = tuple(fake(i, v, named) for i, (v, named) in enumerate(zip(values, extents, strict=True)))
    return Traced(mode, grad, fakes, symbols, tuple(named is None for named in extents))
