"""Makes a plain nn.Module tensor-parallel: two inputs, a dict as output, a packed projection inside.

python examples/shard_a_model.py
torchrun --nproc-per-node 2 examples/shard_a_model.py
"""

from __future__ import annotations

import torch
from launch import launch, say
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import tpcompile

WORDS, TAGS, WIDTH, HEADS = 500, 30, 96, 6


class Tagger(nn.Module):
    """Gives every word a tag; ``style`` shifts all of them. Written for one device."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.tags = nn.Linear(WIDTH, TAGS)

    def forward(self, words: Tensor, style: Tensor) -> dict[str, Tensor]:
        x = self.embed(words) + style.unsqueeze(1)
        batch, length = words.shape
        q, k, v = (
            part.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.out(mixed)
        x = self.norm(x + self.down(gelu(self.up(x))))
        return {"tags": self.tags(x).softmax(dim=-1), "summary": x.mean(dim=1)}


def main() -> None:
    """Runs on every rank."""
    torch.manual_seed(0)  # every rank must start from the same weights
    model = Tagger().eval()
    words, style = torch.randint(WORDS, (4, 11)), torch.randn(4, WIDTH)
    with torch.no_grad():
        expected = model(words, style)

        # The model itself is changed: it keeps its class and names, and now holds this rank's slices.
        sharded = tpcompile.parallelize(model, example_args=(words, style))

        say(f"{sharded.plan}\n")
        result = sharded(words, style=style)  # called as before, by position or by name
        for name, value in expected.items():
            error = ((result[name] - value).abs().max() / value.abs().max()).item()
            say(f"{name}: relative error {error:.1e}")
            assert error <= 1e-5
        tags = sharded(words[:2, :7], style[:2])["tags"]
        say(f"another batch and length, same program: {list(tags.shape)}")
    assert len(sharded.programs) == 1
    weight = sharded.get_parameter("up.weight")
    say(f"up.weight is [{4 * WIDTH}, {WIDTH}], of which this rank holds {list(weight.to_local().shape)}")


if __name__ == "__main__":
    launch(main)
