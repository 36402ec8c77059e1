"""A checkpoint on its way into its folder; at every moment the old one or the new one loads.

Files cannot be replaced together. But loaders follow pointers, and a pointer is one file: the configuration
may name the weights' file (``transformers_weights``) and the model's own code (``auto_map``), and an index
names all of its files. So a checkpoint is written to a subfolder; then pointers are turned to the files
there; the files get their usual names; and the pointers are turned back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tpcompile.errors import TpCompileError
from tpcompile.weights.loading.find_files import CONFIG, INDEX, POINTER, SINGLE, variant_of

from .plan_files import File

_STAGE = re.compile(r"\.?saving-[0-9a-f]{8}")  # without a dot, where auto_map would see another one
_TODO = "make room, or save elsewhere; what was there before is still there"


class StagedCheckpoint:
    """The files of a checkpoint in a subfolder of the folder where they will be.

    As a context it removes what is not finished, but for files that the folder's checkpoint needs.

    Args:
        folder: where they will be. Nothing in it is touched but files of the same names, other weights of
            the same variant under the names that transformers gives them, and subfolders that killed
            saves have left.
        weights: the files of weights, which the user of this class writes.
        others: the contents of all others by name, the configuration and the index among them.
        variant: of the weights.

    Attributes:
        path: the subfolder.
    """

    def __init__(
        self, folder: Path, weights: list[File], others: Mapping[str, bytes], variant: str | None
    ) -> None:
        self.path = folder / f"saving-{uuid.uuid4().hex[:8]}"
        self._folder, self._weights, self._others = folder, [file.name for file in weights], others
        self._single, self._index = variant_of(SINGLE, variant), variant_of(INDEX, variant)
        self._size = sum(file.size for file in weights)
        self._made: list[Path] = []

    def begin(self) -> None:
        """Makes the subfolder, with all files but the weights.

        Raises:
            TpCompileError: it cannot be made; a folder is where a file has to be; the disk is too full.
        """
        try:
            self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self.path.mkdir(parents=True)
            for name, content in self._others.items():
                self._write(self.path / name, content)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise refusal(error, str(self._folder)) from error
        for name in (*self._weights, self._single, *self._others):
            if (self._folder / name).is_dir():
                raise TpCompileError(
                    f"there is a folder named {name}", where=str(self._folder), todo="save elsewhere"
                )
        if free < self._size:
            raise TpCompileError(
                f"the checkpoint needs {self._size} bytes, the disk has {free}",
                where=str(self._folder),
                todo=_TODO,
            )

    def finish(self) -> None:
        """Moves all files to their places, and removes those of the checkpoint before.

        Raises:
            TpCompileError: a file cannot be moved or removed; the old checkpoint loads, or the new one.
        """
        try:
            self._switch()
            for name in sorted(os.listdir(self._folder)):
                if self._is_old(name):
                    _remove(self._folder / name)
        except OSError as error:
            raise TpCompileError(
                f"the checkpoint cannot be moved to its place: {error}",
                where=str(self._folder),
                todo="save again, or elsewhere; what loads from the folder is whole, old or new",
            ) from error

    def __enter__(self) -> StagedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_needed(self.path.name):
            shutil.rmtree(self.path, ignore_errors=True)
        for path in self._made:
            if path.is_dir() and not os.listdir(path):
                path.rmdir()

    def _switch(self) -> None:
        several = len(self._weights) > 1
        config = self._folder / CONFIG
        own = [CONFIG, *(name for name in self._others if name.endswith(".py"))]
        changed = config.exists() and any(map(self._is_other, own))
        clash = several and any((self._folder / name).exists() for name in self._weights)
        if changed:  # the new checkpoint loads from here on
            self._point_config()
        if clash:  # or from here on, unless there is a single file, which loaders prefer
            self._put(self._folder / self._index, self._staged_index())
        for name in self._weights:  # or from here on, if it is a single file
            (self._link if changed or clash else self._move)(name)
        if several:
            self._move(self._index)
            (self._folder / self._single).unlink(missing_ok=True)
        for name in sorted(self._others.keys() - {CONFIG, self._index}):
            (self._link if changed and name in own else self._move)(name)
        self._move(CONFIG)

    def _is_other(self, name: str) -> bool:
        """Whether the folder does not have a file as it is to be."""
        path = self._folder / name
        return not path.is_file() or path.read_bytes() != self._others[name]

    def _point_config(self) -> None:
        """Lets a configuration, in place of the old one, point to the weights and the code of its own."""
        weights = self._weights[0]
        if len(self._weights) > 1:
            weights = f"staged.{INDEX}"
            self._write(self.path / weights, self._staged_index())
        config = json.loads(self._others[CONFIG])
        config |= {POINTER: f"{self.path.name}/{weights}"}
        config |= {key: self._staged_code(config[key]) for key in ("auto_map",) if key in config}
        self._put(self._folder / CONFIG, json.dumps(config, indent=2).encode())

    def _staged_code(self, place: Any) -> Any:
        """Where the configuration finds its classes (``module.Class``), if that is in the checkpoint."""
        if isinstance(place, Mapping):
            return {key: self._staged_code(each) for key, each in place.items()}
        if isinstance(place, list):
            return [self._staged_code(each) for each in place]
        ours = isinstance(place, str) and f"{place.partition('.')[0]}.py" in self._others
        return f"{self.path.name}/{place}" if ours else place

    def _staged_index(self) -> bytes:
        index = json.loads(self._others[self._index])
        places = {key: f"{self.path.name}/{file}" for key, file in index["weight_map"].items()}
        return json.dumps(index | {"weight_map": places}, indent=2).encode()

    def _is_old(self, name: str) -> bool:
        """Whether an entry of the folder is of an earlier checkpoint, or what a killed save has left."""
        if name in self._weights or name in self._others or name == self.path.name:
            return False
        stem = re.escape(self._single.removesuffix(".safetensors"))
        shard = re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name)
        left = _STAGE.fullmatch(name) is not None and not self._is_needed(name)
        return shard is not None or name in (self._single, self._index) or left

    def _is_needed(self, stage: str) -> bool:
        """Whether a configuration, or an index of any variant, points to files in a subfolder."""
        pointers = (self._folder / CONFIG, *self._folder.glob("*.index*.json"))
        return any(path.is_file() and stage.encode() in path.read_bytes() for path in pointers)

    def _move(self, name: str) -> None:
        os.rename(self.path / name, self._folder / name)

    def _link(self, name: str) -> None:
        """As ``_move``, but the file stays as well."""
        beside = self.path / "link"
        try:
            os.link(self.path / name, beside)
        except OSError:  # not every file system has links
            shutil.copyfile(self.path / name, beside)
        os.rename(beside, self._folder / name)

    def _put(self, path: Path, content: bytes) -> None:
        """Replaces a file at once."""
        self._write(self.path / "part", content)
        os.rename(self.path / "part", path)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        with open(path, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())


def refusal(error: OSError, where: str) -> TpCompileError:
    """The answer to an error of the system's while the checkpoint is written."""
    return TpCompileError(f"the checkpoint cannot be written: {error}", where=where, todo=_TODO)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
