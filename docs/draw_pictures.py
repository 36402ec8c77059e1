"""Draws the pictures of ``how_it_works.md`` as a report does: ``python docs/draw_pictures.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tpcompile.planner.plan import Plan
from tpcompile.planner.report.draw_graph import draw_graph
from tpcompile.planner.report.draw_partition import draw_partition
from tpcompile.planner.report.graph_boxes import boxes_of, layers_of
from tpcompile.planner.report.partition import partition_of

FOLDER = Path(__file__).parent / "pictures"
# Readable on light and on dark paper: a picture does not know which it is on.
INK = "#7a858f"


class Mlp(nn.Module):
    """Two matmuls with a nonlinearity between them, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def pictures() -> dict[str, str]:
    """All pictures as SVG, by their names."""
    with torch.device("meta"):
        mlp = tpcompile.plan(Mlp(), 4, example_args=(torch.empty(8, 256),))
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=2,
        )
        ids = torch.zeros(1, 512, dtype=torch.long)
        llama = tpcompile.plan(
            LlamaForCausalLM(config), 4, example_kwargs={"input_ids": ids, "use_cache": False}
        )
    layer = "model.layers.0"
    weights = {
        "up": (mlp, "up.weight"),
        "down": (mlp, "down.weight"),
        "q_proj": (llama, f"{layer}.self_attn.q_proj.weight"),
        "k_proj": (llama, f"{layer}.self_attn.k_proj.weight"),
        "norm": (llama, f"{layer}.input_layernorm.weight"),
    }
    drawn = {f"weight_{name}": _weight(*of) for name, of in weights.items()}
    return {**drawn, "graph_mlp": _graph(mlp), "graph_layer": _graph(llama)}


def _weight(plan: Plan, name: str) -> str:
    partition = partition_of(plan.layout, name)
    assert partition is not None, f"{name} is drawn"
    return _file(draw_partition(partition, 220, 120, labels=True))


def _graph(plan: Plan) -> str:
    assert plan.rewritten is not None, "it was just made"
    name, nodes = layers_of(plan.rewritten)[-1]
    return _file(draw_graph(boxes_of(plan.rewritten, name, nodes)))


def _file(svg: str) -> str:
    """What stands in a page, as a file of its own."""
    root = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" '
    return svg.replace("<svg ", root, 1).replace("currentColor", INK) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / f"{name}.svg").write_text(svg)
