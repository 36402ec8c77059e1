"""A llama-like decoder written by hand the way Megatron-LM shards it: the mark that a compiler has to meet.

Column-parallel q, k, v, gate and up, row-parallel o and down with one all-reduce each, vocabulary divided in
the embedding and the head (Shoeybi et al., 2019). Plain local tensors, no wrapper, nothing dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

_C10D = torch.ops._c10d_functional


class Local(nn.Module):
    """One rank's part, made from an unsharded transformers Llama.

    Args:
        whole: the model to take the weights from.
        group: the process group that shares it.
    """

    def __init__(self, whole: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.ranks, self.rank = group.group_name, group.size(), group.rank()
        config = whole.config
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.embed = self._rows(whole.model.embed_tokens.weight)
        self.first = self.rank * self.embed.shape[0]
        self.head = self._rows(whole.lm_head.weight)
        self.norm = nn.Parameter(whole.model.norm.weight.detach().clone())
        self.layers = nn.ModuleList(Layer(layer, self) for layer in whole.model.layers)
        self.register_buffer("inv_freq", whole.model.rotary_emb.inv_freq.clone())

    def _rows(self, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach().chunk(self.ranks, 0)[self.rank].clone())

    def _columns(self, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach().chunk(self.ranks, 1)[self.rank].clone())

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return _C10D.wait_tensor(_C10D.all_reduce(x, "sum", self.group))

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        local = input_ids - self.first
        mine = (local >= 0) & (local < self.embed.shape[0])
        x = self.all_reduce(F.embedding(local * mine, self.embed) * mine.unsqueeze(-1))
        angles = torch.outer(torch.arange(length, device=x.device).float(), self.get_buffer("inv_freq"))
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        part = F.linear(self._normalised(x, self.norm), self.head)
        rows = _C10D.wait_tensor(_C10D.all_gather_into_tensor(part, self.ranks, self.group))
        return rows.view(self.ranks, batch, length, -1).permute(1, 2, 0, 3).reshape(batch, length, -1)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()  # as transformers does in every dtype
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Layer(nn.Module):
    """One decoder block, this rank's heads and columns."""

    def __init__(self, layer: Any, model: Local) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.model = [model]  # not a child
        self.q, self.k, self.v = (
            model._rows(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.o = model._columns(attention.o_proj.weight)
        self.gate, self.up = model._rows(mlp.gate_proj.weight), model._rows(mlp.up_proj.weight)
        self.down = model._columns(mlp.down_proj.weight)
        self.norm1 = nn.Parameter(layer.input_layernorm.weight.detach().clone())
        self.norm2 = nn.Parameter(layer.post_attention_layernorm.weight.detach().clone())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        model = self.model[0]
        batch, length, _ = x.shape
        y = model._normalised(x, self.norm1)

        def heads(weight: Tensor) -> Tensor:
            return F.linear(y, weight).view(batch, length, -1, model.head_dim).transpose(1, 2)

        def rotate(t: Tensor) -> Tensor:
            half = t.shape[-1] // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        q, k, v = rotate(heads(self.q)), rotate(heads(self.k)), heads(self.v)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mixed = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
        )
        x = x + model.all_reduce(F.linear(mixed, self.o))
        y = model._normalised(x, self.norm2)
        return x + model.all_reduce(
            F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)
        )
