"""What the ranks do in ``test_attention_kernels``: kernels that have heads, beside plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations.flash_attention import flash_attention_forward

import tpcompile
from tests.helpers import flash_attention
from tests.on_ranks.models import error, gradient_error, mesh
from tests.on_ranks.module_life import refusal
from tpcompile.capture.export import flex_attention as flex_module
from tpcompile.ir.torch_internals import FakeTensor


class Heads(nn.Module):
    """Shared keys, slopes, biases that are learned, sinks, packed rows, a window in every second head."""

    def __init__(self, heads: int = 4, groups: int = 2, size: int = 8, width: int = 20) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q = nn.Linear(width, heads * size)
        self.k, self.v = nn.Linear(width, groups * size), nn.Linear(width, groups * size)
        self.o = nn.Linear(heads * size, width)
        self.bias, self.sinks = nn.Parameter(torch.randn(heads)), nn.Parameter(torch.randn(heads))
        self.register_buffer("slopes", torch.rand(heads))
        self.plain = False

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = (self.arithmetic if self.plain else self.kernel)(q, k, v, rows)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return out

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return value + self.slopes[h] * (j - i) + self.bias[h] * ((i - j) % 3)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (rows[b, i] == rows[b, j]) & ((h % 2 == 0) | (i - j < 3))

        length = q.shape[2]
        blocks = create_block_mask(mask, len(q), self.heads, length, length, device=q.device)
        aux = AuxRequest(lse=True)
        y, found = flex_attention(q, k, v, score, blocks, enable_gqa=True, return_aux=aux)
        return y * (found.lse - self.sinks[:, None]).sigmoid()[..., None]

    def arithmetic(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k, v))
        h, i, j = (
            torch.arange(n).view(shape)
            for n, shape in ((self.heads, (-1, 1, 1)), (q.shape[2], (-1, 1)), (k.shape[2], (1, -1)))
        )
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        scores = scores + self.slopes[:, None, None] * (j - i) + self.bias[:, None, None] * ((i - j) % 3)
        shown = (j <= i) & (rows[:, None, :, None] == rows[:, None, None, :]) & ((h % 2 == 0) | (i - j < 3))
        scores = scores.masked_fill(~shown, -torch.inf)
        sinks = self.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


class Causal(Heads):
    """Masks whose functions read nothing, one after the other."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        length = q.shape[2]
        windows = (lambda b, h, i, j: j <= i), (lambda b, h, i, j: (j <= i) & (i - j < 3))
        for window in windows:
            blocks = create_block_mask(window, None, None, length, length, device=q.device)
            q = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        return q

    def arithmetic(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        for shown in (j <= i, (j <= i) & (i - j < 3)):
            q = nn.functional.scaled_dot_product_attention(q, k, v, shown)
        return q


class Around(nn.Module):
    """Flex attention in a checkpoint, before a layer whose operators are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.last = Heads(), weight_norm(nn.Linear(20, 20))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.heads, x, rows, use_reentrant=False)
        return self.last(y)  # type: ignore[no-any-return]


def around(autocast: bool) -> tuple[float, float]:
    """The worst errors of results and gradients."""
    torch.manual_seed(0)
    whole, rows = Around(), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2]])
    sharded: Any = copy.deepcopy(whole)
    whole.heads.plain, x = True, torch.randn(2, 7, 20)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sharded = tpcompile.parallelize(sharded, mesh(), (x, rows))
        ours, theirs = sharded(x, rows), whole(x, rows)
    assert ours.dtype == theirs.dtype
    (ours.float() ** 3).sum().backward()
    (theirs.float() ** 3).sum().backward()
    return error(ours.detach(), theirs.detach()), gradient_error(whole, sharded)


def causal() -> float:
    """The worst error of results."""
    torch.manual_seed(0)
    whole = Causal()
    sharded: Any = tpcompile.parallelize(
        copy.deepcopy(whole), mesh(), (torch.randn(2, 7, 20), torch.zeros(2, 7))
    )
    whole.plain, x = True, torch.randn(3, 9, 20)
    return error(sharded(x, torch.zeros(3, 9)).detach(), whole(x, torch.zeros(3, 9)).detach())


class Holds(Heads):
    """Objects of torch's that hold what they were given: a mask with a function, and distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = create_block_mask(partial(_window, {"of": 3}), None, None, 7, 7, device="cpu")
        self.prior = torch.distributions.Normal(0.0, 1.0)
        self.kinds = torch.distributions.Categorical(probs=torch.tensor([0.25, 0.75]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for y in (self.q, self.k, self.v))
        y = flex_attention(q, k, v, block_mask=self.blocks, enable_gqa=True).transpose(1, 2)
        found: Tensor = self.prior.log_prob(self.o(y.flatten(2))) + self.kinds.log_prob(torch.tensor(1))
        return found


def _window(how: dict[str, int], b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < how["of"])


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda model: None,
    lambda model: model.blocks.mask_mod.args[0].update(of=2),
    lambda model: setattr(model.blocks, "mask_mod", lambda b, h, i, j: i == j),
    lambda model: setattr(model.prior, "loc", torch.tensor(3.0)),
    lambda model: model.prior.scale.mul_(2),
    lambda model: setattr(model, "kinds", torch.distributions.Categorical(probs=torch.tensor([0.5, 0.5]))),
)


def held() -> list[float]:
    """Errors after changes of what objects of torch's hold."""
    torch.manual_seed(0)
    whole, x, found = Holds(), torch.randn(2, 7, 20), []
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,))
    for change in CHANGES:
        change(whole), change(sharded)
        with torch.no_grad():
            found.append(error(sharded(x), whole(x)))
    return found


def heads(*counts: int, backend: str = "", alone: bool = False) -> dict[str, Any]:
    """Errors of results and gradients; what the plan leaves whole.

    Args:
        counts: of heads, and of groups of them.
        backend: compiles the program.
        alone: compiles calls of the kernel by themselves, as on devices that have one.
    """
    torch.manual_seed(0)
    with patch.multiple(flex_module, _has_kernel=_is_real, _BACKEND="aot_eager") if alone else nullcontext():
        return _heads(counts, {"backend": backend} if backend else False)


def _is_real(query: Tensor) -> bool:
    return not isinstance(query, FakeTensor) and get_proxy_mode() is None


def _heads(counts: tuple[int, ...], compiling: Any) -> dict[str, Any]:
    whole = Heads(*counts)
    sharded: Any = copy.deepcopy(whole)
    whole.plain = True
    rows = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2]])
    x = torch.randn(2, 7, 20)
    sharded = tpcompile.parallelize(sharded, mesh(), (x, rows), compile=compiling)
    worst = 0.0
    for length in (7, 5):
        x = torch.randn(2, length, 20)
        ours, theirs = sharded(x, rows[:, :length]), whole(x, rows[:, :length])
        (ours**3).sum().backward()
        (theirs**3).sum().backward()
        worst = max(worst, error(ours.detach(), theirs.detach()))
    return {
        "worst": worst,
        "gradients": gradient_error(whole, sharded),
        "fallbacks": sharded.plan.fallbacks,
        "whole": _whole(whole, sharded),
    }


def _whole(whole: nn.Module, sharded: Any) -> list[str]:
    """The projections around attention that a rank holds whole."""
    layout, rank = sharded.plan.layout, dist.get_rank()
    ends = tuple(f"{name}{end}.weight" for name in "qkvo" for end in ("", "_proj"))
    return [
        name
        for name, p in whole.named_parameters()
        if name.endswith(ends) and layout.local_shape(name, rank) == tuple(p.shape)
    ]


FAMILIES = {
    "mistral": partial(transformers.MistralConfig, sliding_window=4),
    "llama": transformers.LlamaConfig,
    "gemma2": partial(transformers.Gemma2Config, sliding_window=4, query_pre_attn_scalar=8),
}


def model(name: str, attention: str, **fields: Any) -> Any:
    """A model of transformers with two layers, of which Gemma's differ; the same whatever attends."""
    torch.manual_seed(0)
    config = FAMILIES[name](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2 if name == "gemma2" else 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        attn_implementation=attention,
        **fields,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def flex(name: str) -> dict[str, Any]:
    """Errors beside transformers' plain attention: as captured, padded, packed, other sizes, generated."""
    whole, sharded = model(name, "eager"), model(name, "flex_attention")
    tokens = torch.randint(64, (2, 11))
    padding = torch.tensor([[0] * 3 + [1] * 8, [1] * 11])
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]] * 2)
    sharded = tpcompile.parallelize(sharded, mesh(), (), {"input_ids": tokens, "use_cache": False})
    calls: dict[str, dict[str, Any]] = {
        "as captured": {},
        "all shown": {"attention_mask": torch.ones_like(tokens)},
        "padded": {"attention_mask": padding},
        "in order": {"position_ids": torch.arange(11)[None].expand(2, -1)},
        "packed": {"position_ids": packed},
    }
    errors = {}
    with torch.no_grad():
        for label, more in calls.items():
            ours, theirs = (m(tokens, use_cache=False, **more).logits for m in (sharded, whole))
            shown = more.get("attention_mask", torch.ones_like(tokens)).bool()
            errors[label] = error(ours[shown], theirs[shown])
        long = torch.randint(64, (1, 135))
        errors["two blocks"] = error(*(m(long, use_cache=False).logits for m in (sharded, whole)))
        mine, other = (
            m.generate(tokens, attention_mask=padding, max_new_tokens=4, do_sample=False)
            for m in (sharded, whole)
        )
    return {
        "errors": errors,
        "generated": bool((mine == other).all()),
        "fallbacks": sharded.plan.fallbacks,
        "whole": _whole(whole, sharded),
    }


FLASH = "flash_of_tests"


def _install_flash() -> None:
    """Has transformers use the stand-ins for flash attention's package."""
    utils.__dict__.update(
        _loaded_implementation=FLASH,
        _flash_fn=flash_attention.flash_attn_func,
        _flash_varlen_fn=flash_attention.flash_attn_varlen_func,
        _pad_fn=utils._pad_input,
        _unpad_fn=utils._unpad_input,
        _process_flash_kwargs_fn=utils._lazy_define_process_function(flash_attention.flash_attn_varlen_func),
        _process_with_kvcache_kwargs_fn=dict,
    )
    transformers.AttentionInterface.register(FLASH, flash_attention_forward)
    transformers.AttentionMaskInterface.register(FLASH, masking_utils.flash_attention_mask)


def flash(name: str) -> dict[str, Any]:
    """Errors beside plain attention, and gradients; what is refused, by the values of a call."""
    _install_flash()
    whole, sharded = model(name, "eager"), model(name, FLASH)
    tokens = torch.randint(64, (2, 11))
    sharded = tpcompile.parallelize(sharded, mesh(), (), {"input_ids": tokens, "use_cache": False})
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]])
    starts = torch.tensor([0, 5, 9, 11], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    errors = {}
    for label, rows, more, ours in (
        ("as captured", tokens, {}, {}),
        ("all shown", tokens, {"attention_mask": torch.ones_like(tokens)}, {}),
        ("one row", tokens[:1], {}, {}),
        ("packed", tokens[:1], {"position_ids": packed}, lengths),
    ):
        mine = sharded(rows, use_cache=False, **more, **ours).logits
        theirs = whole(rows, use_cache=False, **more).logits
        (mine**2).sum().backward()
        (theirs**2).sum().backward()
        errors[label] = error(mine.detach(), theirs.detach())
    with torch.no_grad():
        for model_ in (sharded, whole):
            errors.setdefault("generated", []).append(
                model_.generate(tokens, max_new_tokens=4, do_sample=False)
            )
    mine, theirs = errors.pop("generated")
    padded = torch.tensor([[0] * 3 + [1] * 8, [1] * 11])
    return {
        "errors": errors,
        "gradients": gradient_error(whole, sharded),
        "generated": bool((mine == theirs).all()),
        "fallbacks": sharded.plan.fallbacks,
        "whole": _whole(whole, sharded),
        "refused": [
            refusal(lambda: sharded(tokens, attention_mask=padded, use_cache=False)),
            refusal(lambda: sharded(tokens[:1], position_ids=packed, use_cache=False)),
        ],
    }


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    size = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    unit, inner = x * size, grad * weight
    along = (inner * unit).mean(-1, keepdim=True)
    return size * (inner - unit * along), (grad * unit).flatten(0, -2).sum(0)


class NormFunction(torch.autograd.Function):
    """A norm with a backward of its own, as kernels come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _normed(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return _gradients(*ctx.saved_tensors, grad)


@torch.library.custom_op("kernels_of_tests::rms_norm", mutates_args=())
def norm_operator(x: Tensor, weight: Tensor) -> Tensor:
    """The same as an operator that nobody can look into."""
    return _normed(x, weight)


@norm_operator.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kernels_of_tests::rms_norm_backward", mutates_args=())
def norm_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Its backward."""
    return _gradients(x, weight, grad)


@norm_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


norm_operator.register_autograd(
    lambda ctx, grad: norm_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Normed(nn.Module):
    """A norm of every head, of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.first, self.second = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = NormFunction.apply(self.up(x).unflatten(-1, (4, 6)), self.first)
        out: Tensor = self.down(norm_operator(y * 2 + x.mean(), self.second).flatten(-2))
        return out


def norms() -> list[tuple[float, float, tuple[str, ...]]]:
    """Errors, those of gradients, and what is computed whole: without rules, then with."""
    found = []
    for with_rules in (False, True):
        if with_rules:
            for kernel in (NormFunction, "kernels_of_tests.rms_norm"):
                tpcompile.register_rule(kernel, "... h, h -> ... h; whole h")
        torch.manual_seed(0)
        whole, x = Normed(), torch.randn(3, 5, 12)
        sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x,))
        ours, theirs = sharded(x), whole(x)
        (ours**3).sum().backward()
        (theirs**3).sum().backward()
        worst = error(ours.detach(), theirs.detach())
        found.append((worst, gradient_error(whole, sharded), sharded.plan.fallbacks))
    return found
