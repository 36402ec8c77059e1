"""Strategies by name, and what rules make of a model: matching, refusals, placements, right results."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed import tensor as dtensor
from torch.nn import functional as F

try:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
except ImportError:  # transformers 5.17
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

import tpcompile
from tests.helpers import programs
from tests.whole.test_families_simulated import CAPTURED, assert_equal_to_whole, captured, inputs, sharded
from tpcompile import ParallelInterface, Strategy, TensorParallelLayer, TpCompileError
from tpcompile.lowering import simulate
from tpcompile.pipeline import rewrite
from tpcompile.planner.pins import make_pins
from tpcompile.strategies.parallel_interface import STRATEGIES
from tpcompile.strategies.read_rules import read_rules

MODELS = Path(transformers.__file__).parent / "models"
_PLAN = re.compile(r"_(?:tp|ep)_plan\s*(?::[^=\n]*)?=\s*\{(.*?)\}", re.DOTALL)
# The document's own list, and what older releases had besides.
DOCUMENT = {
    *(
        "colwise",
        "rowwise",
        "colwise_rep",
        "rowwise_rep",
        "local_colwise",
        "local_rowwise",
        "local",
        "gather",
    ),
    *("local_packed_rowwise", "packed_colwise", "packed_rowwise", "sequence_parallel", "replicate"),
    *("ep_router", "moe_tp_experts"),
}


class Mlp(nn.Module):
    """Packed gate and up, and down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(20, 2 * 28), nn.Linear(28, 20)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Mlp(), nn.LayerNorm(20)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Base(nn.Module):
    """Words and blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(46, 20)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, words: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(words)
        for layer in self.layers:
            x = layer(x)
        return x


class Toy(nn.Module):
    """A base model with a head, tied if asked, named as transformers names them."""

    base_model_prefix = "model"

    def __init__(self, tied: bool = False, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Base(layers), nn.Linear(20, 46, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(words))
        return logits


WORDS = torch.randint(46, (3, 7), generator=torch.Generator().manual_seed(0))


def plan_of(model: nn.Module, rules: Any, ranks: int = 2) -> tpcompile.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tpcompile.plan(model, ranks, (WORDS,), plan=rules, dynamic=False, cost_model="cpu")


def placed(plan: tpcompile.Plan, name: str) -> str:
    text = next(line for line in str(plan).splitlines() if line.startswith(name))
    return text.split("]")[1].split()[0]


def assert_right(model: nn.Module, rules: Any, ranks: int) -> None:
    """Results and gradients under rules, whatever they ask for."""
    program = programs.planned(
        model.double(), WORDS, ranks=ranks, pins=make_pins(read_rules(model, rules).wishes)
    )
    rewrite(program, training=True)
    wanted = model(WORDS)
    for results in programs.run_ranks(program, model, WORDS):
        torch.testing.assert_close(results[0], wanted, rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, WORDS)


def test_every_name_of_transformers_is_known() -> None:
    named = set(ALL_PARALLEL_STYLES.keys()) | DOCUMENT
    for path in (*MODELS.glob("*/configuration_*.py"), *MODELS.glob("*/modeling_*.py")):
        for plan in _PLAN.findall(path.read_text()):
            named |= set(re.findall(r':\s*"(\w+)"', plan))
    assert len(named) > 20
    assert named - set(STRATEGIES) <= {"reshard", "free_full_weight"}


def test_the_mapping() -> None:
    class Custom(TensorParallelLayer):
        pass

    before = len(STRATEGIES)
    try:
        ParallelInterface.register_strategy("mine", Custom)
        ParallelInterface.register("mine_too", Strategy("whole"))
        assert STRATEGIES["mine"] is Custom and ParallelInterface()["mine_too"] == Strategy("whole")
        assert len(STRATEGIES) == before + 2
        own = ParallelInterface()
        own["colwise"] = Strategy("in")
        assert own["colwise"] != STRATEGIES["colwise"] and len(own) == len(STRATEGIES)
        del own["colwise"]
        assert own["colwise"] == STRATEGIES["colwise"]
        with pytest.raises(KeyError):
            del own["colwise"]
        found = read_rules(Toy(), {"model.layers.*.mlp": "mine", "lm_head": "mine_too"})
        assert found.wishes.keys() == {"lm_head.weight"}
    finally:
        del ParallelInterface._global_mapping["mine"], ParallelInterface._global_mapping["mine_too"]


def test_which_rule_counts() -> None:
    rules = {
        "*": "replicate",
        "layers.*.mlp.down_proj": "rowwise",  # relative to the base model
        "model.layers.1.mlp.down_proj": "colwise",
        "model.layers.*.mlp.down_proj.bias": dtensor.Replicate(),
        "*.norm": "sequence_parallel",
    }
    before = dict(rules)
    found = read_rules(Toy(), rules)
    asked = {name: wish.asked for name, (wish,) in found.wishes.items()}
    assert rules == before
    assert asked["lm_head.weight"] == "replicate"
    assert asked["model.layers.0.mlp.down_proj.weight"] == "rowwise"
    assert asked["model.layers.1.mlp.down_proj.weight"] == "colwise"
    assert asked["model.layers.0.mlp.down_proj.bias"] == "R"
    assert asked["model.layers.0.norm.weight"] == "sequence_parallel"
    assert found.sequence == {"model.layers.0.norm", "model.layers.1.norm"} and not found.notes


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"model.layers.*.mlp.dawn_proj": "rowwise"}, "did you mean model.layers.*.mlp.down_proj"),
        ({"model.layers.*.mlp": "rowwise"}, "no parameters of their own"),
        ({"lm_head": "colwize"}, "did you mean 'colwise'.*embedding_rowwise"),
        ({"lm_head": 3}, "is not a placement"),
        ({"lm_head": tpcompile.Shard(5)}, "it has 2 dimensions"),
        ({"model.layers.*.norm": "rowwise"}, "which this parameter does not have"),
        ({"model.embed_tokens": "embedding_colwise", "lm_head": "colwise"}, "one weight under two names"),
    ],
)
def test_what_is_refused(rules: Any, message: str) -> None:
    with pytest.raises(TpCompileError, match=re.compile(message, re.DOTALL)):
        plan_of(Toy(tied="embed" in str(rules)), rules)


def test_placements_by_name() -> None:
    rules = {
        "model.embed_tokens": "embedding_rowwise",
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "local_packed_rowwise",
        "model.layers.*.norm": "replicated_with_grad_allreduce",
        "lm_head": "colwise_rep",
        "model.layers.*": "moe_tp_experts",
    }
    plan = plan_of(Toy(), rules)
    assert placed(plan, "model.embed_tokens") == "S(0)"
    assert placed(plan, "model.layers.*.mlp.gate_up_proj.weight") == "S(0/1)"
    assert placed(plan, "model.layers.*.mlp.down_proj.weight") == "S(1)"
    assert placed(plan, "model.layers.*.norm.weight") == "R"
    assert placed(plan, "lm_head.weight") == "S(0)"
    assert not plan.notes or "rules of the plan cost" in plan.notes[0]


def test_a_tied_weight_may_be_named_by_either_name() -> None:
    plan = plan_of(Toy(tied=True), {"lm_head": "colwise_gather_output"})
    assert placed(plan, "model.embed_tokens.weight") == "S(0)"
    plan = plan_of(Toy(tied=True), {"lm_head": "rowwise_rep", "model.embed_tokens": "embedding_colwise"})
    assert placed(plan, "model.embed_tokens.weight") == "S(1)"


def test_layers_that_are_told_apart() -> None:
    """Layers that repeat stand for one another, unless a rule singles one out, captured or not."""
    for number in (2, 6):
        plan = plan_of(Toy(layers=7), {f"model.layers.{number}.mlp.down_proj": "replicate"})
        whole = {
            name.split(".")[2]
            for name, p in plan.layout.params.items()
            if name.endswith("down_proj.weight") and p.segments[0].shards == (None,)
        }
        assert whole == {str(number)}


WRONG = {
    "model.embed_tokens": "embedding_colwise",
    "model.layers.*.mlp.gate_up_proj": "rowwise",
    "model.layers.*.mlp.down_proj": "colwise",
    "lm_head": "rowwise",
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_plan_that_fits_nowhere_is_right(ranks: int) -> None:
    assert_right(Toy(), WRONG, ranks)


def test_a_poor_plan_is_followed_with_a_warning() -> None:
    model = Toy()
    with pytest.warns(UserWarning, match=r"the rules of the plan cost: \d+ collectives") as caught:
        plan = tpcompile.plan(model, 2, (WORDS,), plan=WRONG, dynamic=False, cost_model="cpu")
    assert len(caught) == 1
    assert placed(plan, "model.layers.*.mlp.down_proj.weight") == "S(0)"
    assert any("the rules of the plan cost" in note for note in plan.notes)


def test_fewer_key_heads_than_ranks() -> None:
    """transformers' plan on four ranks with two key heads: divided as far as there are units."""
    rules = {f"model.layers.*.self_attn.{p}_proj": "colwise" for p in "qkv"}
    rules["model.layers.*.self_attn.o_proj"] = "rowwise"
    model, _ = captured("two_kv_heads")
    model, program, layout = sharded("two_kv_heads", 4, read_rules(model, rules))
    assert_equal_to_whole(model, program, simulate.lower_all(program), inputs("two_kv_heads", CAPTURED))
    for name, param in layout.params.items():
        if "_proj.weight" in name and "self_attn" in name:
            atoms = [(d, a) for d, dim in enumerate(param.segments[0].atoms) for a in dim]
            divided = {atoms[shard][0] for shard in param.segments[0].shards if shard is not None}
            assert divided == {1 if "o_proj" in name else 0}, name
