"""Fingerprints of tensors, at the speed at which memory is read."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

_ROW = 4096
"""Words of eight bytes that get a sum of their own."""

_ROWS = {"cpu": 16, "other": 1 << 11}
"""Rows that are treated at once: what stays in a CPU's cache, and what fills a card."""


def digest(tensor: Tensor) -> str:
    """A fingerprint of a tensor's contents, in its order; of one without values, none.

    Each row of 32 KiB is a sum of its words times random odd numbers, modulo 2^64: that different rows have
    equal sums has a chance of 2^-32 or less. Words are mixed first, as their upper bits have little weight.
    """
    if tensor.is_meta or not tensor.numel():
        return ""
    if tensor.is_quantized:
        return digest(tensor.int_repr())
    if tensor.is_nested and tensor.layout is torch.strided:
        return " ".join(map(digest, tensor.unbind()))
    if hasattr(tensor, "__tensor_flatten__"):  # made of other tensors
        return " ".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    plain = plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    whole = len(plain) // (8 * _ROW) * (8 * _ROW)
    hashed = hashlib.sha256(plain[whole:].cpu().numpy().tobytes())
    if whole:
        if plain.storage_offset() % 8 or plain.data_ptr() % 8:
            plain = plain[:whole].clone()
        hashed.update(_row_sums(plain[:whole].view(torch.int64).view(-1, _ROW)).cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def _row_sums(words: Tensor) -> Tensor:
    factors = _factors().to(words.device)
    many = _ROWS["cpu" if words.is_cpu else "other"]
    return torch.cat([_sums(rows, factors) for rows in words.split(many)])


def _sums(rows: Tensor, factors: Tensor) -> Tensor:
    mixed = (rows >> 31).bitwise_xor_(rows)
    # Integers are multiplied as matrices on CPUs only, where it is the fastest way.
    return torch.mv(mixed, factors) if rows.is_cpu else mixed.mul_(factors).sum(1)


@functools.cache
def _factors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator) | 1
