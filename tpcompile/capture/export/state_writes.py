"""What forward leaves in python state becomes results of the program, written back after every call."""

from __future__ import annotations

import types
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpcompile.errors import CannotCapture
from tpcompile.ir.torch_internals import TreeSpec, tree_flatten, tree_unflatten

from .look_inside import PLAIN, Attributes
from .python_state import BOOKKEEPING, PythonState, StateChange, Step, table_at
from .shots import MISSING

TRACED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_HOOKS = tuple(name for name in BOOKKEEPING if "hooks" in name)
_TODO = "return it; or let it be an attribute of a module, a list, or a dict, of tensors and numbers"


@dataclass(frozen=True)
class Result:
    """Stands for a result of the program."""

    index: int


@dataclass(frozen=True)
class StateWrite:
    """A value that a call leaves.

    Attributes:
        path: the module's path.
        steps: from the module to the container that holds it.
        key: its key there; of a list, how many items stay as they are before those of this value.
        spec: its structure; None if the key goes away.
        leaves: its leaves, results of the program among them.
        name: what to call it.
    """

    path: str
    steps: tuple[Step, ...]
    key: Any
    spec: TreeSpec | None
    leaves: tuple[Any, ...]
    name: str

    @property
    def is_plain(self) -> bool:
        """Whether it is made of python values only."""
        return not any(isinstance(leaf, Result) for leaf in self.leaves)

    @property
    def may_differ(self) -> bool:
        """Whether the state may be another one after every call: a number that counts, a list that grows."""
        return self.is_plain or isinstance(self.key, int)

    def is_read(self, reads: Container[tuple[str, str]]) -> bool:
        """Whether python reads the attribute that it is, or is in."""
        return (self.path, self.steps[0][1] if self.steps else self.key) in reads

    def write(self, model: nn.Module, results: Sequence[Any]) -> None:
        """Leaves the value in a model, given the program's results."""
        table = table_at(model, self.path, self.steps)
        if self.spec is None:
            table.pop(self.key, None)
            return
        leaves = [results[leaf.index] if isinstance(leaf, Result) else leaf for leaf in self.leaves]
        value = tree_unflatten(leaves, self.spec)
        if isinstance(table, dict | Attributes):
            table[self.key] = value
        elif isinstance(table, set):
            table.clear()
            table.update(value)
        else:
            while len(table) > self.key:
                table.pop()
            table.extend(value)


def collect_writes(state: PythonState, first: int) -> tuple[list[StateWrite], list[tuple[str, Any]]]:
    """What has changed since a state was noted, and the traced values in it, by name.

    Args:
        state: from before the call.
        first: how many results the program has before these.

    Raises:
        CannotCapture: a change that could not be repeated after every call.
    """
    writes: list[StateWrite] = []
    values: list[tuple[str, Any]] = []

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, TRACED):
            values.append((name, value))
            return Result(first + len(values) - 1)
        known = isinstance(value, (*PLAIN, type)) or state.knows(value)
        if known or (isinstance(value, types.FunctionType) and not value.__closure__):
            return value
        if isinstance(value, set | frozenset) and all(isinstance(v, PLAIN) for v in value):
            return frozenset(value)
        raise CannotCapture(
            f"the model's forward leaves a {type(value).__name__} in {name}", where=name, todo=_TODO
        )

    for change in state.changes():
        name = str(change)
        if change.steps and change.steps[0][1] in BOOKKEEPING:
            _refuse_bookkeeping(change, name)
            continue
        leaves, spec = ([], None) if change.value is MISSING else tree_flatten(change.value)
        made = tuple(leaf(name, value) for value in leaves)
        writes.append(StateWrite(change.path, change.steps, change.key, spec, made, name))
    return writes, values


def _refuse_bookkeeping(change: StateChange, name: str) -> None:
    table = change.steps[0][1]
    # A buffer that is None is not an input of the program, which could not give it a value.
    kept = all(isinstance(value, torch.Tensor) for value in (change.old, change.value))
    added = table == "_buffers" and not kept
    if table in ("_parameters", "_modules") or added:
        raise CannotCapture(
            f"the model's forward adds, replaces or removes {name}: a parameter, buffer or part",
            where=name,
            todo="have it there from the beginning, and write values with copy_",
        )
    if table in _HOOKS:
        raise CannotCapture(
            f"the model's forward leaves a hook behind ({name})",
            where=name,
            todo="remove it again in forward, or register it before parallelize",
        )
