"""Keeps the planner's decisions on disk, for the same graph under the same wishes."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tpcompile import lowering, passes
from tpcompile.capture.held_caches import Held
from tpcompile.capture.repeats.match_periods import BLOCK, describe_value
from tpcompile.capture.store.describe_code import CodeDescription, NotCacheable
from tpcompile.capture.store.store_capture import hash_files
from tpcompile.disk_cache import cache_folder, entry_name, read_entry, write_entry
from tpcompile.ir.graph_edit import module_path
from tpcompile.planner.search.quantities import symbol_hints
from tpcompile.rules import table
from tpcompile.work import Work

log = logging.getLogger(__name__)

# The packed matmuls that are split, and the decisions on each sub-axis.
Decisions = tuple[list[str], list[dict[str, Any]]]


def plan_cached(decide: Callable[[], Decisions], base: Work, wishes: Mapping[str, Any]) -> Decisions:
    """What ``decide`` gives, from disk if it was decided before.

    Args:
        decide: plans the program.
        base: the canonical program.
        wishes: all else that ``decide`` goes by; the representations of the values must say everything.
    """
    name = _name(base, wishes)
    if name is None:
        return decide()
    found = _read(name)
    if found is None:
        found = decide()
        write_entry(name, json.dumps(found).encode())
    return found


def _name(base: Work, wishes: Mapping[str, Any]) -> str | None:
    if cache_folder() is None:
        return None
    try:
        return entry_name(
            "plan", _own_sources(), torch.__version__, _rules(), describe_work(base), dict(wishes)
        )
    except NotCacheable as error:
        log.debug("the plan is not kept on disk: %s", error)
    return None


def describe_work(base: Work) -> list[Any]:
    """What the planner can see of a program: more than its text, which neither says the example's sizes nor
    what a weight is called nor how many layers one stands for."""
    nodes = [
        (n.name, describe_value(n.meta.get("val")), module_path(n), n.meta.get(BLOCK))
        for n in base.graph.nodes
    ]
    hints = sorted((str(symbol), size) for symbol, size in symbol_hints(base.graph).items())
    inputs = [(source.spec.kind, source.spec.name) for source in base.sources.values()]
    outputs = [(spec.kind, spec.name, spec.divided) for spec in base.captured.outputs]
    caches: list[tuple[str, Held]] = sorted(base.caches.items())
    return [base.ranks, base.text(), nodes, hints, inputs, outputs, base.blocks, caches]


def _rules() -> list[Any]:
    """The rules that the user has registered."""
    code = CodeDescription(repr)
    facts: list[Any] = []
    for name, row in sorted(table._USER.items()):
        if isinstance(row, str):
            facts.append((name, row))
        elif hasattr(row, "__code__") and row.__closure__ is None:
            facts.append((name, repr(row.__defaults__)))
            code.add_function(row)
        else:
            raise NotCacheable(f"the rule of {name} is a {type(row).__name__}")
    return [*facts, code.finish()]


def _read(name: str) -> Decisions | None:
    payload = read_entry(name)
    if payload is None:
        return None
    try:
        groups, decisions = json.loads(payload)
    except ValueError as error:
        log.warning("the cache entry %s is ignored: %s", name, error)
        return None
    log.info("the plan %s was found on disk", name)
    return groups, decisions


@functools.cache
def _own_sources() -> str:
    """The hash of all of tpcompile: hardly a file of it has no say in a plan."""
    folders = [Path(__file__).parents[1], Path(passes.__file__).parent, Path(lowering.__file__).parent]
    return hash_files([path for folder in folders for path in folder.rglob("*.py")])
