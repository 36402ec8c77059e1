"""What the ranks do in ``test_steering``: they generate with clocks, streamers and callbacks that differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import families
from tests.on_ranks.generate import GREEDY, pair
from tests.on_ranks.module_life import refusal
from tpcompile import TpCompileError

NEW = 6


class Streamer:
    """Counts tokens; perhaps it fails at the third call."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.seen, self.calls, self.ended = fails, 0, 0, False

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.fails and self.calls == 3:
            raise BrokenPipeError("nobody listens")
        self.seen += value.numel()

    def end(self) -> None:
        self.ended = True


def steered() -> dict[str, Any]:
    """Whether tokens are those of the unsharded model, and what is said where ranks cannot agree."""
    rank = dist.get_rank()
    whole, sharded = pair("llama", num_hidden_layers=1)
    ids = families.token_ids(1, 5)
    want = whole.generate(ids, max_new_tokens=NEW, **GREEDY)

    def run(**options: Any) -> Tensor:
        tokens: Tensor = sharded.generate(ids, max_new_tokens=NEW, **GREEDY, **options)
        return tokens

    def slow(input_ids: Tensor, scores: Tensor) -> Tensor:
        time.sleep(0.3 * rank)
        return scores

    def stops_at(length: int) -> Callable[..., Tensor]:
        return lambda input_ids, scores: torch.tensor([input_ids.shape[1] >= length])

    def noisy(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + rank

    def fails(*given: Any) -> Tensor:
        if rank:
            raise KeyError("on purpose")
        return torch.tensor([False]) if given[1] is None or isinstance(given[1], tuple) else given[1]

    def told(**options: Any) -> str:
        try:
            return refusal(lambda: run(**options))
        except (KeyError, BrokenPipeError) as error:
            return f"itself {error}"

    streamer, other = Streamer() if rank == 0 else None, Streamer(fails=True) if rank else None
    found: dict[str, Any] = {}
    found["streamed"] = torch.equal(run(streamer=streamer), want)
    found["seen"] = None if streamer is None else (streamer.seen, streamer.ended)
    given = [*{**GREEDY, "max_new_tokens": NEW}.items()]
    found["in any order"] = torch.equal(sharded.generate(ids, **dict(given if rank else given[::-1])), want)
    found["clock"] = run(max_time=0.2, logits_processor=[slow]).shape[1]
    found["criteria"] = run(stopping_criteria=[stops_at(7 + rank)]).tolist() == want[:, :7].tolist()
    found["streamer fails"] = told(streamer=other)
    found["criterion fails"] = told(stopping_criteria=[fails])
    found["processor fails"] = told(logits_processor=[fails])
    found["processors differ"] = told(logits_processor=[noisy])
    found["allowed tokens differ"] = told(prefix_allowed_tokens_fn=lambda batch, row: [3 + rank, 7])
    found["lengths differ"] = told(min_length=rank)
    beams = {**GREEDY, "max_new_tokens": NEW, "num_beams": 2, "streamer": streamer}
    try:
        sharded.generate(ids, **beams)
    except (ValueError, TpCompileError) as error:
        found["beams cannot be streamed"] = type(error).__name__
    sharded.generation_config.repetition_penalty = 1.0 + rank
    found["defaults differ"] = told()
    sharded.generation_config.repetition_penalty = 1.0
    found["afterwards"] = torch.equal(run(), want)
    return found


def streamed_by_one() -> tuple[int, bool]:
    """What a streamer sees where there is one rank only."""
    _, sharded = pair("llama", num_hidden_layers=1)
    streamer = Streamer()
    sharded.generate(families.token_ids(1, 5), max_new_tokens=NEW, streamer=streamer, **GREEDY)
    return streamer.seen, streamer.ended
