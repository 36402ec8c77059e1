"""What users ask of torch's compiler: ``compile=`` of ``parallelize``, as arguments of ``torch.compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import check_arguments, short
from tpcompile.ir.torch_internals import InductorBackend, OtherBackend

from .await_collectives import awaiting
from .symmetric_memory import asks, check_symmetric_memory

Modes = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CompileLike = bool | Modes | Mapping[str, Any]

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def read_compile(asked: CompileLike) -> dict[str, Any] | None:
    """The arguments of ``torch.compile`` that a request means; None if nothing is to be compiled.

    Args:
        asked: a truth value, a mode, arguments of ``torch.compile``, or options of Inductor.

    Raises:
        TpCompileError: torch does not know them.
    """
    if isinstance(asked, bool):
        return {} if asked else None
    options = {"mode": asked} if isinstance(asked, str) else dict(asked)
    known = inspect.signature(torch.compile).parameters.keys() - {"model"}
    todo = "give True, a mode, keyword arguments of torch.compile, or options of Inductor"
    where = f"compile={short(asked)}"
    if options and not known & options.keys():
        options = {"options": options}
    if unknown := options.keys() - known:
        raise TpCompileError(
            f"torch.compile has no argument {', '.join(map(str, unknown))}",
            where=where,
            todo=todo,
        )
    with refusing("torch.compile refuses the options", where=where, todo=todo):
        check_arguments(torch.compile, options)
        backend_of(options)
    return None if options.get("disable") else options


def backend_of(options: Mapping[str, Any]) -> Callable[[GraphModule, list[Any]], Any]:
    """What torch.compile, given these arguments, hands its graphs to.

    Raises:
        ValueError: there are a mode and options at once. Torch raises others for what it does not know.
    """
    mode, own, dynamic = options.get("mode"), options.get("options"), options.get("dynamic")
    if mode is not None and own is not None:
        raise ValueError("a mode and options at once")
    backend = options.get("backend", "inductor")
    if backend == "inductor":
        inductor: Callable[[GraphModule, list[Any]], Any] = InductorBackend(mode, own, dynamic)
        return inductor
    other: Callable[[GraphModule, list[Any]], Any] = OtherBackend(backend, mode, own, dynamic)
    return other


def in_cpp(options: Mapping[str, Any]) -> bool:
    """Whether Inductor is asked for C++ around its kernels, which has no calls of regions."""
    return asks(options, "cpp_wrapper")


def for_group(options: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The options as ranks can have them.

    CUDA graphs are left out where collectives pass through the host, which no graph can hold.

    Raises:
        TpCompileError: what needs symmetric memory is asked for, and the ranks have none.
    """
    check_symmetric_memory(options, group)
    if group is not None and group.size() > 1 and in_cpp(options) and _takes_groups():
        options = awaiting(options)
    mode = options.get("mode")
    if mode in _WITHOUT_GRAPHS and dist.get_backend(group) != "nccl":
        return {**options, "mode": _WITHOUT_GRAPHS[mode]}
    return options


def _takes_groups() -> bool:
    """Whether torch's collectives take process groups, for which Inductor's C++ has no form, or names."""
    schema = torch.ops._c10d_functional.all_reduce.default._schema
    return str(schema.arguments[-1].type) == "Any"
