"""Toy modules, each of which makes one pass do something; sizes differ, so that none is taken for another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """A residual MLP: Megatron's column-then-row scheme."""

    def __init__(self, width: int = 12, inner: int = 20, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.relu(self.up(x)))
        return y


class Classifier(nn.Module):
    """The loss of some labels, one of which is ignored, and the penalty of large logits beside it."""

    def __init__(self, width: int = 12, classes: int = 26) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)
        self.register_buffer("labels", torch.tensor([3, 25, -100, 0, 13]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        return F.cross_entropy(logits, self.labels), logits.logsumexp(-1)


class Attention(nn.Module):
    """Attention with grouped keys; ``packed`` holds query, key and value in one weight, of unequal parts."""

    def __init__(self, packed: bool, width: int = 20, heads: int = 6, groups: int = 2, size: int = 5) -> None:
        super().__init__()
        self.packed, self.size = packed, size
        self.widths = [heads * size, groups * size, groups * size]
        if packed:
            self.qkv = nn.Linear(width, sum(self.widths))
        else:
            self.q, self.k, self.v = (nn.Linear(width, w) for w in self.widths)
        self.out = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.widths, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class PackedColumns(nn.Module):
    """A packed projection that holds its weight by columns, as gpt2 does, with parts of unequal sizes."""

    def __init__(self, width: int = 12, sizes: tuple[int, ...] = (20, 8)) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.weight = nn.Parameter(torch.randn(width, sum(sizes)) / 4)
        self.bias = nn.Parameter(torch.randn(sum(sizes)))
        self.first, self.second = (nn.Linear(size, width, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.addmm(self.bias, x.flatten(0, 1), self.weight).split(self.sizes, -1)
        out: Tensor = self.first(F.relu(a)) + self.second(F.relu(b))
        return out


class Parallel(nn.Module):
    """Attention and MLP beside each other, as in cohere: their sums can be reduced together."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(False, width)
        self.up, self.down = nn.Linear(width, 28, bias=False), nn.Linear(28, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = x + self.attention(h) + self.down(F.silu(self.up(h)))
        return y


class Blocks(nn.Module):
    """MLPs with a norm before each and one at the end: between the sums every position is on its own."""

    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mlps[0](self.first(x))
        x = x + self.mlps[1](self.second(x))
        return self.last(x), x


class Flattened(nn.Module):
    """An MLP on the rows of all sequences together, as in gpt2 and in layers of experts."""

    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.down(F.relu(self.up(x.flatten(0, 1))))
        y: Tensor = x + rows.view(x.shape)
        return y


class NormedHeads(nn.Module):
    """Query and key with a norm over all their heads: two small statistics that are ready together."""

    def __init__(self, width: int = 20, heads: int = 4, size: int = 6, groups: int | None = None) -> None:
        super().__init__()
        self.size, self.grouped = size, groups is not None
        inner, grouped = heads * size, (groups or heads) * size
        self.q, self.k, self.v = (nn.Linear(width, w, bias=False) for w in (inner, grouped, grouped))
        self.q_scale, self.k_scale = (nn.Parameter(torch.rand(w) + 0.5) for w in (inner, grouped))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._norm(self.q(x), self.q_scale), self._norm(self.k(x), self.k_scale), self.v(x)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def _norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale


class Rearranged(nn.Module):
    """Things that can be written in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.linear = nn.Linear(12, 18)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.drop(self.linear(x)).split([4, 8, 6], dim=-1)
        b = b.reshape(x.shape[0], -1, 2, 4).view(x.shape[0], -1, 8)[:, :, 0:8]
        mask = x.new_zeros(1, 4) + a[:, [-1]]
        return torch.cat([b, mask + a, c.contiguous()], dim=-1)


class Tower(nn.Module):
    """Two inputs that meet: values used in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 16), nn.Linear(14, 16, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.left(x)) * self.right(y)
        return self.head(h), h


class Masked(nn.Module):
    """Attention with masks of its own: one that is causal, one that hides nothing, one that is neither."""

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        causal = (at[None, :] <= at[:, None])[None, None].expand(x.shape[0], 1, -1, -1)
        every = (at[None, :] - at[:, None] < x.shape[1]) & torch.ones(1, 1, dtype=torch.bool)
        near = causal & (at[None, :] > at[:, None] - 3)
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        found = [F.scaled_dot_product_attention(heads, heads, heads, m) for m in (causal, every, near)]
        return torch.stack(found).sum(0)


class NormedConvolution(nn.Module):
    """A grouped convolution whose weight is a direction and a length, the length being that of each tap."""

    def __init__(self, width: int = 12, groups: int = 4, taps: int = 3) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, taps, padding=1, groups=groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return y


class Checked(nn.Module):
    """Asserts something of a number read from a tensor. Here, because pytest rewrites asserts of tests."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        assert lengths.max().item() <= x.shape[1]
        return x * 2


class Choosing(nn.Module):
    """Goes on with those rows that a condition chooses: how many they are is up to the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.sum(-1) > 0).nonzero()[:, 0]
        y: Tensor = self.up(x).index_select(0, chosen)
        return y


class StandardisedConvolution(nn.Module):
    """A convolution whose weight is standardised per output channel, by a batch norm of its own."""

    def __init__(self, inputs: int = 7, outputs: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        y: Tensor = F.conv1d(x, flat.reshape_as(self.weight), padding=1)
        return y


class Repeated(nn.Module):
    """Groups that are repeated for heads, by a call that says the resulting size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(60, 12)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.up(x)).unflatten(-1, (4, 5))
        y: Tensor = self.down(inner.repeat_interleave(3, dim=2, output_size=12).flatten(2))
        return y


class Windows(nn.Module):
    """Overlapping windows of three positions per head, read by strides from a transposed value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        heads = self.up(x).view(batch, seq, 4, 6).transpose(1, 2)
        step, head, position, one = heads.stride()
        strides = (step, head, position, position, one)
        windows = heads.as_strided((batch, 4, seq - 3, 3, 6), strides, position)  # not from the first on
        y: Tensor = self.down(windows.sum(3).transpose(1, 2).flatten(2))
        return y


class Table(nn.Module):
    """Rows of a table, by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(16, 12))

    def forward(self, count: int) -> Tensor:
        return self.rows[:count]


class ChosenExperts(nn.Module):
    """A python loop over the experts that some row has chosen; all of them if it is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, 12))

    def forward(self, x: Tensor, dense: bool) -> Tensor:
        choice = x.argmax(-1) % 4
        result = torch.zeros_like(x)
        for expert in range(4) if dense else choice.unique().tolist():
            result = result + (x @ self.weight[expert]) * (choice == expert)[..., None]
        return result


class PartlyCapturable(nn.Module):
    """An MLP, a table, and experts whose python depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts, self.mlp = Table(), ChosenExperts(), Mlp()

    def forward(self, x: Tensor, dense: bool = False) -> Tensor:
        y: Tensor = self.mlp(self.experts(x + self.table(x.shape[1]), dense))
        return y


class ReadsInHelper(nn.Module):
    """Python that depends on the data, and a method that reads the weight of a part that is also called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y + self._again(x) if y.sum() > 0 else y - self._again(x)

    def _again(self, x: Tensor) -> Tensor:
        return x @ self.head.weight.T
