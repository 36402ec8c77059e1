"""Which tensor of a checkpoint goes into which file, and how a file begins."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcompile.errors import TpCompileError
from tpcompile.ir.units import UNITS
from tpcompile.weights.loading.expressions import Expression
from tpcompile.weights.loading.find_files import SINGLE, variant_of
from tpcompile.weights.loading.read_headers import NAMES


@dataclass(frozen=True)
class File:
    """A file to write.

    Attributes:
        name: its name.
        tensors: what it holds, by key, in the order in which it is written.
        metadata: what else its header says.
    """

    name: str
    tensors: Mapping[str, Expression]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.header()) + sum(map(bytes_of, self.tensors.values()))

    def header(self) -> bytes:
        """The file's beginning: the length of the header, and the header itself."""
        entries: dict[str, Any] = {"__metadata__": {**self.metadata, "format": "pt"}}
        at = 0
        for key, tensor in self.tensors.items():
            stop = at + bytes_of(tensor)
            entries[key] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, stop],
            }
            at = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
        return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Expression) -> int:
    """The bytes of a tensor."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def size_in_bytes(size: int | str) -> int:
    """A size such as ``"5GB"`` in bytes (powers of ten, as transformers has it).

    Raises:
        TpCompileError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", str(size))
    found = int(float(match[1]) * UNITS.get(match[2].lower() or "b", 0)) if match is not None else 0
    if found < 1:
        raise TpCompileError(
            f"{size!r} is not a size of a file", where="max_shard_size", todo='give "5GB", or bytes'
        )
    return found


def plan_files(
    tensors: Mapping[str, Expression], largest: int, variant: str | None, metadata: Mapping[str, str]
) -> list[File]:
    """Divides tensors over files of at most ``largest`` bytes; a larger tensor has a file to itself.

    All headers say the metadata.

    Raises:
        TpCompileError: a tensor has a type that safetensors does not know.
    """
    groups: list[dict[str, Expression]] = [{}]
    held = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise TpCompileError(
                f"safetensors has no type {tensor.dtype}", where=key, todo="cast the model first"
            )
        if groups[-1] and held + bytes_of(tensor) > largest:
            groups.append({})
            held = 0
        groups[-1][key] = tensor
        held += bytes_of(tensor)
    name = variant_of(SINGLE, variant)
    names = [name]
    if len(groups) > 1:
        stem = name.removesuffix(".safetensors")
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    # Larger elements first: every tensor is aligned then.
    return [
        File(n, dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)), metadata)
        for n, group in zip(names, groups, strict=True)
    ]


def index_text(files: list[File], parameters: int) -> str:
    """The index of a checkpoint in several files."""
    return (
        json.dumps(
            {
                "metadata": {
                    "total_parameters": parameters,
                    "total_size": sum(bytes_of(t) for file in files for t in file.tensors.values()),
                },
                "weight_map": {key: file.name for file in files for key in file.tensors},
            },
            indent=2,
            sort_keys=True,
        )
        + "\n"
    )
