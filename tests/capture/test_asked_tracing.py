"""What a model's python does otherwise while it is traced is not what a program computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from transformers.utils import is_torchdynamo_compiling, is_tracing

from tpcompile.capture.export.capture_model import capture
from tpcompile.errors import OnlyInParts
from tpcompile.ir.calls import bind_call, flatten_call

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
ONES = torch.ones(2, 6).long()
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])


def outcomes(model: nn.Module, traced: dict[str, Any], *others: dict[str, Any]) -> None:
    """Asserts that a program of one call gives what python gives, for it and for calls of the same form."""
    model = model.double().eval()
    captured = capture(model, bind_call(model, (), traced))
    tables = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers())}
    tables["constant"] = captured.constants
    weights = [tables[spec.kind][spec.name] for spec in captured.inputs if spec.kind != "user"]
    for call in (traced, *others):
        bound = bind_call(model, (), call)
        leaves, _ = flatten_call(bound)
        with torch.no_grad():
            result = captured.unflatten(captured.graph_module(*weights, *leaves), bound)
            expected = model(**call)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


# Forward asks whether it is traced.

QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "torch.compiler.is_compiling": lambda x: torch.compiler.is_compiling(),
    "torch.compiler.is_exporting": lambda x: torch.compiler.is_exporting(),
    "by its own name": lambda x: is_compiling(),
    "dynamo's": lambda x: torch._dynamo.is_compiling(),
    "transformers'": lambda x: is_torchdynamo_compiling(),
    "of a tensor": is_tracing,
}


class Asks(nn.Module):
    """Doubles what it is given, but not while it is traced."""

    def __init__(self, question: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer, self.question = nn.Linear(4, 4), question

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.question(x) else self.layer(x * 2)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.filterwarnings("ignore:.*is_compiling:FutureWarning")
def test_forward_does_otherwise_while_it_is_traced(question: str) -> None:
    outcomes(Asks(QUESTIONS[question]), {"x": torch.randn(3, 4).double()})
    assert not torch.compiler.is_compiling()
    assert is_compiling.__kwdefaults__ is None


class Delta(nn.Module):
    """A function of transformers' models that goes another way where it is exported: a loop over 64 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layer(x).unflatten(2, (3, 4))
        decay, beta = -F.softplus(heads[..., 0]), heads[..., 1].sigmoid()
        return torch_chunk_gated_delta_rule(heads, heads.roll(1, 3), heads, decay, beta)[0]  # type: ignore[no-any-return]


def test_transformers_models_are_not_told_that_they_are_exported() -> None:
    model, x = Delta().double(), torch.randn(3, 7, 4).double()
    outcomes(model, {"x": x}, {"x": torch.randn(2, 9, 4).double()})
    code = capture(model, bind_call(model, (), {"x": x})).graph_module.code
    assert code.count("aten.linalg_solve_triangular.default(") == 2


# Masks that are left out.


class Attends(nn.Module):
    """One attention of transformers: by its registry, and with a mask that its functions make."""

    def __init__(self, mask: Callable[..., Any] = create_causal_mask, is_causal: bool = False, **config: Any):
        super().__init__()
        self.config = LlamaConfig(**SIZES, attn_implementation="sdpa", **config)
        self.mask, self.is_causal = mask, is_causal
        self.layer = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        mask = self.mask(self.config, x, attention_mask, cache=None, position_ids=position_ids)
        heads = self.layer(x).unflatten(2, (2, 8)).transpose(1, 2)
        return self.attend(heads, mask).flatten(2)

    def attend(self, heads: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if mask is None else mask[:, :, :, : heads.shape[2]]
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention(self, heads, heads, heads, mask)[0]  # type: ignore[no-any-return]


class AttendsItself(Attends):
    """Calls torch's attention."""

    def attend(self, heads: Tensor, mask: Tensor | None) -> Tensor:
        causal = self.is_causal and mask is None
        return F.scaled_dot_product_attention(heads, heads, heads, mask, is_causal=causal).transpose(1, 2)


class Tells(Attends):
    """Tells transformers' attention whether it is causal, but not where there is a mask."""

    def attend(self, heads: Tensor, mask: Tensor | None) -> Tensor:
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        causal = self.is_causal and mask is None
        return attention(self, heads, heads, heads, mask, is_causal=causal)[0]  # type: ignore[no-any-return]


class TellsAlways(Attends):
    """Tells it whether it is causal in any case, whatever the module says."""

    def attend(self, heads: Tensor, mask: Tensor | None) -> Tensor:
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention(self, heads, heads, heads, mask, is_causal=True)[0]  # type: ignore[no-any-return]


X = torch.randn(2, 6, 16, dtype=torch.float64)
POSITIONS = torch.arange(6).expand(2, -1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [create_causal_mask, create_bidirectional_mask])
def test_attention_decides_where_python_leaves_a_mask_out(mask: Callable[..., Any], is_causal: bool) -> None:
    """All four: the mask and the attention say the same, or not."""
    model = Attends(mask, is_causal)
    outcomes(model, {"x": X}, {"x": X[:, :4]})
    masks = [{"x": X, "attention_mask": m} for m in (PADDED, ONES)]
    outcomes(model, *masks, {"x": X[:, :4], "attention_mask": ONES[:, :4]})
    positions = [{"x": X, "position_ids": p} for p in (POSITIONS, POSITIONS + 3, PACKED)]
    outcomes(model, *positions)


def test_chunks_begin_where_they_do_in_python() -> None:
    model = Attends(create_chunked_causal_mask, is_causal=True, attention_chunk_size=4)
    positions = [{"x": X, "position_ids": p} for p in (POSITIONS, POSITIONS + 3, PACKED)]
    outcomes(model, *positions)


def test_attention_is_told_whether_it_is_causal() -> None:
    """That it is not may be told only because there is a mask: then the module has said that it is."""
    calls = [{"x": X, "attention_mask": m} for m in (PADDED, ONES)]
    outcomes(Tells(is_causal=True), *calls)
    outcomes(TellsAlways(is_causal=False), *calls)
    outcomes(Tells(create_bidirectional_mask), *calls)


@pytest.mark.parametrize("kind", [AttendsItself, Tells])
def test_what_attention_would_do_without_a_mask_is_not_known(kind: type[Attends]) -> None:
    model = kind().double()
    for call in ({"x": X}, {"x": X, "attention_mask": ONES}):
        with pytest.raises(OnlyInParts, match="mask that transformers makes while it is traced"):
            capture(model, bind_call(model, (), call))


def test_a_decoder_that_looks_ahead() -> None:
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=20, intermediate_size=24, num_hidden_layers=1, pad_token_id=0, **SIZES)
    config.use_bidirectional_attention = True
    model, ids = GemmaForCausalLM(config), torch.randint(20, (2, 6))
    outcomes(model, {"input_ids": ids, "use_cache": False})
    masks = [{"input_ids": ids, "attention_mask": m, "use_cache": False} for m in (ONES, PADDED)]
    outcomes(model, *masks)


def test_nothing_stays_changed() -> None:
    tables = (masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS)
    before = [dict(vars(masking_utils)), *map(dict, tables)]
    capture(Attends().double(), bind_call(Attends(), (), {"x": X}))
    assert [dict(vars(masking_utils)), *map(dict, tables)] == before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


# Forward asks what its modules are.


class Shares(nn.Module):
    """Has a module under two names, and asks what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again, self.more = self.layer, nn.ModuleList([self.layer, nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.again, *self.more[:2]):
            x = layer(x) + (3 if type(layer) is nn.Linear else 5)
        x = x * (3 if self.again is self.layer else 5)
        return x + self.more[0].weight.sum() * (3 if type(self.more) is nn.ModuleList else 5)


def test_a_module_of_two_names_is_what_it_is() -> None:
    outcomes(Shares(), {"x": torch.randn(3, 4).double()}, {"x": torch.randn(5, 4).double()})
