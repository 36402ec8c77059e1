"""What the modules of a sharded model know of it: they are its lowest part, its calls the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from tpcompile.compile_program import Compiler

from .settings import Settings


class Root(Protocol):
    """The runtime of a sharded model, as its modules see it; see ``State``."""

    compiler: Compiler
    settings: Settings
    divided: frozenset[str]
    pieces: frozenset[str]
    hooks: list[tuple[str, str, int]]
    running: int
    lent: dict[tuple[int, str], int]

    def call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Any = None
    ) -> Any:
        """Runs a call of the model, or of the submodule that ``entry`` says."""

    def rebind(self, foreign: bool = False) -> None:
        """Takes note that weights are other tensors than before."""
