"""Quantised checkpoints, written in plain torch in the formats of the published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "eos_token_id": None,
    "pad_token_id": 0,
}
"""Of small models whose weights are quantised."""

E4M3 = torch.float8_e4m3fn
KEPT = ("embed", "lm_head", "norm", ".gate.weight")  # parts of the names of weights that stay as they are


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], config: Any) -> None:
    """Changes a checkpoint's tensors, and says in its configuration that it is quantised."""
    file = folder / "model.safetensors"
    tensors = {key: t.contiguous() for key, t in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(fields))


def fp8(
    folder: Path,
    block: tuple[int, int] = (16, 16),
    scales: torch.dtype = torch.float32,
    **config: Any,
) -> None:
    """DeepSeek-V3's format: e4m3 weights, and for each block the number that they are to be multiplied by.

    The last block of a dimension may be cut short.

    Args:
        folder: a checkpoint, which becomes a quantised one.
        block: rows and columns of a block.
        scales: their type; ``float8_e8m0fnu`` are powers of two.
        config: more fields of the quantization config.
    """

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            if tensor.ndim != 2 or not key.endswith("weight") or any(part in key for part in KEPT):
                found[key] = tensor
                continue
            scale = block_maxima(tensor.float(), block) / 448
            if scales != torch.float32:
                scale = scale.log2().ceil().exp2()
            found[key] = (tensor / spread(scale, block, tensor.shape)).to(E4M3)
            found[f"{key}_scale_inv"] = scale.to(scales)
        return found

    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    rewrite(folder, change, fields | config)


def block_maxima(tensor: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude in each block of a matrix."""
    rows, columns = (math.ceil(n / b) for n, b in zip(tensor.shape, block, strict=True))
    whole = tensor.new_zeros(rows * block[0], columns * block[1])
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor.abs()
    return whole.view(rows, block[0], columns, block[1]).amax((1, 3)).clamp(min=1e-6)


def spread(scale: Tensor, block: tuple[int, int], shape: Any) -> Tensor:
    """A number per block as one per element."""
    every = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return every[: shape[0], : shape[1]]


def dequantised_fp8(folder: Path, block: tuple[int, int], dtype: torch.dtype, out: Path) -> None:
    """An ordinary checkpoint with a quantised one's values."""
    found = load_file(folder / "model.safetensors")
    for key in [key for key in found if f"{key}_scale_inv" in found]:
        scale = found.pop(f"{key}_scale_inv")
        found[key] = (found[key].float() * spread(scale, block, found[key].shape)).to(dtype)
    out.mkdir()
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (out / "config.json").write_text(json.dumps(fields))


def mxfp4(folder: Path) -> None:
    """gpt_oss's format, of random numbers: of each expert's row 16 bytes for 32 numbers, and an exponent."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found, random = {}, torch.Generator().manual_seed(0)
        for key, tensor in tensors.items():
            if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                found[key] = tensor
                continue
            experts, columns, rows = tensor.shape
            shape = (experts, rows, columns // 32)
            found[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=random, dtype=torch.uint8)
            found[f"{key}_scales"] = torch.randint(118, 124, shape, generator=random, dtype=torch.uint8)
        return found

    rewrite(folder, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})


def compressed(folder: Path, kind: str, group: int = 8) -> None:
    """compressed-tensors: ``w4a16`` (eight numbers of 4 bits per int32), ``w8a16`` (int8) or ``fp8`` (e4m3).

    Args:
        folder: a checkpoint, which becomes a quantised one.
        kind: one of these.
        group: of w4a16: how many numbers of a row have one scale; the others have one per row.
    """

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            if tensor.ndim != 2 or not key.endswith("weight") or any(part in key for part in KEPT):
                found[key] = tensor
                continue
            block = (1, group if kind == "w4a16" else tensor.shape[1])
            most = {"w4a16": 7, "w8a16": 127, "fp8": 448}[kind]
            scale = (block_maxima(tensor.float(), block) / most).to(tensor.dtype)
            numbers = tensor.float() / spread(scale, block, tensor.shape)
            found[f"{key}_scale"] = scale
            if kind == "w4a16":
                found[f"{key}_shape"] = torch.tensor(tensor.shape)
                found[f"{key}_packed"] = packed(numbers.round().clamp(-8, 7))
            else:
                found[key] = numbers.to(E4M3) if kind == "fp8" else numbers.round().to(torch.int8)
        return found

    weights = {
        "num_bits": 4 if kind == "w4a16" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        **({"strategy": "group", "group_size": group} if kind == "w4a16" else {"strategy": "channel"}),
    }
    formats = {"w4a16": "pack-quantized", "w8a16": "int-quantized", "fp8": "float-quantized"}
    fields = {
        "quant_method": "compressed-tensors",
        "format": formats[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    rewrite(folder, change, fields)


def packed(numbers: Tensor) -> Tensor:
    """Numbers from -8 to 7, eight of a row in each int32, the first in its lowest bits."""
    rows, columns = numbers.shape
    count = math.ceil(columns / 8)
    whole = torch.zeros(rows, count * 8, dtype=torch.int64)
    whole[:, :columns] = numbers.long() + 8
    words = (whole.view(rows, count, 8) << torch.arange(0, 32, 4)).sum(-1)
    return words.where(words < 1 << 31, words - (1 << 32)).int()
