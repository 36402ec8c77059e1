"""The model that is meant on the command line: a configuration, by a name or a folder, or a function."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.capture.export.default_example import default_example
from tpcompile.errors import TpCompileError
from tpcompile.ir.check import short
from tpcompile.ir.units import size_text

_COPIES = 6
"""How many copies of the weights there are: the model, a copy that runs, what ranks hold, and gradients."""

_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def find_model(
    spec: str,
    layers: int | None = None,
    dtype: str | torch.dtype | None = None,
    fields: Sequence[str] | None = None,
    *,
    verifiable: bool = False,
    keep_quantised: bool = False,
) -> nn.Module:
    """The model that is meant, in evaluation mode.

    Args:
        spec: a folder with a ``config.json``, such a file, a name in the hub's cache, or ``module:factory``.
        layers: cut it down to so many layers.
        dtype: the type of its weights.
        fields: other values of the configuration, as ``name=value``.
        verifiable: with random weights, if they fit into memory as often as verifying wants them; else a
            configuration's model is on ``meta``.
        keep_quantised: with the weights that ``from_pretrained(..., keep_quantised=True)`` has; for that
            the checkpoint has to be there, of which the files' headers are read.

    Raises:
        TpCompileError: there is no such model, it is too large to be verified, or cannot be kept quantised.
    """
    module, colon, factory = spec.partition(":")
    if colon and not Path(spec).exists():
        if keep_quantised:
            raise _no_checkpoint()
        model = _from_factory(module, factory)
        if verifiable:
            _check_memory(model)
        return model
    from tpcompile.weights.loading.build_model import build_model, find_class, find_config, find_dtype

    config = find_config(spec, None, "", {"local_files_only": True}, _read_fields(fields or ()))
    if layers is not None:
        _cut(config.get_text_config(), layers)
    if keep_quantised:
        return _kept_quantised(spec, config, dtype)
    kind: Any = find_class(config, None, False, {})
    wanted = find_dtype(dtype, config, {})
    _warn_of_quantised(config, wanted)
    model = build_model(kind, config, wanted, None)
    if verifiable:
        _check_memory(model)
        model = kind._from_config(model.config, dtype=wanted).eval()
    return model


def model_meant(
    model: Any, dtype: str | torch.dtype | None = None, keep_quantised: bool = False
) -> nn.Module:
    """A model as it is, or the one of a configuration, or of ``find_model``'s text, on ``meta``.

    Args:
        model: one of these; a configuration without an architecture is that of a causal language model.
        dtype: the type of a configuration's weights, by default the configuration's.
        keep_quantised: see ``find_model``.

    Raises:
        TpCompileError: it is none of these, a model with another type, or what is to be kept quantised is
            no checkpoint.
    """
    if isinstance(model, str | os.PathLike):
        return find_model(str(model), dtype=dtype, keep_quantised=keep_quantised)
    if keep_quantised:
        raise _no_checkpoint()
    if isinstance(model, nn.Module) and dtype is None:
        return model
    import transformers

    from tpcompile.weights.loading.build_model import build_model, find_class, find_dtype

    if not isinstance(model, transformers.PretrainedConfig):
        what = "a model, which has a type" if isinstance(model, nn.Module) else short(model)
        todo = "give a model without a dtype, a configuration, or a name"
        raise TpCompileError(f"model is {what}", where="model", todo=todo)
    config = copy.deepcopy(model)
    auto = None if config.architectures else transformers.AutoModelForCausalLM
    kind: Any = find_class(config, auto, False, {})
    wanted = find_dtype(dtype, config, {})
    _warn_of_quantised(config, wanted)
    return build_model(kind, config, wanted, None)


def _no_checkpoint() -> TpCompileError:
    todo = "give the checkpoint's folder or name; a model whose weights are quantised needs no such wish"
    return TpCompileError("what is to be kept quantised is no checkpoint", where="keep_quantised", todo=todo)


def _kept_quantised(spec: str, config: Any, dtype: str | torch.dtype | None) -> nn.Module:
    from tpcompile.weights.loading.request import CheckpointRequest

    request = CheckpointRequest(
        spec, dtype=dtype, config=config, keep_quantised=True, others={"local_files_only": True}
    )
    model: nn.Module = request.build(request.open(), torch.device("meta")).model
    return model


def _warn_of_quantised(config: Any, dtype: torch.dtype) -> None:
    from tpcompile.weights.loading.dequantise import quantised_by

    if (method := quantised_by(config)) is not None:
        warnings.warn(
            f"the checkpoint is quantised ({method}): this is about the model whose weights "
            f"were dequantised, to {dtype}; keep_quantised is about the one whose weights stay so",
            stacklevel=3,
        )


def _read_fields(fields: Sequence[str]) -> dict[str, Any]:
    """``vocab_size=1024`` as a field and its value; a value that is not JSON is text."""
    found: dict[str, Any] = {}
    for each in fields:
        name, equals, text = each.partition("=")
        if not equals:
            raise TpCompileError(f"{each!r} is not name=value", where="--set", todo="give --set name=value")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _check_memory(model: nn.Module) -> None:
    """Refuses to verify what would not fit: the system would end this process, or another one.

    Raises:
        TpCompileError: it would not.
    """
    held = sum(p.nbytes for p in model.parameters())
    needed, there = _COPIES * held, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise TpCompileError(
            f"to verify {size_text(held)} of weights takes about {size_text(needed)}, more than the "
            f"{size_text(there)} of this machine",
            where="MODEL",
            todo="cut it down: --layers 1, --set vocab_size=1024, --set hidden_size=...",
        )


def _from_factory(module: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # also: not a name of a module
        raise TpCompileError(
            f"there is no {module}:{factory}: {error}", where="MODEL", todo="give package.module:factory"
        ) from None
    if not isinstance(model, nn.Module):
        raise TpCompileError(
            f"{module}:{factory} returns a {type(model).__name__}", where="MODEL", todo="return a module"
        )
    return model.eval()


def _cut(config: Any, layers: int) -> None:
    """Leaves a configuration so many layers; lists with an entry per layer are cut with it."""
    for name in _DEPTHS:
        depth = getattr(config, name, None)
        if isinstance(depth, int) and depth > layers:
            for field, value in vars(config).items():
                if isinstance(value, list) and len(value) == depth:
                    setattr(config, field, value[:layers])
            setattr(config, name, layers)


def example_of(model: nn.Module, batch: int, seq: int) -> dict[str, Any] | None:
    """A call with token ids of this size; other inputs, and other models, are as ``parallelize`` has them."""
    example = default_example(model)
    if example is None:
        return None
    sizes = (batch, seq)
    highest = int(getattr(getattr(model, "config", None), "vocab_size", 2) or 2)
    return {
        name: torch.randint(highest, sizes) if isinstance(x, Tensor) and x.dtype == torch.long else x
        for name, x in example.items()
    }
