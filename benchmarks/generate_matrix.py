"""Which families generate the unsharded model's tokens: with which plan, cache, and compiled or not.

    python -m benchmarks.generate_matrix [family ...] [--ranks 2] [--tokens 32] [--backend aot_eager]

Tiny random models of ``tests/helpers/families.py`` in float32, greedy, two prompts of 9 tokens. Prints a
markdown table: per family, for ``plan="auto"`` and (where the configuration has one) ``plan="hf"``, per
cache, eager and compiled, ``right`` with the number of programs that the call captured, or ``wrong at token
n``, or the error with which it was refused. A compiled run uses the programs of the one before it.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import SpmdError, run_spmd
from tests.on_ranks.models import mesh
from tpcompile.runtime.generation import compiling

PLANS = ("auto", "hf")
CACHES = ("dynamic", "static")
PROMPT = 9


def decoders() -> list[str]:
    """The families that generate from tokens alone."""
    return [name for name, family in families.FAMILIES.items() if family.output == "logits" and _can(name)]


def _can(name: str) -> bool:
    with torch.device("meta"):
        model = families.FAMILIES[name].build()
    generates = isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
    return generates and model.can_generate() and model.main_input_name == "input_ids"


def has_plan(name: str) -> bool:
    """Whether the configuration names a plan of transformers."""
    with torch.device("meta"):
        model = families.FAMILIES[name].build()
    try:
        tpcompile.hf_plan(model)
    except tpcompile.TpCompileError:
        return False
    return True


def generate(name: str, plan: str, tokens: int, backend: str) -> list[str]:
    """On a rank: the verdicts per cache, eager and compiled."""
    model = families.build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=families.inputs(name), plan=plan)
    ids = families.token_ids(2, PROMPT)
    found = []
    for cache in CACHES:
        options = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "eos_token_id": None,
            "cache_implementation": cache,
        }
        try:
            expected = whole.generate(ids, **options)
        except Exception as error:  # transformers' own limits, of any kind
            found += [f"transformers itself fails: {_first_line(error)}"] * 2
            continue
        found.append(_verdict(expected, sharded, ids, options))
        with compiling(sharded._tp, {"backend": backend}):
            found.append(_verdict(expected, sharded, ids, options))
    return found


def _verdict(expected: torch.Tensor, sharded: Any, ids: torch.Tensor, options: dict[str, Any]) -> str:
    before = len(sharded.programs)
    try:
        found = sharded.generate(ids, **options)
    except Exception as error:  # a row of the table, whatever it is
        return f"fails: {_first_line(error)}"
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
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    chosen = parser.parse_args()
    columns = [f"{cache}{how}" for cache in CACHES for how in ("", ", compiled")]
    print(f"| {chosen.ranks} ranks, {chosen.tokens} tokens | plan | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for name in chosen.families or decoders():
        for plan in PLANS:
            if plan == "auto" or has_plan(name):
                print(f"| {name} | {plan} | {' | '.join(_row(name, plan, chosen))} |", flush=True)


def _row(name: str, plan: str, chosen: argparse.Namespace) -> list[str]:
    try:
        rows = run_spmd(generate, chosen.ranks, name, plan, chosen.tokens, chosen.backend, timeout=900)
    except SpmdError as error:
        return [f"fails: {str(error).strip().splitlines()[-1][:160]}"]
    return rows[0] if all(row == rows[0] for row in rows) else [f"ranks differ: {rows}"]


if __name__ == "__main__":
    main()
