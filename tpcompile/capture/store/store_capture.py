"""Keeps captured programs on disk: a model that was captured before is not exported again.

torch's own ``GraphPickler`` (which Inductor's cache is built on) writes graphs with fake tensors and symbolic
sizes; it restores the whole ``ShapeEnv``, so that new nodes can be computed on the loaded graph.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import platform
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.decompose import decomposed_names
from tpcompile.capture.export.dynamic_dims import Dims
from tpcompile.capture.export.fake_model import capture_device
from tpcompile.capture.repeats.capture_repeated import capture_repeated
from tpcompile.capture.repeats.match_periods import BLOCK, describe_value
from tpcompile.disk_cache import cache_folder, entry_name, read_entry, write_entry
from tpcompile.ir.calls import flatten_call
from tpcompile.ir.print_graph import graph_text

from .describe_code import NotCacheable, package_versions
from .describe_model import describe_call

log = logging.getLogger(__name__)

_KEPT_META = frozenset({"val", "nn_module_stack", BLOCK})
# Importing these registers the operators that may be in a graph under the namespace.
_OPERATORS = {"transformers": "transformers.integrations.moe"}
_PACKAGES = {"torch", "transformers", "numpy", "sympy"}


def capture_cached(
    model: nn.Module,
    bound: dict[str, Any],
    *,
    dynamic: bool | Mapping[str, Dims] = True,
    device: torch.device | str | None = None,
) -> Captured:
    """What ``capture_repeated`` gives for the call, from disk if it was captured before.

    Args:
        model: see ``capture``, as for all that follow.
        bound: the call.
        dynamic: the dimensions that are left open.
        device: the device that the graph is made for.
    """
    on = cache_folder() is not None
    name = capture_name(model, bound, dynamic, device) if on else None
    if name is not None:
        found = _read(name, flatten_call(bound)[0])
        if found is not None:
            log.info("the captured program %s was found on disk", name)
            return found
    captured = capture_repeated(model, bound, dynamic=dynamic, device=device)
    if name is not None:
        data = try_dump(captured)
        if data is not None:
            write_entry(name, data)
    return captured


def capture_name(
    model: nn.Module,
    bound: dict[str, Any],
    dynamic: bool | Mapping[str, Dims],
    device: torch.device | str | None,
) -> str | None:
    """A name for everything that the capture depends on; None if the model cannot be described."""
    try:
        register_cache_support()  # it decides what the leaves are
        leaves, _ = flatten_call(bound)
        target = torch.device(device) if device is not None else capture_device(model, leaves)
        facts = describe_call(model, bound, dynamic, target)
        versions = (platform.python_version(), torch.__version__, package_versions(_PACKAGES))
        return entry_name("capture", versions, _own_sources(), decomposed_names(), facts)
    except NotCacheable as error:
        log.debug("the captured program is not kept: %s", error)
    except Exception as error:  # describing reads any attribute of any object
        log.info("the captured program is not kept: %r", error)
    return None


@functools.cache
def _own_sources() -> str:
    """The hash of everything that makes and stores captures."""
    capture, package = Path(__file__).parents[1], Path(__file__).parents[2]
    files = [*capture.rglob("*.py"), *(package / "ir").rglob("*.py"), package / "disk_cache.py"]
    return hash_files(files)


def hash_files(files: list[Path]) -> str:
    """One hash of several files' contents."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def try_dump(captured: Captured) -> bytes | None:
    """A program as bytes, or None where something in it cannot be pickled."""
    try:
        return dump_captured(captured)
    except Exception as error:  # pickling runs code of whatever classes the result is made of
        log.info("the captured program cannot be written: %r", error)
        return None


def dump_captured(captured: Captured) -> bytes:
    """A program as bytes.

    Raises:
        Exception: something in it cannot be pickled.
    """
    from torch.fx._graph_pickler import GraphPickler, Options  # imports Inductor

    class Pickler(GraphPickler):
        """Names memory formats by torch: pickle takes any module that has imported it, a script maybe."""

        def reducer_override(self, obj: object) -> Any:
            if isinstance(obj, torch.memory_format):
                return _memory_format, (str(obj).rpartition(".")[2],)
            return super().reducer_override(obj)

    graph = captured.graph_module.graph
    namespaces = {n.target.namespace for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    devices = {name: str(value.device) for name, value in captured.constants.items()}
    constants = {name: _detached(value) for name, value in captured.constants.items()}
    plain = replace(captured, constants=constants)
    options = Options(ops_filter=None, node_metadata_key_filter=_KEPT_META.__contains__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = Pickler.dumps((devices, _fingerprint(graph), plain), options)
        return GraphPickler.dumps((sorted(namespaces), inner), options)  # the operators must be there first


def _memory_format(name: str) -> Any:
    return getattr(torch, name)


def _detached(value: torch.Tensor) -> torch.Tensor:
    # A copy: pickling a view would store all of what it is a view of.
    return value.detach().cpu().clone()


def load_captured(data: bytes) -> Captured:
    """The program that ``dump_captured`` was given.

    Raises:
        Exception: the data is damaged, or something that it names is not there any more.
    """
    from torch.fx._graph_pickler import GraphPickler

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch about its own deprecations
        namespaces, inner = cast(tuple[list[str], bytes], GraphPickler.loads(data, mode))
        for namespace in namespaces:
            if namespace in _OPERATORS:
                importlib.import_module(_OPERATORS[namespace])
        devices, fingerprint, captured = cast(
            tuple[dict[str, str], str, Captured], GraphPickler.loads(inner, mode)
        )
    graph = captured.graph_module.graph
    if _fingerprint(graph) != fingerprint:
        raise ValueError("the graph is another one than was stored")
    mode._allow_unsafe_data_ptr_access = False  # as in export's own mode
    captured.graph_module = GraphModule(captured.graph_module, graph, class_name="Captured")
    captured.constants = {name: value.to(devices[name]) for name, value in captured.constants.items()}
    return captured


def _read(name: str, leaves: list[Any]) -> Captured | None:
    payload = read_entry(name)
    return None if payload is None else try_load(payload, leaves, f"the cache entry {name}")


def try_load(data: bytes, leaves: list[Any], what: str) -> Captured | None:
    """A program from bytes; None where they are damaged, or the program does not take the call."""
    try:
        captured = load_captured(data)
        refusal = captured.accepts(leaves)
    except Exception as error:  # unpickling can fail in any way
        refusal, captured = repr(error), None
    if captured is None or refusal is not None:
        log.warning("%s is ignored: %s", what, refusal)
        return None
    return captured


def _fingerprint(graph: Graph) -> str:
    """The hash of a graph, of all values' strides and devices, and of where its nodes belong."""
    digest = hashlib.sha256(graph_text(graph).encode())
    for node in graph.nodes:
        val = node.meta.get("val")
        steps = [str(step) for step in val.stride()] if isinstance(val, FakeTensor) else None
        where = (node.meta.get("nn_module_stack"), node.meta.get(BLOCK))
        digest.update(f"{node.name} {describe_value(val)} {steps} {where}\n".encode())
    return digest.hexdigest()
