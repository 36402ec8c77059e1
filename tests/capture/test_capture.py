"""Capture: the flat graph equals the model, also at other sizes, and the model stays as it was."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._export.wrappers import allow_in_pre_dispatch_graph
from torch.nn import functional as F

from tests.helpers import toys
from tpcompile.capture.export import capture_model
from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.switch_experts import choose_experts_implementation
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call, flatten_call

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    config = transformers.AutoConfig.for_model(kind, **options)
    return getattr(transformers, auto).from_config(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_flat(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> tuple[Any, ...]:
    leaves, spec = flatten_call(bound)
    assert spec == captured.in_spec
    assert captured.accepts(leaves) is None
    tables = {
        "param": dict(model.named_parameters()),
        "buffer": dict(model.named_buffers()),
        "constant": captured.constants,
    }
    weights = [tables[s.kind][s.name] for s in captured.inputs if s.kind != "user"]
    return captured.graph_module(*weights, *leaves)


def run(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> Any:
    return captured.unflatten(run_flat(captured, model, bound), bound)


def assert_well_formed(captured: Captured) -> None:
    graph = captured.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(captured.inputs)
    assert len(graph.output_node().args[0]) == len(captured.outputs)
    assert all("val" in node.meta for node in graph.nodes)
    names = [(s.kind, s.name) for s in captured.inputs]
    assert len(set(names)) == len(names)
    assert not any("_assert" in str(n.target) or "higher_order" in str(n.target) for n in graph.nodes)


def state_of(model: nn.Module) -> list[Any]:
    return [(name, id(value)) for m in model.modules() for name, value in [*m.__dict__.items()]] + [
        id(t) for t in [*model.parameters(), *model.buffers()]
    ]


@pytest.mark.parametrize(
    ("example", "served", "refused"),
    [((1, 3), [(1, 2), (1, 9)], [(2, 3), (1, 1)]), ((2, 7), [(4, 5), (3, 2)], [(1, 7), (2, 1), (0, 7)])],
)
def test_llama_runs_at_other_sizes(
    example: tuple[int, int], served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    model = tiny("llama")
    before = state_of(model)
    captured = capture(model, bind_call(model, (), {"input_ids": tokens(*example)}))
    assert state_of(model) == before
    assert_well_formed(captured)
    assert all(captured.accepts([tokens(*shape)]) is not None for shape in refused)
    for shape in served:
        bound = bind_call(model, (tokens(*shape),), {})
        result, expected = run(captured, model, bound), model(**bound)
        assert type(result) is type(expected)
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-6)
        cache = result.past_key_values
        assert isinstance(cache, transformers.DynamicCache)
        torch.testing.assert_close(cache.layers[1].keys, expected.past_key_values.layers[1].keys)
    linear = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    stack = list(linear[0].meta["nn_module_stack"].values())
    assert stack[-1][0] == "model.layers.0.self_attn.q_proj"


def test_nodes_have_the_lines_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), toys.Mlp())
    bound = bind_call(model, (torch.zeros(3, 5, 12),), {})
    mine = [node.stack_trace for node in capture(model, bound).graph_module.graph.nodes]
    monkeypatch.setattr(capture_model, "quick_stack_lines", contextlib.nullcontext)
    theirs = [node.stack_trace for node in capture(model, bound).graph_module.graph.nodes]
    assert mine == theirs and sum(trace is not None for trace in mine) > 20


def test_gradients_reach_every_parameter() -> None:
    model = tiny("llama")
    bound = bind_call(model, (), {"input_ids": tokens(2, 7), "use_cache": False})
    captured = capture(model, bound)
    run(captured, model, bound).logits.square().mean().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(**bound).logits.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-8)


class Gated(nn.Module):
    """Grad-mode regions, nested ones, a buffer changed under no_grad, autocast regions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        with torch.no_grad():
            gate = torch.sigmoid(self.a(x))
            self.seen.add_(x.mean(0) + gate.mean(0))
            with torch.enable_grad():
                inner = self.b(gate)
        with torch.autocast("cpu", torch.bfloat16):
            low = self.b(x)
        return {"out": self.b(x) * gate + self.seen + low.float(), "inner": inner, "count": 3}


def test_no_grad_regions_keep_their_meaning() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(4, 5)
    captured = capture(model, bind_call(model, (x,), {}))
    assert_well_formed(captured)
    assert torch.equal(model.seen, torch.zeros(5))
    flat = run_flat(captured, model, {"x": x})
    assert captured.outputs[-1].kind == "buffer_mutation" and captured.outputs[-1].name == "seen"
    assert captured.unflatten(flat, {})["count"] == 3
    (flat[0].sum() + flat[1].sum()).backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    expected = model(x)
    (expected["out"].sum() + expected["inner"].sum()).backward()
    torch.testing.assert_close(flat[0], expected["out"])
    torch.testing.assert_close(flat[-1], model.seen)
    assert got[0] is None and model.a.weight.grad is None
    for mine, p in zip(got[2:], list(model.parameters())[2:], strict=True):
        torch.testing.assert_close(mine, p.grad)


class HandsBack(nn.Module):
    """Operators that hand back what they were given, gradient and all, in regions that record none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def size(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x.float().abs().mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        size = self.size(h)  # behind it, export calls h by the name of h.float()
        with torch.no_grad():
            same, doubled = nn.functional.dropout(torch.atleast_1d(h), 0.5, False), 2 * h.float()
            view = h.view_as(h)
            with torch.autocast("cpu", torch.bfloat16):
                largest = h.float().max()
        return self.b(h) * size + h * same * doubled + view * largest


class Infers(HandsBack):
    """The same for inference mode, which export does not see: as a block and as a decorator."""

    @torch.inference_mode()
    def size(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().mean() + 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        with torch.inference_mode():
            doubled = 2 * h
            with torch.inference_mode(False):
                scale = doubled.sum()
        return self.b(h) * (self.size(h).clone() + doubled.clone()) * scale.clone()


@pytest.mark.parametrize("kind", [HandsBack, Infers])
def test_gradients_flow_around_regions_without(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 5)
    (got,) = run_flat(capture(model, bind_call(model, (x,), {})), model, {"x": x})
    expected = model(x)
    grads = [torch.autograd.grad(result.sum(), list(model.parameters())) for result in (got, expected)]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*grads)


class Wraps(torch.autograd.Function):
    """Of whole numbers, and under vmap, where no gradient can be asked for: as torch indexes in masks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: torch.Tensor) -> torch.Tensor:
        return at % 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        raise AssertionError("there is no gradient")

    @classmethod
    @allow_in_pre_dispatch_graph
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args)


class Masks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[-1])
        return torch.where(torch.vmap(lambda at: Wraps.apply(at) > 0)(places), x, 0.0)


def test_a_function_of_whole_numbers_has_no_backward_to_keep() -> None:
    model, x = Masks(), torch.randn(4, 5)
    (got,) = run_flat(capture(model, bind_call(model, (x,), {})), model, {"x": x})
    torch.testing.assert_close(got, model(x))


def test_ambient_autocast_is_in_the_graph() -> None:
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(model, bind_call(model, (x,), {}))
        expected = model(x)
    assert torch.equal(run(captured, model, {"input": x}), expected)


def test_tied_embeddings_are_one_placeholder() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    bound = bind_call(model, (), {"input_ids": tokens(2, 5), "use_cache": False})
    captured = capture(model, bound)
    assert_well_formed(captured)
    params = [s.name for s in captured.inputs if s.kind == "param"]
    assert params == [name for name, _ in model.named_parameters()]
    assert len(captured.graph_module.graph.find_nodes(op="placeholder")[0].users) == 2
    torch.testing.assert_close(run(captured, model, bound).logits, model(**bound).logits)


def test_meta_model_is_captured_for_a_real_device() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.empty(1, 8, dtype=torch.long, device="meta")
    before = state_of(model)
    captured = capture(model, bind_call(model, (), {"input_ids": ids, "use_cache": False}))
    assert state_of(model) == before
    assert all(p.device.type == "meta" for p in model.parameters())
    assert "meta" not in captured.graph_module.code
    for node in captured.graph_module.graph.nodes:
        if isinstance(node.meta["val"], torch.Tensor):
            assert node.meta["val"].device.type == "cpu"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, a: Any, /, b: Any, *rest: Any, flag: bool = True, opt: Any = None, **more: Any) -> Any:
        first = self.linear(a) + b if flag else b
        return {"first": first, "none": opt, "rest": [r * 2 for r in rest], "more": more.get("z", 1)}


def test_arguments_of_every_kind() -> None:
    model, a, b, c = TwoInputs(), torch.randn(2, 4), torch.randn(2, 5), torch.randn(3)
    bound = bind_call(model, (a, b, c), {"z": 2.5, "opt": None})
    assert list(bound) == ["a", "b", "*rest", "z"]
    assert [s.name for s in capture(model, bound).user_inputs] == ["a", "b", "rest[0]", "z"]
    captured = capture(model, bound)
    result, expected = run(captured, model, bound), model(a, b, c, z=2.5)
    assert list(result) == list(expected) and result["more"] == 2.5 and result["none"] is None
    torch.testing.assert_close(result["first"], expected["first"])
    assert bind_call(model, (a,), {"b": b}) == bind_call(model, (a, b), {"opt": None})
    assert "captured for" in str(captured.accepts([a, torch.randn(2, 6), c, 2.5]))
    assert "must equal" in str(captured.accepts([a, torch.randn(3, 5), c, 2.5]))


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {"b": 1})])
def test_calls_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TpCompileError, match="does not fit"):
        bind_call(TwoInputs(), args, kwargs)


def test_explicit_dims() -> None:
    model = nn.Linear(4, 5)
    bound = bind_call(model, (torch.randn(2, 7, 4),), {})
    assert capture(model, bound, dynamic=False).user_inputs[0].extents == (2, 7, 4)
    extents = capture(model, bound, dynamic={"input": {1: True}}).user_inputs[0].extents
    assert extents is not None and extents[0] == 2 and isinstance(extents[1], str)


@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder_is_not_one_opaque_operator(grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.set_grad_enabled(grad):
        captured = capture(model, bind_call(model, (torch.randn(2, 7, 24),), {}))
        x = torch.randn(3, 5, 24)
        torch.testing.assert_close(run(captured, model, {"src": x}), model(x))
    assert (
        "aten.linear" in captured.graph_module.code
        and "_transformer_encoder" not in captured.graph_module.code
    )


@pytest.mark.parametrize("configured", ["eager", "grouped_mm"])
def test_experts_are_switched_and_switched_back(configured: str) -> None:
    model = tiny("mixtral", num_local_experts=4, num_hidden_layers=1)
    model.set_experts_implementation(configured)
    assert choose_experts_implementation(model) == ("batched_mm" if configured == "eager" else configured)
    bound = bind_call(model, (), {"input_ids": tokens(2, 7), "use_cache": False})
    captured = capture(model, bound)
    assert model.config._experts_implementation == configured
    other = {**bound, "input_ids": tokens(3, 5)}
    torch.testing.assert_close(
        run(captured, model, other).logits, model(**other).logits, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "auto", "changes", "open_dims"),
    [
        ("bert", "AutoModel", {"head_dim": None, "num_hidden_layers": 1}, 2),
        ("gpt2", "AutoModelForCausalLM", {"n_embd": 48, "n_layer": 1, "n_head": 6, "head_dim": None}, 2),
        ("mamba", "AutoModelForCausalLM", {"state_size": 5, "num_hidden_layers": 1}, 1),
    ],
)
def test_other_models(kind: str, auto: str, changes: dict[str, Any], open_dims: int) -> None:
    model = tiny(kind, auto, **changes)
    kwargs = {} if kind == "bert" else {"use_cache": False}
    captured = capture(model, bind_call(model, (), {"input_ids": tokens(2, 6), **kwargs}))
    assert_well_formed(captured)
    assert len(captured.ranges) == open_dims
    assert bool(captured.notes) == (open_dims < 2)
    bound = bind_call(model, (tokens(5, 6),), kwargs)
    torch.testing.assert_close(run(captured, model, bound)[0], model(**bound)[0], rtol=1e-5, atol=1e-6)
    if kind == "bert":
        assert captured.ranges[captured.user_inputs[0].extents[1]] == (2, 512)  # type: ignore[index]
        assert "outside of" in str(captured.accepts([tokens(2, 600)]))


def decode_call(model: Any, batch: int, past: int) -> dict[str, Any]:
    cache = model(tokens(batch, past)).past_key_values
    mask = torch.ones(batch, past + 1, dtype=torch.long)
    mask[0, 0] = 0
    call = {"input_ids": tokens(batch, 1), "attention_mask": mask, "past_key_values": cache}
    return bind_call(model, (), call)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "others"), [(1, [(1, 5), (1, 2)]), (2, [(3, 9)])])
def test_decode_step_with_a_cache(batch: int, others: list[tuple[int, int]]) -> None:
    model = tiny("llama")
    captured = capture(model, decode_call(model, batch, 5))
    assert captured.user_inputs[0].extents[1] == 1  # type: ignore[index]
    assert len(captured.ranges) == batch
    assert captured.accepts(flatten_call(decode_call(model, 3 - batch, 5))[0]) is not None
    for other in others:
        bound = decode_call(model, *other)
        result, expected = run(captured, model, bound), model(**decode_call(model, *other))
        (cache,) = (given for name, given in bound.items() if name not in ("input_ids", "attention_mask"))
        assert result.past_key_values is cache
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-6)
        assert result.past_key_values.get_seq_length() == other[1] + 1


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Careless(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([inner])
        self.calls, self.seen = 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        self.seen.append(x.shape[0])
        return self.inner[0](x)


def test_data_dependent_control_flow_is_located() -> None:
    model = Careless(Branch())
    before = state_of(model)
    with pytest.raises(TpCompileError) as caught:
        capture(model, bind_call(model, (torch.randn(3, 4),), {}))
    assert "inner.0 (Branch)" in caught.value.where and "x.sum() > 0" in caught.value.where
    assert "torch.where" in caught.value.todo
    assert state_of(model) == before and model.calls == 0 and model.seen == []


class Mutating(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


@torch.no_grad()
@pytest.mark.parametrize(("past", "other"), [(3, 2), (12, 15)])
def test_sliding_window_cache_keeps_its_position(past: int, other: int) -> None:
    model = tiny("gemma3_text", sliding_window=6, num_hidden_layers=1)
    captured = capture(model, decode_call(model, 2, past))
    bound = decode_call(model, 3, other)
    result, expected = run(captured, model, bound), model(**decode_call(model, 3, other))
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-5)
    assert result.past_key_values.get_seq_length() == other + 1
    mixed = decode_call(model, 2, 5 if past == 12 else 12)
    assert captured.accepts(flatten_call(mixed)[0]) is not None


def test_a_number_of_a_tensor_may_be_asserted() -> None:
    """What is read of a tensor has no bounds, and is not a size of an input."""
    model = toys.Checked()
    bound = bind_call(model, (torch.randn(3, 5), torch.tensor([2, 5, 4])), {})
    assert torch.equal(run(capture(model, bound), model, bound), bound["x"] * 2)


def _nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)


def test_changed_inputs_are_refused() -> None:
    with pytest.raises(TpCompileError, match="changes x in place"):
        capture(Mutating(), bind_call(Mutating(), (torch.randn(3, 4),), {}))


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x, x[:2]])


def _quantised(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    "make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, _nested, _padded, _quantised]
)
def test_tensors_that_are_not_dense_are_refused(make: Any) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(TpCompileError, match="sparse, nested or quantised"):
        capture(model, bind_call(model, (make(torch.eye(4)),), {}))


class Grows(nn.Module):
    """Keeps what it has seen in a buffer that becomes longer."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.register_buffer("seen", torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.part.seen = torch.cat([self.part.seen, x])
        return x + 1


def test_what_a_buffer_cannot_keep_is_told() -> None:
    model, x = Grows(), torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"another shape or type to part\.seen"):
        captured = capture(model, bind_call(model, (x,), {}))
    assert "part.seen" in "".join(captured.notes)
    assert model.part.seen.shape == (0, 3)


class Dropping(nn.Module):
    """Writes into what a dropout has handed back."""

    def __init__(self, drop: Any) -> None:
        super().__init__()
        self.up, self.drop = nn.Linear(4, 4), drop

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.up(x)
        after = self.drop(before)
        after += 1
        return self.drop(x), before + after


@pytest.mark.parametrize(
    "drop",
    [
        nn.Dropout(0.5).eval(),
        nn.Dropout(0.0),
        lambda x: F.dropout(x, training=False),
        lambda x: torch.dropout(x, 0.5, False),
    ],
)
def test_a_dropout_that_drops_nothing_hands_back_its_argument(drop: Any) -> None:
    """Export would have it copied: what is written into the one would not be in the other."""
    model, x = Dropping(drop), torch.randn(3, 4)
    bound = bind_call(model, (x,), {})
    found, wanted = run(capture(model, bound), model, bound), model(x)
    assert found[0] is wanted[0] is x
    assert torch.equal(found[1], wanted[1])
