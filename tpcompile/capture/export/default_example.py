"""The call that a transformers model is captured for when the user gives no example."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH, LENGTH = 2, 16


def default_example(model: nn.Module) -> dict[str, Any] | None:
    """Arguments for a model that says what its main input is, or None: it is captured at its first call.

    Token ids are [2, 16]; pictures and spectrograms take their size from the configuration, a decoder
    beside an encoder gets as many tokens of its own. Values do not matter; they are of the weights' type.
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if config is None or not isinstance(name, str):
        return None
    tokens, dtype = torch.zeros(BATCH, LENGTH, dtype=torch.long), getattr(model, "dtype", None)
    decoder = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
    if name == "input_ids":
        return {"input_ids": tokens, **decoder}
    if (
        name == "input_features"
        and hasattr(config, "num_mel_bins")
        and hasattr(config, "max_source_positions")
    ):
        frames = 2 * config.max_source_positions  # a convolution halves them
        return {"input_features": torch.zeros(BATCH, config.num_mel_bins, frames, dtype=dtype), **decoder}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (BATCH, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, dtype=dtype)}
    return None
