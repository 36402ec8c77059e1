"""What the command line reads and prints, as plain data."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from tpcompile.errors import TpCompileError
from tpcompile.planner.disk_cache import cache_folder
from tpcompile.planner.plan import Plan
from tpcompile.planner.print_plan import placement_text


def plan_data(found: Plan) -> dict[str, Any]:
    """A plan, without what is needed to follow it."""
    layout = found.layout
    return {
        "ranks": found.ranks,
        "axes": found.axis_sizes,
        "model_bytes": found.model_bytes,
        "bytes_of_fullest_rank": layout.fullest,
        "seconds": found.seconds,
        "parameters": {
            name: {
                "shape": param.shape,
                "dtype": str(param.dtype).removeprefix("torch."),
                "placement": placement_text(param),
                "local_shape": layout.local_shape(name, 0),
            }
            for name, param in layout.params.items()
        },
        "collectives": [vars(each) for each in found.collectives],
        "fallbacks": found.fallbacks,
        "notes": found.notes,
    }


def read_numbers(text: str) -> list[int]:
    """``1-4,8`` as numbers of ranks.

    Raises:
        TpCompileError: it is something else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        good = first.isdecimal() and (not dash or last.isdecimal())
        if not good or not 0 < int(first) <= int(last or first) <= 4096:
            raise TpCompileError(
                f"{part[:40]!r} is not a number of ranks",
                where="--ranks",
                todo="give 1-16, or 2,4,8, up to 4096",
            )
        found += range(int(first), int(last or first) + 1)
    return found


def versions(version: str) -> dict[str, str]:
    """What a bug report should say: versions, devices, where plans are kept."""
    packages = ("torch", "transformers", "safetensors", "numpy", "sympy", "accelerate")
    found = {"tpcompile": version, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found |= {"platform": platform.platform(), "cuda devices": ", ".join(cards) or "none"}
    found["kept plans"] = str(cache_folder())
    return found
