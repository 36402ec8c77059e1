"""A checkpoint that is to be loaded: opened and checked, then matched with its model on ``meta``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypedDict

import torch

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import check_arguments
from tpcompile.ranks.describe import describe_value

from .build_model import (
    build_model,
    find_class,
    find_config,
    find_dtype,
    find_generation_config,
    refuse_arguments,
)
from .dequantise import find_quantizer, finish_model, prepare_model
from .expressions import Expression
from .find_files import POINTER, find_files
from .initialise_rest import initialise_rest
from .match_keys import match_keys
from .quantise import quantise_model, quantizer_for
from .read_headers import Stored, read_headers


class Hub(TypedDict, total=False):
    """Arguments that find a checkpoint on the hub."""

    cache_dir: str | PathLike[str] | None
    force_download: bool
    local_files_only: bool
    proxies: Mapping[str, str] | None
    revision: str | None
    token: str | bool | None


HUB = tuple(Hub.__annotations__)
_OF_ADAPTERS = ("cache_dir", "force_download", "token", "revision", "local_files_only")
_MEANINGLESS = ("low_cpu_mem_usage", "use_safetensors", "weights_only", "disable_mmap")


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files are complete.

    Attributes:
        config: its configuration.
        stored: its tensors by their keys.
        quantizer: what loads quantised ones, or None.
        wanted: what quantises them while they are loaded, or None.
        becomes: how, as text.
    """

    config: Any
    stored: Mapping[str, Stored]
    quantizer: Any = None
    wanted: Any = None
    becomes: str = ""

    def lines(self) -> list[str]:
        """What ranks must agree about."""
        tensors = [f"{key}: {s.dtype} {list(s.shape)}" for key, s in sorted(self.stored.items())]
        fields = sorted((name, v) for name, v in vars(self.config).items() if not name.startswith("_"))
        settings = [f"configuration, {name}: {describe_value(value)}" for name, value in fields]
        return [*tensors, *settings, f"quantised: {self.becomes}"]


@dataclass(frozen=True)
class Built:
    """A model on ``meta`` that fits its checkpoint.

    Attributes:
        model: the model; what is not loaded has its value already.
        expressions: per name what a tensor is made of.
        unexpected: keys that the model has no use for.
    """

    model: Any
    expressions: Mapping[str, Expression]
    unexpected: frozenset[str]


@dataclass(frozen=True)
class CheckpointRequest:
    """What the user asked ``from_pretrained`` for; see there.

    Attributes:
        name: the folder, or the name on the hub.
        dtype: the type of the model.
        config: a configuration, where to find it, or None.
        model_class: the model's class, an ``AutoModel...``, or None.
        attn_implementation: the attention implementation, or None.
        generation_config: instead of the checkpoint's.
        key_mapping: patterns of keys to rename.
        trust_remote_code: whether code that comes with the checkpoint may run.
        variant: of the weights.
        subfolder: of the folder or repository.
        quantization_config: how a quantised checkpoint is to be loaded, or how another one is to be
            quantised, or None.
        keep_quantised: whether the weights of a quantised one stay so.
        adapter: what is to be put into the model; only whether there is one counts here.
        others: arguments for the hub, and fields of the configuration.
    """

    name: str
    dtype: Any = None
    config: Any = None
    model_class: Any = None
    attn_implementation: str | Mapping[str, str] | None = None
    generation_config: Any = None
    key_mapping: Mapping[str, str] | None = None
    trust_remote_code: bool = False
    variant: str | None = None
    subfolder: str = ""
    quantization_config: Any = None
    keep_quantised: bool = False
    adapter: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def _hub(self) -> dict[str, Any]:
        return {key: value for key, value in self.others.items() if key in HUB}

    def open(self) -> Opened:
        """Finds the checkpoint and checks the headers of all its files.

        Raises:
            TpCompileError: it is not there, not complete, or of a kind that cannot be loaded.
        """
        refuse_arguments(self.others)
        check_arguments(Hub, self.others, "from_pretrained")
        with refusing("key_mapping has a pattern that is none", where="key_mapping", todo="correct it"):
            for pattern in self.key_mapping or ():
                re.compile(pattern)
        fields = {k: v for k, v in self.others.items() if k not in HUB and k not in _MEANINGLESS}
        find = functools.partial(
            find_files, self.name, variant=self.variant, subfolder=self.subfolder, hub=self._hub
        )
        remote = {"trust_remote_code": self.trust_remote_code}  # without a word of it transformers would ask
        try:
            config = find_config(self.name, self.config, self.subfolder, self._hub | remote, fields)
        except TpCompileError:
            find()  # perhaps it can say more: it is a folder of an adapter, or there is no such folder
            raise
        files = find(pointer=getattr(config, POINTER, None))
        self._refuse_adapter()
        keep, wanted, becomes = self.keep_quantised, None, ""
        quantizer = find_quantizer(config, self.quantization_config, self.name, keep)
        if quantizer is None and self.quantization_config is not None:
            wanted = quantizer_for(self.quantization_config, self.name)
            becomes = describe_value(wanted.quantization_config.to_dict())
        return Opened(config, read_headers(files.paths, files.index), quantizer, wanted, becomes)

    def _refuse_adapter(self) -> None:
        """Refuses an adapter beside the model, which transformers would put into it."""
        from transformers.utils import find_adapter_config_file, is_peft_available

        if self.adapter is not None or not is_peft_available() or os.path.isfile(self.name):
            return
        hub = {key: value for key, value in self._hub.items() if key in _OF_ADAPTERS}
        if find_adapter_config_file(self.name, subfolder=self.subfolder, **hub) is not None:
            raise TpCompileError(
                "there is an adapter beside the model, which transformers would load with it",
                where=self.name,
                todo="give adapter=..., the folder of an adapter; or a folder without adapter_config.json",
            )

    def build(self, opened: Opened, device: torch.device) -> Built:
        """Makes the model on ``meta`` and finds out what its tensors are made of.

        Raises:
            TpCompileError: the model cannot be made, or is not the checkpoint's.
        """
        config, quantizer = opened.config, opened.quantizer
        todo = "check the configuration and the checkpoint; nothing was loaded"
        with refusing("no model can be made of the checkpoint", where=self.name, todo=todo):
            dtype = find_dtype(self.dtype, config, opened.stored)
            dtype = dtype if quantizer is None else quantizer.update_dtype(dtype)
            model_class = find_class(config, self.model_class, self.trust_remote_code, self._hub)
            model = build_model(model_class, config, dtype, self.attn_implementation)
            if quantizer is not None:
                prepare_model(model, quantizer, dtype, sorted({s.file for s in opened.stored.values()}))
            expressions, _, unexpected = match_keys(model, opened.stored, dtype, self.key_mapping, quantizer)
            if quantizer is not None:
                finish_model(model, quantizer)
            initialise_rest(model, expressions, device)
            if opened.wanted is not None:
                expressions = quantise_model(model, opened.wanted, expressions, dtype)
            find_generation_config(model, self.generation_config, self.name, self.subfolder, self._hub)
        return Built(model, expressions, frozenset(unexpected))
