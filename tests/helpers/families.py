"""Tiny random models of many families, for tests.

Every dimension has a size of its own (heads 8, kv heads 4, head_dim 12, hidden 40, ffn 68, experts 6,
vocab 259, batch 3, sequence 13, ...), so that a rule which takes one dimension for another can't pass by
coincidence. Biases and norms are far from their initial zeros and ones, so that a forgotten one is seen.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 259
BATCH = 3
SEQ = 13
WIDTH = 96
"""The hidden size where it must be heads * head_dim (8 * 12); elsewhere it is 40."""

EXPERTS_IMPLEMENTATION = "batched_mm"
"""How transformers runs experts, in the reference and in what we compile: its loop can't be captured."""

Inputs = Callable[[int, int], dict[str, Any]]

_device = torch.device("cpu")


def device() -> torch.device:
    """Where models are built and inputs made."""
    return _device


@contextlib.contextmanager
def on(kind: str) -> Iterator[None]:
    """Builds models and makes inputs on another type of device; the values are the same."""
    global _device
    before, _device = _device, torch.device(kind)
    try:
        yield
    finally:
        _device = before


@dataclass(frozen=True)
class Family:
    """One kind of model and what is known about it.

    Args:
        name: the key in `FAMILIES`.
        build: makes the raw module; keyword arguments override the config's (or constructor's) fields.
            Use `build(name)` of this module, which also gives it its weights.
        inputs: keyword arguments of a forward, from batch and sequence (vision models have no sequence).
        dense: False where there are routed experts.
        collectives: how many collectives a forward of the two layers may issue at `use_cache=False`, a
            reduce-scatter + all-gather pair counting as one; None where no budget is set.
        output: the key, in `reference`'s answer, of the tensor to compare first.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Inputs
    dense: bool = True
    collectives: int | None = None
    output: str = "logits"


# ---------------------------------------------------------------------------------------------------- inputs


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def token_ids(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """Random tokens without the special ones (padding 0, begin 1, end 2)."""
    return torch.randint(3, VOCAB, (batch, seq), generator=_generator("tokens", batch, seq)).to(_device)


def causal_inputs(batch: int = BATCH, seq: int = SEQ) -> dict[str, Any]:
    """The keyword arguments of a causal language model without a cache."""
    return {"input_ids": token_ids(batch, seq), "use_cache": False}


def _masked_inputs(batch: int, seq: int) -> dict[str, Any]:
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, seq - 2 :] = 0
    return {"input_ids": token_ids(batch, seq), "attention_mask": mask}


def _translation_inputs(batch: int, seq: int) -> dict[str, Any]:
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, seq - 2 :] = 0
    ids = token_ids(batch, seq)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": token_ids(batch, 7),
        "use_cache": False,
    }


def _speech_inputs(batch: int, seq: int) -> dict[str, Any]:
    sound = torch.randn(batch, 10, 60, generator=_generator("sound", batch))
    return {"input_features": sound, "decoder_input_ids": token_ids(batch, seq), "use_cache": False}


def _text_and_image_inputs(batch: int, seq: int) -> dict[str, Any]:
    image = torch.randn(batch, 3, 20, 20, generator=_generator("image", batch))
    return {**_masked_inputs(batch, seq), "pixel_values": image}


def picture_inputs(batch: int, seq: int) -> dict[str, Any]:
    """Arguments of `qwen2_vl` with one picture of 4 x 4 patches per text, which take 4 tokens of it."""
    ids = token_ids(batch, seq)
    ids[:, 1], ids[:, 2:6] = 0, 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16 * batch, 3 * 2 * 4 * 4, generator=_generator("patches", batch)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "mm_token_type_ids": (ids == 1).int(),
        "use_cache": False,
    }


def _float_inputs(**shapes: tuple[int, ...]) -> Callable[[int, int], dict[str, Any]]:
    """Normal inputs of the given shapes, in which -1 stands for the batch and -2 for the sequence."""

    def inputs(batch: int, seq: int) -> dict[str, Any]:
        sizes = {-1: batch, -2: seq}
        return {
            name: torch.randn([sizes.get(n, n) for n in shape], generator=_generator(name, batch, seq))
            for name, shape in shapes.items()
        }

    return inputs


# -------------------------------------------------------------------------------------- transformers models


def _from_config(
    model_type: str, defaults: dict[str, Any], auto: str = "AutoModelForCausalLM", **overrides: Any
) -> nn.Module:
    config = transformers.AutoConfig.for_model(model_type, **(defaults | overrides))
    model: nn.Module = getattr(transformers, auto).from_config(config)
    return model


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = _SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 68,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
# For families without a head_dim: the hidden size is heads * head_dim.
_WIDE = {k: v for k, v in _BASE.items() if k != "head_dim"} | {"hidden_size": WIDTH}
_MHA = {k: v for k, v in _WIDE.items() if k != "num_key_value_heads"}
_GPT2 = _SPECIAL | {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 8,
    "n_inner": 68,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_FALCON = {k: v for k, v in _MHA.items() if k != "intermediate_size"} | {"ffn_hidden_size": 68}
_HALF_ROTARY = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
_SIX_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 6}

QWEN2_VL: dict[str, Any] = {
    "text_config": _WIDE
    | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 3]},
    },
    "vision_config": {
        "depth": 1,
        "embed_dim": 40,
        "hidden_size": WIDTH,
        "num_heads": 5,
        "mlp_ratio": 2,
        "patch_size": 4,
    },
    # Outside the tokens that `token_ids` makes.
    "image_token_id": 1,
    "video_token_id": 2,
    "vision_start_token_id": 0,
}

# Proportions of the real model: the latent projections hold 6 % of an attention's parameters.
_MLA = {k: v for k, v in _BASE.items() if k != "head_dim"} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 9,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 28,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}

_MAMBA = _SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "state_size": 7,
    "time_step_rank": 5,
    "conv_kernel": 4,
    "expand": 2,
}


# A mixer with recurrent state in layer 0, attention in layer 1.
_BAMBA = _BASE | {
    "mamba_n_heads": 8,
    "mamba_d_head": 10,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 9,
    "attn_layer_indices": [1],
}


def _decoder(
    name: str,
    collectives: int,
    defaults: dict[str, Any],
    /,
    *,
    model_type: str = "",
    auto: str = "AutoModelForCausalLM",
    dense: bool = True,
    **fields: Any,
) -> Family:
    build = partial(_from_config, model_type or name, defaults | fields, auto)
    return Family(name, build, causal_inputs, dense=dense, collectives=collectives)


_DECODERS = (
    _decoder("llama", 6, _BASE),
    # Layer 0 attends in chunks of 5 with rotary positions, layer 1 to everything without.
    _decoder(
        "llama4_text",
        6,
        _BASE,
        dense=False,
        intermediate_size=28,
        intermediate_size_mlp=68,
        num_local_experts=6,
        num_experts_per_tok=2,
        attention_chunk_size=5,
        no_rope_layers=[1, 0],
    ),
    _decoder("mistral", 6, _BASE, sliding_window=5),
    _decoder("mixtral", 6, _BASE | _SIX_EXPERTS, dense=False, intermediate_size=28),
    _decoder("gemma", 6, _BASE),
    _decoder(
        "gemma2",
        6,
        _BASE,
        sliding_window=5,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    _decoder("cohere", 4, _WIDE, logit_scale=0.4),
    _decoder(
        "cohere2",
        4,
        _BASE,
        logit_scale=0.4,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _decoder("glm", 6, _BASE | _HALF_ROTARY),
    _decoder(
        "granite",
        6,
        _BASE,
        embedding_multiplier=1.7,
        logits_scaling=1.3,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
    _decoder("olmo", 6, _WIDE, clip_qkv=1.5),
    _decoder("olmo2", 8, _WIDE),
    _decoder("phi", 4, _WIDE | _HALF_ROTARY),
    _decoder("phi3", 6, _WIDE, num_key_value_heads=8, original_max_position_embeddings=64),
    _decoder("qwen2", 6, _WIDE),
    _decoder(
        "qwen2_moe",
        6,
        _WIDE,
        dense=False,
        moe_intermediate_size=28,
        shared_expert_intermediate_size=52,
        num_experts=6,
        num_experts_per_tok=2,
    ),
    _decoder("qwen2_vl", 6, QWEN2_VL, auto="AutoModelForImageTextToText"),
    # qwen3_moe is this attention with qwen2_moe's router and experts, line by line.
    _decoder("qwen3", 6, _BASE),
    _decoder("starcoder2", 6, _WIDE),
    _decoder(
        "gpt_oss",
        6,
        _BASE | _SIX_EXPERTS,
        dense=False,
        intermediate_size=28,
        sliding_window=5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
    _decoder("deepseek_v3", 6, _MLA, dense=False),
    _decoder("gpt2", 6, _GPT2),
    _decoder("opt", 6, _MHA, ffn_dim=68, dropout=0.0),
    # Packed [q..., k, v] with one kv head, attention and MLP in parallel.
    _decoder("falcon_mqa", 4, _FALCON, model_type="falcon", multi_query=True, parallel_attn=True),
    # Packed per kv head, [q q k v] four times.
    _decoder("falcon_gqa", 4, _FALCON, model_type="falcon", new_decoder_architecture=True, num_kv_heads=4),
    # Packed per head, [q k v] eight times, with biases and alibi.
    _decoder(
        "falcon_mha",
        6,
        _FALCON,
        model_type="falcon",
        multi_query=False,
        parallel_attn=False,
        bias=True,
        alibi=True,
    ),
    _decoder("bloom", 6, _SPECIAL, vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=8),
    _decoder("gpt_neox", 4, _MHA | _HALF_ROTARY),
    _decoder("gptj", 4, _GPT2, rotary_dim=10),
    _decoder("stablelm", 6, _WIDE | _HALF_ROTARY, use_qkv_bias=True),
    _decoder("mamba", 6, _MAMBA),
    _decoder("bamba", 8, _BAMBA),
)

_BERT = _MHA | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 68,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 17,
}

_T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 12,
    "d_ff": 68,
    "num_layers": 2,
    "num_heads": 8,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_WHISPER = _SPECIAL | {
    "vocab_size": VOCAB,
    "num_mel_bins": 10,
    "encoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_layers": 2,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 68,
    "decoder_ffn_dim": 68,
    "d_model": WIDTH,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
}
_CLIP = {
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 68,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "eos_token_id": 2,
    },
    "vision_config": _VIT,
    "projection_dim": 44,
}

# --------------------------------------------------------------------------- models that aren't transformers'


def _transformer_encoder(
    width: int = WIDTH, heads: int = 8, ffn: int = 68, layers: int = 2, norm_first: bool = False
) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, ffn, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class MixerBlock(nn.Module):
    """An MLP over the tokens, then an MLP over the channels, each with its residual."""

    def __init__(self, tokens: int, channels: int, token_ffn: int, channel_ffn: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, token_ffn), nn.GELU(), nn.Linear(token_ffn, tokens))
        self.norm2 = nn.LayerNorm(channels)
        self.channel_mlp = nn.Sequential(
            nn.Linear(channels, channel_ffn), nn.GELU(), nn.Linear(channel_ffn, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channel_mlp(self.norm2(x))
        return y


class Mixer(nn.Module):
    """MLP-Mixer: patches of an image, `layers` blocks, mean over the patches, classes."""

    def __init__(
        self, channels: int = 44, token_ffn: int = 28, channel_ffn: int = 68, layers: int = 2
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, kernel_size=4, stride=4)
        self.blocks = nn.ModuleList(MixerBlock(20, channels, token_ffn, channel_ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 17)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


class UNet(nn.Module):
    """Two levels down and up again, with skip connections, two kinds of norm and a transposed convolution."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.down2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width), nn.SiLU()
        )
        self.middle = nn.Sequential(nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1), nn.GELU())
        self.up2 = nn.ConvTranspose2d(3 * width, 2 * width, 2, stride=2)
        self.merge2 = nn.Conv2d(4 * width, width, 3, padding=1)
        self.merge1 = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        a = self.down1(image)
        b = self.down2(a)
        c = self.up2(self.middle(b))
        c = F.silu(self.merge2(torch.cat([c, b], dim=1)))
        c = F.interpolate(c, scale_factor=2.0, mode="nearest")
        y: Tensor = self.head(F.relu(self.merge1(torch.cat([c, a], dim=1))))
        return y


class TwoTowers(nn.Module):
    """Two inputs and a dict of outputs: each query position weighs the context, then both are scored."""

    def __init__(self, query: int = 44, context: int = 52, inner: int = 68) -> None:
        super().__init__()
        self.query = nn.Linear(query, inner)
        self.context = nn.Linear(context, inner)
        self.value = nn.Linear(context, inner, bias=False)
        self.out = nn.Linear(inner, query)
        self.norm = nn.LayerNorm(query)
        self.score = nn.Linear(query, 1)

    def forward(self, query: Tensor, context: Tensor) -> dict[str, Tensor]:
        weights = (torch.tanh(self.query(query)) @ self.context(context).transpose(1, 2) / 8).softmax(-1)
        hidden = self.norm(query + self.out(weights @ self.value(context)))
        return {"hidden": hidden, "scores": self.score(hidden).squeeze(-1), "weights": weights}


_OTHERS = (
    Family("bert", partial(_from_config, "bert", _BERT, "AutoModelForMaskedLM"), _masked_inputs),
    Family(
        "vit",
        partial(_from_config, "vit", _VIT, "AutoModelForImageClassification"),
        _float_inputs(pixel_values=(-1, 3, 20, 20)),
    ),
    Family(
        "bert_classifier",
        partial(_from_config, "bert", _BERT | {"num_labels": 5}, "AutoModelForSequenceClassification"),
        _masked_inputs,
    ),
    Family("t5", partial(_from_config, "t5", _T5, "AutoModelForSeq2SeqLM"), _translation_inputs),
    Family(
        "whisper", partial(_from_config, "whisper", _WHISPER, "AutoModelForSpeechSeq2Seq"), _speech_inputs
    ),
    Family(
        "clip",
        partial(_from_config, "clip", _CLIP, "AutoModel"),
        _text_and_image_inputs,
        output="logits_per_image",
    ),
    Family("transformer_encoder", _transformer_encoder, _float_inputs(src=(-1, -2, WIDTH)), output="output"),
    Family("mixer", Mixer, _float_inputs(image=(-1, 3, 16, 20)), output="output"),
    Family("unet", UNet, _float_inputs(image=(-1, 3, 20, 16)), output="output"),
    Family("two_towers", TwoTowers, _float_inputs(query=(-1, -2, 44), context=(-1, 9, 52)), output="hidden"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (*_DECODERS, *_OTHERS)}

# --------------------------------------------------------------------------------------------------- weights


def _is_constant(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values for one parameter that keep activations O(1) and leave nothing at its initial value."""
    noise = torch.randn(tensor.shape, generator=generator)
    owner, _, leaf = name.rpartition(".")
    if leaf.endswith("bias"):
        return 0.3 * noise
    if leaf == "A_log":  # a state space's decay rates have a structure that must stay
        return tensor.detach() + 0.1 * noise
    scale = tensor.numel() == max(tensor.shape, default=1) and bool((tensor != 0).all())  # [1, channels, 1]
    if tensor.ndim < 2 or "norm" in owner.rpartition(".")[2] or (scale and _is_constant(tensor)):
        # Norm weights sit around their initial value, 1, or 0 where the model adds 1 itself.
        return tensor.detach() + 0.1 * noise if _is_constant(tensor) else 0.3 * noise
    if any(part in name for part in ("embed", "wte", "wpe", "token")):
        return 0.3 * noise
    receptive = tensor[0, 0].numel() if tensor.ndim > 3 else 1
    # The mean of both fans: Linear, Conv1D and packed experts differ in which comes first.
    fan = (tensor.shape[-1] + tensor.shape[-2]) / 2 if tensor.ndim < 4 else sum(tensor.shape[:2]) / 2
    return noise * (fan * receptive) ** -0.5


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter, and every buffer that acts as a weight, a random and non-trivial value."""
    generator = _generator("weights", seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_random_like(name, parameter, generator))
    for name, buffer in model.named_buffers():
        noise = torch.randn(buffer.shape, generator=generator)
        if name.endswith(("running_mean", "correction_bias")):
            buffer.copy_(0.3 * noise)
        elif name.endswith("running_var"):
            buffer.copy_(1 + 0.3 * noise.abs())


def prepare(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Random weights, `dtype`, eval mode, and the experts' implementation that we compile."""
    randomize(model, seed)
    persistent = model.state_dict().keys()
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            # Rotary frequencies and the like stay in float32, as `from_pretrained(dtype=...)` leaves them.
            if buffer.is_floating_point() and f"{module_name}.{name}".lstrip(".") in persistent:
                module._buffers[name] = buffer.to(dtype)
    set_experts(model)
    return model.eval()


def set_experts(model: nn.Module) -> None:
    """Makes a transformers model run its experts as the reference does."""
    if isinstance(model, transformers.PreTrainedModel):
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """A two-layer model of the family, always with the same weights; overrides are fields of its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[name].build(**overrides)
    return prepare(model, dtype, seed).to(_device)


def inputs(
    name: str, batch: int = BATCH, seq: int = SEQ, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The family's inputs, floating ones in `dtype`."""
    return {
        key: value.to(_device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in FAMILIES[name].inputs(batch, seq).items()
    }


def tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of any model's output, by name: `output` for a lone one, indices for a tuple."""
    if isinstance(output, Tensor):
        return {"output": output}
    items = output.items() if hasattr(output, "items") else ((str(i), v) for i, v in enumerate(output))
    return {key: value for key, value in items if isinstance(value, Tensor)}


def reference(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the undivided model answers: its output tensors by name."""
    set_experts(model)
    with torch.no_grad():
        return tensors(model(**inputs))


# ------------------------------------------------------------------------------------------------ edge cases

EDGE_CASES: dict[str, Callable[..., nn.Module]] = {
    "one_kv_head": partial(build, "llama", num_key_value_heads=1),
    "two_kv_heads": partial(build, "llama", num_key_value_heads=2),
    "three_heads": partial(build, "llama", hidden_size=42, num_attention_heads=3, num_key_value_heads=3),
    "six_heads": partial(build, "llama", hidden_size=42, num_attention_heads=6, num_key_value_heads=6),
    "fourteen_heads_two_kv": partial(
        build, "llama", hidden_size=42, num_attention_heads=14, num_key_value_heads=2
    ),
    "ffn_130": partial(build, "llama", intermediate_size=130),
    "tied": partial(build, "llama", tie_word_embeddings=True),
    "untied": partial(build, "gemma", tie_word_embeddings=False),
    "attention_and_mlp_bias": partial(build, "llama", attention_bias=True, mlp_bias=True),
    "phi3_unequal_segments": partial(build, "phi3", num_key_value_heads=4),
    "phi3_one_kv_head": partial(build, "phi3", num_key_value_heads=1),
    "glm_packed_gate_up": partial(build, "glm"),
    "cohere_head_norms": partial(build, "cohere", use_qk_norm=True),
    "gpt_neox_sequential": partial(build, "gpt_neox", use_parallel_residual=False),
    "mixtral_packed_experts": partial(build, "mixtral"),
    "mixtral_five_experts": partial(build, "mixtral", num_local_experts=5),
    "qwen2_moe_packed_experts": partial(build, "qwen2_moe"),
    "llama4_packed_experts": partial(build, "llama4_text"),
    "gpt_oss_interleaved_experts": partial(build, "gpt_oss"),
    "gpt2": partial(build, "gpt2"),
    "bloom": partial(build, "bloom"),
    "gpt_neox": partial(build, "gpt_neox"),
    "falcon_mqa": partial(build, "falcon_mqa"),
    "falcon_gqa": partial(build, "falcon_gqa"),
    "falcon_mha": partial(build, "falcon_mha"),
}
"""Layouts that are easy to get wrong, all causal language models (`causal_inputs`); each takes a dtype."""
