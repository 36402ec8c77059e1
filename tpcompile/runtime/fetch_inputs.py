"""Where the inputs of a rank's program come from, and a function that fetches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Fetch = Callable[[Sequence[Any]], list[Any]]
"""Takes the leaves of a call, gives the values of all placeholders, in their order."""


@dataclass(frozen=True)
class Feed:
    """Where the value of a placeholder comes from: a parameter, buffer or constant, or a segment of one.

    Attributes:
        module: the module that holds it.
        name: its name there.
        constant: the value itself, for a constant of the graph.
        segment: dimension, start and length of the segment in the local tensor, or None for all of it.
        overwritten: the program writes a new value into it. It is given a copy: backward, a result or another
            buffer may want the old one.
    """

    module: nn.Module | None
    name: str
    constant: Tensor | None = None
    segment: tuple[int, int, int] | None = None
    overwritten: bool = False

    def get(self) -> Tensor:
        """The value as it is now (optimizers and ``load_state_dict`` may have replaced it)."""
        if self.constant is not None:
            return self.constant
        assert self.module is not None
        value = getattr(self.module, self.name)
        return value if self.segment is None else value.narrow(*self.segment)


def make_fetch(feeds: Sequence[Feed | int]) -> Fetch:
    """A function that does what a loop over the feeds would do; a number stands for a leaf of the call.

    It is written out because of torch.compile: whatever a loop reads is guarded, and guards run at every
    call. Of ten per weight this leaves four, the module and the weight in it, as in code written by hand.
    """
    modules: list[nn.Module] = []
    places: dict[int, int] = {}
    constants: list[Tensor] = []
    parts = []
    for feed in feeds:
        if isinstance(feed, int):
            parts.append(f"leaves[{feed}]")
        elif feed.constant is not None:
            parts.append(f"constants[{len(constants)}]")
            constants.append(feed.constant)
        else:
            assert feed.module is not None
            if id(feed.module) not in places:
                places[id(feed.module)] = len(modules)
                modules.append(feed.module)
            cut = "" if feed.segment is None else f".narrow{feed.segment}"
            value = f"getattr(modules[{places[id(feed.module)]}], {feed.name!r}){cut}"
            parts.append(f"kept({value})" if feed.overwritten else value)
    source = (
        "def make(modules, constants, kept):\n"
        "    def fetch(leaves):\n"
        f"        return [{', '.join(parts)}]\n"
        "    return fetch\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<inputs of a program>", "exec"), namespace)
    fetch: Fetch = namespace["make"](tuple(modules), tuple(constants), _kept)
    return fetch


def _kept(buffer: Tensor) -> Tensor:
    """A buffer's value, as it is now, for backward and for results."""
    return buffer.clone()
