"""Programs with few of a long list of equal layers, and what follows from them for all layers.

Layers that repeat compute the same, so that what a program takes grows by the same amount with each. Two
programs that differ in one layer therefore tell what any number of layers takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tpcompile.capture.repeats.blocks import Block, RepeatedBlocks
from tpcompile.planner.global_program import GlobalProgram

from .recorder import Label, Moment

Copies = tuple[int, ...]
"""Per list of repeated layers, how many periods are added to those that were captured."""


def left_out(program: GlobalProgram) -> Copies:
    """How many periods capture has left out."""
    return () if program.blocks is None else tuple(repeat.copies for repeat in program.blocks.repeats)


def samples(copies: Copies) -> list[Copies]:
    """The programs to run: all of it if it is short, else one without and one with a layer of each list."""
    if sum(copies) <= len(copies):
        return [copies]
    none = tuple(0 for _ in copies)
    one_more = [tuple(int(a == b) for b in range(len(copies))) for a, count in enumerate(copies) if count]
    return [none, *one_more]


def shortened(program: GlobalProgram, copies: Copies) -> GlobalProgram:
    """The same program with so many of the periods that were left out."""
    blocks = program.blocks
    if blocks is None:
        return program
    repeats = tuple(replace(r, count=r.kept + c) for r, c in zip(blocks.repeats, copies, strict=True))
    kept = [d.repeat < 0 or d.copies <= copies[d.repeat] for d in blocks.results]
    fewer: RepeatedBlocks = replace(
        blocks,
        repeats=repeats,
        outputs=tuple(spec for spec, keep in zip(blocks.outputs, kept, strict=True) if keep),
        results=tuple(each for each, keep in zip(blocks.results, kept, strict=True) if keep),
    )
    return replace(program, captured=replace(program.captured, blocks=fewer))


def extended(values: Sequence[float], copies: Copies) -> float:
    """What the whole program takes, from what each of ``samples`` does."""
    first, *others = values
    if not others:
        return first
    counts = [count for count in copies if count]
    return first + sum(count * (v - first) for v, count in zip(others, counts, strict=True))


def highest(
    runs: Sequence[Mapping[Label, Moment]], taken: Sequence[Copies], program: GlobalProgram
) -> Moment:
    """The moment of the whole program when most is alive.

    From layer to layer what is alive changes by the same amount, so that the first or the last has most.
    """
    copies = left_out(program)
    if len(runs) == 1:
        return max(runs[0].values())
    ends = [_by_end(run, counts, program) for run, counts in zip(runs, taken, strict=True)]
    common = [label for label in ends[0] if all(label in end for end in ends)]
    return max(
        Moment(
            round(extended([end[label].live for end in ends], copies)),
            round(extended([end[label].gradients for end in ends], copies)),
        )
        for label in common
    )


def _by_end(run: Mapping[Label, Moment], copies: Copies, program: GlobalProgram) -> dict[Label, Moment]:
    """The parts of a run; a list's last period under a name that it has in every run, those before the last
    that was captured under their numbers."""
    found: dict[Label, Moment] = {}
    assert program.blocks is not None
    for label, moment in run.items():
        phase, part = label
        if isinstance(part, Block):
            last = program.blocks.repeats[part.repeat].kept - 1 + copies[part.repeat]
            if part.period == last:
                part = f"last of list {part.repeat}"
            elif part.period >= program.blocks.repeats[part.repeat].kept - 1:
                continue
        found[phase, part] = moment
    return found
