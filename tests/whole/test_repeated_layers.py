"""Truncated capture: unrolled it is the whole program, and where layers do not repeat it is not used."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import tpcompile
from tests.helpers import programs
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp
from tests.on_ranks import repeated as spmd_repeated
from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.held_caches import mark_caches
from tpcompile.capture.repeats.blocks import BLOCK, Repeat, block_of
from tpcompile.capture.repeats.capture_repeated import (
    capture_repeated,
    unroll_captured,
)
from tpcompile.capture.repeats.find_repeats import find_repeats, truncated
from tpcompile.capture.repeats.unroll_layers import unroll
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call, flatten_call, leaf_names
from tpcompile.ir.graph_edit import call
from tpcompile.ir.torch_internals import FakeTensor
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.lowering.simulate import SimulatedGroups
from tpcompile.lowering.state import SOURCE
from tpcompile.pipeline import canonical, rewrite
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import CostModel

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str, layers: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {**(DEEPSEEK if kind == "deepseek_v3" else TINY), **changes, "num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.1)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_flat(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> Any:
    """The flat results of a whole captured program."""
    leaves, _ = flatten_call(bound)
    assert captured.accepts(leaves) is None
    tables = {
        "param": dict(model.named_parameters()),
        "buffer": dict(model.named_buffers()),
        "constant": captured.constants,
    }
    weights = [tables[s.kind][s.name] for s in captured.inputs if s.kind != "user"]
    return captured.graph_module(*weights, *leaves)


def run_all(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> Any:
    """The result of a whole captured program, in the model's own structure."""
    return captured.unflatten(run_flat(captured, model, bound), bound)


def run(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> torch.Tensor:
    """Its first leaf."""
    result = tree_flatten(run_all(captured, model, bound))[0][0]
    assert isinstance(result, torch.Tensor)
    return result


def assert_same(mine: Any, theirs: Any) -> None:
    """Equal structures of equal tensors."""
    (a, one), (b, two) = tree_flatten(mine), tree_flatten(theirs)
    assert one == two
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def graph_text(captured: Captured) -> list[str]:
    """Every call with its operands by number, and the module it came from."""
    numbers = {node: i for i, node in enumerate(captured.graph_module.graph.nodes)}
    return [
        f"{n.target} {torch.fx.map_arg((n.args, n.kwargs), numbers.__getitem__)} "
        f"{[entry[0] for entry in n.meta.get('nn_module_stack', {}).values()]}"
        for n in captured.graph_module.graph.nodes
        if n.op not in ("placeholder", "output")
    ]


def state_of(model: nn.Module) -> list[Any]:
    return [(name, id(value)) for m in model.modules() for name, value in m.__dict__.items()] + [
        (name, id(t)) for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]


@torch.no_grad()
def assert_unrolls(model: nn.Module, bound: dict[str, Any]) -> None:
    """The truncated capture, unrolled, is node for node the full capture, and computes the same bits.

    Most tests capture with fixed sizes, because that is several times quicker.
    """
    before = state_of(model)
    short = capture_repeated(model, bound, dynamic=False)
    assert state_of(model) == before
    assert short.blocks is not None, short.notes
    full, whole = capture(model, bound, dynamic=False), unroll_captured(short)
    assert whole.inputs == full.inputs
    assert whole.outputs == full.outputs
    assert graph_text(whole) == graph_text(full)
    torch.testing.assert_close(run(whole, model, bound), run(full, model, bound), rtol=0, atol=0)


def language_call(model: nn.Module, *shape: int) -> dict[str, Any]:
    return bind_call(model, (), {"input_ids": tokens(*shape), "use_cache": False})


@pytest.mark.parametrize(
    ("kind", "layers", "changes", "repeat"),
    [
        ("llama", 12, {}, Repeat("model.layers", 0, 1, 12)),
        ("gemma2", 12, {"sliding_window": 4}, Repeat("model.layers", 0, 2, 6)),
        ("deepseek_v3", 10, {}, Repeat("model.layers", 1, 1, 9)),
    ],
)
def test_language_models(kind: str, layers: int, changes: dict[str, Any], repeat: Repeat) -> None:
    model = tiny(kind, layers, **changes)
    assert find_repeats(model) == [repeat]
    assert_unrolls(model, language_call(model, 2, 7))


def test_plain_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    model = nn.TransformerEncoder(layer, 8, norm=nn.LayerNorm(24), enable_nested_tensor=False).eval()
    assert_unrolls(model, bind_call(model, (torch.randn(2, 5, 24),), {}))


def test_two_lists() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(24, 4, 5, 6, 40, batch_first=True).eval()
    assert [r.path for r in find_repeats(model)] == ["encoder.layers", "decoder.layers"]
    assert_unrolls(model, bind_call(model, (torch.randn(2, 5, 24), torch.randn(2, 7, 24)), {}))


# ------------------------------------------------------------------------------- layers that only seem equal


class Layer(nn.Module):
    """A layer of which ``twist`` says what it does with its number."""

    def __init__(self, layer_idx: int, twist: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.twist = twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twist(self.layer_idx, self.down(F.gelu(self.up(x))))


class Stack(nn.Module):
    """Adds up what layers give, the sum outside of them; ``style`` says what else the loop does."""

    def __init__(self, twist: Callable[[int, torch.Tensor], torch.Tensor], style: str = "", depth: int = 9):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, twist) for i in range(depth))
        self.style, self.depth = style, depth

    def forward(self, x: torch.Tensor) -> Any:
        seen = []
        scale = 1.0 / len(self.layers) if self.style == "length" else 1.0
        for i, layer in enumerate(self.layers):
            if self.style == "late" and i == 7:
                x = x * 2
            x = x + layer(x * torch.tensor(0.5))
            seen.append(torch.tanh(x) if self.style == "heads" else x)
        if self.style == "last":
            return x + seen[2]
        if self.style in ("second", "third"):
            return x, seen[["second", "third"].index(self.style) + 1]
        if self.style == "sums":  # each result is of two layers
            return x, *(a + b for a, b in itertools.pairwise(seen))
        return (x * scale, *seen) if self.style in ("all", "heads") else x * scale


def straight(i: int, x: torch.Tensor) -> torch.Tensor:
    return x


def scaled(i: int, x: torch.Tensor) -> torch.Tensor:
    return x * (1 / (i + 1))


def late(i: int, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) if i >= 5 else x


def frozen(i: int, x: torch.Tensor) -> torch.Tensor:
    return x.detach() if i >= 5 else x


def late_scale(i: int, x: torch.Tensor) -> torch.Tensor:
    return x * (2.0 if i >= 5 else 3.0)


def test_a_loop_that_adds_at_open_sizes() -> None:
    torch.manual_seed(0)
    model = Stack(straight)
    first, second = (bind_call(model, (torch.randn(b, 5, 8),), {}) for b in (2, 3))
    short = capture_repeated(model, first)
    assert short.blocks is not None, short.notes
    assert short.ranges and sum(s.kind == "constant" for s in short.inputs) == 1
    whole = unroll_captured(short)
    for bound in (first, second):
        torch.testing.assert_close(run(whole, model, bound), model(**bound), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("twist", "style", "reason"),
    [
        (scaled, "", "differ"),
        (late, "", "layers.5 does not do what"),
        (frozen, "", "layers.5 does not do what"),
        (late_scale, "", "layers.5 does not do what"),
        (straight, "late", "layers.7 does not do what"),
        (straight, "length", "on the number of layers"),
        (straight, "last", "on the number of layers"),
        (straight, "sums", "on the number of layers"),
        (straight, "second", "one of the layers only"),
        (straight, "third", "one of the layers only"),
    ],
)
def test_falls_back(twist: Callable[[int, torch.Tensor], torch.Tensor], style: str, reason: str) -> None:
    torch.manual_seed(0)
    model = Stack(twist, style)
    bound = bind_call(model, (torch.randn(2, 5, 8),), {})
    before = state_of(model)
    captured = capture_repeated(model, bound, dynamic=False)
    assert state_of(model) == before
    assert captured.blocks is None
    assert unroll_captured(captured) is captured
    assert "captured one by one" in captured.notes[-1] and reason in captured.notes[-1]
    expected = model(**bound)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(run(captured, model, bound), expected, rtol=0, atol=0)


class Weighed(nn.Module):
    """What follows the layers fails with fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
        self.weights = nn.Parameter(torch.rand(9, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x := layer(x) for layer in self.layers]
        return (torch.stack(seen) * self.weights).sum(0)


def test_nothing_is_reported_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch logs operators that fail on fake tensors as errors, also where all layers are captured then."""
    model, told = Weighed(), list[logging.LogRecord]()
    logger = logging.getLogger(FakeTensor.__module__)
    monkeypatch.setattr(logger, "callHandlers", told.append)
    captured = capture_repeated(model, bind_call(model, (torch.randn(2, 8),), {}), dynamic=False)
    assert captured.blocks is None and "captured one by one" in captured.notes[-1]
    assert not told


class Counting(nn.Linear):
    """A layer that counts its calls in a tensor that it is given."""

    def forward(self, x: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        if count is not None:
            count.add_(1.0)
        return torch.relu(super().forward(x))


class Beside(nn.Module):
    """Each layer, or the loop behind each layer, changes something that only the end of forward shows."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counting(8, 8) for _ in range(9))
        self.register_buffer("count", torch.ones(()))
        self.style = style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay = torch.ones(())
        for layer in self.layers:
            x = layer(x, self.count if self.style == "layers count" else None)
            if self.style == "loop counts":
                self.count.mul_(2.0)
            if self.style == "decay":
                decay = decay * 0.5
        return x * decay


@pytest.mark.parametrize("style", ["layers count", "loop counts", "decay"])
def test_what_is_changed_beside_the_layers(style: str) -> None:
    """As often as the model has layers, not as often as layers were captured."""
    torch.manual_seed(0)
    model = Beside(style)
    bound = bind_call(model, (torch.randn(2, 8),), {})
    captured = capture_repeated(model, bound, dynamic=False)
    assert captured.blocks is None and "captured one by one" in captured.notes[-1]
    mine = run_flat(captured, model, bound)
    assert_same(mine[0], model(**bound))
    if style != "decay":
        assert_same(mine[1], model.count)


# ------------------------------------------------------------- layers with inputs and results of their own


@torch.no_grad()
def assert_short(model: nn.Module, bound: dict[str, Any], *, dynamic: bool = False) -> Captured:
    """Layers are left out, and the unrolled program gives what the model gives, in its structure.

    Returned is what was captured, its graph unrolled.
    """
    expected = model(**copy.deepcopy(bound))
    before = state_of(model)
    short = capture_repeated(model, bound, dynamic=dynamic)
    assert state_of(model) == before
    assert short.blocks is not None, short.notes
    nodes = len(short.graph_module.graph.nodes)
    whole = unroll_captured(short)
    assert_same(run_all(whole, model, bound), expected)
    assert nodes < len(whole.graph_module.graph.nodes)
    return short


@pytest.mark.parametrize(
    ("kind", "layers", "changes"), [("llama", 6, {}), ("gemma2", 11, {"sliding_window": 5})]
)
def test_caches(kind: str, layers: int, changes: dict[str, Any]) -> None:
    """Of every layer keys and values go in and out; sliding layers count tokens besides."""
    model = tiny(kind, layers, **changes)
    assert_short(model, bind_call(model, (), {"input_ids": tokens(2, 7)}))
    with torch.no_grad():
        past = model(input_ids=tokens(2, 7)).past_key_values
    step = bind_call(model, (), {"input_ids": tokens(2, 1), "past_key_values": past})
    short = assert_short(model, step)
    assert sum(s.kind == "user" for s in short.inputs) < len(short.user_inputs)
    assert [s.name for s in short.user_inputs] == leaf_names(step)
    returned = {s.name for s in short.whole_outputs} - {"logits", *step}  # the caches themselves
    assert returned == {*leaf_names(step)} - {"input_ids"}


def test_a_static_cache_without_data() -> None:
    """Its layers count tokens in tensors that are made when the cache is put together for the call."""
    model = tiny("llama", 6).double()
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    assert_short(model, bind_call(model, (), {"input_ids": tokens(2, 7), "past_key_values": cache}))


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma2", {"sliding_window": 5})])
def test_static_caches_of_all_layers_are_written_in_place(kind: str, changes: dict[str, Any]) -> None:
    """The last layer's too, whose own tensors the captured call does not have."""
    model = tiny(kind, 12 if kind == "gemma2" else 6, **changes)
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(input_ids=tokens(2, 3), past_key_values=cache)
    step = bind_call(model, (), {"input_ids": tokens(2, 1), "past_key_values": cache})
    short = capture_repeated(model, step, dynamic=False)
    assert short.blocks is not None, short.notes
    written = {spec.name for spec in capture(model, step, dynamic=False).outputs if spec.in_place}
    assert len(written) > model.config.num_hidden_layers
    assert {spec.name for spec in short.whole_outputs if spec.in_place} == written


def test_a_cache_of_open_length() -> None:
    model = tiny("llama", 6)
    with torch.no_grad():
        pasts = [model(input_ids=tokens(2, n)).past_key_values for n in (7, 4)]
    first, second = (
        bind_call(model, (), {"input_ids": tokens(2, 1), "past_key_values": past}) for past in pasts
    )
    short = capture_repeated(model, first)
    assert short.blocks is not None, short.notes
    with torch.no_grad():
        expected = model(**copy.deepcopy(second))  # first: a run updates the cache that it is given
        assert_same(run_all(unroll_captured(short), model, second), expected)


def test_hidden_states() -> None:
    """All layers but the last return what they hand on; the last one's is normalised first."""
    model = tiny("llama", 6)
    short = assert_short(model, language_call(model, 2, 7) | {"output_hidden_states": True})
    assert len(short.whole_outputs) == 1 + 7


@pytest.mark.parametrize("style", ["all", "heads"])
def test_a_loop_that_collects(style: str) -> None:
    torch.manual_seed(0)
    model = Stack(straight, style)
    assert_short(model, bind_call(model, (torch.randn(2, 5, 8),), {}))


class StateLayer(nn.Module):
    """A layer with a state: a tensor that it changes, and one that it hands back as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        new = state["sum"] + self.up(x)
        return torch.relu(new) * state["kept"], {"sum": new, "kept": state["kept"]}


class Stateful(nn.Module):
    """Layers with a state each, in a plain list of dicts; ``wrong`` is one that is given the first's."""

    def __init__(self, wrong: int = -1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StateLayer() for _ in range(9))
        self.wrong = wrong

    def forward(self, x: torch.Tensor, states: list[dict[str, torch.Tensor]]) -> Any:
        new = []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, states[0 if i == self.wrong else i])
            new.append(state)
        return {"x": x, "states": new}


def states(count: int = 9) -> list[dict[str, torch.Tensor]]:
    return [{"sum": torch.randn(2, 5, 8), "kept": torch.randn(8)} for _ in range(count)]


def test_states_in_any_structure() -> None:
    torch.manual_seed(0)
    model = Stateful()
    assert_short(model, bind_call(model, (torch.randn(2, 5, 8), states()), {}))


def test_a_state_of_another_layer() -> None:
    torch.manual_seed(0)
    model = Stateful(wrong=6)
    bound = bind_call(model, (torch.randn(2, 5, 8), states()), {})
    captured = capture_repeated(model, bound, dynamic=False)
    assert captured.blocks is None and "captured one by one" in captured.notes[-1]
    with torch.no_grad():
        assert_same(run_all(captured, model, bound), model(**bound))


def test_a_state_of_another_size() -> None:
    torch.manual_seed(0)
    model, given = Stateful(), states()
    given[7]["sum"] = torch.randn(2, 1, 8)
    captured = capture_repeated(model, bind_call(model, (torch.randn(2, 5, 8), given), {}), dynamic=False)
    assert captured.blocks is None
    assert "layers.7 takes other inputs" in captured.notes[-1]


# ------------------------------------------------------------------------------------------- their plans


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_are_planned_alike_whatever_a_mesh_costs(ranks: int) -> None:
    """The last captured layer may stand for others only if the one before it lies and is sent alike."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=16))
    call = {"input_ids": torch.zeros(2, 16, dtype=torch.long), "use_cache": False}
    base = canonical(mark_caches(capture_repeated(model, bind_call(model, (), call))), ranks)
    kinds = set()
    for latency, bandwidth, memory in ((0, 1e7, 1e7), (0, 1e8, 1e9), (1e-5, 1e8, 1e7), (1e-5, 1e10, 1e6)):
        program = programs.planned_work(base.copy(), CostModel("mesh", 1e10, memory, latency, bandwidth))
        rewrite(program, training=False)
        groups = SimulatedGroups(program.axis_sizes, (0,) * len(program.axis_sizes))
        flat = lower_program(
            program, (0,) * len(program.axis_sizes), groups
        ).local  # refuses layers that differ
        kinds.add(tuple(str(n.target) for n in flat.graph.nodes if "tpcompile" in str(n.target)))
    assert len(kinds) > 2  # the plans did differ


@pytest.mark.parametrize(("bias", "ranks"), [(True, 2), (True, 3), (False, 2)])
def test_layers_that_are_planned_unlike_each_other_are_planned_one_by_one(bias: bool, ranks: int) -> None:
    """The first by columns, all others by rows: what is sent between them is not the same."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=bias) for _ in range(7)))
    report = tpcompile.verify(model, ranks, example_args=(torch.randn(64, 32),), dynamic=False)
    assert report.ok, report


def test_they_are_on_processes() -> None:
    for result, gradients, notes in run_spmd(spmd_repeated.planned_unlike, 2):
        assert "planned one by one: periods 1 and 2 of repeated layers differ" in notes
        assert max(result, gradients) <= 1e-5


# --------------------------------------------------------------------- layers as calls of one submodule


def lowered(model: nn.Module, bound: dict[str, Any]) -> tuple[GraphModule, GraphModule | None, GlobalProgram]:
    """The program of a single rank, as it is and outlined, and what it was lowered from."""
    program = programs.planned_work(GlobalProgram(mark_caches(capture_repeated(model, bound)), 1))
    rewrite(program, training=True)
    at = (0,) * len(program.axis_sizes)
    lowered = lower_program(program, at, SimulatedGroups(program.axis_sizes, at))
    return lowered.local, lowered.outlined, program


def feed(
    graph_module: GraphModule, model: nn.Module, bound: dict[str, Any], program: GlobalProgram
) -> list[Any]:
    names = {
        s.name: leaf for s, leaf in zip(program.captured.user_inputs, flatten_call(bound)[0], strict=True)
    }
    tables = names | dict(model.named_parameters()) | dict(model.named_buffers()) | program.captured.constants
    return [tables[n.meta[SOURCE].spec.name] for n in graph_module.graph.find_nodes(op="placeholder")]


@pytest.mark.filterwarnings("ignore:the rules of the plan cost")
@pytest.mark.parametrize("layer", [0, 1, 2, 5])
def test_a_pin_on_one_layer_is_about_no_other(layer: int) -> None:
    model = nn.Sequential(*(Mlp() for _ in range(6)))
    plan = tpcompile.plan(model, 2, (torch.zeros(3, 5, 12),), plan={f"{layer}.up": "replicate"})
    whole = [n for n in range(6) if plan.layout.local_shape(f"{n}.up.weight", 0) == (20, 12)]
    assert whole == [layer]


@pytest.mark.parametrize("cached", [False, True])
def test_outlined_layers_compute_the_same(cached: bool) -> None:
    model = tiny("llama", 9)
    bound = bind_call(model, (), {"input_ids": tokens(2, 7), "use_cache": cached})
    flat, outlined, program = lowered(model, bound)
    assert outlined is not None
    body = outlined.get_submodule("layers_0")
    calls = outlined.graph.find_nodes(op="call_module", target="layers_0")
    assert isinstance(body, GraphModule) and len(calls) == 8
    assert len(body.graph.output_node().args[0]) == (3 if cached else 1)  # type: ignore[arg-type]
    linears = [
        len(g.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
        for g in (flat, outlined, body)
    ]
    assert linears == [9 * 7 + 1, 7 + 1, 7]
    results = [g(*feed(g, model, bound, program)) for g in (flat, outlined)]
    assert_same(*results)
    gradients = [torch.autograd.grad(r[0].sum(), list(model.parameters())) for r in results]
    assert_same(*gradients)


def test_few_layers_are_not_outlined() -> None:
    model = tiny("llama", 6)
    assert lowered(model, language_call(model, 2, 7))[1] is None


def test_compiled_layers_on_two_ranks() -> None:
    """Seven of eight layers are calls of one submodule; the first one is captured by itself."""
    for found in run_spmd(spmd_repeated.compiled_gradients, 2, timeout=600):
        assert found["calls"] == spmd_repeated.LAYERS - 1
        assert max(found[name] for name in ("loss", "logits", "gradients")) <= 1e-5


def test_divided_between_layers_on_two_ranks() -> None:
    assert max(run_spmd(spmd_repeated.divided_between_layers, 2)) <= 1e-5


def test_tokens_on_two_ranks() -> None:
    for found in run_spmd(spmd_repeated.tokens, 2, timeout=600):
        assert found["equal"] and found["states"] <= 1e-5 and not found["one by one"]


# ------------------------------------------------------------------------------------------- finding repeats


def widths(*sizes: int) -> list[Repeat]:
    return find_repeats(nn.ModuleDict({"a": nn.ModuleList(nn.Linear(n, n) for n in sizes)}))


def test_find_repeats() -> None:
    assert widths(3, 3, 3, 3) == []
    assert widths(3, 3, 3, 3, 3) == [Repeat("a", 0, 1, 5)]
    assert widths(4, 5, 3, 3, 3, 3, 3, 3, 9) == [Repeat("a", 2, 1, 6)]
    assert widths(*[1, 1, 1, 1, 1, 2] * 6, 1, 1) == [Repeat("a", 0, 6, 6)]
    assert list(Repeat("a", 2, 2, 6).dropped) == [8, 9, 10, 11, 12, 13]
    assert Repeat("a.b", 0, 2, 6).shifted("a.b.4.b.4.weight", 3) == "a.b.10.b.4.weight"


def test_what_is_no_repeat() -> None:
    one = nn.Linear(3, 3)
    assert find_repeats(nn.ModuleList([one] * 8)) == []
    tied = nn.ModuleList(nn.Linear(3, 3) for _ in range(8))
    tied[6].weight = tied[1].weight
    assert [len(r.dropped) for r in find_repeats(nn.ModuleDict({"a": tied}))] == []
    frozen_last = nn.ModuleList(nn.Linear(3, 3) for _ in range(8))
    frozen_last[7].requires_grad_(False)
    assert find_repeats(nn.ModuleDict({"a": frozen_last})) == [Repeat("a", 0, 1, 7)]


def test_a_different_last_layer_is_kept() -> None:
    torch.manual_seed(0)
    model = Stack(straight)
    model.layers[8].up, model.layers[8].down = nn.Linear(8, 28), nn.Linear(28, 8)
    assert_unrolls_stack(model)


def assert_unrolls_stack(model: Stack) -> None:
    bound = bind_call(model, (torch.randn(2, 5, 8),), {})
    short = capture_repeated(model, bound, dynamic=False)
    assert short.blocks is not None, short.notes
    whole = unroll_captured(short)
    assert [s.name for s in whole.inputs if s.kind == "param"] == [n for n, _ in model.named_parameters()]
    torch.testing.assert_close(run(whole, model, bound), model(**bound), rtol=0, atol=0)


def test_truncated_restores_after_an_error() -> None:
    model = Stack(straight)
    before, names = state_of(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError), truncated(model, find_repeats(model)):
        assert len(model.layers) == 3
        raise ValueError
    assert state_of(model) == before
    assert [name for name, _ in model.named_parameters()] == names


# ---------------------------------------------------------------------------------------------- after passes


def linears(short: Captured) -> list[Node]:
    return short.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)


def insert_identities(short: Captured, *, tagged: bool, skip: int = 0) -> None:
    """Puts a multiplication by one behind every linear, as a pass would insert a collective."""
    graph = short.graph_module.graph
    for linear in linears(short)[skip:]:
        users = list(linear.users)
        with graph.inserting_after(linear):
            same = call(graph, torch.ops.aten.mul.Tensor, (linear, 1.0), like=linear)
        if not tagged:
            same.meta.pop(BLOCK, None)
        for user in users:
            user.replace_input_with(linear, same)


def short_stack(depth: int) -> tuple[Stack, dict[str, Any], Captured]:
    torch.manual_seed(0)
    model = Stack(straight, depth=depth)
    bound = bind_call(model, (torch.randn(2, 5, 8),), {})
    short = capture_repeated(model, bound, dynamic=False)
    assert short.blocks is not None, short.notes
    return model, bound, short


@pytest.mark.parametrize("tagged", [True, False])
def test_unrolls_after_a_rewrite(tagged: bool) -> None:
    model, bound, short = short_stack(12)
    insert_identities(short, tagged=tagged)
    whole = unroll_captured(short)
    graph = whole.graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 12 * 2
    blocks = [block for node in graph.nodes if (block := block_of(node))]
    assert {block.period for block in blocks} == set(range(12))
    torch.testing.assert_close(run(whole, model, bound), model(**bound), rtol=0, atol=0)


def test_cut_weights_are_copied_one_by_one() -> None:
    """A pass may have replaced a weight by two halves: each is asked for, under the weight's own name."""
    _, _, short = short_stack(6)
    assert short.blocks is not None
    graph = short.graph_module.graph
    names = {n: s.name for n, s in zip(graph.find_nodes(op="placeholder"), short.inputs, strict=True)}
    for linear in linears(short):
        weight = linear.args[1]
        assert isinstance(weight, Node)
        with graph.inserting_after(weight):
            halves = [graph.placeholder(f"{weight.name}_part{i}") for i in range(2)]
        with graph.inserting_before(linear):
            whole = call(graph, torch.ops.aten.clone.default, (weight,), like=linear)
        for half in halves:
            half.meta.update(weight.meta)
            names[half] = names[weight]
        whole.target, whole.args = torch.ops.aten.cat.default, (halves,)
        linear.replace_input_with(weight, whole)
        graph.erase_node(weight)
    asked = []

    def new_param(node: Node, rename: Callable[[str], str]) -> Node:
        asked.append(rename(names[node]))
        with graph.inserting_after(node):
            copy = graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        return copy

    unroll(graph, short.blocks, new_param)
    graph.lint()
    assert sorted(asked) == sorted(
        f"layers.{i}.{name}"
        for i in (3, 4, 5)
        for name in ("up.weight", "up.weight", "up.bias", "down.weight", "down.weight", "down.bias")
    )


def test_refuses_periods_that_were_rewritten_differently() -> None:
    _, _, short = short_stack(6)
    insert_identities(short, tagged=True, skip=5)
    count = len(short.graph_module.graph.nodes)
    with pytest.raises(TpCompileError, match="periods 1 and 2 of repeated layers differ"):
        unroll_captured(short)
    assert len(short.graph_module.graph.nodes) == count


def test_names_of_what_was_left_out() -> None:
    model, _, short = short_stack(6)
    assert short.blocks is not None
    names = [s.name for s in short.inputs if s.kind == "param"]
    copied = [copy for _, copy in short.blocks.left_out(names)]
    assert names + copied == [name for name, _ in model.named_parameters()]
