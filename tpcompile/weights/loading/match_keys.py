"""Which tensors of a checkpoint every parameter and buffer of a model is made of."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tpcompile.errors import TpCompileError
from tpcompile.ir.hf_internals import (
    LoadStateDictConfig,
    convert_and_load_state_dict_in_model,
    get_model_conversion_mapping,
    rename_source_key,
)
from tpcompile.ir.module_tensors import every_name, whole_tensors
from tpcompile.ir.names import first_few
from tpcompile.ir.unwrap import unwrap

from .expressions import Expression, copied, leaves
from .fill_tensor import Filler
from .lazy_tensor import LazyTensor, Recording
from .read_headers import MappedFiles, Stored

_CHUNK = 1 << 24  # elements of a tensor that are compared at once
_TODO = "load a checkpoint of this model; nothing was loaded"
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def match_keys(
    model: Any,
    stored: Mapping[str, Stored],
    dtype: torch.dtype,
    key_mapping: Mapping[str, str] | None,
    quantizer: Any = None,
) -> tuple[dict[str, Expression], set[str], set[str]]:
    """Matches a checkpoint with a model on ``meta``, by the rules of the installed transformers.

    Keys are renamed and tensors converted by transformers' own code, which is run on lazy tensors. The
    model's tensors stay on ``meta``, in the type that they will have; tied ones are one tensor afterwards.

    Args:
        model: the model; it keeps the conversions that were used, for saving.
        stored: the checkpoint's tensors.
        dtype: the model's type.
        key_mapping: the user's own renaming of keys, patterns as in transformers.
        quantizer: transformers' own, whose conversions dequantise a quantised checkpoint; else None.

    Returns:
        Per name (of ``tensors_by_name``) what a tensor is made of; the names that a checkpoint may lack and
        does; the keys that the model has no use for.

    Raises:
        TpCompileError: a key is missing, or has another shape or kind of type.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    info = _convert(model, stored, dtype, key_mapping, quantizer)
    unwrap(model)  # what stays quantised
    expressions = _harvest(model)
    for name, e in expressions.items():  # transformers asks its quantizer whether a shape matters
        if e.shape != shapes.get(name, e.shape):
            info.mismatched_keys.add((name, e.shape, shapes[name]))
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        keys = _sources(model, name, stored, key_mapping, quantizer)
        what = f"a weight conversion failed for {name}: {_last_error(text)}"
        _refuse(what, _places(keys, stored), stored)
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=lambda m: str(m[0]))[0]
        keys = _sources(model, name, stored, key_mapping, quantizer)
        what = f"{name} has shape {list(found)} in the checkpoint, {list(expected)} in the model"
        _refuse(what, _places(keys, stored) or name, stored)
    _tie(model, expressions, info.missing_keys)
    lacking = set(info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    lacking -= info.missing_keys
    if info.missing_keys:
        _refuse(f"the checkpoint lacks {first_few(sorted(info.missing_keys))}", "", stored)
    for name, expression in expressions.items():
        _check_type(name, expression, quantizer is not None)
    return _by_first_name(model, expressions), lacking, set(info.unexpected_keys)


def warn_unexpected(unexpected: Iterable[str], where: str) -> None:
    """Warns of keys that the model has no use for."""
    if unexpected:
        warnings.warn(f"{where}: the model has no use for {first_few(sorted(unexpected))}", stacklevel=3)


def _refuse(what: str, where: str, stored: Mapping[str, Stored]) -> NoReturn:
    files = sorted({s.file for s in stored.values()})
    raise TpCompileError(what, where=where or ", ".join(files[:3]), todo=_TODO)


def _places(keys: Iterable[str], stored: Mapping[str, Stored]) -> str:
    return ", ".join(f"{stored[key].file}: {key}" for key in keys)


def _last_error(text: str) -> str:
    """The error in what transformers tells of a conversion that failed: a traceback, and more."""
    lines = text.strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*\wError: ", line)), lines[-1])


def _convert(
    model: Any,
    stored: Mapping[str, Stored],
    dtype: torch.dtype,
    key_mapping: Mapping[str, str] | None,
    quantizer: Any,
) -> Any:
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, _plain(key_mapping), quantizer),
    )
    lazy: dict[str, Any] = {key: LazyTensor(leaf) for key, leaf in stored.items()}
    with _no_progress_bar(), Recording():
        info, _ = convert_and_load_state_dict_in_model(
            model=model, state_dict=lazy, load_config=config, disk_offload_index=None
        )
    return info


def _plain(mapping: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(mapping) if mapping is not None else None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bar would count what is only looked at."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _harvest(model: nn.Module) -> dict[str, Expression]:
    """Takes the lazy tensors out of a model; valueless ones on ``meta`` take their place."""
    found: dict[str, Expression] = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if isinstance(tensor, LazyTensor):
                    found[f"{prefix}.{name}" if prefix else name] = tensor.expression
                    table[name] = _like(tensor, table is module._parameters)
    return found


def _like(tensor: Tensor, parameter: bool) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty


def _tie(model: Any, expressions: dict[str, Expression], missing: set[str]) -> None:
    """Ties parameters as transformers does: to the name that the checkpoint has.

    Where it has both and they differ, they are not tied, whatever the configuration says.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in expressions and source in expressions:
            if same_values(expressions[target], expressions[source]):
                del expressions[target]
                missing.add(target)
            else:
                warnings.warn(
                    f"{target} and {source} are tied by the configuration, but differ in the checkpoint: "
                    "they are not tied",
                    stacklevel=4,
                )
                model.all_tied_weights_keys.pop(target)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def same_values(one: Expression, other: Expression) -> bool:
    """Whether two tensors are equal, bit by bit; they are read part by part."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one == other or not one.shape:
        return one == other
    files = MappedFiles()
    rows = max(1, _CHUNK // max(1, math.prod(one.shape[1:])))
    for start in range(0, one.shape[0], rows):
        count = min(rows, one.shape[0] - start)
        parts = [torch.empty((count, *e.shape[1:]), dtype=e.dtype) for e in (one, other)]
        for part, e in zip(parts, (one, other), strict=True):
            Filler(files.read).fill(part, e, [start] + [0] * (len(e.shape) - 1))
        if not torch.equal(*parts):
            return False
    return True


def _kind(dtype: torch.dtype) -> object:
    """Types of one kind are cast into each other on loading; others would lose their meaning."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return "floating"
    return "integer" if dtype in _INTEGERS else dtype


def _check_type(name: str, expression: Expression, quantised: bool) -> None:
    """What a quantizer computes with may be of any type, but not what it lets through."""
    for leaf in copied(expression) if quantised else leaves(expression):
        if _kind(leaf.dtype) != _kind(expression.dtype):
            raise TpCompileError(
                f"{name} has type {leaf.dtype} in the checkpoint, {expression.dtype} in the model",
                where=leaf.place,
                todo=_TODO,
            )


def _by_first_name(model: nn.Module, expressions: Mapping[str, Expression]) -> dict[str, Expression]:
    """Expressions by the first of a tied tensor's names."""
    by_tensor = {id(t): expressions[name] for name, t in every_name(model) if name in expressions}
    return {name: by_tensor[id(t)] for name, t in whole_tensors(model).items() if id(t) in by_tensor}


def _sources(
    model: Any,
    name: str,
    stored: Mapping[str, Stored],
    key_mapping: Mapping[str, str] | None,
    quantizer: Any,
) -> list[str]:
    """The keys that a parameter is made of, for an error."""
    mapping: list[Any] = get_model_conversion_mapping(model, _plain(key_mapping), quantizer)
    converters = [m for m in mapping if hasattr(m, "operations")]
    renamings = [m for m in mapping if not hasattr(m, "operations")]
    state = model.state_dict()

    def renamed(key: str) -> str:
        if key in state and key == name:
            return key
        new: str = rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]
        return re.sub(r"\*\.", "0.", new)

    return [key for key in stored if renamed(key) == name]
