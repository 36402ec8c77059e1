"""How a custom strategy's ranks hold a parameter that no segments describe.

Segments (see ``layout``) say how the compiler divides; a user's ``partition_tensor`` may cut in any way. What
is kept of it is what each rank holds, as runs of indices per dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError

from .index_ranges import Range

Runs = tuple[tuple[int, int], ...]
"""Start and length of indices that follow each other; in the order of the local tensor."""


@dataclass(frozen=True)
class Selection:
    """What each rank holds of a parameter.

    Attributes:
        strategy: the custom strategy that cut it.
        shapes: per rank, the shape of its local tensor.
        runs: per rank and dimension, the indices that it holds; None if the parts are not made of elements
            of the whole, or not of rows and columns of it.
    """

    strategy: str
    shapes: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[Runs, ...], ...] | None

    def held(self, name: str, rank: int) -> tuple[Runs, ...]:
        """The runs of a rank.

        Raises:
            TpCompileError: they are not known.
        """
        if self.runs is None:
            raise TpCompileError(
                f"the custom strategy {self.strategy!r} holds parts that are not cut out of the parameter "
                "by rows and columns, so that the whole cannot be told from them",
                where=name,
                todo="let partition_tensor choose elements only; or save the parts yourself",
            )
        return self.runs[rank]

    def take(self, name: str, full: Tensor, rank: int) -> Tensor:
        """A rank's part of the whole parameter, a copy."""
        return full[self._index(name, full, rank)]

    def assemble(self, name: str, full: Tensor, parts: Mapping[int, Tensor]) -> None:
        """Writes the parts of all ranks into the whole parameter.

        Raises:
            TpCompileError: together they do not hold all of it.
        """
        missing = torch.ones(full.shape, dtype=torch.bool, device=full.device)
        for rank, part in parts.items():
            index = self._index(name, full, rank)
            full[index] = part.reshape(full[index].shape)
            missing[index] = False
        if bool(missing.any()):
            raise TpCompileError(
                f"the custom strategy {self.strategy!r} leaves elements out, so that the whole is lost",
                where=name,
                todo="let the ranks' parts make up the parameter",
            )

    def ranges(self, name: str, rank: int) -> list[Range]:
        """The boxes of the whole that a rank holds, each with where it is in the local tensor."""
        dims = []
        for runs in self.held(name, rank):
            starts = itertools.accumulate((size for _, size in runs), initial=0)
            dims.append(
                [(start, size, slice(at, at + size)) for (start, size), at in zip(runs, starts, strict=False)]
            )
        return [
            Range(tuple(o for o, _, _ in box), tuple(n for _, n, _ in box), tuple(w for _, _, w in box))
            for box in itertools.product(*dims)
        ]

    def refuse_boxes(self, name: str) -> NoReturn:
        """Boxes of such a parameter are not boxes of the local tensor.

        Raises:
            TpCompileError: always.
        """
        raise TpCompileError(
            f"the custom strategy {self.strategy!r} cuts the parameter in a way that checkpoints by slices "
            "(torch.distributed.checkpoint) cannot express",
            where=name,
            todo="save full_state_dict() instead",
        )

    def _index(self, name: str, full: Tensor, rank: int) -> tuple[Tensor, ...]:
        """Indices for each dimension, shaped to broadcast."""
        found = []
        held = self.held(name, rank)
        for dim, runs in enumerate(held):
            own = [torch.arange(start, start + size, device=full.device) for start, size in runs]
            flat = torch.cat(own) if own else torch.empty(0, dtype=torch.long, device=full.device)
            found.append(flat.reshape([-1 if d == dim else 1 for d in range(len(held))]))
        return tuple(found)


def selection_from_json(data: Mapping[str, Any] | None) -> Selection | None:
    """Reads what ``dataclasses.asdict`` and ``json`` made of one."""
    if data is None:
        return None

    def dims(rank: Sequence[Any]) -> tuple[Runs, ...]:
        return tuple(tuple((int(a), int(n)) for a, n in runs) for runs in rank)

    runs = None if data["runs"] is None else tuple(map(dims, data["runs"]))
    return Selection(data["strategy"], tuple(tuple(map(int, s)) for s in data["shapes"]), runs)
