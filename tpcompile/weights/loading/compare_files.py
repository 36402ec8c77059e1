"""Finds out that ranks read different copies of a checkpoint, of which each would take its slices."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist

from tpcompile.errors import TpCompileError
from tpcompile.ranks.agree import together
from tpcompile.ranks.digest import digest
from tpcompile.ranks.exchange import exchange, name_of

from .read_headers import MappedFiles, Stored


def compare_files(group: dist.ProcessGroup | None, stored: Mapping[str, Stored]) -> None:
    """Compares all bytes of all tensors, where ranks do not read the very same files.

    Files are the same where number, size and time of change are: then nothing is read. Else the ranks that
    share a copy share the work of reading it, and the copies are compared tensor by tensor.

    Args:
        group: the ranks.
        stored: the checkpoint's tensors by key; every rank has the same keys.

    Raises:
        TpCompileError: on all ranks, with the first tensor that differs.
    """
    if group is None or group.size() == 1:
        return
    files = together(group, "look at the checkpoint's files", lambda: _files(stored))
    copies = exchange(group, "tell which files they read", files)
    if all(copy == copies[0] for copy in copies):
        return
    sharing = [place for place, copy in enumerate(copies) if copy == copies[group.rank()]]
    mine = sorted(stored)[sharing.index(group.rank()) :: len(sharing)]
    read = MappedFiles().read
    own = together(group, "read the checkpoint", lambda: {key: digest(read(stored[key])) for key in mine})
    everyone = exchange(group, "compare the checkpoint's copies", own)
    for key in sorted(stored):
        found = [(place, hashes[key]) for place, hashes in enumerate(everyone) if key in hashes]
        for place, value in found[1:]:
            if value != found[0][1]:
                raise TpCompileError(
                    f"the ranks read different checkpoints: {name_of(group, found[0][0])} and "
                    f"{name_of(group, place)} have other values in {key}",
                    where=stored[key].file,
                    todo="copy the checkpoint anew to the nodes that have an old one; nothing was loaded",
                )


def _files(stored: Mapping[str, Stored]) -> list[tuple[int, int, int]]:
    states = [os.stat(file) for file in sorted({each.file for each in stored.values()})]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]
