"""``generate`` of a saved program: transformers' loop, over the programs instead of the model.

Of the model's class, which is one of transformers', only what prepares and steers the loop is used: it is
made without its constructor, and has no modules and no weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import short

from ..generates_alike import GeneratesAlike, WithoutBatching
from .values import decode, encode

_CLASSES = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
_NOT_KEPT = ("quantization_config", "auto_map", "_name_or_path", "compile_config")
"""Of configurations: what is about a checkpoint, names code, or compiles, which saved programs do not."""


def generating_data(model: nn.Module, original: type[nn.Module]) -> dict[str, Any]:
    """What ``generate`` needs of a model, as JSON; or, as "refused", why there is no ``generate``.

    A class or methods of somebody's own would have to be imported, and encoders are called by themselves,
    which saved programs are not.
    """
    config: Any = getattr(model, "config", None)
    wishes: Any = getattr(model, "generation_config", None)
    known = _CLASSES.fullmatch(original.__module__) and hasattr(original, "_sample")
    replaced = any(callable(value) and hasattr(original, name) for name, value in vars(model).items())
    foreign = not known or replaced or not _has_own_methods(original)
    if foreign or config is None or wishes is None or config.is_encoder_decoder:
        return {"refused": "it is not a decoder of transformers' own"}
    if type(config) is not getattr(original, "config_class", None):
        return {"refused": f"its configuration is of another class, {type(config).__name__}"}
    try:
        data = {
            "class": [original.__module__, original.__qualname__],
            "config": _kept(config.to_dict()),
            "attention": config._attn_implementation,
            "dtype": encode(model.dtype),
            "generation": _kept(json.loads(wishes.to_json_string(use_diff=False))),
        }
        read = _configurations(original, json.loads(json.dumps(data)))
    except Exception as error:  # attributes may be anything
        return {"refused": f"its configuration cannot be written: {short(error)}"}
    for before, after in zip((config, wishes), read, strict=True):
        if (name := _first_unlike(before.to_dict(), after.to_dict())) is not None:
            return {"refused": f"{name} of its {type(before).__name__} is read otherwise than it is written"}
    return data


def _has_own_methods(kind: type[nn.Module]) -> bool:
    """Whether all methods of a class are those that it came with."""
    functions = (f for each in kind.__mro__ for f in vars(each).values() if inspect.isfunction(f))
    return all(f.__module__.partition(".")[0] in ("torch", "transformers") for f in functions)


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _NOT_KEPT}


def _first_unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first attribute that was lost or changed; lists may have been tuples."""
    old, new = ({key: repr(_listed(value)) for key, value in _kept(each).items()} for each in (before, after))
    return next((key for key in sorted({**old, **new}) if old.get(key) != new.get(key)), None)


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(value[key]) for key in sorted(value, key=repr)}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def _configurations(kind: Any, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model's configuration, and that of its generation."""
    from transformers import GenerationConfig

    config = kind.config_class.from_dict(dict(data["config"]))
    config._attn_implementation = data["attention"]  # masks are made for it
    return config, GenerationConfig.from_dict(dict(data["generation"]))


@dataclass
class _Ranks:
    """What ``GeneratesAlike`` looks at."""

    group: dist.ProcessGroup
    group_name: str
    steering: tuple[Any, Sequence[Any]] = (None, ())
    generating: bool = False


class _Loop(GeneratesAlike, WithoutBatching):
    """Mixed into the model's class."""

    device: torch.device
    dtype: torch.dtype

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As that of a sharded model.

        Raises:
            TpCompileError: as there; or the class uses its modules while it generates.
        """
        try:
            return self._generate(super().generate, args, kwargs)  # type: ignore[misc]
        except AttributeError as error:
            if error.obj is not self:
                raise
            raise TpCompileError(
                f"generate of this class uses its {error.name}, which a saved program has not",
                where=f"saved {type(self).__name__}",
                todo="generate with the sharded model, or call the program in a loop of your own",
            ) from error

    def _where(self) -> torch.device:
        return self.device

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there are no weights here.

        Raises:
            TpCompileError: always.
        """
        raise TpCompileError(
            "a saved program writes no checkpoint: it would be without weights",
            where=f"saved {type(self).__name__}",
            todo="save_pretrained of the sharded model",
        )

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What transformers calls with a static cache on a GPU: saved programs run as they are."""
        return self  # type: ignore[return-value]  # a module

    def get_experts_implementation(self) -> dict[str, str]:
        """How experts are computed stands in the programs."""
        return {}


def loop_over(
    program: Callable[..., Any],
    data: Mapping[str, Any],
    group: dist.ProcessGroup,
    group_name: str,
    device: torch.device,
) -> Any:
    """What has ``generate``, over a saved program.

    Args:
        program: called in the model's place.
        data: what ``generating_data`` made.
        group: the ranks.
        group_name: what tells them from others.
        device: this rank's.

    Raises:
        TpCompileError: the data is something else, or of another transformers.
    """
    with refusing("the saved program cannot generate", where="generate", todo="save the program again"):
        module, name = data["class"]
        kind = getattr(importlib.import_module(module), name) if _CLASSES.fullmatch(module) else None
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "_sample")):
            what = f"{short(data['class'])} is not a class that generates"
            raise TpCompileError(what, where="generate", todo="save the program again")
        config, wishes = _configurations(kind, data)
        dtype = decode(data["dtype"], device)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return program(*args, **kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    body = {"forward": forward, "device": device, "dtype": dtype, "__module__": kind.__module__}
    loop: Any = object.__new__(type(kind.__name__, (_Loop, kind), body))
    nn.Module.__init__(loop)
    loop.config, loop.generation_config, loop._tp = config, wishes, _Ranks(group, group_name)
    return loop.eval()


def refuse_to_generate(name: str, why: str) -> TpCompileError:
    """What is said where there is no loop."""
    return TpCompileError(
        f"the saved {name} has no generate: {why}",
        where="generate",
        todo="save the model without that, or call the program in a loop of your own",
    )
