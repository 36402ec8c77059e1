"""Every causal language model type of the installed transformers, tiny, on two simulated ranks.

    python -m benchmarks.zoo [--types a,b,...] [--limit SECONDS] [--total SECONDS]

One line per type: whether it is captured, the error against the unsharded model, the share of the weights
that a rank holds, how many collectives, and what is computed whole for want of a rule.
Each type runs in a process of its own that is stopped after the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import families, programs, simulate
from tpcompile import markers
from tpcompile.capture import bind_call, capture
from tpcompile.decisions import decisions_from_data, decisions_to_data
from tpcompile.pipeline import canonical, plan_program, rewrite, split_copy
from tpcompile.plan import fallbacks_of
from tpcompile.plan_layout import layout_of
from tpcompile.planner.cost import preset
from tpcompile.shell import whole_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 68,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": None,
}
OTHER_NAMES = {"n_embd": 96, "n_layer": 2, "n_head": 8, "d_model": 96, "num_layers": 2, "n_positions": 64}


def config_of(kind: str) -> Any:
    """A small configuration: the usual names where the type's own configuration has them."""
    known = AutoConfig.for_model(kind)
    sizes = {k: v for k, v in {**SIZES, **OTHER_NAMES}.items() if hasattr(known, k) and v is not None}
    return AutoConfig.for_model(kind, **sizes)


def measure(kind: str) -> dict[str, Any]:
    """Captures, plans and runs one type; what is printed about it."""
    model = families.prepare(AutoModelForCausalLM.from_config(config_of(kind)), torch.float64)
    call = bind_call(model, (), families.causal_inputs(2, 16))
    base = canonical(capture(model, call), 2)
    planned = plan_program(base, preset("cpu"), lambda _work, _axis: {})
    work = split_copy(base, planned.split_groups)
    decisions_from_data(work, decisions_to_data(planned))
    layout = layout_of(work, whole_tensors(model))
    rewrite(work, training=False)
    lowered = simulate.lower_all(work)
    with torch.no_grad():
        whole = next(x for x in torch.utils._pytree.tree_leaves(model(**call)) if torch.is_tensor(x))
        results = [ranks[0] for ranks in programs.run_ranks(work, model, lowered=lowered, **call)]
    total = sum(math.prod(p.shape) * p.dtype.itemsize for p in layout.params.values())
    return {
        "error": max(float((r - whole).abs().max() / whole.abs().max()) for r in results),
        "share": layout.held(0) / total,
        "collectives": sum(n.target in markers.COMMUNICATING for n in work.graph.nodes),
        "fallbacks": list(fallbacks_of(work)),
    }


def run(kind: str, limit: float) -> dict[str, Any]:
    """Measures one type in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit:g} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["died"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def line(kind: str, found: dict[str, Any]) -> str:
    """One type as text."""
    if "failed" in found:
        return f"{kind:28} {found['failed']}"
    whole = "; ".join(found["fallbacks"])[:120]
    return (
        f"{kind:28} error {found['error']:.0e}  weights {found['share']:.3f}  "
        f"{found['collectives']:3} collectives  {whole}"
    )


def main() -> None:
    """Prints the table and a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=",".join(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--total", type=float, default=math.inf)
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    start, seen = time.monotonic(), []
    for kind in options.types.split(","):
        if time.monotonic() - start > options.total:
            break
        seen.append(run(kind, options.limit))
        print(line(kind, seen[-1]), flush=True)
    done = [found for found in seen if "failed" not in found]
    right = [found for found in done if found["error"] < 1e-5]
    halved = [found for found in right if found["share"] < 0.53 and not found["fallbacks"]]
    print(f"{len(seen)} types, {len(done)} planned, {len(right)} right, {len(halved)} of them divided fully")


if __name__ == "__main__":
    main()
