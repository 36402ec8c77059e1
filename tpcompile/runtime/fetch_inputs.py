"""Where the inputs of a rank's program come from, and a function that fetches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor

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

    def held(self) -> Tensor:
        """The parameter, buffer or constant as it is now."""
        if self.constant is not None:
            return self.constant
        assert self.module is not None
        return getattr(self.module, self.name)

    def get(self) -> Tensor:
        """What the program computes with now (optimizers and ``load_state_dict`` may have replaced it)."""
        value = local_tensor(self.held())
        return value if self.segment is None else value.narrow(*self.segment)


def make_fetch(feeds: Sequence[Feed | int], *, bound: bool = False) -> Fetch:
    """A function that does what a loop over the feeds would do; a number stands for a leaf of the call.

    It is written out because of torch.compile: whatever a loop reads is guarded, and guards run at every
    call.

    Args:
        feeds: where the values come from.
        bound: whether weights are read now, not at every call: the leaves inside of sharded parameters stay
            the same while values change. Of several guards per weight torch.compile then has one.
    """
    modules: list[nn.Module] = []
    places: dict[int, int] = {}
    fixed: list[Tensor] = []
    parts = []
    for feed in feeds:
        if isinstance(feed, int):
            parts.append(f"leaves[{feed}]")
            continue
        held = feed.held()
        if feed.constant is not None or (bound and isinstance(held, ShardedParameter)):
            value = f"fixed[{len(fixed)}]"
            fixed.append(local_tensor(held))
        else:
            assert feed.module is not None
            if id(feed.module) not in places:
                places[id(feed.module)] = len(modules)
                modules.append(feed.module)
            value = _read(f"modules[{places[id(feed.module)]}]", feed)
        if feed.segment is not None:
            value += f".narrow{feed.segment}"
        parts.append(f"kept({value})" if feed.overwritten else value)
    source = (
        "def make(modules, tables, fixed, kept, local):\n"
        "    def fetch(leaves):\n"
        f"        return [{', '.join(parts)}]\n"
        "    return fetch\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<inputs of a program>", "exec"), namespace)
    tables = tuple(module._parameters for module in modules)
    fetch: Fetch = namespace["make"](tuple(modules), tables, tuple(fixed), _kept, local_tensor)
    return fetch


def _read(module: str, feed: Feed) -> str:
    """The code that reads a parameter or buffer."""
    assert feed.module is not None
    if feed.name in feed.module._parameters:  # not by getattr, which looks in three tables
        return f"local({module.replace('modules', 'tables')}[{feed.name!r}])"
    value = f"getattr({module}, {feed.name!r})"
    return f"local({value})" if isinstance(feed.held(), ShardedParameter) else value


def _kept(buffer: Tensor) -> Tensor:
    """A buffer's value, as it is now, for backward and for results."""
    return buffer.clone()
