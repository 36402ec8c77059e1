"""What ranks do in ``test_serve_ranks``: the first one calls a model, and the others follow."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import tpcompile
from tests.on_ranks.module_life import refusal

from .models import mesh

IDS = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes, **special)).eval()


class Streamed(BaseStreamer):
    """Tokens as they come."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        pass


def served() -> dict[str, Any]:
    """What the first rank finds; the others say how often they were in the block."""
    whole = llama()
    model = tpcompile.parallelize(copy.deepcopy(whole), mesh())
    found: dict[str, Any] = {"led": 0}
    with model.serve_ranks() as leading:
        if leading:
            found |= _lead(whole, model)
    if not leading:
        found["led"] += 1
    with torch.no_grad():  # afterwards all ranks call again
        found["after"] = float((model(IDS).logits - whole(IDS).logits).abs().max())
    return found


def _lead(whole: Any, model: Any) -> dict[str, Any]:
    streamer, options = Streamed(), {"max_new_tokens": 4, "do_sample": False}
    want = whole.generate(IDS, **options)
    with torch.no_grad():
        found = {
            "call": float((model(IDS, use_cache=False).logits - whole(IDS).logits).abs().max()),
            "submodule": float((model.model(IDS)[0] - whole.model(IDS)[0]).abs().max()),
        }
    with torch.inference_mode():
        found["inference"] = float((model(IDS).logits - whole(IDS).logits).abs().max())
    found["tokens"] = torch.equal(model.generate(IDS, streamer=streamer, **options), want)
    found["streamed"] = len(streamer.seen)
    torch.manual_seed(5)
    sampled = whole.generate(IDS, max_new_tokens=4, do_sample=True)
    torch.manual_seed(5)
    found["sampled"] = torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=True), sampled)
    found["threads"] = _threads(model, want, options)
    found["gradients"] = refusal(lambda: model(IDS))
    with torch.no_grad():
        found["cache"] = refusal(lambda: model(IDS, past_key_values=DynamicCache()))
        found["failed"] = refusal(lambda: model(IDS.float()))
    found["still"] = torch.equal(model.generate(IDS, **options), want)
    return found


def _threads(model: Any, want: Tensor, options: dict[str, Any]) -> bool:
    """Requests of several threads at once take turns."""
    same: list[bool] = []
    threads = [
        threading.Thread(target=lambda: same.append(torch.equal(model.generate(IDS, **options), want)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(same) == 3 and all(same)


class Scaled(torch.nn.Module):
    """A layer with a setting that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = torch.nn.Linear(4, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.scale


def differently() -> dict[str, str]:
    """What the first rank alone changes in its model is found out before anything is computed."""
    x, said = torch.ones(2, 4), {}
    model = tpcompile.parallelize(Scaled().eval(), mesh(), (x,))
    with torch.no_grad():
        for scale in (2.0, 1.0):
            model.scale = scale
            for _ in range(3):  # a call of each is known, and not the first
                model(x)
    with model.serve_ranks() as leading, torch.no_grad():
        if leading:
            model(x)
            said["copied"] = refusal(lambda: copy.deepcopy(model))
            said["nested"] = refusal(lambda: model.serve_ranks().__enter__())
            said["unknown"] = refusal(lambda: model(x, nothing=lambda: 0))
            model(x)
            model.scale = 2.0
            said["changed"] = refusal(lambda: model(x))
            model.scale = 1.0
            model(x)
    return said


def one_fails() -> list[str]:
    """A call that fails on a follower alone is an error of the leader's, and ranks stay in step."""
    model = tpcompile.parallelize(torch.nn.Linear(4, 8), mesh(), (torch.ones(2, 4),))
    if dist.get_rank() == 1:
        model.register_forward_hook(lambda *_: Path("/no/such/file").read_text())
    said = []
    with model.serve_ranks() as leading, torch.no_grad():
        for _ in range(2 if leading else 0):
            said.append(refusal(lambda: model(torch.ones(2, 4))))
    return said
