"""Finds the files of a checkpoint, in a folder or on the hub, and refuses what cannot be read in slices."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import Must

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
POINTER = "transformers_weights"
"""The field of a configuration that names the file of its weights, or their index."""

Variant = Annotated[
    str, Must("letters, digits, dots and dashes", lambda name: re.fullmatch(r"[\w.-]+", name) is not None)
]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FOREIGN = {".gguf": "GGUF", ".h5": "Keras", ".msgpack": "Flax", ".onnx": "ONNX"}


@dataclass(frozen=True)
class Files:
    """A checkpoint's files.

    Attributes:
        paths: of the files, in order.
        index: key -> path of its file, or None without an index.
    """

    paths: tuple[str, ...]
    index: Mapping[str, str] | None = None


def find_files(
    name_or_path: str,
    *,
    variant: str | None = None,
    subfolder: str = "",
    hub: Mapping[str, Any] | None = None,
    pointer: str | None = None,
) -> Files:
    """The safetensors files of a checkpoint: one file, those of an index, or all of a folder.

    Args:
        name_or_path: a folder, a file, or a name on the hub.
        variant: reads ``model.<variant>.safetensors`` instead.
        subfolder: of the folder or repository.
        hub: arguments for the hub, such as ``revision``.
        pointer: the file of weights, or the index, that the configuration names; it comes before all others.

    Raises:
        TpCompileError: there are none, or what names them is damaged.
    """
    folder = Path(name_or_path, subfolder)
    if folder.is_file():
        _refuse_foreign([folder.name], str(folder))
        return Files((str(folder),))
    if folder.is_dir():
        return _in_folder(folder, variant, pointer)
    if os.path.isabs(name_or_path) or name_or_path.startswith((".", "~")):
        raise TpCompileError(
            "there is no such folder", where=str(folder), todo="give the folder of a checkpoint"
        )
    return _on_hub(name_or_path, variant, subfolder, hub or {}, pointer)


def variant_of(name: str, variant: str | None) -> str:
    """``model.safetensors`` as ``model.<variant>.safetensors``; the variant stands before the last ending."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _in_folder(folder: Path, variant: str | None, pointer: str | None) -> Files:
    if pointer is not None:
        path = str(folder / _inside(pointer, str(folder / CONFIG)))
        return _of_index(path, lambda name: str(folder / name)) if path.endswith(".json") else Files((path,))
    single, index = (folder / variant_of(name, variant) for name in (SINGLE, INDEX))
    if single.is_file():
        return Files((str(single),))
    if index.is_file():
        return _of_index(str(index), lambda name: str(folder / name))
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    several = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if several and variant is None:
        return Files(tuple(str(folder / name) for name in several))
    _refuse_foreign(names, str(folder))
    raise TpCompileError(
        f"the folder has no {single.name}, no {index.name} and no other safetensors file",
        where=str(folder),
        todo="give the folder of a checkpoint that save_pretrained wrote",
    )


def _inside(name: Any, where: str) -> str:
    """The name of a file of weights that another file gives.

    Raises:
        TpCompileError: it is not of weights, or leaves the folder.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    leaves = path.is_absolute() or ".." in path.parts or "\0" in str(path)
    if leaves or not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise TpCompileError(f"{name!r} names no file of weights in the checkpoint", where=where, todo=_TODO)
    return str(path)


def _of_index(path: str, resolve: Callable[[str], str]) -> Files:
    with refusing("the checkpoint's index cannot be read", where=path, todo=_TODO), open(path) as handle:
        weight_map = json.load(handle)["weight_map"].items()
    inside = {key: _inside(name, path) for key, name in weight_map}
    paths = {name: resolve(name) for name in sorted(set(inside.values()))}
    return Files(tuple(paths.values()), {key: paths[name] for key, name in inside.items()})


_TODO = "copy or download the checkpoint again; nothing was loaded"


def _on_hub(
    name: str, variant: str | None, subfolder: str, hub: Mapping[str, Any], pointer: str | None
) -> Files:
    from transformers.utils import cached_file

    def find(file: str, required: bool) -> str | None:
        try:
            found: str | None = cached_file(
                name, file, subfolder=subfolder, _raise_exceptions_for_missing_entries=required, **hub
            )
        except (OSError, ValueError) as error:
            raise TpCompileError(
                f"the checkpoint cannot be found: {' '.join(str(error).split())}",
                where=name,
                todo="give a folder that exists, or a name on the hub that can be reached",
            ) from error
        return found

    def must(file: str) -> str:
        path = find(file, True)
        assert path is not None
        return path

    if pointer is not None:
        path = must(_inside(pointer, f"{name}: {CONFIG}"))
        return _of_index(path, must) if path.endswith(".json") else Files((path,))
    single = find(variant_of(SINGLE, variant), False)
    if single is not None:
        return Files((single,))
    index = find(variant_of(INDEX, variant), False)
    if index is not None:
        return _of_index(index, must)
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if find(pickled, False) is not None:
            _refuse_foreign([pickled.removesuffix(".index.json")], name)
    return Files((must(variant_of(SINGLE, variant)),))  # for the hub's own reason


def _refuse_foreign(names: Sequence[str], where: str) -> None:
    """Says why files that are not safetensors are not loaded."""
    for name in names:
        kind = os.path.splitext(name)[1]
        if name == "adapter_model.safetensors":
            raise TpCompileError(
                "these are the weights of an adapter, not of a model",
                where=where,
                todo="load the model, with this folder as adapter=",
            )
        if kind in _PICKLES:
            raise TpCompileError(
                f"{name} is a pickle: reading it can run any code, and it cannot be read in slices",
                where=where,
                todo="write it as safetensors once: from_pretrained(...) and save_pretrained(...) of "
                "transformers, where you trust the file",
            )
        if kind in _FOREIGN:
            raise TpCompileError(
                f"{name} is a {_FOREIGN[kind]} file",
                where=where,
                todo="load it with transformers, write it with save_pretrained, and load that",
            )
