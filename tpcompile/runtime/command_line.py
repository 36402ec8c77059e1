"""What the command line reads and prints, as plain data."""

from __future__ import annotations

import importlib.metadata
import math
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


def read_mesh(text: str | None, ranks: int) -> tuple[int, int, int | None]:
    """How many ranks share a model, how many copies of it there are, and how many of its ranks are on a node.

    Args:
        text: the axes, as ``dp=2,tp=4``. The model is divided over ``tp``, over ``node`` and ``gpu`` as one,
            or over the only axis. None: there is no mesh.
        ranks: how many share the model then.

    Raises:
        TpCompileError: it is something else, or several axes with neither ``tp`` nor ``node`` before ``gpu``.
    """
    if text is None:
        return ranks, 1, None
    pairs = [part.strip().partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in pairs if name.isidentifier() and size.isdecimal()}
    total = math.prod(sizes.values())
    if len(sizes) != len(pairs) or not 0 < total <= 4096:
        raise TpCompileError(
            f"{text[:60]!r} is not a mesh", where="--mesh", todo="give axes with their sizes, as in dp=2,tp=4"
        )
    if "tp" not in sizes and [name for name in sizes if name in ("node", "gpu")] == ["node", "gpu"]:
        mine = sizes["node"] * sizes["gpu"]
        return mine, total // mine, sizes["gpu"]
    if "tp" not in sizes and len(sizes) > 1:
        raise TpCompileError(
            f"none of the axes {', '.join(sizes)} is tp, nor are there node and, behind it, gpu",
            where="--mesh",
            todo="call the axis to divide over tp, as in dp=2,tp=4, or two of them node=2,gpu=8",
        )
    mine = sizes.get("tp", total)
    return mine, total // mine, None


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
