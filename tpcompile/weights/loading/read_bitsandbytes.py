"""Checkpoints that bitsandbytes' weights were written to: their tensors become those of a matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.bitsandbytes_weights import EightBit, FourBit
from tpcompile.ir.torch_internals import no_dispatch

from .fill_tensor import Filler
from .read_headers import MappedFiles

_STATE = "quant_state.bitsandbytes__"


def of_matrices(operation: Any) -> Any:
    """transformers' operation that makes a weight, but one that can be taken apart, of tensors of a file."""

    class OfMatrices(operation):
        """It makes weights that can be taken apart."""

        def convert(self, input_dict: Any, model: Any = None, full_layer_name: str = "", **_: Any) -> Any:
            """The weight of what the file has of it."""
            parts = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
            if len(parts) == 1:  # of a layer that is not quantised
                return input_dict
            layer = model.get_submodule(full_layer_name.rpartition(".")[0])
            size = layer.out_features, layer.in_features
            return {"weight": _eight_bit(parts, layer) if "SCB" in parts else _four_bit(parts, size)}

    return OfMatrices


def _eight_bit(parts: Mapping[str, Tensor], layer: Any) -> Any:
    numbers, scales = parts["weight"], parts["SCB"]
    _refuse_others(scales, numbers.shape[0])
    return EightBit.of((numbers, scales), numbers.shape, layer.state.threshold)


def _four_bit(parts: Mapping[str, Tensor], size: tuple[int, int]) -> Any:
    """A weight, and what is said of it in a tensor of bytes; without its scales it is none.

    Raises:
        ValueError: its parts do not fit together.
    """
    state: Any = next((part for key, part in parts.items() if _STATE in key), None)
    if state is None or "weight.absmax" not in parts:
        raise ValueError("its scales, or what is said of them, are missing")
    with no_dispatch():  # it is read now: what it says is needed for the conversion
        said = json.loads(bytes(Filler(MappedFiles().read).whole(state.expression).tolist()))
    rows, columns = size
    block, count = said["blocksize"], rows * columns // said["blocksize"]
    weight, scales = parts["weight"], parts["weight.absmax"]
    if tuple(said["shape"]) != size or columns % block or weight.dtype != torch.uint8:
        given = f"{weight.dtype} for a matrix of shape {said['shape']} in blocks of {block}"
        raise ValueError(f"{given}, where the layer has one of {list(size)}, and its rows are whole blocks")
    _refuse_others(scales, count)
    if "weight.nested_absmax" in parts:
        inner, step = parts["weight.nested_absmax"], said["nested_blocksize"]
        _refuse_others(inner, -(-count // step))
        each = inner[:, None].expand(-1, step).reshape(-1)[:count]
        scales = parts["weight.nested_quant_map"][scales.long()] * each + said["nested_offset"]
    packed, scales = weight.reshape(rows, columns // 2), scales.reshape(rows, columns // block)
    kind = getattr(torch, said["dtype"])
    return FourBit.of((packed, scales), size, block, said["quant_type"], kind, "nested_offset" in said)


def _refuse_others(scales: Tensor, count: int) -> None:
    """Refuses scales of another number.

    Raises:
        ValueError: they are such.
    """
    if tuple(scales.shape) != (count,):
        raise ValueError(f"scales of shape {list(scales.shape)}, where there should be {count}")
