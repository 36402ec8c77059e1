"""Quantised checkpoints: transformers' quantizer dequantises them as it converts weights, or keeps them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer

from tpcompile.capture.export.default_example import parts_of_config
from tpcompile.errors import TpCompileError, refusing

from .keep_blocks import KeptBlocks, as_list, finish_kept, keep_blocks, kept_by
from .read_bitsandbytes import of_matrices

_FIELD = "quantization_config"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)  # types of scales that are powers of two
_SCALE = "_scale_inv"  # what transformers adds to a weight's name for the scales of its blocks
_WHOLE = (
    "load it with transformers, call dequantize() of the model, write that with save_pretrained, and load it"
)


def find_quantizer(config: Any, given: Any, where: str, keep: bool = False) -> HfQuantizer | None:
    """What dequantises a checkpoint, or keeps it: transformers' quantizer; None if it is not quantised.

    Args:
        config: the checkpoint's configuration; afterwards its ``quantization_config`` is the one that counts.
        given: what the user gave for it: one of transformers' objects, a dict of its fields, or None.
        where: the checkpoint, for an error.
        keep: whether weights are to stay quantised, also where transformers would dequantise them here.

    Raises:
        TpCompileError: neither dequantising nor keeping was asked for, the method cannot do it tensor by
            tensor, or this version of transformers does not say how.
    """
    holders = _holders(config)
    if not holders:
        if keep:
            todo = "leave it out, or say how weights are to be quantised: quantization_config"
            raise TpCompileError("the checkpoint is not quantised", where="keep_quantised", todo=todo)
        return None
    stored = getattr(holders[0], _FIELD)
    method = _method(stored)
    said = f"the checkpoint is quantised ({method})"
    if not hasattr(HfQuantizer, "get_load_operations"):  # 5.17
        raise TpCompileError(
            f"{said}, and transformers {transformers.__version__} does not say how single weights are read",
            where=where,
            todo=f"install transformers 5.24 or later, or {_WHOLE}",
        )
    with refusing(f"{said}, which cannot be understood", where=where, todo=_WHOLE):
        if isinstance(given, Mapping):
            given = AutoQuantizationConfig.from_dict({"quant_method": method, **given})
        wanted = AutoHfQuantizer.merge_quantization_configs(copy.deepcopy(stored), given)
        if not hasattr(wanted, "dequantize") and (kept := _keeping(wanted)) is not None:
            setattr(config, _FIELD, wanted)
            return kept
        blocks = KeptBlocks.by(method, wanted)
        if keep:
            return _keeping_blocks(config, wanted, given, blocks, said, where)
        if not getattr(wanted, "dequantize", False):
            kind = type(wanted).__name__
            ways = f"give {_FIELD}=transformers.{kind}(dequantize=True): then every rank dequantises its "
            ways += "slices while it reads them, and holds them in the model's type"
            ways += "; or keep_quantised=True" if blocks is not None else ""
            todo = ways if hasattr(wanted, "dequantize") else _WHOLE
            raise TpCompileError(said, where=where, todo=todo)
        quantizer = _dequantising(wanted)
        operation = _operations(quantizer).get("dequantize")
    if operation is None:
        raise TpCompileError(f"{said}, and dequantised only as a whole", where=where, todo=_WHOLE)
    block = getattr(wanted, "weight_block_size", None)
    if block is not None:
        operation = _of_whole_blocks(operation, tuple(block))
    elif _scales_have_rows(quantizer):
        operation = _of_as_many_rows(operation)
    quantizer.get_load_operations = lambda: {"dequantize": operation}
    setattr(config, _FIELD, wanted)
    return _shared(quantizer)


def quantised_by(config: Any) -> str | None:
    """The method by which a configuration says that the weights are quantised, or None."""
    holders = _holders(config)
    return _method(getattr(holders[0], _FIELD)) if holders else None


def say_nothing_of_it(config: Any) -> None:
    """Makes a configuration that of an ordinary model."""
    for part in _holders(config):
        delattr(part, _FIELD)


def keeps(quantizer: HfQuantizer) -> bool:
    """Whether weights stay quantised: the quantizer makes tensors of their parts."""
    dequantises = getattr(quantizer.quantization_config, "dequantize", False)
    return kept_by(quantizer) is not None or ("deserialize" in _operations(quantizer) and not dequantises)


def _keeping(wanted: Any) -> HfQuantizer | None:
    """What loads a checkpoint whose weights stay quantised; None if that cannot be done."""
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=True)
    if not keeps(quantizer):
        return None
    if _method(wanted) == "bitsandbytes":  # its own weights cannot be taken apart
        operation = of_matrices(_operations(quantizer)["deserialize"])
        quantizer.get_load_operations = lambda: {"deserialize": operation}
    quantizer.validate_environment(device_map=None, weights_only=True)
    return _shared(quantizer)


def _dequantising(wanted: Any) -> HfQuantizer:
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)
    return quantizer


def _keeping_blocks(
    config: Any, wanted: Any, given: Any, blocks: KeptBlocks | None, said: str, where: str
) -> HfQuantizer:
    """What makes weights of a checkpoint's blocks, in a model whose layers are the ordinary ones.

    Raises:
        TpCompileError: there are no blocks, or the user asks for something else as well.
    """
    if blocks is None:
        raise TpCompileError(
            f"{said}, and its weights cannot be kept so", where=where, todo="leave keep_quantised out"
        )
    if given is not None and getattr(wanted, "dequantize", False):
        todo = "leave one of the two out"
        raise TpCompileError(f"keep_quantised, and a {_FIELD} that says otherwise", where=where, todo=todo)
    wanted.dequantize = False
    setattr(config, _FIELD, wanted)
    blocks.config = copy.deepcopy(wanted)
    wanted = copy.deepcopy(wanted)
    wanted.dequantize = True  # so that it leaves the layers as they are
    quantizer = _dequantising(wanted)
    keep_blocks(quantizer, blocks)
    return _shared(quantizer)


def prepare_model(model: Any, quantizer: HfQuantizer, dtype: torch.dtype, files: list[str]) -> None:
    """Lets the quantizer change a model on ``meta`` as it does before it loads (nothing, as a rule)."""
    change_layers(model, quantizer, dtype, files)
    if keeps(quantizer):
        model.hf_quantizer = quantizer


def change_layers(model: Any, quantizer: HfQuantizer, dtype: torch.dtype, files: list[str] | None) -> None:
    """Lets the quantizer put its layers into a model on ``meta``, which is for evaluation."""
    quantizer.preprocess_model(
        model=model, dtype=dtype, device_map=None, checkpoint_files=files, use_kernels=False
    )
    model.eval()  # also the layers that it has put in


def finish_model(model: Any, quantizer: HfQuantizer) -> None:
    """Lets the quantizer finish a model; one that was dequantised becomes an ordinary one in all it says."""
    if (kept := kept_by(quantizer)) is not None:  # of which it knows nothing
        finish_kept(model, kept)
        return
    quantizer.postprocess_model(model)
    if not keeps(quantizer):
        say_nothing_of_it(model.config)
        return
    # What is written is what was read: there is nothing to be reverted.
    own = _operations(quantizer)["deserialize"]
    used = [c for c in model._weight_conversions if not _operates(c, own)]
    model._weight_conversions = used


def _method(stored: Any) -> str:
    fields = stored if isinstance(stored, Mapping) else getattr(stored, "__dict__", {})
    method = fields.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))


def _shared(quantizer: HfQuantizer) -> HfQuantizer:
    """transformers copies a conversion for every key, and with it what belongs to its quantizer."""
    quantizer.__deepcopy__ = lambda memo: quantizer
    return quantizer


def _operates(conversion: Any, operation: Any) -> bool:
    return any(isinstance(one, operation) for one in getattr(conversion, "operations", ()))


def _holders(config: Any) -> list[Any]:
    """A configuration and its parts, as far as they say that they are quantised."""
    return [part for part in parts_of_config(config) if getattr(part, _FIELD, None) is not None]


def _operations(quantizer: HfQuantizer) -> Mapping[str, Any]:
    found: Mapping[str, Any] = quantizer.get_load_operations()
    return found


def _of_whole_blocks(operation: Any, block: tuple[int, ...]) -> Any:
    """An operation that takes a weight's size over the number of its scales for the size of its blocks.

    That is wrong where the last block is cut short (576 rows in blocks of 128): it is filled up before, and
    cut afterwards. Scales for blocks of another size are refused.
    """

    class OfWholeBlocks(operation):
        """transformers' operation, on weights of whole blocks."""

        def convert(self, input_dict: Any, full_layer_name: Any = None, **kwargs: Any) -> Any:
            """Fills up, converts, and cuts."""
            whole, sizes = dict(input_dict), {}
            for key, value in input_dict.items():
                if key + _SCALE in input_dict:
                    weights, scales = as_list(value), as_list(input_dict[key + _SCALE])
                    whole[key] = [_fill(w, s, block) for w, s in zip(weights, scales, strict=True)]
                    if any(w is not old for w, old in zip(whole[key], weights, strict=True)):
                        sizes[full_layer_name if key == "weight" else key] = [w.shape[-2:] for w in weights]
            found = super().convert(whole, full_layer_name=full_layer_name, **kwargs)
            for key, old in sizes.items():
                found[key] = [t[..., :n, :m] for t, (n, m) in zip(as_list(found[key]), old, strict=True)]
            return found

    return OfWholeBlocks


def _scales_have_rows(quantizer: Any) -> bool:
    """Whether each row of a weight of compressed-tensors has scales of its own, by its configuration."""
    config = getattr(getattr(quantizer, "compressor", None), "quantization_config", None)
    groups = [group.weights for group in getattr(config, "config_groups", {}).values() if group.weights]
    return bool(groups) and all(group.strategy in ("channel", "group") for group in groups)


def _of_as_many_rows(operation: Any) -> Any:
    """An operation that would take the scales of one row for those of all."""

    class OfAsManyRows(operation):
        """transformers' operation, on scales of as many rows as the weight has."""

        def convert(self, input_dict: Any, **kwargs: Any) -> Any:
            """Compares, and converts.

            Raises:
                ValueError: the scales are not those of the weight's rows.
            """
            for key in input_dict:
                name = key.removesuffix("_scale")
                weights = input_dict.get(name, input_dict.get(f"{name}_packed"))
                if key == name or weights is None:
                    continue
                for weight, scales in zip(as_list(weights), as_list(input_dict[key]), strict=True):
                    if scales.ndim != 2 or scales.shape[0] != weight.shape[0]:
                        given = f"scales of shape {list(scales.shape)}"
                        raise ValueError(f"{given} for a weight of {weight.shape[0]} rows")
            return super().convert(input_dict, **kwargs)

    return OfAsManyRows


def _fill(weight: Tensor, scales: Tensor, block: tuple[int, ...]) -> Tensor:
    """A weight with zeros behind its last rows and columns, where their block is cut short.

    Raises:
        ValueError: the scales are not those of its blocks.
    """
    if not scales.ndim or weight.dtype not in _FP8:
        return weight  # one scale for all, or packed numbers, whose blocks have a size of their own
    sizes = weight.shape[-2:]
    grid = [-(-size // length) for size, length in zip(sizes, block, strict=True)]
    if list(scales.shape[-2:]) == grid:
        lack = [n * b - size if n > 1 else 0 for n, b, size in zip(grid, block, sizes, strict=True)]
        return pad(weight, (0, lack[1], 0, lack[0])) if any(lack) else weight
    if scales.dtype in _EXPONENTS:
        return weight  # MX formats: the number of scales says which blocks
    given = f"scales of shape {list(scales.shape)} for a weight of shape {list(weight.shape)}"
    raise ValueError(f"{given}, in blocks of {block}")
