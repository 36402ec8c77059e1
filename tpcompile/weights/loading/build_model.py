"""The model of a checkpoint, without weights: its configuration, its class, its architecture on ``meta``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import short
from tpcompile.ir.hf_internals import get_class_from_dynamic_module

from .dequantise import say_nothing_of_it
from .read_headers import Stored

# Parts of the names of attention that runs kernels which torch.export cannot see into.
_OPAQUE_ATTENTION = ("paged",)

_REFUSED = {
    "device_map": "the mesh says where the model goes: give mesh",
    "max_memory": "give memory, in bytes per rank",
    "tp_plan": "give plan",
    "tp_size": "give mesh",
    "distributed_config": "give mesh and plan",
    "device_mesh": "give mesh",
    "load_in_8bit": "give quantization_config",
    "load_in_4bit": "give quantization_config",
    "state_dict": "load the model with transformers, then call tpcompile.parallelize",
    "gguf_file": "load it with transformers, write it with save_pretrained, and load that",
    "ignore_mismatched_sizes": "every tensor must fit: give the configuration of the checkpoint",
    "output_loading_info": "what does not fit is an error: leave it out",
    "use_kernels": "kernels from the hub cannot be captured: leave it out",
    "kernel_config": "kernels from the hub cannot be captured: leave it out",
    "offload_folder": "weights cannot be offloaded: use more ranks",
}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of transformers' from_pretrained that mean nothing here.

    Raises:
        TpCompileError: one of them is given.
    """
    for name, todo in _REFUSED.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise TpCompileError(
                f"from_pretrained of tpcompile does not take {name}", where="arguments", todo=todo
            )


def find_config(name_or_path: str, config: Any, subfolder: str, hub: Mapping[str, Any], fields: Any) -> Any:
    """The checkpoint's configuration, with some fields changed.

    Args:
        name_or_path: of the checkpoint.
        config: a configuration to take instead, or where to find it.
        subfolder: of the checkpoint.
        hub: arguments for the hub.
        fields: fields of the configuration to change.

    Raises:
        TpCompileError: there is none, or it has no such field.
    """
    if config is not None and not isinstance(config, transformers.PretrainedConfig | str | PathLike):
        raise TpCompileError(
            f"config is {short(config)}", where="from_pretrained", todo="give a configuration, or its folder"
        )
    if isinstance(config, transformers.PretrainedConfig):
        found, unknown = copy.deepcopy(config), dict(fields)
    else:
        where = str(config) if config is not None else name_or_path
        todo = "give the folder of a checkpoint with a config.json, or a name on the hub, or config"
        with refusing("there is no configuration to load", where=where, todo=todo):
            found, unknown = transformers.AutoConfig.from_pretrained(
                where, return_unused_kwargs=True, subfolder=subfolder, **hub, **fields
            )
    unknown = {key: value for key, value in unknown.items() if key not in hub}
    if unknown:
        raise TpCompileError(
            f"the configuration has no field {', '.join(sorted(unknown))}",
            where=type(found).__name__,
            todo="give arguments of tpcompile.from_pretrained, or fields of the model's configuration",
        )
    found.name_or_path = name_or_path
    return found


def find_class(
    config: Any, model_class: Any, trust_remote_code: bool, hub: Mapping[str, Any]
) -> type[nn.Module]:
    """The class of a checkpoint's model: the one given, or the first of the configuration's architectures.

    Args:
        config: the configuration.
        model_class: a model's class or an ``AutoModel...`` to take it from, or None.
        trust_remote_code: whether code that comes with the checkpoint may run.
        hub: arguments for the hub.

    Raises:
        TpCompileError: there is none, or it is not a transformers model.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if model_class is None or mapping is not None:
        found = _class_of(config, model_class, mapping, trust_remote_code, hub)
    else:
        found = model_class
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise TpCompileError(
            f"{found!r} is not a model of transformers",
            where="model_class",
            todo="give a subclass of PreTrainedModel; or load the model yourself and parallelize it",
        )
    return found


def _class_of(config: Any, auto: Any, mapping: Any, trust_remote_code: bool, hub: Mapping[str, Any]) -> Any:
    remote = getattr(config, "auto_map", None) or {}
    names = getattr(config, "architectures", None) or []
    models = [k for k in remote if k.startswith("AutoModel")]
    own = [k for k in models if str(remote[k]).rpartition(".")[2] in names]
    name = auto.__name__ if auto is not None else next(iter(own + models), None)
    if name in remote:
        if not trust_remote_code:
            raise TpCompileError(
                "the checkpoint brings its own code",
                where=remote[name],
                todo="read it, then give trust_remote_code=True; or give model_class",
            )
        return get_class_from_dynamic_module(remote[name], config.name_or_path, **hub)
    candidates = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
    candidates = candidates if isinstance(candidates, list | tuple) else (candidates,)
    if mapping is not None:
        by_name = {c.__name__: c for c in candidates}
        chosen = [by_name[n] for n in names if n in by_name] or list(candidates)
    else:
        known = (getattr(transformers, n, None) for n in names)
        chosen = [c for c in known if c is not None]
    if not chosen:
        raise TpCompileError(
            f"which class the model has is not known (architectures: {names})",
            where=type(config).__name__,
            todo="give model_class",
        )
    return chosen[0]


def find_dtype(dtype: Any, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """The type of the model: as given, else the configuration's, else that of the first floating tensor.

    A tensor of floating numbers of one byte is a quantised one.

    Raises:
        TpCompileError: it is not a type.
    """
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None)
        floats = (s.dtype for s in stored.values() if s.dtype.is_floating_point and s.dtype.itemsize > 1)
        first = next(floats, torch.float32)
        dtype = first if dtype is None else dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise TpCompileError(
            f"{dtype!r} is not a type that a model can have",
            where="dtype",
            todo='give torch.bfloat16, or "auto"',
        )
    return found


def build_model(
    model_class: Any, config: Any, dtype: torch.dtype, attention: str | Mapping[str, str] | None
) -> transformers.PreTrainedModel:
    """The model in evaluation mode, on ``meta``: an ordinary one, also where the weights are quantised.

    Args:
        model_class: its class.
        config: its configuration; it is copied.
        dtype: its type.
        attention: its attention implementation, or None for the configuration's or transformers' own choice.

    Raises:
        TpCompileError: it cannot be made, or its attention cannot be captured.
    """
    wanted = attention or getattr(config, "_attn_implementation", None)
    for one in wanted.values() if isinstance(wanted, Mapping) else (wanted,):
        if one is not None and any(part in str(one) for part in _OPAQUE_ATTENTION):
            raise TpCompileError(
                f"the attention implementation {one!r} cannot be captured",
                where=model_class.__name__,
                todo='give attn_implementation="sdpa" (or "eager")',
            )
    config = copy.deepcopy(config)
    say_nothing_of_it(config)
    extra = {"attn_implementation": attention} if attention is not None else {}
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    todo = "check the configuration; transformers' from_config with it fails likewise"
    with refusing("the model cannot be made", where=model_class.__name__, todo=todo):
        with torch.device("meta"), safe():
            model = model_class._from_config(config, dtype=dtype, **extra)
    found: transformers.PreTrainedModel = model.eval()
    return found


def find_generation_config(
    model: Any, given: Any, name_or_path: str, subfolder: str, hub: Mapping[str, Any]
) -> None:
    """Gives a model that can generate its ``generation_config``: the one given, or the checkpoint's.

    Raises:
        TpCompileError: what is given, or the checkpoint's file, is none.
    """
    if given is not None and not isinstance(given, transformers.GenerationConfig):
        raise TpCompileError(
            f"generation_config is {short(given)}", where="from_pretrained", todo="give a GenerationConfig"
        )
    if not model.can_generate():
        return
    if given is not None:
        model.generation_config = copy.deepcopy(given)
        return
    where = {"subfolder": subfolder, **hub}
    # Old checkpoints have no file of its own, but fields of it in the model's configuration.
    older: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
    for extra in ({}, older):
        file = Path(name_or_path, subfolder, extra.get("config_file_name", "generation_config.json"))
        with contextlib.nullcontext() if file.is_file() else contextlib.suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                name_or_path, **where, **extra
            )
            return
