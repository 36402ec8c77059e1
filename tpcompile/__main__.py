"""The command line: how a model would be sharded, what that costs, whether it is right; and to run it.

python -m tpcompile plan Qwen/Qwen3-0.6B --ranks 8
python -m tpcompile fit config.json --memory 80GiB --device h100
python -m tpcompile verify config.json --ranks 4 --layers 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tpcompile
from tpcompile.ir.units import size_text
from tpcompile.planner.disk_cache import cache_folder, entries
from tpcompile.runtime.command_line import plan_data, read_mesh, read_numbers, versions
from tpcompile.runtime.command_options import (
    Again,
    Batch,
    Device,
    Divided,
    Dtype,
    Fields,
    Json,
    Kept,
    Layers,
    Memory,
    Mesh,
    Mode,
    Model,
    Optimizer,
    Ranks,
    Seq,
    errors,
    show,
)
from tpcompile.runtime.find_model import example_of, find_model
from tpcompile.runtime.run_commands import run_app

app = typer.Typer(
    name="tpcompile",
    help="Shows how a model is sharded over ranks, what that costs, and whether it is right.\n\n"
    "MODEL is a folder with a config.json, such a file, a name in the hub's cache, or "
    "package.module:factory, a function without arguments that returns a module. Only generate and "
    "convert read weights. Shell completion: tpcompile --install-completion.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


app.add_typer(run_app)


@app.command(epilog="Example: tpcompile plan Qwen/Qwen3-0.6B --ranks 8 --seq 2048")
def plan(
    model: Model,
    ranks: Ranks = 8,
    mesh: Mesh = None,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "h100",
    batch: Batch = 2,
    seq: Seq = 16,
    memory: Memory = None,
    mode: Mode = None,
    optimizer: Optimizer = "adamw",
    checkpointing: Again = False,
    sequence_parallel: Divided = False,
    keep_quantised: Kept = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the plan here, for parallelize(plan=...).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Where every weight goes, and what a forward communicates; with --mode, what a step takes."""
    with errors(as_json):
        ranks, copies, node = read_mesh(mesh, ranks)
        device = device if node is None else f"{device}x{node}"
        asked = (memory, sequence_parallel, keep_quantised)
        found = _plan(model, ranks, layers, dtype, device, batch, seq, *asked)
        data: dict[str, Any] = plan_data(found) | {"copies": copies}
        text = str(found)
        if copies > 1:
            text = f"{text}\n\n{copies} such groups of {ranks} ranks; what copies send is not counted"
        if mode is not None:
            kind: Any = mode
            step = found.estimate(
                kind, batch=batch, seq=seq, optimizer=optimizer, checkpointing=checkpointing
            )
            data["estimate"] = step.to_json()
            text = f"{text}\n\n{step}"
        if output is not None:
            found.save(output)
        show(text, data, as_json)


@app.command(
    epilog="Example: tpcompile fit Qwen/Qwen3-0.6B --memory 80GiB --ranks 1-16 --mode decode --batch 8"
)
def fit(
    model: Model,
    memory: Annotated[
        str | None, typer.Option(help="What a rank may take, as 80GiB; by default what the device has.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to try: 1-16, or 2,4,8.")] = "1-16",
    mesh: Mesh = None,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "h100",
    mode: Annotated[str, typer.Option(help="A step of what: decode, prefill or train.")] = "decode",
    batch: Batch = 1,
    seq: Seq = 4096,
    optimizer: Optimizer = "adamw",
    checkpointing: Again = False,
    sequence_parallel: Divided = False,
    keep_quantised: Kept = False,
    as_json: Json = False,
) -> None:
    """Which numbers of ranks a model fits on, the quickest, the cheapest. Exits with 1 if none fits."""
    with errors(as_json):
        kind: Any = mode
        mine, copies, node = read_mesh(mesh, 0)
        device = device if node is None else f"{device}x{node}"
        found = tpcompile.fit(
            find_model(model, layers, dtype, keep_quantised=keep_quantised),
            memory,
            read_numbers(ranks) if mesh is None else [mine],
            device=device,
            mode=kind,
            batch=batch,
            seq=seq,
            optimizer=optimizer,
            checkpointing=checkpointing,
            sequence_parallel=sequence_parallel,
        )
        text = (
            str(found)
            if copies == 1
            else f"{found}\n\n{copies} such groups of {mine} ranks; the numbers are of one"
        )
        show(text, found.to_json() | {"copies": copies}, as_json)
    raise typer.Exit(0 if any(size.fits for size in found.sizes) else 1)


@app.command(epilog="Example: tpcompile report Qwen/Qwen3-0.6B --ranks 8 --out report.html")
def report(
    model: Model,
    ranks: Ranks = 8,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "h100",
    batch: Batch = 2,
    seq: Seq = 16,
    memory: Memory = None,
    out: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("report.html"),
    explain: Annotated[bool, typer.Option(help="Price the alternatives of every weight.")] = True,
    beside: Annotated[
        Path | None, typer.Option(help="A plan that was written with --output, to compare with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A page that shows the plan: every weight as it is divided, what a step takes, why."""
    with errors(as_json):
        found = _plan(model, ranks, layers, dtype, device, batch, seq, memory)
        other = None if beside is None else tpcompile.Plan.load(beside)
        found.report(out, model, explain=explain, beside=other)
        show(f"written: {out}", {"report": str(out), "bytes": out.stat().st_size}, as_json)


@app.command(epilog="Example: tpcompile explain Qwen/Qwen3-0.6B model.layers.0.self_attn.o_proj --ranks 8")
def explain(
    model: Model,
    module: Annotated[str, typer.Argument(help="A module or parameter by its name in the model.")],
    ranks: Ranks = 8,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "h100",
    batch: Batch = 2,
    seq: Seq = 16,
    as_json: Json = False,
) -> None:
    """Why a module's weights go where they go: the alternatives and what they cost."""
    with errors(as_json):
        text = _plan(model, ranks, layers, dtype, device, batch, seq).explain(module)
        show(text, {"module": module, "explanation": text.splitlines()}, as_json)


@app.command(epilog="Example: tpcompile lint Qwen/Qwen3-0.6B --ranks 8")
def lint(
    model: Model,
    ranks: Ranks = 8,
    layers: Layers = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A tp_plan as JSON; by default its own.")
    ] = None,
    device: Device = "h100",
    as_json: Json = False,
) -> None:
    """What a tp_plan of transformers loses beside the best plan. Exits with 1 if it loses anything."""
    with errors(as_json):
        rules: Any = json.loads(plan_file.read_text()) if plan_file is not None else "hf"
        built = find_model(model, layers)
        report = tpcompile.lint_plan(built, rules, ranks, cost_model=device)
        data = {"clean": report.clean, "unmet": report.unmet, "gathered": report.gathered}
        data |= {"repeated": report.repeated, "replicated": dict(report.replicated)}
        show(report, data, as_json)
    raise typer.Exit(0 if report.clean else 1)


@app.command(epilog="Example: tpcompile verify Qwen/Qwen3-0.6B --ranks 8 --layers 2")
def verify(
    model: Model,
    ranks: Ranks = 2,
    layers: Layers = None,
    dtype: Dtype = "float32",
    batch: Batch = 2,
    seq: Seq = 16,
    gradients: Annotated[bool, typer.Option(help="Compare gradients as well.")] = True,
    seed: Annotated[int, typer.Option(help="Of the random weights and tokens.")] = 0,
    fields: Fields = None,
    as_json: Json = False,
) -> None:
    """Whether sharded and unsharded models agree, with random weights. Exits with 1 if not."""
    with errors(as_json):
        torch.manual_seed(seed)
        built = find_model(model, layers, dtype, fields, verifiable=True)
        report = tpcompile.verify(
            built, ranks, example_kwargs=example_of(built, batch, seq), gradients=gradients
        )
        data = {"ok": report.ok, "kind": report.kind, "report": str(report).splitlines()}
        show(report, data, as_json)
    raise typer.Exit(0 if report.ok else 1)


@app.command(epilog="Example: tpcompile env --json")
def env(as_json: Json = False) -> None:
    """Versions and places, for a bug report."""
    found = versions(tpcompile.__version__)
    show("\n".join(f"{name}: {value}" for name, value in found.items()), found, as_json)


@app.command(epilog="Example: tpcompile cache --clear")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all kept plans.")] = False,
    as_json: Json = False,
) -> None:
    """The plans that are kept for the next start: where, how many, how large."""
    folder, found = cache_folder(), entries()
    size = sum(path.stat().st_size for path in found)
    for path in found if clear else ():
        path.unlink(missing_ok=True)
    data = {"folder": None if folder is None else str(folder), "plans": len(found), "bytes": size}
    text = f"{folder or 'no cache'}: {len(found)} plans, {size_text(size)}{', removed' if clear else ''}"
    show(text, data | {"removed": clear}, as_json)


@app.callback()
def _give_package(context: typer.Context) -> None:
    context.obj = tpcompile


def main() -> None:
    """What the command ``tpcompile`` runs."""
    app(prog_name="tpcompile")


def _plan(
    spec: str,
    ranks: int,
    layers: int | None,
    dtype: str | None,
    device: str,
    batch: int,
    seq: int,
    memory: float | None = None,
    sequence_parallel: bool = False,
    keep_quantised: bool = False,
) -> tpcompile.Plan:
    built = find_model(spec, layers, dtype, keep_quantised=keep_quantised)
    limit = None if memory is None else memory * 2**30
    return tpcompile.plan(
        built,
        ranks,
        example_kwargs=example_of(built, batch, seq),
        cost_model=device,
        memory=limit,
        sequence_parallel=sequence_parallel,
    )


if __name__ == "__main__":
    main()
