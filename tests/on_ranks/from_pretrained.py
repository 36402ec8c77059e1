"""What the ranks do in ``test_from_pretrained`` and ``test_save_pretrained``."""

from __future__ import annotations

import copy
import errno
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import tpcompile
from tests.helpers import families
from tests.on_ranks.checkpoint import shell
from tests.on_ranks.models import CAPTURED, OTHER, call, error, mesh
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.weights.sharded_parameter import local_tensor

NEW_TOKENS = 5


def whole_model(model_class: Any, folder: str, dtype: Any, quantisation: Any = None) -> Any:
    """What transformers loads."""
    model = model_class.from_pretrained(folder, dtype=dtype, quantization_config=quantisation)
    families.set_experts(model)
    return model.to(families.device())


def same_slices(model: Any, whole: Any) -> list[str]:
    """The names of tensors that are not, bit by bit, this rank's slices of the whole ones."""
    layout, rank = model.plan.layout, dist.get_rank()
    expected = whole_tensors(whole)
    found = whole_tensors(model)
    assert found.keys() == expected.keys(), "other tensors are tied"
    return [
        name
        for name, local in found.items()
        if local.dtype != expected[name].dtype
        or local.requires_grad != expected[name].requires_grad
        or not torch.equal(local_tensor(local), layout.shard(name, expected[name].detach(), rank))
    ]


def load(
    name: str, folder: str, dtype: Any, out: str, decode: bool, quantisation: Any = None
) -> dict[str, Any]:
    """Loads a checkpoint, compares it with what transformers loads, saves it; it may also decode."""
    example = call(name, CAPTURED) | {"use_cache": True}
    model: Any = tpcompile.from_pretrained(
        folder, mesh(), dtype=dtype, example_kwargs=example, quantization_config=quantisation
    )
    original = getattr(transformers, type(model).__name__)
    whole = whole_model(original, folder, dtype, copy.deepcopy(quantisation))
    found: dict[str, Any] = {"wrong": same_slices(model, whole), "training": model.training}
    found["instance"] = isinstance(model, original)
    found["lent"] = len(model._tp.lent)  # else it would not run compiled
    inputs = call(name, OTHER) | {"use_cache": True}
    with torch.no_grad():
        found["error"] = error(model(**inputs), whole(**inputs))
        if decode:
            prompt = {"input_ids": families.token_ids(2, 4), "max_length": 4 + NEW_TOKENS, "do_sample": False}
            found["tokens"] = torch.equal(model.generate(**prompt), whole.generate(**prompt))
    found["generation_config"] = model.generation_config.to_dict() == whole.generation_config.to_dict()
    size = sum(t.nbytes for t in whole.state_dict().values())
    model.save_pretrained(out, max_shard_size=int(size * 0.6))
    found["there"] = os.path.exists(out)
    found["failed save"] = failed_save(model, out)
    return found


class Looking(transformers.LlamaForCausalLM):
    """Its python looks at its input."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["use_cache"] = bool(input_ids.sum() < 0)
        return super().forward(input_ids=input_ids, **kwargs)


def in_parts(folder: str) -> tuple[bool, float]:
    """Whether a model is loaded before anything is captured, and the error of what it says then."""
    model: Any = tpcompile.from_pretrained(folder, mesh(), model_class=Looking)
    early, whole = not model.programs, Looking.from_pretrained(folder)
    ids = families.token_ids(2, 4)
    with torch.no_grad():
        return early, error(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def save_replicas(name: str, data: dict[str, Any], folder: str) -> list[bool]:
    """Saves from a mesh of two axes: whether the checkpoint is there afterwards, and nothing else."""
    model: Any = shell(name, data)[0]
    model.save_pretrained(folder, max_shard_size="30KB")
    there = os.path.exists(os.path.join(folder, "model.safetensors.index.json"))
    dist.barrier()
    alone = os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(model._tp.compiler.axis.replica)
    said = answer(lambda: model.save_pretrained(folder))
    return [there, alone, "other models, not replicas" in said]


def failed_save(model: Any, folder: str) -> str:
    """The disk of rank 0 is full at the second file."""
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        patch.setattr(os, "fsync", full)
        return answer(lambda: model.save_pretrained(folder, max_shard_size="10KB"))


def refusals(folders: list[str], only_first_rank: str) -> list[str]:
    """What every rank is told about bad checkpoints; the last one is bad for the other ranks only."""
    attempts = [(folder, {}) for folder in folders]
    attempts.append((only_first_rank if dist.get_rank() == 0 else folders[0], {}))
    tp = mesh()
    return [answer(lambda f=f, o=o: tpcompile.from_pretrained(f, tp, **o)) for f, o in attempts]  # type: ignore[misc]


def answer(attempt: Any) -> str:
    """The error of an attempt."""
    try:
        attempt()
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return "accepted"
