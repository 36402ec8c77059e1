"""Options that commands share, and how they answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tpcompile.errors import TpCompileError

Model = Annotated[str, typer.Argument(help="Folder, config.json, hub name, or package.module:factory.")]
Ranks = Annotated[int, typer.Option(help="How many ranks share the model.", min=1, max=4096)]
Layers = Annotated[int | None, typer.Option(help="Cut the model down to so many layers.", min=1)]
Dtype = Annotated[str | None, typer.Option(help="Type of the weights; by default the configuration's.")]
Dequantised = Annotated[
    bool, typer.Option("--dequantize", help="A quantised checkpoint is dequantised while it is loaded.")
]
Kept = Annotated[bool, typer.Option("--keep-quantised", help="fp8 blocks and MXFP4 of a checkpoint stay so.")]
Device = Annotated[
    str, typer.Option(help="Cost model: h100, h200, b200, a100 or cpu; h100x8: in nodes of 8.")
]
Mode = Annotated[str | None, typer.Option(help="Estimate a step: prefill, decode or train.")]
Optimizer = Annotated[str, typer.Option(help="Of a step of training: adamw, adam, sgd, momentum, ...")]
Again = Annotated[bool, typer.Option(help="Layers are run again in backward, in a step of training.")]
Divided = Annotated[bool, typer.Option(help="The sequence is divided between the blocks.")]
Batch = Annotated[int, typer.Option(help="Texts in the example.", min=1)]
Seq = Annotated[int, typer.Option(help="Tokens of each text in the example.", min=1)]
Mesh = Annotated[
    str | None,
    typer.Option(help="Axes of a mesh instead, dp=2,tp=4 (the model is divided over tp) or node=2,gpu=8."),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="On CPUs, although there are accelerators.")]
Memory = Annotated[float | None, typer.Option(help="GiB of weights that a rank may hold.")]
Fields = Annotated[
    list[str] | None, typer.Option("--set", help="Another value of a field, as in --set vocab_size=1024.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

REFUSED = 2
"""The exit code of a refusal."""


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Shows a refusal as text, or as an object.

    Raises:
        Exit: with 2, for a refusal.
    """
    try:
        yield
    except TpCompileError as error:
        if as_json:
            print(json.dumps({"error": error.what, "where": error.where, "todo": error.todo}))
        else:
            print(error, file=sys.stderr)
        raise typer.Exit(REFUSED) from None


def show(text: object, data: dict[str, Any], as_json: bool) -> None:
    """Prints an answer."""
    print(json.dumps(data) if as_json else text)
