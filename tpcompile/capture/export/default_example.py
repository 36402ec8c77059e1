"""The call that a transformers model is captured for when the user gives no example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 16
_SPECIAL = ("_token_id", "_token_index")
"""How names of settings end that say which token means something else than text, such as a picture."""


def default_example(model: nn.Module) -> dict[str, Any] | None:
    """Arguments for a model that says what its main input is, or None: it is captured at its first call.

    Token ids are [2, 16]; pictures and spectrograms take their size from the configuration, a decoder
    beside an encoder gets as many tokens of its own. To capture a model values do not matter. To verify it
    they do: of equal tokens, or of padding, a model computes the same whatever its attention does. So they
    differ, and are always alike; pictures are of the weights' type.
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if config is None or not isinstance(name, str):
        return None
    dtype = getattr(model, "dtype", None)
    decoder = (
        {"decoder_input_ids": _tokens(config, 1)} if getattr(config, "is_encoder_decoder", False) else {}
    )
    if name == "input_ids":
        return {"input_ids": _tokens(config, 0), **decoder}
    if (
        name == "input_features"
        and hasattr(config, "num_mel_bins")
        and hasattr(config, "max_source_positions")
    ):
        frames = 2 * config.max_source_positions  # a convolution halves them
        return {"input_features": _values((BATCH, config.num_mel_bins, frames), dtype), **decoder}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (BATCH, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": _values(shape, dtype)}
    return None


def parts_of_config(config: Any) -> list[Any]:
    """A configuration of transformers, and those in it, such as that of a model's text part."""
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {})))
    return [part for part in parts if part is not None]


def _tokens(config: Any, seed: int) -> Tensor:
    """Token ids of text, [2, 16]; 0 where the configuration does not say how many there are."""
    settings = [item for part in parts_of_config(config) for item in vars(part).items()]
    special = {value for name, value in settings if name.endswith(_SPECIAL) and isinstance(value, int)}
    size = min(
        (value for name, value in settings if name == "vocab_size" and isinstance(value, int)), default=0
    )
    plain = [token for token in range(min(size, 1000)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(max(1, len(plain)), (BATCH, LENGTH), generator=generator, device="cpu")
    return torch.tensor(plain or [0], device="cpu")[chosen]


def _values(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
