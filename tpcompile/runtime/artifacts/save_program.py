"""Writes what a sharded model runs, so that it runs in another process without the model.

A folder has ``program.json``, which says what it is and is written last, and for each rank a file of graphs
and one of tensors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tpcompile.capture.caches.paged import is_pooled
from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.calls import CallSignature
from tpcompile.lowering.state import SOURCE
from tpcompile.planner.disk_cache import own_sources
from tpcompile.planner.plan import digest_of
from tpcompile.planner.write_file import write_whole
from tpcompile.ranks.agree import compare, together
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.groups import AxisGroups
from tpcompile.ranks.mesh import local_device
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.weights.saving.replicas import refuse_other_models
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor

from ..fetch_inputs import Feed
from ..guards import hooks_below
from ..program import RankProgram, trained_weights
from ..state import State
from .call_data import call_data, signature_data
from .generating import generating_data
from .graph_data import graph_data
from .package import compile_package, machine, refuse_unpackable

FORMAT = "tpcompile program"
VERSION = 3
MANIFEST = "program.json"
_TODO = "give a folder of its own, with room in it"
_ALIKE = "give every rank the same attributes, modes and wishes for gradients"


@dataclass(frozen=True)
class Saved:
    """What is saved.

    Attributes:
        programs: the call signatures.
        axis: the ranks.
        groups: the process groups of the sub-axes.
        signature: of the model's forward.
        name: the model's class, for people.
        generates: what ``generate`` needs to know of it, or why there is none.
        package: whether graphs are compiled to native code as well.
    """

    programs: Sequence[RankProgram]
    axis: MeshAxis
    groups: AxisGroups
    signature: CallSignature
    name: str
    generates: dict[str, Any]
    package: bool = False


def save_programs(model: State, folder: str, package: bool = False) -> None:
    """Writes the programs of a sharded model; all of its ranks call this.

    Args:
        model: what it knows.
        folder: where to.
        package: whether graphs are compiled to native code as well.

    Raises:
        TpCompileError: see ``save_program``; or there are none.
    """
    axis = model.compiler.axis
    everyone = None if axis is None else axis.everyone
    programs = [program for program in model.programs if _is_current(program, model)]
    numbers = [f"program {program.number}" for program in programs]
    compare(everyone, "calls of the model as it is now", numbers, _ALIKE)
    more = bool(programs) and _does_more(programs[0].root, model)
    if model.foreign or model.composed or more:
        raise TpCompileError(
            "the model does not run as programs alone",
            where="save_program",
            todo="save one without hooks, whose forward was not replaced after parallelize, that is captured "
            "whole and that nothing else has divided",
        )
    if not programs or axis is None:
        raise TpCompileError(
            "no call of the model, as it is now, was captured in evaluation mode",
            where="save_program",
            todo="call model.eval(), then the model under torch.no_grad()",
        )
    root = programs[0].root
    refuse_other_models(root, axis, "save_program")
    groups = model.compiler.groups[programs[0].plan.axis_sizes]
    name = model.original.__name__
    generates = together(everyone, "describe how it generates", lambda: generating_data(root, model.original))
    saved = Saved(programs, axis, groups, model.signature, name, generates, package)
    save_program(Path(folder), saved)


def save_program(folder: Path, saved: Saved) -> None:
    """Writes a folder; all ranks call this, and of several replicas the first one writes.

    Raises:
        TpCompileError: on all ranks: a program cannot be saved, or the folder cannot be written; what is no
            saved program is left as it is.
    """
    axis, writes = saved.axis, saved.axis.replica == 0
    tensors: dict[str, Tensor] = {}

    def describe() -> list[Any]:
        kept: dict[int, str] = {}
        for program in saved.programs if saved.package else ():
            refuse_unpackable(program.graph_module, _inputs(program, saved), str(program))
        return [_rank_data(program, saved, tensors, kept) for program in saved.programs]

    mine = together(axis.everyone, "describe the programs", describe)
    _prepare(folder, axis, writes)
    files = together(axis.everyone, "write the program", lambda: _write(folder, saved, mine, tensors, writes))
    everyone = exchange(axis.group, "write the program: files", files)
    digests = {name: digest for each in everyone for name, digest in each.items()}

    def finish() -> None:
        if writes and axis.rank == 0:
            with refusing("the program cannot be written", where=str(folder), todo=_TODO):
                write_whole(folder / MANIFEST, json.dumps(_manifest(saved, digests)))

    together(axis.everyone, "finish the program", finish)


def _does_more(root: nn.Module, model: State) -> bool:
    """Whether something runs around the programs: hooks, or a forward that calls the one before."""
    hooked = root._forward_hooks or root._forward_pre_hooks or hooks_below(root, "", model.hooks)
    return bool(hooked) or "forward" in vars(root)


def _is_current(program: RankProgram, model: State) -> bool:
    """Whether a program would run in a call of the model as it is now, without gradients or a paged cache."""
    whole = not program.entry and not program.training and program.types == model.settings.types
    pooled = any(is_pooled(spec.name) for spec in program.captured.user_inputs)
    return whole and not pooled and _is_quiet(program) and program.reads.hold(model.settings.state)


def _is_quiet(program: RankProgram) -> bool:
    """Whether what python has found out of gradients is so without them, and of the weights as they are."""
    if program.gradients is None:
        return True
    trained = trained_weights(program.feeds)
    return not program.gradients[0] and program.gradients[len(program.gradients) - len(trained) :] == trained


def versions() -> dict[str, str]:
    """What a saved program depends on; of torch without the kind of device that it was built for."""
    found = {"torch": torch.__version__.partition("+")[0], "tpcompile": own_sources()}
    return found | {"transformers": importlib.metadata.version("transformers")}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """The SHA-256 of a contiguous tensor: its type, its shape, and the bytes of its numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rank_data(
    program: RankProgram, saved: Saved, tensors: dict[str, Tensor], kept: dict[int, str]
) -> dict[str, Any]:
    """A call, a rank's graph of it, and where its inputs come from; their tensors join the others.

    The call's signature is a rank's own: caches that stay divided have other sizes on each.
    """
    call = call_data(program)
    graph = program.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")

    def feed(source: Feed | int, name: str) -> Any:
        if isinstance(source, int):
            return source
        held = source.held()
        if id(held) not in kept:
            kept[id(held)] = name if name not in tensors else f"{name} {len(tensors)}"
            tensors[kept[id(held)]] = local_tensor(held)
        return [kept[id(held)], source.segment, source.overwritten]

    for source in program.mutated:
        held = source.held()
        if isinstance(held, ShardedParameter) and not held.placing.whole:
            raise TpCompileError(
                f"{program} writes a buffer that an earlier call has divided",
                where=held.placing.name,
                todo="make the call that writes it before all others",
            )
    names = [node.meta[SOURCE].spec.name for node in placeholders]
    return {
        "call": call,
        "graph": graph_data(graph, {name: axes for axes, name in saved.groups.names.items()}),
        "feeds": [feed(source, name) for source, name in zip(program.feeds, names, strict=True)],
        "mutated": [feed(source, source.name)[0] for source in program.mutated],
    }


def _prepare(folder: Path, axis: MeshAxis, writes: bool) -> None:
    """Makes the folder; a program in it is not one any more, and stays one that may be written over."""

    def prepare() -> None:
        with refusing("the program cannot be written", where=str(folder), todo=_TODO):
            if not writes or axis.rank:
                return
            folder.mkdir(parents=True, exist_ok=True)
            manifest = folder / MANIFEST
            ours = manifest.is_file() and f'"format": "{FORMAT}"'.encode() in manifest.read_bytes()
            if any(folder.iterdir()) and not ours:
                raise TpCompileError("there is something else in the folder", where=str(folder), todo=_TODO)
            write_whole(manifest, json.dumps({"format": FORMAT, "version": "unfinished"}))
            for kind in ("rank-*.json", "rank-*.safetensors", "rank-*.pt2", f"{MANIFEST}.*.part"):
                for path in folder.glob(kind):
                    path.unlink()

    together(axis.everyone, "make the program's folder", prepare)


def _write(
    folder: Path, saved: Saved, programs: list[Any], tensors: Mapping[str, Tensor], writes: bool
) -> dict[str, str]:
    """Writes a rank's files; their digests by their names."""
    if not writes:
        return {}
    with refusing("the program cannot be written", where=str(folder), todo=_TODO):
        facts, stored = {}, {}
        for name, tensor in tensors.items():
            strides = tensor.stride()
            order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
            stored[name] = tensor.detach().permute(order).contiguous().clone()
            facts[name] = {
                "order": order if order != sorted(order) else None,
                "trained": tensor.requires_grad,
                "digest": tensor_digest(stored[name]),
            }
        paths = [folder / f"rank-{saved.axis.rank}.json"]
        save_file(stored, paths[0].with_suffix(".safetensors"))
        if saved.package:
            paths += [_package(folder, saved, at, data) for at, data in enumerate(programs)]
        paths[0].write_text(json.dumps({"programs": programs, "tensors": facts}))
        return {each.name: file_digest(each) for each in paths}


def _package(folder: Path, saved: Saved, at: int, data: dict[str, Any]) -> Path:
    """Compiles a call's graph for the sizes that it was captured with."""
    program, path = saved.programs[at], folder / f"rank-{saved.axis.rank}-{at}.pt2"
    names = {name: axes for axes, name in saved.groups.names.items()}
    data["package"] = compile_package(program.graph_module, _inputs(program, saved), names, path)
    data["package"]["machine"] = machine(local_device(saved.axis.device_type))
    return path


def _inputs(program: RankProgram, saved: Saved) -> Sequence[Any]:
    """What a program's graph is given in a call like the one that it was captured for."""
    device = local_device(saved.axis.device_type)
    given = [
        torch.zeros(tuple(map(int, x.shape)), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x
        for x in program.example
    ]
    return program.fetch(given)


def _manifest(saved: Saved, files: Mapping[str, str]) -> dict[str, Any]:
    plan = saved.programs[-1].plan
    data = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "model": saved.name,
        "generates": saved.generates,
        "device": saved.axis.device_type,
        "ranks": len(saved.axis.rows[0]),
        "axes": list(saved.groups.axis_sizes),
        "signature": signature_data(saved.signature),
        "plan": plan.to_json(),
        "files": dict(sorted(files.items())),
    }
    return data | {"digest": digest_of(data)}
