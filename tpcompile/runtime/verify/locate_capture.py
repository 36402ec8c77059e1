"""Where a captured graph parts from the model's python, which has no graph: module by module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tpcompile.ir.torch_internals import tree_leaves

from .compare import agree
from .report import Difference
from .trial import Trial
from .values import Trace

Results = list[tuple[str, Tensor]]
"""What modules returned, in the order in which they came back: the module's path, and a tensor."""


def locate_capture(trial: Trial, captured: Trace) -> Difference | None:
    """The first module whose result, or else its gradient, no value of the captured graph is.

    Args:
        trial: the call.
        captured: the values of its graph.
    """
    model = copy.deepcopy(trial.model)
    results = _recorded(trial, model)
    values = [held[0][0] for held in captured.values.values()]
    agreed: list[str] = []
    for path, value in results:
        if not _among(value.detach(), [v.detach() for v in values], trial.limit):
            return _difference(model, path, agreed[-1:], backward=False)
        agreed.append(path)
    agreed = []
    for path, value in reversed(results):
        twins = [v for v in values if agree(v.detach(), value.detach(), trial.limit)]
        if value.grad is not None and not _among(
            value.grad, [v.grad for v in twins if v.grad is not None], trial.limit
        ):
            return _difference(model, path, agreed[-1:], backward=True)
        agreed.append(path)
    return None


def _recorded(trial: Trial, model: nn.Module) -> Results:
    """Runs a model as python, forward and perhaps backward; what its modules returned."""
    results: Results = []

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    if leaf.requires_grad:
                        leaf.retain_grad()
                    results.append((path, leaf if leaf.requires_grad else leaf.clone()))

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(record(path))
    trial.run_python(model)
    return results


def _among(value: Tensor, values: list[Tensor], limit: float) -> bool:
    return any(v.shape == value.shape and agree(v, value, limit) for v in values)


def _difference(model: nn.Module, path: str, agreed: list[str], backward: bool) -> Difference:
    module = model.get_submodule(path)
    return Difference(
        node=f"the result of {path or type(module).__name__}",
        text=f"{type(module).__name__}.forward, or a hook on it",
        placement="",
        rule="",
        module=path,
        line=next(_line_of(module), ""),
        error=float("inf"),
        backward=backward,
        agreed=tuple(f"the result of {name}" for name in agreed if name),
        why="no value of the captured graph is this",
    )


def _line_of(module: nn.Module) -> Iterator[str]:
    """Where the forward of a module is written down."""
    try:
        forward = inspect.unwrap(type(module).forward)
        file, line = inspect.getsourcefile(forward), inspect.getsourcelines(forward)[1]
        yield f'File "{file}", line {line}, in forward'
    except (OSError, TypeError):  # made by exec, or in a console
        return
