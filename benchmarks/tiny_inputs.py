"""Arguments with which a model of transformers runs, found by its forward's signature and by trying.

Where the usual shapes do not fit, others are tried in turn, and arguments that an error names are added.
"""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.exporters.utils import precompute_export_inputs

from benchmarks.tiny_arguments import (
    BATCH,
    DECODER_LENGTH,
    FRAMES,
    GRIDS,
    LENGTH,
    MANY_FRAMES,
    SAMPLES,
    SOUND,
    made,
    picture,
    size_of,
)
from tests.helpers import families
from tpcompile.capture.export.default_example import default_example


def running_call(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call that the model has been seen to run.

    Raises:
        Exception: what the usual arguments failed with, if no others work either.
    """
    failed: list[Exception] = []
    for given in _ways(model, failed):
        for _ in range(6):
            inputs = _filled(given, dtype, size_of(model.config, "vocab_size"))
            try:
                with torch.no_grad():
                    _check(model(**inputs))
                return _precomputed(model, inputs)
            except Exception as error:
                failed.append(error)
                more = _more(model, given, error)
                given |= more
                if not more:
                    break
    raise told(failed)


def told(failed: list[Exception]) -> Exception:
    """The first error, unless one says that the type of numbers is to blame."""
    return next(filter(wants_other_numbers, failed), failed[0])


def wants_other_numbers(error: Exception) -> bool:
    """Whether an error says that the type of numbers is to blame, so that no other sizes help."""
    return re.search("double|scalar type|dtype", str(error), re.IGNORECASE) is not None


def _more(model: nn.Module, given: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Arguments that an error asks for, and pictures as these want them."""
    found = {name: made(name, model, given) for name in _asked_for(model, given, error)}
    more = {name: value for name, value in found.items() if value is not None}
    if "pixel_values" in given and any(name in GRIDS for name in more):
        more["pixel_values"] = made("pixel_values", model, {**given, **more})
    pictures = given.get("pixel_values")
    if (
        not more
        and re.search("expected (4, got 3|5, got 4)", str(error))
        and isinstance(pictures, Tensor)
        and pictures.ndim == 4
    ):
        more["pixel_values"] = pictures[:, None]  # some for each text
    return more


def _check(results: Any) -> None:
    """Raises ValueError where there is nothing to compare: all is hidden, by a mask of the other kind."""
    numbers = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.is_floating_point()]
    if all(bool((x == x.flatten()[0]).all()) for x in numbers if x.numel()):
        raise ValueError("all results are the same number")


def _ways(model: nn.Module, failed: list[Exception]) -> Iterator[dict[str, Any]]:
    """The usual arguments, then some with sound, spectrograms and pictures of other shapes."""
    yield _usual(model)
    usual = _usual(model)
    masks = {n: ~v for n, v in usual.items() if isinstance(v, Tensor) and v.dtype == torch.bool}
    if masks:
        yield usual | masks
    for name, value in usual.items():
        if name in SOUND and value.ndim > 1:
            for other in _turned(value, model.config, str(failed[0])):
                given = usual | {name: other}
                given |= {n: made(n, model, given) for n in usual if n.endswith("features_mask")}
                yield given
                if masks:
                    yield given | masks
        if name == "pixel_values" and value.ndim > 3 and "weight of size" not in str(failed[0]):
            if "5D" in str(failed[0]):
                yield usual | {name: torch.stack([value, value], 1)}
            height, width = value.shape[-2:]
            sizes = [(height // 2, width)] if height == 2 * width else []
            sizes += [] if size_of(model.config, "image_size") else [(224, 224), (48, 320), (384, 384)]
            for size in sizes:
                others = [n for n, v in usual.items() if isinstance(v, Tensor) and v.shape == value.shape]
                yield usual | {n: value.new_zeros(*value.shape[:-2], *size) for n in others}


def _turned(value: Tensor, config: Any, problem: str) -> Iterator[Tensor]:
    """Sound as one channel; a spectrogram with its frames last, of a width that an error says, or sound."""
    if value.ndim == 2:
        yield value[:, None]
        yield value.new_zeros(BATCH, 1, 8 * SAMPLES)
        yield value.new_zeros(BATCH, 1, FRAMES)
        return
    widths = {value.shape[-1], size_of(config, "hidden_size"), 128, *map(int, re.findall(r"\d+", problem))}
    frames = 2 * (size_of(config, "max_source_positions") or MANY_FRAMES // 2)
    for width in sorted(w for w in widths if isinstance(w, int) and 16 < w < 2000):
        yield value.new_zeros(BATCH, FRAMES, width)
        yield value.new_zeros(BATCH, width, FRAMES)
        yield value.new_zeros(BATCH, width, frames)
    yield value.new_zeros(BATCH, SAMPLES)
    yield value.new_zeros(BATCH, 1, SAMPLES)


def _usual(model: nn.Module) -> dict[str, Any]:
    """Arguments of the right shapes for what a model's forward takes, mostly zeros."""
    known = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    given = {} if any(name in GRIDS for name in required) else default_example(model) or {}
    if main not in given or (main == "pixel_values" and size_of(model.config, "num_frames")):
        if main in known or not required:
            given[main] = made(main, model, given, required)
        if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
            given["decoder_input_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for name in required:
        if name not in given and (value := made(name, model, given, required)) is not None:
            given[name] = value
    generates = getattr(model, "can_generate", lambda: False)()
    size = size_of(model.config, "image_size")
    if main == "input_ids" and "pixel_values" in known and size and not generates:
        given["pixel_values"] = picture("pixel_values", model.config)
    causal = generates and not model.config.is_encoder_decoder  # its usual call has no padding
    if "attention_mask" in known and "input_ids" in given and not causal:
        given["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        given["attention_mask"][0, LENGTH - 2 :] = 0
    if "decoder_attention_mask" in known and "decoder_input_ids" in given:
        given["decoder_attention_mask"] = torch.ones(BATCH, DECODER_LENGTH, dtype=torch.long)
    if "use_cache" in known:
        given["use_cache"] = False
    return given


def _filled(given: dict[str, Any], dtype: torch.dtype, vocabulary: int | None) -> dict[str, Any]:
    """The same arguments with random numbers and tokens; masks, grids and boxes stay."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            found[name] = value
        elif value.is_floating_point() and "bbox" not in name:
            found[name] = torch.randn(value.shape, generator=generator).to(dtype)
        elif value.is_floating_point():
            found[name] = value.to(dtype)
        elif name.endswith("input_ids"):
            tokens = families.token_ids(BATCH, DECODER_LENGTH if "decoder" in name else LENGTH)
            found[name] = tokens if vocabulary is None else tokens % vocabulary
        else:
            found[name] = value
    return found


def _precomputed(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """With what transformers' own exporters compute from grids before a model is traced, if that runs."""
    if not any(name in inputs for name in (*GRIDS, "feature_lens", "input_features_mask", "image_sizes")):
        return inputs
    more = dict(inputs)
    try:
        precompute_export_inputs(model, more)
        with torch.no_grad():
            model(**more)
    except Exception:  # the values themselves do as well, where nothing reads them
        return inputs
    return more


def _asked_for(model: nn.Module, given: dict[str, Any], error: Exception) -> list[str]:
    """Arguments that an error names, or that the lines name where something was None."""
    known = set(inspect.signature(model.forward).parameters) - set(given) - {"self", "kwargs", "labels"}
    words = sorted(re.findall(r"\w+", str(error).lower()), key=lambda word: not word.endswith("ids"))
    found = [name for name in dict.fromkeys(words) if name in known]
    if found or "None" not in str(error):
        return found[:1] if re.search(r"\b(one|1) of\b|\beither\b", str(error)) else found
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        text = linecache.getline(frame.f_code.co_filename, line)
        words = sorted(re.findall(r"\w+", text), key=lambda word: not word.endswith("ids"))
        if found := [name for name in words if name in known and name in frame.f_locals]:
            return found[:1]
    return []
