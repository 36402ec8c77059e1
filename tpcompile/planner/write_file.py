"""Files that appear whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path


def check_place(target: Path) -> None:
    """Fails as ``write_whole`` would, and leaves nothing.

    Raises:
        IsADirectoryError: it is a folder.
    """
    if target.is_dir():
        raise IsADirectoryError(target)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    part.touch()
    part.unlink()


def write_whole(target: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
