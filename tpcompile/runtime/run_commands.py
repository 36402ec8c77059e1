"""The commands that run on ranks: to generate, to measure, to convert. Their context has the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tpcompile.ir.units import size_text, time_text

from .command_options import (
    Batch,
    Cpu,
    Dequantised,
    Dtype,
    Fields,
    Json,
    Kept,
    Layers,
    Model,
    Ranks,
    Seq,
    errors,
    show,
)
from .find_model import example_of, find_model
from .run_on_ranks import (
    bench_call,
    check_layout,
    convert_checkpoint,
    convert_plan,
    generate_tokens,
    is_rank,
    measure,
    mesh_of_ranks,
    read_prompt,
    start_ranks,
)

run_app = typer.Typer()


@run_app.command(epilog='Example: tpcompile generate Qwen/Qwen3-0.6B --ranks 2 --prompt "Can I help"')
def generate(
    context: typer.Context,
    model: Model,
    ranks: Ranks = 2,
    prompt: Annotated[str | None, typer.Option(help="A text to go on with.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead, as in 1,2,3.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to generate.", min=1)] = 20,
    dtype: Dtype = None,
    dequantize: Dequantised = False,
    keep_quantised: Kept = False,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Loads a checkpoint over processes of this machine, or over torchrun's, and generates greedily."""
    with errors(as_json):
        given, tokenizer = read_prompt(model, prompt, ids)
    _on_ranks(ranks)
    with errors(as_json), mesh_of_ranks(cpu) as mesh:
        found = generate_tokens(
            _load(context, model, mesh, dtype, dequantize, keep_quantised), given, tokenizer, tokens
        )
        _show_first(found.get("text", found["ids"]), found, as_json)


@run_app.command(epilog="Example: tpcompile bench Qwen/Qwen3-0.6B --ranks 2 --mode decode --seq 512")
def bench(
    context: typer.Context,
    model: Model,
    ranks: Ranks = 2,
    layers: Layers = None,
    dtype: Dtype = None,
    mode: Annotated[str, typer.Option(help="A step of what: prefill or decode.")] = "prefill",
    batch: Batch = 1,
    seq: Seq = 128,
    runs: Annotated[int, typer.Option(help="Steps that are measured.", min=1)] = 5,
    fields: Fields = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Measures a step on processes of this machine, or on torchrun's, with random weights."""
    _on_ranks(ranks)
    with errors(as_json), mesh_of_ranks(cpu) as mesh:
        torch.manual_seed(0)
        built = find_model(model, layers, dtype, fields, verifiable=True).to(mesh.device_type)
        call = bench_call(built, mode, batch, seq)
        found = measure(context.obj.parallelize(built, mesh), call, mode, runs)
        text = f"{mode} on {found['ranks']} ranks: {time_text(found['seconds'])}"
        _show_first(f"{text}, {found['tokens_per_second']:.0f} tokens per second", found, as_json)


@run_app.command(epilog="Example: tpcompile convert Qwen/Qwen3-0.6B plan.json --to tp-plan --ranks 8")
def convert(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder, or for a tp-plan the file, to write.")],
    to: Annotated[str, typer.Option(help="tp-plan, safetensors, dcp, or program.")] = "safetensors",
    ranks: Ranks = 1,
    dtype: Dtype = None,
    dequantize: Dequantised = False,
    keep_quantised: Kept = False,
    shard: Annotated[str, typer.Option(help="The size of a file of safetensors.")] = "5GB",
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """A plan as a tp_plan of transformers; or a checkpoint, slice by slice, to another layout."""
    with errors(as_json):
        layout = check_layout(to)
        if layout == "tp-plan":
            built = find_model(model, None, dtype)
            plan = context.obj.plan(built, ranks, example_kwargs=example_of(built, 2, 16))
            found = convert_plan(context.obj.to_hf_plan(plan), out)
            return show("\n".join(f"{key}: {style}" for key, style in found["rules"].items()), found, as_json)
    _on_ranks(ranks)
    with errors(as_json), mesh_of_ranks(cpu) as mesh:
        found = convert_checkpoint(
            _load(context, model, mesh, dtype, dequantize, keep_quantised), layout, out, shard
        )
        _show_first(f"written: {out}, {size_text(found['bytes'])}", found, as_json)


def _on_ranks(ranks: int) -> None:
    """Goes on in ranks: in torchrun's; else as many are started here, and this process ends with them."""
    if not is_rank():
        raise typer.Exit(start_ranks(ranks))


def _load(
    context: typer.Context, model: str, mesh: Any, dtype: str | None, dequantize: bool, keep: bool
) -> Any:
    wishes = {"quantization_config": {"dequantize": True} if dequantize else None, "keep_quantised": keep}
    return context.obj.from_pretrained(model, mesh, dtype=dtype, local_files_only=True, **wishes)


def _show_first(text: object, data: dict[str, Any], as_json: bool) -> None:
    """Prints an answer of all ranks once."""
    if os.environ.get("RANK") == "0":
        show(text, data, as_json)
