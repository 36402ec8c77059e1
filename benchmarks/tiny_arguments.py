"""One argument of a forward by its name: tokens, pictures, patches with their grid, sound, masks, boxes.

Sizes come from the configuration. A name without a rule takes its shape from the forward's documentation.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH, LENGTH, DECODER_LENGTH = 2, 14, 7
FRAMES, MANY_FRAMES, SAMPLES, PIXELS = 60, 200, 4000, 64
GRIDS = ("grid_thw", "image_grid_thw", "spatial_shapes", "target_sizes", "pixel_position_ids")
"""Arguments that go with patches in the place of pictures."""

SOUND = ("input_values", "input_features", "audio_mel", "past_values")


def made(name: str, model: nn.Module, given: dict[str, Any], required: list[str] | None = None) -> Any:
    """One argument by its name, or None where nothing says what it is."""
    config, asked = model.config, {*given, *(required or ())}
    side = 2 * (size_of(config, "spatial_merge_size") or 2)
    if "input_ids" in name:
        return torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if name in ("grid_thw", "image_grid_thw"):
        return torch.tensor([[1, side, side]] * BATCH)
    if name in ("spatial_shapes", "target_sizes"):
        return torch.tensor([[side, side]] * BATCH)
    if name == "pixel_position_ids":
        rows = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        return rows.expand(BATCH, -1, -1).clone()
    if name in ("hidden_states", "pixel_values") and (grids := [g for g in GRIDS if g in asked]):
        return _patches(config, side, grids[0])
    if name.endswith("mask") and not name.startswith("past_"):
        return _mask(name, given, side)
    if "bbox" in name or name.endswith("boxes"):
        corner = torch.linspace(0.1, 0.5, BATCH * LENGTH).view(BATCH, LENGTH, 1)
        return torch.cat([corner, corner / 2, corner + 0.2, corner + 0.3], -1)
    if (history := given.get("past_values")) is not None and name.startswith("past_"):
        features = size_of(config, "num_time_features") or 0
        return (
            history.new_ones(*history.shape[:2], features)
            if "features" in name
            else history.new_ones(history.shape)
        )
    if "pixel_values" in name:
        return picture(name, config)
    if name in SOUND:
        return _sequence(name, config)
    return _documented(name, model)


def _patches(config: Any, side: int, grid: str) -> Tensor:
    """Patches of all pictures as rows, or side by side as one picture, or the rows of each picture."""
    patch, channels = square(size_of(config, "patch_size") or 16), size_of(config, "in_channels")
    channels, count = channels or size_of(config, "num_channels") or 3, side * side
    if grid == "target_sizes":
        return torch.zeros(1, channels, patch[0], patch[1] * count * BATCH)
    width = channels * math.prod(patch) * (size_of(config, "temporal_patch_size") or 1)
    rows = (BATCH, count) if grid in ("spatial_shapes", "pixel_position_ids") else (BATCH * count,)
    return torch.zeros(*rows, width)


def _mask(name: str, given: dict[str, Any], side: int) -> Tensor:
    """Everything is seen: all tokens, frames or pixels of what is masked."""
    pixels = given.get("pixel_values")
    if name.startswith("pixel") and isinstance(pixels, Tensor):
        shape = (BATCH, side * side) if pixels.ndim < 4 else (BATCH, *pixels.shape[-2:])
        return torch.ones(shape, dtype=torch.long)
    sound = next((given[n] for n in ("audio_mel", "input_features", "input_values") if n in given), None)
    if sound is None:
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    last = sound.ndim != 3 or sound.shape[-1] in (FRAMES, MANY_FRAMES, SAMPLES)
    return torch.ones(BATCH, sound.shape[-1 if last else 1], dtype=torch.bool)


def picture(name: str, config: Any) -> Tensor:
    frames = size_of(config, "num_frames")
    video = [frames] if frames else [4] if name == "pixel_values_videos" else []
    channels = size_of(config, "num_channels") or 3
    return torch.zeros(BATCH, *video, channels, *square(size_of(config, "image_size") or PIXELS))


def _sequence(name: str, config: Any) -> Tensor:
    """A time series, sound, or a spectrogram."""
    if name == "past_values":
        channels = size_of(config, "num_input_channels")
        history = (size_of(config, "context_length") or 32) + max(size_of(config, "lags_sequence") or [0])
        return torch.zeros(BATCH, history, *([channels] if channels else []))
    if name == "input_values" and not size_of(config, "max_length"):
        return torch.zeros(BATCH, SAMPLES)
    width = size_of(config, "num_mel_bins") or size_of(config, "feature_size") or 80
    return torch.zeros(BATCH, size_of(config, "max_length") or FRAMES, width)


def _documented(name: str, model: nn.Module) -> Tensor | None:
    """A tensor of the shape that the forward's documentation says; rows and lengths are the usual ones."""
    text = re.search(rf"\b{name} \(([^\n]*?)of shape [`'(]+([^)]*)\)", model.forward.__doc__ or "")
    if text is None:
        return None
    shape = [_documented_size(word.strip(" `'"), model.config) for word in text[2].split(",") if word.strip()]
    long = any(kind in text[1] for kind in ("Long", "Int", "Bool"))
    return torch.zeros(shape, dtype=torch.long if long else torch.float32)


def _documented_size(word: str, config: Any) -> int:
    if word.isdecimal():
        return int(word)
    if word.startswith(("batch", "num_images")):
        return BATCH
    if "height" in word or "width" in word or word == "image_size":
        return square(size_of(config, "image_size") or PIXELS)["width" in word]
    size = size_of(config, word.removeprefix("config."))
    return size if isinstance(size, int) else LENGTH


def size_of(config: Any, name: str) -> Any:
    """An attribute of a configuration, or of a part of it."""
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))]
    return next((getattr(p, name) for p in parts if getattr(p, name, None) is not None), None)


def square(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))
