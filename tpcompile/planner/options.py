"""What the user of the compiler asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcompile.capture.checkpointing import Checkpointing
from tpcompile.ranks.describe import describe_code, describe_value
from tpcompile.rules.table import user_rows
from tpcompile.strategies.read_rules import Rules

from .disk_cache import own_sources
from .global_program import Pass
from .plan import Plan
from .search.cost import CostModel


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        cost: the cost model.
        rules: what the user's plan asks of single parameters.
        dynamic: which dimensions of the inputs may change (see ``capture``).
        memory: bytes of weights that a rank may hold, or None.
        passes: the user's, which run after ours, before planning or behind it.
        plan: a plan to follow instead of making one.
        custom: custom strategies by glob of a module.
        compose: whether what cannot be captured runs as python over its parts; None: only if that is the
            model's fault, not perhaps the call's.
        sequence: whether the sequence is divided between the blocks, or at which modules.
        checkpointing: how layers are recomputed in backward; None: as forward itself says.
    """

    cost: CostModel
    rules: Rules = field(default_factory=Rules)
    dynamic: bool | Mapping[str, Any] = True
    memory: float | None = None
    passes: Sequence[Pass] = ()
    plan: Plan | None = None
    custom: Mapping[str, str] = field(default_factory=dict)
    compose: bool | None = False
    sequence: bool | frozenset[str] = False
    checkpointing: Checkpointing | None = None

    def lines(self) -> list[str]:
        """What all ranks must have asked for, as text; the cost model may differ: rank 0's counts."""
        plan = None if self.plan is None else (self.plan.fingerprint, self.plan.layout.to_json())
        passes = [f"{describe_code(type(each))}: {describe_value(each)}" for each in self.passes]
        versions = [own_sources(), torch.__version__]
        asked: dict[str, Any] = {"rules": self.rules.wishes, "custom": dict(self.custom), "plan": plan}
        asked |= {"passes": passes, "dynamic": self.dynamic, "memory": self.memory, "compose": self.compose}
        asked |= {"rows": _row_lines(), "versions": versions}
        asked["sequence"] = self.sequence if isinstance(self.sequence, bool) else sorted(self.sequence)
        asked["checkpointing"] = self.checkpointing and self.checkpointing.asked
        return [f"{name}: {value!r}" for name, value in asked.items()]


def rules_version() -> str:
    """A short fingerprint of all that says what operators allow: our sources, and the rows of the user's."""
    return hashlib.sha256("\n".join([own_sources(), *_row_lines()]).encode()).hexdigest()[:8]


def _row_lines() -> list[str]:
    own = sorted(user_rows().items())
    return [f"{op}: {row if isinstance(row, str) else describe_code(row)}" for op, row in own]
