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
from transformers import LlamaConfig, LlamaForCausalLM

_C10D = torch.ops._c10d_functional


def llama(width: int, layers: int, key_heads: int, vocabulary: int) -> LlamaForCausalLM:
    """The unsharded model, to be trained: heads of 64, random weights."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


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

    def run(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer."""
        result: Tensor = layer(x, cos, sin)
        return result

    def logits(self, input_ids: Tensor) -> Tensor:
        """This rank's part of the logits."""
        local = input_ids - self.first
        mine = (local >= 0) & (local < self.embed.shape[0])
        x = self.all_reduce(F.embedding(local * mine, self.embed) * mine.unsqueeze(-1))
        places = torch.arange(input_ids.shape[1], device=x.device)
        angles = torch.outer(places.float(), self.get_buffer("inv_freq"))
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = self.run(layer, x, cos, sin)  # type: ignore[arg-type]
        return F.linear(self._normalised(x, self.norm), self.head)

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        part = self.logits(input_ids)
        rows = _C10D.wait_tensor(_C10D.all_gather_into_tensor(part, self.ranks, self.group))
        return rows.view(self.ranks, batch, length, -1).permute(1, 2, 0, 3).reshape(batch, length, -1)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()  # as transformers does in every dtype
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Trained(Local):
    """The same with gradients: Megatron-LM's f and g, its vocabulary-parallel loss and sequence parallelism.

    Args:
        whole: the model to take the weights from.
        group: the process group that shares it.
        sequence: divide the positions between the blocks (Korthikanti et al., 2022).
    """

    def __init__(self, whole: Any, group: dist.ProcessGroup, sequence: bool = False) -> None:
        super().__init__(whole, group)
        self.sequence = sequence

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks: all of it, or this rank's positions."""
        if not self.sequence:
            return torch.ops.tpcompile.all_reduce(x, self.group)
        sizes = [x.shape[1] // self.ranks] * self.ranks
        return torch.ops.tpcompile.reduce_scatter(x, self.group, 1, sizes, self.rank)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        y = super()._normalised(x, weight)
        if not self.sequence:
            return torch.ops.tpcompile.copy_to_ranks(y, self.group)
        size = x.shape[1] * self.ranks
        return torch.ops.tpcompile.gather_positions(y, self.group, 1, self.ranks, self.rank, size, True)

    def loss(self, input_ids: Tensor) -> Tensor:
        """The mean loss of predicting each token from those before it."""
        part, labels = self.logits(input_ids)[:, :-1], input_ids[:, 1:]
        loss: Tensor = _Loss.apply(part.flatten(0, 1), labels.flatten() - self.first, self)
        return loss

    def finish(self) -> None:
        """Adds up the gradients of norms, of which each rank has a summand under sequence parallelism."""
        if not self.sequence:
            return
        grads = [p.grad for name, p in self.named_parameters() if "norm" in name and p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, whole in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(whole.view_as(grad))


class _Loss(torch.autograd.Function):
    """The mean cross entropy of logits whose classes the ranks share."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, labels: Tensor, model: Local) -> Tensor:
        def reduce(x: Tensor, op: str) -> Tensor:
            return _C10D.wait_tensor(_C10D.all_reduce(x, op, model.group))

        part = part - reduce(part.amax(-1), "max").unsqueeze(-1)
        mine = (labels >= 0) & (labels < part.shape[1])
        labels = labels * mine
        picked = part.gather(1, labels.unsqueeze(1)).squeeze(1) * mine
        shares = part.exp_()
        total, picked = reduce(torch.stack([shares.sum(-1), picked]), "sum").unbind(0)
        ctx.save_for_backward(shares.div_(total.unsqueeze(1)), labels, mine)
        return (total.log() - picked).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shares, labels, mine = ctx.saved_tensors
        shares.scatter_add_(1, labels.unsqueeze(1), -mine.to(shares.dtype).unsqueeze(1))
        return shares * (grad / len(labels)), None, None


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
        y = model._normalised(x, self.norm1)
        batch, length, _ = y.shape

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
