"""Small models and their quantised checkpoints, whose weights stay quantised in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests.helpers import quantised

SIZES = quantised.SIZES | {"hidden_size": 128}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 0,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 16}),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, EXPERTS),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, LATENT),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig, EXPERTS | {"head_dim": 16}),
}


def plain(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A checkpoint that is not quantised."""
    kind, config, fields = FAMILIES[name]
    torch.manual_seed(0)
    kind(config(**(SIZES | fields))).to(dtype).save_pretrained(folder)


def checkpoint(name: str, folder: Path, dtype: torch.dtype, block: tuple[int, int] = (16, 16)) -> None:
    """A checkpoint whose weights are fp8 in blocks, or MXFP4."""
    plain(name, folder, dtype)
    if name == "gpt_oss":
        quantised.mxfp4(folder)
    else:
        quantised.fp8(folder, block)


def of_experts(model: Any) -> Any:
    """With experts that compute as captured ones do."""
    if hasattr(model.config, "_experts_implementation_internal"):
        model.set_experts_implementation("batched_mm")
    return model


def dequantised(name: str, folder: Path) -> Any:
    """What transformers makes of it."""
    by = hf.Mxfp4Config if name == "gpt_oss" else hf.FineGrainedFP8Config
    asked = by(dequantize=True)
    return of_experts(FAMILIES[name][0].from_pretrained(folder, quantization_config=asked))


def with_fp8_layers(name: str, folder: Path) -> Any:
    """What transformers makes of it where its kernels are."""
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None):
        return FAMILIES[name][0].from_pretrained(folder)
