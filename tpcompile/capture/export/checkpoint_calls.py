"""Calls of ``torch.utils.checkpoint`` in forward: what is traced in one is recomputed in backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import checkpoint

from tpcompile.ir.regions import mark

ContextFn = Callable[[], tuple[Any, Any]]
"""Makes the contexts of a region's forward and of its recomputation: what of it is saved."""


class CheckpointCalls:
    """The regions of a trace.

    Attributes:
        found: their names, each with what is saved of it (None: nothing).
    """

    def __init__(self) -> None:
        self.found: dict[str, ContextFn | None] = {}
        self._inside = False

    @contextmanager
    def region(self, context_fn: ContextFn | None) -> Iterator[None]:
        """Marks what is traced inside; of regions in regions the outer one counts."""
        if self._inside or not torch.is_grad_enabled():
            yield
            return
        name = f"checkpoint {len(self.found)}"
        self.found[name] = context_fn
        tracing = get_proxy_mode()
        graph = None if tracing is None else tracing.tracer.graph
        before = 0 if graph is None else len(graph.nodes)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if graph is not None:
            for node in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
                mark(node, name)

    def without_reentrant(
        self, run: Callable[..., Any], preserve: bool, context_fn: ContextFn, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """What torch runs around a call that it checkpoints."""
        with self.region(None if context_fn is checkpoint.noop_context_fn else context_fn):
            yield

    def without_reentrant_by_name(
        self, run: Callable[..., Any], args: Any, kwargs: Any, *, context_fn: ContextFn, **options: Any
    ) -> Iterator[None]:
        """The same as torch calls it from 2.14 on."""
        return self.without_reentrant(run, True, context_fn)

    def reentrant(self, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """As torch's, a call to which no tensor is given that needs a gradient gives none."""
        if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
            with torch.no_grad():
                return run(*args)
        with self.region(None):
            return run(*args)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Lets calls that are not reentrant come here; reentrant ones are functions of autograd."""
        run: Callable[..., Iterator[None]] = self.without_reentrant
        name = "_checkpoint_without_reentrant_generator"
        if hasattr(checkpoint, f"{name}_impl"):  # from torch 2.14 on
            name, run = f"{name}_impl", self.without_reentrant_by_name
        with patch.object(checkpoint, name, run):
            yield
