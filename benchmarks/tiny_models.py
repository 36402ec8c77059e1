"""Any type of transformers as a tiny model with inputs of its own, found by the names of attributes.

No type is known by name here: whatever a configuration calls its width is made small, so are its parts,
and lists with an entry per layer keep one layer of each kind.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from tests.helpers import families
from tpcompile.capture.export.default_example import default_example

BATCH, LENGTH, DECODER_LENGTH = 2, 14, 7
LARGEST = 150e6
"""Parameters of the largest model that is tried."""

# Every meaning has a size of its own; an attribute that is smaller already stays.
_NAMES: dict[int, str] = {
    259: "vocab_size encoder_hash_byte_group_vocab vocab_size_per_layer_input",
    128: "hidden_size d_model n_embd embed_dim hidden_dim dim emb_dim embedding_dim decoder_hidden_size "
    "encoder_hidden_size text_hidden_size out_hidden_size projection_dim projector_hidden_size lru_width "
    "attention_hidden_size d_inner word_embed_proj_dim encoder_hidden_dim hidden_size_per_layer_input "
    "d_embed hidden_size_global adapter_in_dim",
    292: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size ffn_config encoder_intermediate_size "
    "decoder_intermediate_size block_ff_dim block_multiple_of speech_encoder_intermediate_size "
    "prefix_dense_intermediate_size",
    8: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
    "rotary_dim attention_heads encoder_num_attention_heads decoder_num_attention_heads "
    "linear_num_value_heads swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
    "qk_rope_head_dim "
    "linear_num_heads speech_encoder_attention_heads",
    4: "num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads "
    "index_n_heads mm_tokens_per_image kv_n_heads num_frames",
    16: "head_dim d_kv linear_key_head_dim linear_value_head_dim swa_head_dim attention_head_dim "
    "index_head_dim global_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_n_heads "
    "n_mamba_heads mamba_num_heads",
    6: "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size "
    "attention_chunk_size mamba_chunk_size index_topk num_blocks_per_layer",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth layers encoder_num_hidden_layers decoder_num_hidden_layers num_experts_per_tok "
    "num_experts_per_token num_expert_group moe_topk moe_k top_k n_group mamba_n_groups attn_layer_period "
    "expert_layer_period no_rope_layer_interval full_attention_interval decoder_num_layers "
    "speech_encoder_layers",
    28: "moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size",
    36: "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len max_sequence_length",
    30: "max_source_positions",
    18: "q_lora_rank",
    10: "kv_lora_rank",
    12: "qk_nope_head_dim",
    14: "v_head_dim",
    7: "mamba_d_state state_size ssm_state_size",
    5: "time_step_rank",
    0: "num_kv_shared_layers",
    1: "first_k_dense_replace num_dense_layers topk_group n_shared_experts attn_layer_offset "
    "expert_layer_offset num_mtp_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_HEAD_DIM = _SIZES["head_dim"]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")

# Where the usual sizes do not fit together, these are tried in turn.
_VARIANTS: tuple[dict[str, int | None], ...] = (
    {},
    {"pad_token_id": 0},  # where rows end is found by it
    {"num_heads": 16},  # an inner width of twice the hidden size has twice the heads
    {"num_key_value_heads": 8},
    {"head_dim": None},
    {"intermediate_size": 256, "num_heads": 16},
    {"hidden_dim": None},
    {"embedding_size": 128},
    {"hidden_size": 96, "d_model": 96, "embed_dim": 96, "hidden_dim": 96, "dim": 96},
)


def _shrunk(config: PreTrainedConfig, variant: dict[str, int | None]) -> dict[str, Any]:
    """What to change of a configuration and of its parts."""
    sizes: dict[str, int | None] = {**_SIZES, **variant}
    if "qk_rope_head_dim" in vars(config):  # what is called the size of a head follows from this one
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": sizes["num_attention_heads"]}
    new: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            new[name] = {"model_type": value.model_type, **_shrunk(value, variant)}
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            new[name] = _TOKENS.get(name, min(value, 1))
        elif type(value) is int and (size := sizes.get(name)) is not None:
            new[name] = min(value, size)
        elif value is None and name in sizes and ("expert" in name or name in ("vocab_size", "pad_token_id")):
            new[name] = sizes[name]
        elif isinstance(value, dict) and "mrope_section" in value:
            new[name] = _short_sections(value)
        elif name == "depths":
            new[name] = [min(depth, 2) for depth in value]
    return new | _layer_lists(config, new)


def _short_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of the rotary dimensions, which have to add up to half the size of a head."""
    count = len(rope["mrope_section"])
    half = _HEAD_DIM // 2
    return rope | {"mrope_section": [half // count] * (count - 1) + [half - half // count * (count - 1)]}


def _layer_lists(config: PreTrainedConfig, new: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, cut to one layer of each kind (two to six layers)."""
    found: dict[str, Any] = {}
    for name in _LAYERS:
        count = vars(config).get(name)
        lists = {
            k: v for k, v in vars(config).items() if isinstance(v, list) and count and len(v) == count > 1
        }
        if not lists:
            continue
        kinds = list(zip(*lists.values(), strict=True))
        kept = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:6]
        kept = sorted({*kept, *range(2)} if len(kept) < 2 else kept)
        found[name] = len(kept)
        found |= {k: [v[i] for i in kept] for k, v in lists.items()}
    return found


def tiny_model(kind: str, auto: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a type that runs, in eval mode, and the arguments of a call.

    Args:
        kind: the type, as in ``AutoConfig.for_model``.
        auto: the name of an auto class.
        dtype: of weights and inputs.

    Raises:
        Exception: what the usual sizes failed with, if no others work either.
    """
    failed: list[Exception] = []
    for variant in _VARIANTS:
        try:
            config = AutoConfig.for_model(kind, **_shrunk(AutoConfig.for_model(kind), variant))
            # Where a type has several classes, transformers looks for one of these and takes the first else.
            config.architectures = config.architectures or []
            with torch.device("meta"):
                size = parameters_of(getattr(transformers, auto).from_config(config))
            if size > LARGEST:
                raise ValueError(f"the small configuration has {size / 1e6:.0f} million parameters")
            model = families.prepare(getattr(transformers, auto).from_config(config), dtype)
            inputs = inputs_of(model, dtype)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except Exception as error:
            failed.append(error)
    raise failed[0]


def default_problem(kind: str, auto: str) -> str:
    """Why a type cannot be built from its own default configuration either, or an empty text."""
    try:
        with torch.device("meta"):
            getattr(transformers, auto).from_config(AutoConfig.for_model(kind))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def inputs_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Random arguments for what a model's forward takes."""
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    given = default_example(model) or {}
    if main not in given or (main == "pixel_values" and _size(model.config, "num_frames")):
        given[main] = _other_input(main, model.config)
        if model.config.is_encoder_decoder and "decoder_input_ids" in known:
            given["decoder_input_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for name in ("input_ids", "pixel_values"):
        if name in known and name not in given and known[name].default is inspect.Parameter.empty:
            given[name] = _other_input(name, model.config)
    generates = getattr(model, "can_generate", lambda: False)()
    size = _size(model.config, "image_size")
    if main == "input_ids" and "pixel_values" in known and size and not generates:
        given["pixel_values"] = torch.zeros(BATCH, 3, *_square(size))
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value.is_floating_point():
            found[name] = torch.randn(value.shape, generator=generator).to(dtype)
        else:
            found[name] = families.token_ids(BATCH, DECODER_LENGTH if "decoder" in name else LENGTH)
    causal = generates and not model.config.is_encoder_decoder  # its usual call has no padding
    if "attention_mask" in known and "input_ids" in found and not causal:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[0, LENGTH - 2 :] = 0
        found["attention_mask"] = mask
    if "decoder_attention_mask" in known and "decoder_input_ids" in found:
        found["decoder_attention_mask"] = torch.ones(BATCH, DECODER_LENGTH, dtype=torch.long)
    if "use_cache" in known:
        found["use_cache"] = False
    return found


def _other_input(name: str, config: Any) -> Tensor:
    """Tokens, a picture of a size that the configuration does not say, a video, sound, or a sequence."""
    if name == "input_ids":
        return torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if name.startswith("pixel_values"):
        frames = _size(config, "num_frames")
        video = [frames] if frames else [4] if name == "pixel_values_videos" else []
        channels = _size(config, "num_channels") or 3
        return torch.zeros(BATCH, *video, channels, *_square(_size(config, "image_size") or 64))
    if name == "past_values":
        channels = _size(config, "num_input_channels")
        return torch.zeros(BATCH, _size(config, "context_length") or 32, *([channels] if channels else []))
    if name == "input_values" and not _size(config, "max_length"):
        return torch.zeros(BATCH, 4000)
    width = _size(config, "num_mel_bins") or _size(config, "feature_size") or 80
    frames = _size(config, "max_length") or 60
    return torch.zeros(BATCH, frames, width)


def _size(config: Any, name: str) -> Any:
    """An attribute of a configuration, or of a part of it."""
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))]
    return next((getattr(p, name) for p in parts if getattr(p, name, None) is not None), None)


def _square(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def parameters_of(model: nn.Module) -> int:
    """How many numbers the model has."""
    return sum(math.prod(p.shape) for p in model.parameters())
