"""What the command line does on ranks: it starts them, generates, measures, converts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpCompileError, refusing
from tpcompile.planner.write_file import write_whole
from tpcompile.ranks.mesh import default_mesh

from .command_options import REFUSED
from .dry_run.calls import token_call

_LAYOUTS = ("tp-plan", "safetensors", "dcp", "program")
_GRACE = 20.0
"""Seconds that ranks have to end after the first one has failed."""


def is_rank() -> bool:
    """Whether this process is a rank: of torchrun's, or of ``start_ranks``'s."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(ranks: int) -> int:
    """Runs this command again as so many processes of this machine; the first one's output is everybody's.

    What another rank wrote to stderr is shown if it fails first, and not by a refusal, which all share.

    Returns:
        The exit code of the rank that failed first, or 0.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "tpcompile", *sys.argv[1:]]
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):  # which end a process without a word to its callbacks
            stack.callback(signal.signal, number, signal.signal(number, _stop))
        processes, logs = [], []
        for rank in range(ranks):
            logs.append(stack.enter_context(tempfile.TemporaryFile()))
            streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": logs[-1]} if rank else {}
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, **streams))
            stack.callback(_end, processes[-1])
        failed = _wait(processes)
        code = 0 if failed is None else processes[failed].returncode
        if failed and code != REFUSED:
            logs[failed].seek(0)
            text = logs[failed].read().decode(errors="replace")
            print(f"rank {failed} ended with {code}:\n{text}", file=sys.stderr)
        return code


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended, or some time since one has failed; the one that failed first, if any."""
    failed, last = None, float("inf")
    while (codes := [p.poll() for p in processes]).count(None) and time.monotonic() < last:
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            last = time.monotonic() + _GRACE
        time.sleep(0.05)
    return failed if failed is not None else next((rank for rank, code in enumerate(codes) if code), None)


@contextlib.contextmanager
def mesh_of_ranks(cpu: bool) -> Iterator[DeviceMesh]:
    """All ranks as a mesh, whose processes are connected meanwhile."""
    try:
        yield default_mesh("cpu" if cpu else None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def read_prompt(name: str, prompt: str | None, ids: str | None) -> tuple[torch.Tensor, Any]:
    """Token ids [1, length], and the tokenizer if there is a text.

    Args:
        name: where the tokenizer is.
        prompt: the text; or
        ids: token ids, with commas between them.

    Raises:
        TpCompileError: neither prompt nor ids are given, or both; or there is no tokenizer.
    """
    if (prompt is None) == (ids is None):
        raise TpCompileError(
            "there is no prompt" if ids is None else "there are a prompt and ids",
            where="--prompt",
            todo='give --prompt "some text", or --ids 1,2,3',
        )
    if prompt is None:
        with refusing("ids are not numbers", where="--ids", todo="give --ids 1,2,3"):
            return torch.tensor([[int(each) for each in str(ids).split(",")]]), None
    from transformers import AutoTokenizer

    with refusing("the tokenizer cannot be read", where=name, todo="give --ids 1,2,3 instead"):
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        return tokenizer(prompt, return_tensors="pt")["input_ids"], tokenizer


def generate_tokens(model: Any, given: torch.Tensor, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """So many greedy tokens after a prompt, as ids, and as text if there is a tokenizer.

    Raises:
        TpCompileError: it does not generate, or ids are not in its vocabulary.
    """
    if not model.can_generate():
        raise TpCompileError("the model does not generate", where="MODEL", todo="give one with a head")
    size = model.get_input_embeddings().num_embeddings
    if given.min() < 0 or given.max() >= size:
        raise TpCompileError(f"ids are not all from 0 to {size - 1}", where="--ids", todo="give such ids")
    device = next(model.parameters()).device
    began = time.perf_counter()
    found = model.generate(given.to(device), max_new_tokens=tokens, do_sample=False)[0].tolist()
    data = {"ids": found, "seconds": time.perf_counter() - began}
    return data if tokenizer is None else data | {"text": tokenizer.decode(found, skip_special_tokens=True)}


def bench_call(model: Any, mode: str, batch: int, seq: int) -> dict[str, Any]:
    """A call with random token ids, the same ones on all ranks.

    Args:
        model: a model that takes token ids.
        mode: ``prefill``; or ``decode``, for which this is the prompt.
        batch: texts.
        seq: tokens of each.

    Raises:
        TpCompileError: it is another mode, or another model.
    """
    if mode not in ("prefill", "decode"):
        raise TpCompileError(f"mode is {mode!r}", where="--mode", todo="give prefill or decode")
    config = getattr(model, "config", None)
    if mode == "decode" and getattr(config, "is_encoder_decoder", False):
        raise TpCompileError(
            "the model has an encoder and a decoder", where="--mode", todo="measure its prefill"
        )
    call = token_call(model, "prefill", batch, seq)
    text = getattr(config, "get_text_config", lambda: config)()
    same, vocabulary = torch.Generator().manual_seed(0), int(getattr(text, "vocab_size", None) or 2)
    return {
        name: torch.randint(vocabulary, x.shape, generator=same) if isinstance(x, torch.Tensor) else x
        for name, x in call.items()
    }


def measure(model: Any, call: dict[str, Any], mode: str, runs: int) -> dict[str, Any]:
    """The median time of a step, after one that is not counted.

    Args:
        model: a sharded model.
        call: of ``bench_call``.
        mode: the call itself; or one more token for each of its texts.
        runs: how many are measured.

    Raises:
        TpCompileError: it returns no cache to decode with.
    """
    device = next(model.parameters()).device
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    ids = call[model.main_input_name]
    seconds = []
    with torch.no_grad():
        step = call if mode == "prefill" else _next_token(model, call, ids)
        for _ in range(runs + 1):
            dist.barrier()
            began = time.perf_counter()
            model(**step)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - began)
    median, (batch, seq) = statistics.median(seconds[1:]), ids.shape
    tokens = batch * (seq if mode == "prefill" else 1)
    return {"mode": mode, "batch": batch, "seq": seq, "ranks": dist.get_world_size(), "seconds": median} | {
        "slowest": max(seconds[1:]),
        "tokens_per_second": tokens / median,
    }


def _next_token(model: Any, call: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    cache = getattr(model(**call), "past_key_values", None)
    if cache is None:
        raise TpCompileError("the model returns no cache", where="--mode", todo="measure its prefill")
    return call | {model.main_input_name: ids[:, :1], "past_key_values": cache}


def convert_checkpoint(model: Any, layout: str, out: Path, shard: str) -> dict[str, Any]:
    """Writes a sharded model's weights in another layout.

    Args:
        model: the model, as it was loaded.
        layout: ``safetensors``: as transformers writes them; ``dcp``: for ``torch.distributed.checkpoint``;
            ``program``: for ``tpcompile.load_program``.
        out: the folder.
        shard: the size of a file of safetensors.

    Raises:
        TpCompileError: it cannot be written.
    """
    if layout == "safetensors":
        model.save_pretrained(str(out), max_shard_size=shard)
    elif layout == "program":
        model.save_program(str(out))
    else:
        with refusing("the checkpoint cannot be written", where=str(out), todo="give a folder"):
            dcp_save(model.sharded_state_dict(tied=False), checkpoint_id=str(out))
    return {
        "layout": layout,
        "folder": str(out),
        "bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()),
    }


def convert_plan(rules: dict[str, str], out: Path) -> dict[str, Any]:
    """Writes rules of transformers.

    Raises:
        TpCompileError: they cannot be written.
    """
    with refusing("the plan cannot be written", where=str(out), todo="give a file"):
        write_whole(out, json.dumps(rules, indent=1))
    return {"layout": "tp-plan", "file": str(out), "rules": rules}


def check_layout(layout: str) -> str:
    """A layout that there is.

    Raises:
        TpCompileError: there is none of this name.
    """
    if layout not in _LAYOUTS:
        raise TpCompileError(f"{layout!r} is not a layout", where="--to", todo=f"give {', '.join(_LAYOUTS)}")
    return layout
