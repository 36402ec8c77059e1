"""Reads what ``save_program`` wrote. Nothing in the folder is executed, and nothing damaged is run."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.capture.caches.register import register_cache_support
from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import checked
from tpcompile.planner.plan import Plan, digest_of
from tpcompile.ranks.agree import compare, together
from tpcompile.ranks.groups import AxisGroups
from tpcompile.ranks.mesh import Axis, check_mesh, default_mesh, local_device
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.ranks.own_groups import TIMEOUT, seconds_of

from .call_data import captured_of, example_of, signature_of_data
from .graph_data import graph_of
from .loaded_program import LoadedCall, LoadedProgram, TensorFeed
from .package import Package, machine, register_names
from .save_program import FORMAT, MANIFEST, VERSION, tensor_digest, versions
from .values import decode

_TODO = "copy the folder again, or save the program again"


@checked
def load_program(
    folder: str | PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    axis: Axis | None = None,
    timeout: float | timedelta = TIMEOUT,
    package: bool = False,
) -> LoadedProgram:
    """A sharded model's programs, as ``model.save_program(folder)`` has written them.

    It needs neither the model's class nor a checkpoint, and captures and plans nothing. It is called as the
    model was, for inference, and gives the same, bit for bit. All ranks must call this.

    Args:
        folder: what was written.
        mesh: the device mesh, of as many ranks as the model had; by default one axis over all processes.
        axis: the name of the mesh axis, or a tuple of several, as for ``parallelize``.
        timeout: seconds that ranks wait for each other.
        package: calls of the sizes that native code was saved for (``save_program(package=True)``) run it,
            not bit for bit the same. It executes code from the folder: ask for it if you trust who wrote it.

    Raises:
        TpCompileError: on all ranks: the folder holds something else, is damaged, or was written by another
            version, or for another number of ranks or type of device.
    """
    path = Path(folder)
    mesh = mesh if mesh is not None else default_mesh()
    ranks, place = check_mesh(mesh, axis), MeshAxis.of(mesh, axis, seconds_of(timeout))
    data = together(place.group, "read the program", lambda: _read_manifest(path, ranks, place.device_type))
    compare(place.group, "saved programs", [data["digest"]], "give every rank the same folder")
    groups = AxisGroups(place, tuple(data["axes"]))
    compare(place.group, "ways to load a program", [f"package: {package}"], "give every rank the same")
    return together(place.group, "load the program", lambda: _load(path, data, place, groups, package))


def _read_manifest(folder: Path, ranks: int, device: str) -> dict[str, Any]:
    file = folder / MANIFEST
    with refusing("not a saved program", where=str(file), todo="give a folder that save_program has written"):
        data = json.loads(file.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT}")
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r} of the format, this is {VERSION}")
        if data.get("digest") != digest_of(data):
            raise ValueError("it was changed, or is damaged")
        wanted, axes = {str(k): str(v) for k, v in data["versions"].items()}, tuple(data["axes"])
        if math.prod(axes) != data["ranks"] or not all(type(n) is int and n > 0 for n in axes):
            raise ValueError(f"the sub-axes {axes} do not make up {data['ranks']} ranks")
    found, todo = versions(), "save the program again from the model, as it is to be run"
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            what = f"saved with {name} {str(wanted.get(name))[:12]}, this is {str(found.get(name))[:12]}"
            raise TpCompileError(f"the program was {what}", where=str(file), todo=todo)
    if (data["ranks"], data["device"]) != (ranks, device):
        what = f"for {data['ranks']} ranks on {data['device']}, the mesh has {ranks} on {device}"
        raise TpCompileError(f"the program was saved {what}", where=str(file), todo=todo)
    return data


def _load(
    folder: Path, data: Mapping[str, Any], axis: MeshAxis, groups: AxisGroups, package: bool
) -> LoadedProgram:
    register_cache_support()
    device = local_device(axis.device_type)
    with refusing("the saved program cannot be read", where=str(folder), todo=_TODO):
        path = folder / f"rank-{axis.rank}.json"
        mine = json.loads(_read_file(path, data["files"]))
        with safe_open(path.with_suffix(".safetensors"), "pt") as file:
            tensors = {name: _restore(name, file, facts, device) for name, facts in mine["tensors"].items()}
        calls = [_call(part, tensors, groups.name, device) for part in mine["programs"]]
        if package:
            for call, part in zip(calls, mine["programs"], strict=True):
                call.package = _package(folder, part.get("package"), data["files"], groups, device)
        plan = Plan.from_json(data["plan"])
        signature, generates = signature_of_data(data["signature"]), data["generates"]
        return LoadedProgram(str(data["model"]), signature, calls, tensors, plan, axis, generates)


def _package(
    folder: Path, data: Any, digests: Mapping[str, str], groups: AxisGroups, device: torch.device
) -> Package:
    """A call's native code.

    Raises:
        ValueError: there is none, or it is for another machine.
    """
    if data is None:
        raise ValueError("it was saved without packages (package=True)")
    if data["machine"] != (here := machine(device)):
        raise ValueError(f"its packages are for {data['machine']}, this is {here}")
    code = _read_file(folder / data["file"], digests)
    register_names({own: groups.name(tuple(axes)) for own, axes in data["groups"].items()})
    return Package(torch._inductor.aoti_load_package(io.BytesIO(code)), data["layouts"], data["results"])


def _read_file(path: Path, digests: Mapping[str, str]) -> bytes:
    """A file of graphs or code, which is read once: what was checked is what is used.

    Raises:
        ValueError: it is not the one that was written.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digests[path.name]:
        raise ValueError(f"{path.name} was changed, or is damaged")
    return content


def _restore(name: str, file: Any, facts: Mapping[str, Any], device: torch.device) -> Tensor:
    """A tensor with its dimensions in the order, in memory, that they had: kernels go by that.

    It is a copy: kernels go by where in memory it begins, too, and in a mapped file that is anywhere. The
    copy is what is checked.

    Raises:
        ValueError: it is not the one that was written.
    """
    tensor: Tensor = file.get_tensor(name).clone()
    if tensor_digest(tensor) != facts["digest"]:
        raise ValueError(f"{name} was changed, or is damaged")
    if (order := facts["order"]) is not None:
        tensor = tensor.permute(sorted(range(len(order)), key=order.__getitem__))
    return tensor.to(device).requires_grad_(facts["trained"])  # torch folds matmuls otherwise for these


def _call(
    mine: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    group_name: Callable[[tuple[int, ...]], str],
    device: torch.device,
) -> LoadedCall:
    data = mine["call"]
    graph = graph_of(mine["graph"], len(mine["feeds"]), group_name, device)
    leaves = len(data["inputs"])

    def feed(source: Any) -> TensorFeed | int:
        if type(source) is int and 0 <= source < leaves:
            return source
        name, segment, overwritten = source
        return TensorFeed(
            tensors[name], None if segment is None else tuple(map(int, segment)), bool(overwritten)
        )

    return LoadedCall(
        captured_of(data, graph, device),
        graph,
        tuple(map(feed, mine["feeds"])),
        tuple(tensors[name] for name in mine["mutated"]),
        tuple(map(str, data["names"])),
        example_of(data, device),
        frozenset(map(int, data["numbers"])),
        tuple(map(int, data["loose"])),
        {int(at): int(before) for at, before in data["same"]},
        None if data["wanted"] is None else [bool(each) for each in data["wanted"]],
        decode(data["autocast"], device),
        decode(data["default"], device),
    )
