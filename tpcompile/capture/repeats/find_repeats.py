"""Finds lists of layers that repeat, and shortens them for a while."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .blocks import KEPT, Repeat
from .layer_fingerprint import fingerprints, weight_owners

_FEWEST_DROPPED = 2
_LONGEST_PERIOD = 16


def find_repeats(model: nn.Module) -> list[Repeat]:
    """Return the outermost lists of layers of which at least two periods can be left out."""
    owners = weight_owners(model)
    found: list[Repeat] = []
    for path, module in model.named_modules():
        if any(path.startswith(repeat.path + ".") for repeat in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            layers = list(module)
            plain = list(module._modules) == [str(i) for i in range(len(layers))]
            if not plain or len({id(layer) for layer in layers}) < len(layers):
                continue
            if len(layers) < KEPT + _FEWEST_DROPPED:
                continue
            repeat = _longest(path, fingerprints(layers, owners, path))
            if repeat is not None:
                found.append(repeat)
    return found


def _longest(path: str, facts: Sequence[dict[str, Hashable]]) -> Repeat | None:
    """Return the way to see periods that leaves out the most layers; on a tie the shortest, first one."""
    kinds: list[dict[str, Hashable]] = []
    numbers = []
    for layer in facts:
        if layer not in kinds:
            kinds.append(layer)
        numbers.append(kinds.index(layer))
    best: Repeat | None = None
    for period in range(1, min(_LONGEST_PERIOD, len(facts) // (KEPT + _FEWEST_DROPPED)) + 1):
        first = 0
        while first < len(numbers):
            end = first + period
            while end < len(numbers) and numbers[end] == numbers[end - period]:
                end += 1
            candidate = Repeat(path, first, period, (end - first) // period)
            if candidate.copies >= _FEWEST_DROPPED:
                if best is None or len(candidate.dropped) > len(best.dropped):
                    best = candidate
            first = max(end - period + 1, first + 1)
    return best


@contextmanager
def truncated(model: nn.Module, repeats: Sequence[Repeat]) -> Iterator[None]:
    """Take the repeated layers out of the model inside the block; afterwards it is as it was.

    Layers keep their names, and those before the gap their positions, so that what looks a layer up by
    its number finds the same things. The lists' own tables are swapped, not changed.
    """
    lists = [model.get_submodule(repeat.path) for repeat in repeats]
    before = [module._modules for module in lists]
    try:
        for module, repeat, table in zip(lists, repeats, before, strict=True):
            gone = {str(index) for index in repeat.dropped}
            module.__dict__["_modules"] = {k: v for k, v in table.items() if k not in gone}
        yield
    finally:
        for module, table in zip(lists, before, strict=True):
            module.__dict__["_modules"] = table
