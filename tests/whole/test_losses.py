"""Losses over a vocabulary that the ranks share: nothing is gathered, and all is what torch computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import losses as on_ranks
from tpcompile.planner.search.cost import CostModel
from tpcompile.runtime.read_request import example_call, read_options
from tpcompile.runtime.sharded_result import defer_gathers
from tpcompile.runtime.verify.one_process import verify
from tpcompile.runtime.verify.trial import SimulatedCompiler, Trial

VOCABULARY, WIDTH = 203, 14
# Where every byte counts, and no message as such: what is small is sent rather than what is large.
BYTES = CostModel("bytes", flops=1e12, memory=1e12, latency=0.0, bandwidth=1e9)
IGNORED = -100

Loss = Callable[[Tensor, Tensor], Tensor]


class Head(nn.Module):
    """Logits of positions over a vocabulary, and what a function makes of them and of labels."""

    def __init__(self, loss: Loss, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias)
        self.register_buffer("weight", torch.rand(VOCABULARY))
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> object:
        logits = self.head(x)
        return (
            self.loss(logits, labels) if self.loss is not weighted else weighted(logits, labels, self.weight)
        )


def weighted(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Classes have weights, and labels are smoothed."""
    flat, targets = logits.flatten(0, 1), labels.flatten()
    mean = F.cross_entropy(flat, targets, weight, label_smoothing=0.2, ignore_index=IGNORED)
    plain = F.cross_entropy(flat, targets, weight, reduction="none")
    soft = F.cross_entropy(flat, flat.detach().roll(1, 0).exp(), weight, label_smoothing=0.1)
    return mean + (plain * plain).mean() + soft


def _by_token(**options: object) -> Loss:
    return lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)  # type: ignore[arg-type]


def _picked(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)


def _soft(logits: Tensor, labels: Tensor) -> Tensor:
    classes = torch.arange(VOCABULARY, dtype=logits.dtype).cos().softmax(0)
    return F.cross_entropy(logits.flatten(0, 1), classes.expand_as(logits).flatten(0, 1))


LOSSES: dict[str, Loss] = {
    "mean": _by_token(),
    "sum": _by_token(reduction="sum"),
    "none": _by_token(reduction="none"),
    "smoothed": _by_token(label_smoothing=0.1),
    "smoothed sum": _by_token(label_smoothing=0.1, reduction="sum"),
    "ignore_index": lambda x, y: _by_token(ignore_index=3)(x, y.clamp(min=3)),
    "weighted": weighted,
    "classes in the middle": lambda x, y: F.cross_entropy(x.transpose(1, 2), y, reduction="none"),
    "one token": lambda x, y: F.cross_entropy(x[0, 0], y[0, 1]),
    "transformers": lambda x, y: ForCausalLMLoss(x, y, VOCABULARY),
    "transformers, counted": lambda x, y: ForCausalLMLoss(x, y, VOCABULARY, num_items_in_batch=y.numel()),  # type: ignore[arg-type]
    "log_softmax, nll_loss": lambda x, y: F.nll_loss(x.log_softmax(-1).flatten(0, 1), y.flatten()),
    "nll_loss in the middle": lambda x, y: F.nll_loss(x.log_softmax(-1).transpose(1, 2), y),
    "token log-probabilities": _picked,
    "logsumexp": lambda x, y: x.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) - x.logsumexp(-1),
    "z-loss": lambda x, y: _by_token()(x, y) + 1e-2 * (x.logsumexp(-1, keepdim=True) ** 2).mean(),
    "soft labels": _soft,
    "one-hot": lambda x, y: -(F.one_hot(y.clamp(min=0), VOCABULARY) * x.log_softmax(-1)).sum(),
    "entropy": lambda x, y: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "distillation": lambda x, y: F.kl_div(x.log_softmax(-1), x.flip(0).softmax(-1), reduction="batchmean"),
}


def _trial(loss: Loss, ranks: int, bias: bool = False) -> tuple[Trial, list[str]]:
    """A head's call compiled for some ranks, and what differs from the model as it is."""
    model = Head(loss, bias).double().train()
    x = torch.randn(2, 5, WIDTH, dtype=torch.double)
    labels = torch.randint(0, VOCABULARY, (2, 5))
    labels[0, :2] = IGNORED
    options = read_options(model, "auto", BYTES, "cpu", True, None, (), sequence_parallel=False)
    trial = Trial(
        model, example_call(model, (x, labels), None, True), SimulatedCompiler(options, ranks), True
    )
    found = trial.compare_ranks(trial.python(), trial.on_ranks())
    return trial, [f"{one.name} by {one.error}" for one in found if not one.error <= trial.limit]


def _whole(program: GraphModule) -> list[str]:
    """The values of a rank's program that have all of the vocabulary; what is given to it does not count."""
    found = [n for n in program.graph.nodes if n.op == "call_function" and _has_all(n)]
    return [f"{node}: {node.meta['val'].shape}" for node in found]


def _has_all(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and VOCABULARY in value.shape


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_the_vocabulary_is_gathered(name: str) -> None:
    trial, wrong = _trial(LOSSES[name], 3)
    assert not wrong
    # Labels that are written with all classes are whole on every rank, as the model writes them.
    given = ("soft labels", "one-hot", "weighted")
    assert name in given or not any(map(_whole, trial.programs))
    assert not [c for c in trial.compiled.plan.collectives if c.kind == "all_gather"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks(ranks: int) -> None:
    trial, wrong = _trial(_by_token(), ranks, bias=True)
    assert not wrong
    assert not any(map(_whole, trial.programs))


@pytest.mark.parametrize("dims", [(-1, 1), (2, 0)])
def test_a_logsumexp_over_more_than_the_vocabulary(dims: tuple[int, int]) -> None:
    assert not _trial(lambda x, y: x.logsumexp(dims), 2)[1]


def test_where_all_labels_are_ignored() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        none = torch.full_like(labels, IGNORED)
        return torch.stack([_by_token()(logits, none), _by_token(reduction="sum")(logits, none)])

    trial, _ = _trial(loss, 2)
    mean, total = next(value.detach() for (kind, _), value in trial.on_ranks()[0].items() if kind == "result")
    assert math.isnan(mean)
    assert total == 0


def test_labels_out_of_the_vocabulary_fail_as_in_torch() -> None:
    for wrong in (VOCABULARY, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            _trial(lambda x, y, wrong=wrong: _by_token()(x, torch.full_like(y, wrong)), 2)  # type: ignore[misc]


def test_small_logits_are_gathered_where_messages_count() -> None:
    """The planner goes by cost: where messages count, one is better than five."""
    waits = CostModel("waits", flops=1e12, memory=1e12, latency=1.0, bandwidth=1e12)
    model = Head(LOSSES["distillation"]).train()
    x, labels = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.long)
    options = read_options(model, "auto", waits, "cpu", True, None, (), sequence_parallel=False)
    plan = (
        SimulatedCompiler(options, 2).compile(model, example_call(model, (x, labels), None, True), None).plan
    )
    assert sum(c.count for c in plan.collectives) == 1


def _llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_a_model_of_transformers_with_its_own_loss() -> None:
    model = _llama(tied=True).train()
    ids = torch.randint(0, VOCABULARY, (2, 8))
    options = read_options(model, "auto", None, "cpu", True, None, (), sequence_parallel=False)
    bound = example_call(model, (), {"input_ids": ids, "labels": ids}, True)
    trial = Trial(model, bound, SimulatedCompiler(options, 2), gradients=False)
    short = [defer_gathers(program, trial.specs) for program in trial.programs]
    assert not any(_whole(program) for program, _ in short)
    assert all(len(gathers) == 1 for _, gathers in short)  # the logits'
    assert [c.where for c in trial.compiled.plan.collectives if "when it is used" in c.where]
    without = SimulatedCompiler(options, 2)
    plan = without.compile(model, example_call(model, (), {"input_ids": ids}, True), None).plan
    assert not [c for c in plan.collectives if "when it is used" in c.where]


def test_with_a_divided_sequence() -> None:
    model, ids = _llama().train(), torch.randint(0, VOCABULARY, (2, 7))
    report = verify(model, 2, (), {"input_ids": ids, "labels": ids}, sequence_parallel=True)
    assert report.ok, report


def test_steps_of_training_are_those_of_the_whole_model() -> None:
    errors = run_spmd(on_ranks.train, 2, _llama(), VOCABULARY)
    assert max(errors) < 1e-5


def test_sharded_logits_are_used_as_whole_ones() -> None:
    run_spmd(on_ranks.use, 2, 7)
