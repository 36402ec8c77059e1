"""Small configurations of any type of transformers, found by the names of attributes.

No type is known by name here: whatever a configuration calls its width is made small, so are its parts,
and lists with an entry per layer keep one layer of each kind. Where the usual sizes do not fit together,
others are tried in turn (`CUTS`), and what an error names (`mended`).
"""

from __future__ import annotations

import dataclasses
import linecache
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

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
    2: "num_experts_per_tok num_experts_per_token num_expert_group moe_topk moe_k top_k n_group "
    "mamba_n_groups attn_layer_period expert_layer_period no_rope_layer_interval full_attention_interval",
    28: "moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size",
    36: "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len max_sequence_length",
    30: "max_source_positions",
    18: "q_lora_rank",
    10: "kv_lora_rank num_queries",
    12: "qk_nope_head_dim",
    14: "v_head_dim",
    7: "mamba_d_state state_size ssm_state_size",
    5: "time_step_rank",
    0: "num_kv_shared_layers",
    1: "first_k_dense_replace num_dense_layers topk_group n_shared_experts attn_layer_offset "
    "expert_layer_offset num_mtp_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_WIDTHS, _INNER = _NAMES[128].split(), _NAMES[292].split()
_HEADS = [*_NAMES[8].split(), *_NAMES[4].split(), *_NAMES[16].split()]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LISTED = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_LAYERS = (
    *_LISTED,
    "num_encoder_layers",
    "num_decoder_layers",
    "depth",
    "layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
    "decoder_num_layers",
    "speech_encoder_layers",
)


_PICTURES = ("image_size", "pretrain_image_size", "image_embedding_size", "backbone_feature_sizes")
_LARGE_PICTURE = 320


@dataclass(frozen=True)
class Cut:
    """How a configuration is made small.

    Attributes:
        sizes: other sizes than the usual ones, by name; None leaves an attribute as it is.
        layers: how many layers are left; 0 leaves all.
        widths: whether anything but layers is cut.
        pictures: whether the sides of large pictures are a quarter.
        follow: whether any number that equals a width becomes what that becomes.
        in_place: whether attributes are set on the default configuration, rather than given to a new one,
            which derives others from them.
        sections: of the rotary dimensions, for three-dimensional positions.
        largest: millions of parameters that a model may have.
    """

    sizes: Mapping[str, int | None] = field(default_factory=dict)
    layers: int = 2
    widths: bool = True
    pictures: bool = True
    follow: bool = False
    in_place: bool = False
    sections: tuple[int, ...] = ()
    largest: float = 150


CUTS: tuple[Cut, ...] = (
    Cut(),
    Cut(follow=True),
    Cut({"pad_token_id": 0}),  # where rows end is found by it
    Cut(layers=0, largest=60),  # lists say which layers are taken
    Cut(layers=0, follow=True, largest=60),
    Cut(widths=False, largest=60),
    Cut(widths=False, layers=0, largest=60),
    Cut({"num_heads": 16}),  # an inner width of twice the hidden size has twice the heads
    Cut({"num_key_value_heads": 8}),
    Cut({"head_dim": None}),
    Cut({"intermediate_size": 256, "num_heads": 16}),
    Cut({"hidden_dim": None}),
    Cut({"embedding_size": 128}),
    Cut({name: 96 for name in ("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim")}),
    Cut(dict.fromkeys(_INNER, 256)),  # half of it is a width too
    Cut({"index_topk": 16, "max_position_embeddings": None}),
    Cut(dict.fromkeys(_HEADS), follow=True, largest=60),
    Cut(pictures=False),
    Cut(in_place=True),
    Cut(in_place=True, follow=True, layers=0, largest=60),
    Cut(widths=False, layers=0, pictures=False, largest=60),
)


def small_config(kind: str, cut: Cut) -> PreTrainedConfig:
    """A type's default configuration, made small."""
    default: PreTrainedConfig = AutoConfig.for_model(kind)
    followed = _followed(default) if cut.follow else {}
    if not any(_has_large_pictures(vars(part)) for part in _parts(default)):
        cut = dataclasses.replace(cut, pictures=False)
    if cut.in_place:
        _set(default, _shrunk(default, cut, followed))
        return default
    config: PreTrainedConfig = AutoConfig.for_model(kind, **_shrunk(default, cut, followed))
    return config


def _set(config: PreTrainedConfig, new: dict[str, Any]) -> None:
    for name, value in new.items():
        part = getattr(config, name)
        if isinstance(part, PreTrainedConfig):
            _set(part, value)
        elif name != "model_type":
            setattr(config, name, value)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _followed(config: PreTrainedConfig) -> dict[int, int]:
    """Widths of the default configuration, and what they become."""
    widths = {vars(part).get(name) for part in _parts(config) for name in _WIDTHS}
    return {w: _SIZES["hidden_size"] for w in widths if type(w) is int and w > _SIZES["hidden_size"]}


def _shrunk(config: PreTrainedConfig, cut: Cut, followed: dict[int, int]) -> dict[str, Any]:
    """What to change of a configuration and of its parts."""
    sizes: dict[str, int | None] = {**_SIZES} if cut.widths else {"vocab_size": _SIZES["vocab_size"]}
    sizes |= dict.fromkeys(_LAYERS, cut.layers or None)
    if "vocab_size" not in vars(config) and _as_many_key_heads(vars(config)):
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")  # no type shares them outside of text
    sizes |= cut.sizes
    if "qk_rope_head_dim" in vars(config) and cut.widths:  # what is called the size of a head follows it
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": sizes["num_attention_heads"]}
    new: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            new[name] = _own(value) | _shrunk(value, cut, followed)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            new[name] = _TOKENS.get(name, min(value, 1))
        elif type(value) is int and (size := sizes.get(name)) is not None:
            new[name] = min(value, size)
        elif type(value) is int and value in followed and name not in sizes:
            new[name] = followed[value]
        elif (
            isinstance(value, list | tuple) and value and all(type(v) is int and v in followed for v in value)
        ):
            new[name] = [followed[v] for v in value]
        elif value is None and name in sizes and ("expert" in name or name in ("vocab_size", "pad_token_id")):
            new[name] = sizes[name]
        elif value is None and name in cut.sizes:
            new[name] = cut.sizes[name]
        elif name in ("depths", "blocks_per_stage", "stage_num_blocks") and value and cut.layers:
            new[name] = [min(depth, cut.layers) for depth in value]
    new |= _layer_lists(config) if cut.layers else {}
    return new | _rotary(config, new, cut) | (_small_pictures(config) if cut.pictures else {})


def _as_many_key_heads(values: Mapping[str, Any]) -> bool:
    return values.get("num_key_value_heads") == values.get("num_attention_heads")


def _own(part: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration sets otherwise in a part of it than that part's type does."""
    usual = vars(type(part)())
    found = {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_") and not isinstance(value, PreTrainedConfig) and value != usual.get(name)
    }
    if "_out_features" in vars(part):
        found["out_features"] = part.out_features
    return {"model_type": part.model_type, **found}


def _has_large_pictures(values: Mapping[str, Any]) -> bool:
    sides = values.get("image_size") or 0
    return max(sides if isinstance(sides, list | tuple) else [sides]) >= _LARGE_PICTURE


def _small_pictures(config: PreTrainedConfig) -> dict[str, Any]:
    """A quarter of the sides of pictures, in whole patches, and of what is given in these."""
    values = vars(config)
    patch = values.get("patch_size")
    patch = (patch if isinstance(patch, int) else 1) * (values.get("num_windows") or 1)

    def quarter(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(quarter, value))
        return max(1, value // (4 * patch)) * patch if value >= _LARGE_PICTURE else value // 4

    return {name: quarter(values[name]) for name in _PICTURES if values.get(name)}


def _rotary(config: PreTrainedConfig, new: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Sections of the rotary dimensions, which have to add up to a share of half a head's size."""
    rope = vars(config).get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if cut.sections:
        return {"rope_parameters": rope | {"mrope_section": list(cut.sections)}}
    old, small = _head_size(vars(config)), _head_size(vars(config) | new)
    if "mrope_section" not in rope or not old or not small:
        return {}
    half = sum(rope["mrope_section"]) * small // old
    return {"rope_parameters": rope | {"mrope_section": _scaled(rope["mrope_section"], half)}}


def _head_size(values: Mapping[str, Any]) -> int:
    for name in ("qk_rope_head_dim", "head_dim"):
        if values.get(name):
            return int(values[name])
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    return width // heads if width and heads else 0


def _scaled(sections: list[int], total: int) -> list[int]:
    """Sections in about these proportions that add up to a total; none is empty."""
    whole = sum(sections)
    short = [max(1, size * total // whole) for size in sections[1:]]
    return [total - sum(short), *short]


def _layer_lists(config: PreTrainedConfig) -> dict[str, Any]:
    """Lists with an entry per layer, cut to one layer of each kind (two to six layers)."""
    found: dict[str, Any] = {}
    for name in _LISTED:
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


def mended(cut: Cut, error: Exception) -> Cut | None:
    """Another cut, if the error says what is wrong with this one."""
    text = str(error)
    found = re.search(r"sum exactly to (\d+).*split_sizes=\[(\d+), (\d+), (\d+)\]", text)
    if found and not cut.sections:
        total, *sections = map(int, found.groups())
        return dataclasses.replace(cut, sections=tuple(_scaled(sections, total)))
    missing = re.search(r"`(\w+)` (config needs to be specified|argument in the config)", text)
    if missing and missing[1] not in cut.sizes:
        return dataclasses.replace(cut, sizes={**cut.sizes, missing[1]: _SIZES.get(missing[1], 8)})
    if "NoneType" in text:  # of a size that the default leaves open
        frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
        for name in re.findall(r"\w+", linecache.getline(frame.f_code.co_filename, number)):
            if name == "mrope_section" and not cut.sections:
                return dataclasses.replace(cut, sections=(2, 3, 3))
            if name in _SIZES and name not in cut.sizes:
                return dataclasses.replace(cut, sizes={**cut.sizes, name: _SIZES[name]})
    return None
