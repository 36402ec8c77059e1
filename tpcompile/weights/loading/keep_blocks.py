"""Checkpoints in fp8 blocks and in MXFP4 whose weights stay quantised: tensors of ``BlockScaled``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer

from tpcompile.errors import TpCompileError
from tpcompile.ir.block_scaled import BlockScaled
from tpcompile.ir.unwrap import taken_apart

_NAMES = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
_ACTIVATIONS = "activation_scale"
_MX = (1, 32)  # the blocks of MXFP4


@dataclass
class KeptBlocks:
    """What stays quantised of a checkpoint.

    Attributes:
        bits: what the checkpoint adds to the name of a weight for its bits.
        scales: for its scales.
        block: the size of a block; None if a weight is one.
        config: transformers' configuration, as a checkpoint has it.
        names: the weights.
        left_out: those that have scales of activations as well, for which the model has no place.
    """

    bits: str
    scales: str
    block: tuple[int, int] | None
    config: Any = None
    names: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)

    @classmethod
    def by(cls, method: str, config: Any) -> KeptBlocks | None:
        """What a method's weights are kept as, by a quantisation's configuration; None if they cannot be."""
        block = getattr(config, "weight_block_size", None)
        return None if method not in _NAMES else cls(*_NAMES[method], None if block is None else tuple(block))

    def weight(self, bits: Tensor, scale: Tensor, dtype: torch.dtype) -> BlockScaled:
        """A weight of a checkpoint's tensors.

        Raises:
            ValueError: they do not fit together.
        """
        if self.bits:  # (experts, rows, blocks, 16), of a weight that forward has transposed
            if bits.ndim != 4 or bits.shape[:3] != scale.shape or bits.shape[3] * 2 != _MX[1]:
                raise ValueError(f"scales of shape {list(scale.shape)} for bits of shape {list(bits.shape)}")
            return BlockScaled.of(bits.flatten(2), scale, _MX, dtype, (0, 2, 1))
        if bits.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(f"scales for numbers of type {bits.dtype}")
        if scale.ndim != bits.ndim:
            raise ValueError(f"scales of shape {list(scale.shape)} for a weight of shape {list(bits.shape)}")
        return BlockScaled.of(bits, scale, self.block or tuple(bits.shape[-2:]), dtype)

    def stored(self, name: str, weight: Any) -> dict[str, Tensor]:
        """The tensors of a checkpoint that a weight is made of."""
        if not isinstance(weight, BlockScaled):
            return {name: weight}
        bits = weight.qdata.unflatten(-1, (-1, _MX[1] // 2)) if self.bits else weight.qdata
        return {name + self.bits: bits, name + self.scales: weight.scale}


def keep_blocks(quantizer: HfQuantizer, kept: KeptBlocks) -> None:
    """Lets transformers' quantizer, which would dequantise weights, keep them."""

    class KeepBlocks(ConversionOps):
        """It makes weights whose parts are a checkpoint's tensors."""

        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer  # by which transformers sees that tensors are to keep their type

        def convert(
            self, input_dict: Any, full_layer_name: str = "", model: Any = None, **_: Any
        ) -> dict[str, Any]:
            """The weights, by their names or by the patterns that the next conversion takes them by."""
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            found: dict[str, Any] = {}
            for key, value in input_dict.items():
                if key.endswith(kept.scales) or _ACTIVATIONS in key:
                    kept.left_out |= {full_layer_name} if _ACTIVATIONS in key else set()
                    continue
                weights, scales = as_list(value), input_dict.get(key.removesuffix(kept.bits) + kept.scales)
                if scales is None:
                    weights = [weight.to(dtype) for weight in weights]
                else:
                    pairs = zip(weights, as_list(scales), strict=True)
                    weights = [kept.weight(*pair, dtype) for pair in pairs]
                    kept.names.add(full_layer_name)
                single = key == "weight" or kept.bits
                found |= {full_layer_name: weights[0]} if single else {key: weights}
            return found

    quantizer.get_load_operations = lambda: {"dequantize": KeepBlocks}
    quantizer.kept = kept


def kept_by(quantizer: Any) -> KeptBlocks | None:
    """What stays quantised although transformers' quantizer would dequantise it."""
    return getattr(quantizer, "kept", None)


def as_list(value: Any) -> list[Tensor]:
    """What a conversion is given for a pattern: one tensor, or several."""
    return value if isinstance(value, list) else [value]


def finish_kept(model: Any, kept: KeptBlocks) -> None:
    """Checks what became of the weights, and leaves the model the conversions that are reverted to save it.

    Raises:
        TpCompileError: a conversion of transformers has computed with a weight.
    """
    if lost := sorted(kept.names - taken_apart(model).keys()):
        raise TpCompileError(
            "transformers converts this weight in a way that a quantised one does not go through",
            where=lost[0],
            todo="let the checkpoint be dequantised: quantization_config={'dequantize': True}",
        )
    used = [_without(one, kept) for one in model._weight_conversions]
    model._weight_conversions = [one for one in used if one is not None]
    model.config.quantization_config = kept.config


def _without(conversion: Any, kept: KeptBlocks) -> Any:
    """A conversion as it would be of weights that are not quantised; None if there is none."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    rest = [op for op in conversion.operations if not hasattr(op, "hf_quantizer")]
    if len(rest) == len(conversion.operations) or not rest:
        return conversion if rest else None
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    own = [s for s in sources if not s.endswith(kept.scales) and _ACTIVATIONS not in s]
    return conversion.copy(own, targets, operations=rest)
