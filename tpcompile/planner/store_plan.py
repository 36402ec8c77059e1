"""Keeps the planner's decisions on disk, for the same graph under the same wishes."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy
import torch
from torch.fx import Node

from tpcompile.capture.held_caches import Held
from tpcompile.capture.repeats.blocks import BLOCK
from tpcompile.capture.repeats.match_periods import describe_value
from tpcompile.ir.nodes import module_path
from tpcompile.ir.print_graph import target_text
from tpcompile.ir.torch_internals import OpOverload
from tpcompile.planner.search.cost import CostModel
from tpcompile.planner.search.quantities import symbol_hints
from tpcompile.rules.table import user_rows

from .disk_cache import cache_folder, entry_name, own_sources, read_entry, write_entry
from .global_program import GlobalProgram

log = logging.getLogger(__name__)

# The packed matmuls that are split, and the decisions on each sub-axis.
Decisions = tuple[list[str], list[dict[str, Any]]]


def plan_cached(decide: Callable[[], Decisions], base: GlobalProgram, wishes: Mapping[str, Any]) -> Decisions:
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


def _name(base: GlobalProgram, wishes: Mapping[str, Any]) -> str | None:
    """A name for everything that a plan follows from; None where that includes python code of the user's."""
    rules = user_rows()
    code = [f"the rule of {operator}" for operator, row in rules.items() if not isinstance(row, str)]
    code += [
        f"the cost model {v!r}"
        for v in wishes.values()
        if isinstance(v, CostModel) and type(v) is not CostModel
    ]
    code += [f"the strategy of {path}" for path in base.custom.strategies]
    if code or cache_folder() is None:
        log.debug("the plan is not kept on disk: %s", code or "the cache is off")
        return None
    versions = (platform.python_version(), torch.__version__, np.__version__, sympy.__version__)
    return entry_name(versions, own_sources(), sorted(rules.items()), describe_program(base), dict(wishes))


def describe_program(base: GlobalProgram) -> list[Any]:
    """All that the planner can see of a program: more than its text, which neither says the example's sizes
    nor what a weight is called nor how many layers one stands for."""
    nodes = [_describe_node(n) for n in base.graph.nodes]
    operators = {n.target for n in base.graph.nodes if isinstance(n.target, OpOverload)}
    # What has no rule is pointwise if torch's tags say so.
    schemas = sorted((str(op._schema), sorted(map(str, op.tags))) for op in operators)
    hints = sorted((str(symbol), size) for symbol, size in symbol_hints(base.graph).items())
    inputs = [(source.spec.kind, source.spec.name) for source in base.sources.values()]
    outputs = [(spec.kind, spec.name, spec.divided) for spec in base.captured.outputs]
    caches: list[tuple[str, Held]] = sorted(base.caches.items())
    constants = base.captured.constant_lines()
    refused = sorted(base.refused.items())
    return [base.ranks, nodes, schemas, hints, inputs, outputs, constants, base.blocks, caches, refused]


def _describe_node(node: Node) -> tuple[Any, ...]:
    called = (node.op, node.name, getattr(node.target, "__module__", ""), target_text(node))
    value = describe_value(node.meta.get("val"))
    return (*called, repr((node.args, node.kwargs)), value, module_path(node), node.meta.get(BLOCK))


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
