"""What a call leaves behind, however it was run: results, buffers, attributes, and gradients."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.capture.caches.call_results import GivenCache, Results, given_caches, take_results
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.export.specs import OutputSpec
from tpcompile.capture.held_caches import cache_leaves
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import call_model, flatten_call, leaf_names
from tpcompile.ir.module_tensors import tensors_by_name
from tpcompile.ir.put_together import put_together
from tpcompile.ir.torch_internals import tree_map
from tpcompile.runtime.watched_module import WatchedModule

from .compare import difference, largest

Key = tuple[str, str]
"""What sort of value, and its name: ``("result", "logits")``, ``("gradient", "lm_head.weight")``."""


@dataclass(frozen=True)
class Finding:
    """One value compared.

    Attributes:
        sort: "result", "buffer", "attribute", "check", "gradient" or "token".
        name: its name.
        error: how far it is from the model's, relative to the largest value.
        ranks: on how many ranks it is too far; 0 if the program of no rank is meant.
    """

    sort: str
    name: str
    error: float
    ranks: int = 0


def results_of(specs: Sequence[OutputSpec], flat: Sequence[Any]) -> dict[Key, Any]:
    """A program's flat results by what they are."""
    sorts = {"user": "result", "state": "result", "buffer_mutation": "buffer"}
    pairs = zip(specs, flat, strict=True)
    kept = ((s, v) for s, v in pairs if not isinstance(s.value, GivenCache))
    return {(sorts.get(s.kind, s.kind), s.name): value for s, value in kept}


def copied_call(bound: Mapping[str, Any]) -> dict[str, Any]:
    """A call with tensors of its own: models write into the caches that they are given."""

    def mine(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    register_cache_support()
    return tree_map(mine, dict(bound))


def learning_leaves(bound: Mapping[str, Any]) -> frozenset[str]:
    """The leaves of a call that get gradients: not those of caches, which are written to."""
    caches = given_caches(bound)
    named = {name: value for name, value in bound.items() if name not in caches}
    leaves = zip(leaf_names(named), flatten_call(named)[0], strict=True)
    return frozenset(n for n, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def run_python(model: nn.Module, bound: Mapping[str, Any], learning: bool) -> dict[Key, Any]:
    """Runs a model as the python that it is.

    Args:
        model: a model that is written to.
        bound: the call.
        learning: run backward as well, from all results that belong to no cache.
    """
    call = copied_call(bound)
    leaves = dict(zip(leaf_names(call), flatten_call(call)[0], strict=True))
    if learning:
        model.zero_grad()  # a copy of a sharded model has the gradients of earlier steps
        for name in learning_leaves(bound):
            leaves[name].requires_grad_()
    whole = nullcontext() if isinstance(model, WatchedModule) else put_together(model)
    with torch.set_grad_enabled(learning), whole:
        results = take_results(call, call_model(model, call))
    named = zip(results.names, results.values, strict=True)
    found: dict[Key, Any] = {
        ("result", name or "output"): v for name, v in named if not isinstance(v, GivenCache)
    }
    for name, (module, attribute) in tensors_by_name(model).items():
        if attribute in module._buffers:
            found["buffer", name] = getattr(module, attribute)
    if learning:
        backward([found], _losses(results))
        places = tensors_by_name(model)
        params = {name: getattr(*place) for name, place in places.items()}
        for name, value in (params | {n: leaves[n] for n in learning_leaves(bound)}).items():
            if value.requires_grad:
                found["gradient", name] = value.grad
    return found


def refuse_nothing(model: nn.Module, outcome: Mapping[Key, Any]) -> None:
    """Nothing is not called right.

    Raises:
        TpCompileError: there is no tensor in what a model leaves behind, or its results are zero everywhere.
    """
    if not any(isinstance(value, Tensor) for value in outcome.values()):
        raise TpCompileError(
            "the call leaves no tensor behind that could be compared",
            where=type(model).__name__,
            todo="verify a call that returns one",
        )
    results = [v for (sort, _), v in outcome.items() if sort == "result" and isinstance(v, Tensor)]
    if results and not any(bool(result.any()) for result in results):
        raise TpCompileError(
            "all results are zero, which they could be whatever the model does",
            where=type(model).__name__,
            todo="verify a call with other arguments (tokens that are no padding), or a model with weights",
        )


def _losses(results: Results) -> list[str]:
    """The results that backward starts from: of caches, ranks have parts."""
    flags = cache_leaves(results.out_spec)
    named = zip(results.names, flags, strict=False)  # behind the results are the caches that were given
    return [name or "output" for name, in_cache in named if not in_cache]


def backward(outcomes: Sequence[Mapping[Key, Any]], losses: Collection[str]) -> None:
    """Runs backward from a sum of results, weighted at random, always alike: of all ranks at once.

    Every rank computes the loss from results of its own, as it does when a sharded model is trained.
    """
    named = [(name, value) for one in outcomes for (sort, name), value in one.items() if sort == "result"]
    chosen = [(n, v) for n, v in named if n in losses and isinstance(v, Tensor) and v.requires_grad]
    if chosen:
        torch.stack([_weighted(n, v) for n, v in chosen]).sum().backward()


def _weighted(name: str, value: Tensor) -> Tensor:
    flat = torch.view_as_real(value) if value.is_complex() else value
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weights = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    return (flat * weights.to(flat)).sum().to(torch.float64)


def compared(got: Mapping[Key, Any], want: Mapping[Key, Any]) -> list[Finding]:
    """The values of one outcome that another has as well, compared."""
    gradients = [value for (sort, _), value in want.items() if sort == "gradient"]
    floor = 1e-2 * largest(gradients)
    found = []
    for (sort, name), value in want.items():
        if (sort, name) not in got and sort == "attribute":
            continue
        mine = got.get((sort, name))
        if sort == "gradient":
            mine, value = _filled(mine, value), _filled(value, mine)
        error = difference(mine, value, floor if sort == "gradient" else 0.0)
        found.append(Finding(sort, name, error))
    return found


def worst_of(ranks: Sequence[Sequence[Finding]], limit: float) -> list[Finding]:
    """Of each value what the rank has that is furthest off, and on how many ranks it is too far."""
    found = []
    for column in zip(*ranks, strict=True):
        worst = max(column, key=lambda one: one.error)
        found.append(replace(worst, ranks=sum(not one.error <= limit for one in column)))
    return found


def _filled(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient that did not come is zero."""
    return torch.zeros_like(like) if gradient is None and like is not None else gradient
