"""What the files of a checkpoint hold, by their headers; every file is checked before anything is loaded.

The format is safetensors': eight bytes with the length of the header, the header (JSON), the tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import short

from .expressions import Leaf

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LARGEST = 1 << 63  # torch's sizes are of this type
_LARGEST_HEADER = 100_000_000  # as in safetensors


@dataclass(frozen=True)
class Stored(Leaf):
    """A tensor in a file.

    Attributes:
        file: the file's path.
        start: its first byte there.
    """

    file: str
    start: int

    @property
    def place(self) -> str:
        """Its file, and its key there."""
        return f"{self.file}: {self.name}"

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """The byte behind its last one."""
        return self.start + self.count * self.dtype.itemsize


def read_headers(files: Sequence[str], index: Mapping[str, str] | None = None) -> dict[str, Stored]:
    """The tensors of all files by their keys.

    Args:
        files: paths of safetensors files.
        index: key -> path of its file, for a checkpoint with an index.

    Raises:
        TpCompileError: a file is missing, truncated or no safetensors file, a key is missing or there twice.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for key, stored in read_header(file).items():
            other = found.get(key)
            if other is not None and (index is None or key not in index):
                _refuse(f"two files of the checkpoint have the key {key}", f"{other.file} and {file}")
            if other is None or (index is not None and index[key] == file):
                found[key] = stored
    for key, file in (index or {}).items():
        if key not in found or found[key].file != file:
            _refuse(f"the checkpoint's index has the key {key} in a file that lacks it", file)
    return found


def read_header(file: str) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
        TpCompileError: it is missing, truncated, or no safetensors file.
    """
    with (
        refusing("a file of the checkpoint cannot be read", where=file, todo=_TODO),
        open(file, "rb") as handle,
    ):
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            _refuse(f"the file is not a safetensors file, or truncated ({size} bytes)", file)
        text = handle.read(length)
    with refusing("the file's header is not a JSON object", where=file, todo=_TODO):
        entries = {key: value for key, value in json.loads(text).items() if key != "__metadata__"}
    found = {key: _entry(file, key, value, 8 + length) for key, value in entries.items()}
    _check_extent(file, found, 8 + length, size)
    return found


_TODO = "copy or download the checkpoint again; nothing was loaded"


def _refuse(what: str, where: str) -> NoReturn:
    raise TpCompileError(what, where=where, todo=_TODO)


def _entry(file: str, key: str, value: Any, base: int) -> Stored:
    with refusing(f"the file's header has no dtype, shape and offsets for {key}", where=file, todo=_TODO):
        dtype, shape, (start, stop) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, start, stop]
        if (
            not all(type(n) is int and 0 <= n < _LARGEST for n in numbers)
            or math.prod(filter(None, shape)) >= _LARGEST
        ):
            raise ValueError(f"shape {short(value['shape'])}, offsets {short(value['data_offsets'])}")
    if dtype not in DTYPES:
        raise TpCompileError(
            f"{key} has the type {dtype}, which cannot be loaded",
            where=file,
            todo="use a checkpoint that is not quantised",
        )
    stored = Stored(shape, DTYPES[dtype], key, file, base + start)
    if stored.stop != base + stop:
        _refuse(
            f"{key} has {stop - start} bytes, its shape {list(shape)} and type {dtype} need "
            f"{stored.stop - stored.start}",
            file,
        )
    return stored


def _check_extent(file: str, found: Mapping[str, Stored], base: int, size: int) -> None:
    at = base
    for key, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != at:
            _refuse(f"the tensors of the file overlap or leave gaps at {key}", file)
        if stored.stop > size:
            _refuse(f"the file is truncated: {key} ends at byte {stored.stop}, the file at {size}", file)
        at = stored.stop
    if at != size:
        _refuse(f"the file has {size - at} bytes behind its last tensor", file)


def extent(leaf: Stored, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Where in its file a box of a stored tensor begins and ends; it may have gaps."""
    first = last = 0
    for size, start, length in zip(leaf.shape, offsets, sizes, strict=True):
        first, last = first * size + start, last * size + start + length - 1
    return leaf.start + first * leaf.dtype.itemsize, leaf.start + (last + 1) * leaf.dtype.itemsize


class MappedFiles:
    """Reads stored tensors as views of mapped files: what is not copied out of them takes no memory.

    The pages that are touched belong to the system's page cache and are shared by all ranks of a machine.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, Tensor] = {}

    def read(self, leaf: Leaf) -> Tensor:
        """A stored tensor."""
        assert isinstance(leaf, Stored)
        if 0 in leaf.shape:
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        part = self._map(leaf.file)[leaf.start : leaf.stop]
        if leaf.start % leaf.dtype.itemsize:
            part = part.clone()  # torch's own writers align tensors; a file from elsewhere need not
        return part.view(leaf.dtype).view(leaf.shape)

    def _map(self, file: str) -> Tensor:
        if file not in self._bytes:
            storage = torch.UntypedStorage.from_file(file, False, os.path.getsize(file))
            self._bytes[file] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._bytes[file]
