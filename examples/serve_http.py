"""A server of completions in OpenAI's form, over a model that several processes share.

python examples/serve_http.py
torchrun --nproc-per-node 2 examples/serve_http.py --forever
curl localhost:8000/v1/completions -d '{"prompt": [5, 7, 11], "max_tokens": 8}'

Rank 0 runs an ordinary server; whatever it asks of the model the other ranks do too. Prompts are token ids,
which OpenAI's interface allows: this small random model has no tokenizer. Without --forever it is asked once.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, say
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    eos_token_id=None,
    pad_token_id=0,
)


class Completions(BaseHTTPRequestHandler):
    """Answers ``POST /v1/completions``."""

    model: Any

    def do_POST(self) -> None:
        """A prompt of token ids, and how many tokens to add."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = torch.tensor([asked["prompt"]])
        tokens = self.model.generate(prompt, max_new_tokens=asked.get("max_tokens", 16), do_sample=False)
        new = tokens[0, prompt.shape[1] :].tolist()
        answer = json.dumps({"object": "text_completion", "choices": [{"index": 0, "tokens": new}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Keeps quiet."""


def serve(model: Any, forever: bool) -> list[int]:
    """Runs the server; unless it is to run for ever, it is asked once: the tokens that come."""
    handler = type("Handler", (Completions,), {"model": model})
    with ThreadingHTTPServer(("127.0.0.1", 8000 if forever else 0), handler) as server:
        if forever:
            server.serve_forever()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1/completions"
        data = json.dumps({"prompt": [5, 7, 11], "max_tokens": 8}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data)) as response:
            answer = json.loads(response.read())
        server.shutdown()
    tokens: list[int] = answer["choices"][0]["tokens"]
    return tokens


def main() -> None:
    """Runs on every rank."""
    torch.manual_seed(0)
    whole = LlamaForCausalLM(CONFIG).eval()
    alone = whole.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=8, do_sample=False)[0, 3:].tolist()

    model = tpcompile.parallelize(whole, init_device_mesh("cpu", (dist.get_world_size(),)))
    with model.serve_ranks() as leading:
        if leading:
            tokens = serve(model, "--forever" in sys.argv)
            say(f"the server's tokens: {tokens}, those of the model alone: {alone}")
            assert tokens == alone


if __name__ == "__main__":
    launch(main)
