"""What the ranks do in ``test_axes``: several axes of a mesh are used as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import tpcompile
from tests.on_ranks.axes import STEPS, Run, whole_run
from tests.on_ranks.models import CAPTURED, build, call, error


def like_one_axis(folder: str) -> dict[str, list[str]]:
    """What differs from a model over one axis, by mesh: its plan, results, gradients, weights, and files."""
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    beside = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("node", "data", "gpu"))
    other = DeviceMesh("cpu", [[3, 1], [0, 2]], mesh_dim_names=("node", "gpu"))
    meshes = {"grid": grid, "slice": beside["node", "gpu"], "other order": other}
    model, expected = _outcome(flat, "tp")
    files, found = _stored(model, flat, "tp", f"{folder}/flat"), {}
    for name, mesh in meshes.items():
        model, outcome = _outcome(mesh, ("node", "gpu"))
        found[name] = _differences(outcome, expected)
        if name == "grid":
            stored = _stored(model, mesh, ("node", "gpu"), f"{folder}/{name}")
            found[name] += _differences(stored, files)
    return found


def _outcome(mesh: DeviceMesh, axis: Any) -> tuple[Any, dict[str, Any]]:
    """A sharded model, and what it is and gives. Its heads of keys are two: the ranks are taken as 2 x 2."""
    model: Any = build("two_kv_heads", num_hidden_layers=1)
    tpcompile.parallelize(model, mesh, axis=axis, example_kwargs=call("two_kv_heads", CAPTURED))
    logits = model(**call("two_kv_heads", CAPTURED)).logits
    logits.square().mean().backward()
    found = {"plan": str(model.plan), "logits": logits}
    found |= {f"{name}'s gradient": _local(p.grad) for name, p in model.named_parameters()}
    found |= {f"{name}, held": _local(value) for name, value in model.state_dict().items()}
    return model, found | {n: value.full_tensor() for n, value in model.sharded_state_dict().items()}


def _stored(model: Any, mesh: DeviceMesh, axis: Any, folder: str) -> dict[str, Any]:
    """What a model writes, and what is read again over the mesh."""
    model.save_program(f"{folder}/program")
    program = tpcompile.load_program(f"{folder}/program", mesh, axis=axis)
    model.save_pretrained(f"{folder}/weights")
    loaded = tpcompile.from_pretrained(f"{folder}/weights", mesh, axis=axis)
    asked = call("two_kv_heads", CAPTURED)
    found = {path.name: path.read_bytes() for path in Path(f"{folder}/weights").iterdir()}
    return {**found, "of the program": program(**asked).logits, "of the checkpoint": loaded(**asked).logits}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    return [name for name, value in found.items() if not _same(value, expected[name])]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def data_parallel() -> dict[str, float]:
    """Trains over a data axis that lies between those that share the model: how far it is from unsharded."""
    names, found = ("node", "data", "gpu"), {}
    for kind, shape in {"ddp": (2, 2, 1), "layers": (1, 2, 2)}.items():
        run = Run(kind, shape, names)
        found[f"losses of {kind}"] = run.train(0, STEPS)
        found[f"weights of {kind}"] = error(run.model.full_state_dict(), whole_run()[0].state_dict())
    return found
