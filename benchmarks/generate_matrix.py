"""Which families generate the unsharded model's tokens, with which cache.

    python -m benchmarks.generate_matrix [--ranks 2] [--tokens 32] [families ...]

Tiny random models of ``tests/families.py`` in float32, greedy, two prompts of 9 tokens. Prints a markdown
table: per family and cache ``right``, ``wrong at token n``, or the error with which it was refused, and how
many programs the call captured.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

import tpcompile
from tests import families
from tests.spmd import SpmdError, run_spmd
from tests.spmd_models import mesh

CACHES: tuple[str | None, ...] = ("dynamic", "static")
PROMPT = 9


def decoders() -> list[str]:
    """The families that generate from tokens alone."""
    return [name for name, family in families.FAMILIES.items() if family.output == "logits" and _can(name)]


def _can(name: str) -> bool:
    with torch.device("meta"):
        model = families.FAMILIES[name].build()
    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin) and model.can_generate()


def generate(name: str, tokens: int) -> list[str]:
    """On a rank: the verdict per cache."""
    model = families.build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=families.inputs(name))
    ids = families.token_ids(2, PROMPT)
    return [_verdict(whole, sharded, ids, tokens, cache) for cache in CACHES]


def _verdict(whole: Any, sharded: Any, ids: torch.Tensor, tokens: int, cache: str | None) -> str:
    options = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": cache,
    }
    try:
        expected = whole.generate(ids, **options)
    except Exception as error:  # transformers' own limits, of any kind
        return f"transformers itself fails: {_first_line(error)}"
    before = len(sharded.programs)
    try:
        found = sharded.generate(ids, **options)
    except tpcompile.TpCompileError as error:
        return f"refused: {_first_line(error)}"
    programs = len(sharded.programs) - before
    differs = (found != expected).any(0).nonzero().flatten().tolist()
    return f"wrong at token {differs[0] - PROMPT}" if differs else f"right ({programs})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()
    print(f"| {chosen.ranks} ranks, {chosen.tokens} tokens | {' | '.join(map(str, CACHES))} |")
    print("|---" * (1 + len(CACHES)) + "|")
    for name in chosen.families or decoders():
        try:
            rows = run_spmd(generate, chosen.ranks, name, chosen.tokens, timeout=900)
            verdicts = rows[0] if all(row == rows[0] for row in rows) else [f"ranks differ: {rows}"]
        except SpmdError as error:
            verdicts = [f"fails: {str(error).strip().splitlines()[-1][:160]}"]
        print(f"| {name} | {' | '.join(verdicts)} |", flush=True)


if __name__ == "__main__":
    main()
