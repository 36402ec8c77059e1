"""What ranks do in ``test_trainer``: transformers' ``Trainer``, of sharded models beside unsharded ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from trl import GRPOTrainer

import tpcompile
from tests.helpers.run_ranks import as_torchrun
from tests.on_ranks.module_life import refusal
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.runtime.training import data_ranks
from tpcompile.runtime.training.refuse_arguments import refuse_own_gathers
from tpcompile.weights.sharded_parameter import ShardedParameter


class ToyConfig(PreTrainedConfig):
    """Four ranks divide neither size evenly."""

    model_type = "toy_of_trainer"
    hidden_size = 22
    intermediate_size = 42
    vocab_size = 61


class ToyForCausalLM(PreTrainedModel):
    """A language model that is captured in no time, with the loss of transformers."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        words = self.words(input_ids)
        logits = self.head(words + self.down(self.up(words.cumsum(1)).relu()))
        loss = (
            None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        )
        return CausalLMOutput(loss=loss, logits=logits)


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        lines = Lines(9)
        return (lines[at] for at in range(len(lines)))


class Lines(Dataset[dict[str, Tensor]]):
    """Lines of random tokens; some positions of the labels do not count."""

    def __init__(self, count: int, length: int = 12, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(3 + shift)
        self.lines = torch.randint(60, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        line = self.lines[at]
        labels = line.clone()
        labels[: at % 5] = -100
        return {"input_ids": line, "labels": labels}


def toy(seed: int = 0) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return ToyForCausalLM(ToyConfig())


def sharded_toy(seed: int = 0) -> Any:
    """The same, sharded; its first program is the one that a trainer's steps call."""
    return tpcompile.parallelize(toy(seed), example_kwargs=step_example())


def step_example() -> dict[str, Tensor]:
    """What a trainer calls its model with in a step."""
    words = Lines(3).lines
    return {"input_ids": words, "labels": words, "num_items_in_batch": torch.tensor(33)}


class Penalised(Trainer):
    """Python reads a weight, as TRL does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        loss = loss + self.model.head.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


def trainer_of(
    model: Any, folder: str, data: Any = None, model_init: Any = None, kind: Any = Trainer, **args: Any
) -> Any:
    """A trainer of four steps."""
    usual = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(
        model=model,
        args=TrainingArguments(**usual | args),
        train_dataset=data or Lines(9),
        eval_dataset=Lines(8),
        model_init=model_init,
    )


def history(trainer: Trainer, *names: str) -> list[list[float]]:
    """What a trainer has logged."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


def same_curve(folder: str, args: dict[str, Any], limit: float) -> None:
    """Losses, norms, evaluation and weights are those of an unsharded trainer."""
    own = str(Path(folder) / f"unsharded{dist.get_rank()}")
    alone = trainer_of(toy(), own, **args)
    alone.train()
    sharded = trainer_of(sharded_toy(), folder, **args)
    sharded.train()
    close = dict(rtol=0, atol=limit)
    for names in (("loss", "grad_norm", "learning_rate"), ("eval_loss",)):
        expected, found = history(alone, *names), history(sharded, *names)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **close)
    weights = sharded.model.full_state_dict()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2 * limit)


def _correct(prediction: Any) -> dict[str, float]:
    hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"hits": float(hits.sum()), "rows": float(len(hits)), "mean": float(prediction.predictions.mean())}


def metrics_count_once(folder: str) -> None:
    """Predictions, metrics, tokens and operations are counted once, under torchrun as well."""
    own = str(Path(folder) / f"unsharded{dist.get_rank()}")
    counted = {"include_num_input_tokens_seen": "all", "max_steps": 2}
    alone = trainer_of(toy(), own, Stream(), **counted)
    alone.compute_metrics = _correct
    alone.train()
    expected = alone.predict(Lines(8))
    with as_torchrun():
        sharded = trainer_of(sharded_toy(), folder, Stream(), **counted)
        sharded.compute_metrics = _correct
        sharded.train()
        found = sharded.predict(Lines(8))
        assert sharded.is_world_process_zero() == (dist.get_rank() == 0)
    assert found.predictions.shape == expected.predictions.shape
    torch.testing.assert_close(
        torch.tensor(found.predictions), torch.tensor(expected.predictions), rtol=0, atol=1e-4
    )
    for name in ("test_loss", "test_hits", "test_rows", "test_mean"):
        assert abs(found.metrics[name] - expected.metrics[name]) < 1e-4, name
    for name in ("num_input_tokens_seen", "total_flos", "epoch", "global_step"):
        assert getattr(sharded.state, name) == getattr(alone.state, name), name


SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}


def train_and_save(folder: str, launched: bool) -> list[list[float]]:
    """Four steps with checkpoints after two and four; the losses."""
    with as_torchrun() if launched else contextlib.nullcontext():
        trainer = trainer_of(sharded_toy(), folder, **SAVING, **BEST)
        trainer.train()
        trainer.save_model(str(Path(folder) / "last"))
    assert trainer.state.best_model_checkpoint is not None
    return history(trainer, "loss", "grad_norm")


def resume(folder: str) -> list[list[float]]:
    """The last two of the four steps, from the checkpoint after two; the losses of all."""
    trainer = trainer_of(sharded_toy(1), folder, **SAVING)
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
    states = [s["exp_avg"] for s in trainer.optimizer.state_dict()["state"].values()]
    assert all(isinstance(s, ShardedParameter) for s in states)
    return history(trainer, "loss", "grad_norm")


class Classifier(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(60, 16), nn.Linear(16, 32), nn.Linear(32, 60)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.down(self.up(self.words(input_ids)).relu())
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def classifier() -> Any:
    """Captured at its first call."""
    return tpcompile.parallelize(Classifier())


def refused(folder: str) -> dict[str, str]:
    """What is refused, and how."""
    mixed = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    alone = DeviceMesh("cpu", [dist.get_rank()])
    several = tpcompile.parallelize(Classifier(), mixed, axis="tensor")
    wrapped = DistributedDataParallel(
        tpcompile.parallelize(Classifier(), mixed, axis="tensor"), process_group=mixed.get_group("data")
    )
    with as_torchrun():
        stream = trainer_of(several, folder)
        around = trainer_of(wrapped, folder)
    plain = Classifier()
    old = torch.optim.SGD(plain.parameters())
    late = trainer_of(tpcompile.parallelize(plain), folder)
    late.optimizer = old
    of_rank = Lines(9, shift=dist.get_rank())
    calls: dict[str, Callable[[], Any]] = {
        "data": trainer_of(classifier(), folder, of_rank).train,
        "rates": trainer_of(classifier(), folder, learning_rate=0.1 + dist.get_rank()).train,
        "resumed": lambda: trainer_of(classifier(), folder).train(folder if dist.get_rank() else None),
        "optimizer": late.train,
        "find": lambda: trainer_of(classifier(), folder, auto_find_batch_size=True),
        "dispatch": lambda: trainer_of(classifier(), folder, accelerator_config={"dispatch_batches": True}),
        "lomo": lambda: trainer_of(classifier(), folder, optim="lomo"),
        "mesh": lambda: trainer_of(tpcompile.parallelize(Classifier(), alone), folder),
        "launched": lambda: trainer_of(several, folder),
        "stream": lambda: stream.evaluate(Stream()),
        "wrapped": around.train,
        "gathers": lambda: refuse_own_gathers(GRPOTrainer, several._tp.compiler.axis),
    }
    return {name: refusal(call) for name, call in calls.items()}


MANY = {
    **SAVING,
    **BEST,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.02,
    "include_num_input_tokens_seen": "all",
}
"""Four steps, each of them an epoch of eleven rows: the last batch is incomplete."""


def several_batches(folder: str, shape: tuple[int, ...], resume: str | None = None) -> dict[str, Any]:
    """Training on several batches at a time: all that is averaged, counted, and seen.

    Args:
        folder: of checkpoints.
        shape: of the mesh: of data and tensor; or of two axes of data and two of tensor, the first of
            them with one rank. Of data only: it is unsharded.
        resume: a checkpoint.
    """
    ranks = 1 if len(shape) == 1 else shape[-1]
    model = toy(seed=dist.get_rank() // ranks)  # the first's weights count, as under DistributedDataParallel
    if len(shape) > 1:
        names = ("dp", "tp") if len(shape) == 2 else ("dp", "more", "node", "gpu")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        axis = names[len(shape) // 2 :]
        model = tpcompile.parallelize(model, mesh, axis=axis, example_kwargs=step_example())
    with as_torchrun(), mock.patch.object(data_ranks, "_BUCKET", 2000):
        trainer = trainer_of(model, folder, Lines(11), kind=Penalised, **MANY)
        trainer.compute_metrics = _correct
        trainer.train(resume_from_checkpoint=resume)
        predicted, loader = trainer.predict(Lines(7)), trainer.get_train_dataloader()
    state, seed = trainer.state, loader.worker_init_fn
    names = ("eval_loss", "eval_hits", "eval_rows", "eval_mean")
    return {
        "steps": torch.tensor(history(trainer, "loss", "grad_norm")),
        "evaluations": torch.tensor(history(trainer, *names)),
        "predicted": torch.tensor([predicted.metrics[f"test{name[4:]}"] for name in names]),
        "predictions": torch.tensor(predicted.predictions),
        "weights": dict(model.full_state_dict() if len(shape) > 1 else model.state_dict()),
        "counted": (state.num_input_tokens_seen, state.total_flos, state.epoch, state.global_step),
        "best": Path(str(state.best_model_checkpoint)).name,
        "rows": list(loader.batch_sampler),
        "workers": seed.keywords["rank"],
        "place": (trainer.args.process_index, trainer.args.world_size),
        "writes": (
            trainer.args.should_save,
            trainer.is_world_process_zero(),
            trainer.accelerator.is_main_process,
        ),
    }


def means() -> tuple[list[float | None], list[float], str]:
    """Gradients, of which some are on one rank or on none, after they were averaged; a buffer; an error."""
    mesh = DeviceMesh("cpu", [[1], [0]], mesh_dim_names=("data", "tensor"))
    module, here = nn.ParameterList(torch.zeros(2) for _ in range(3)), dist.get_rank()
    module.register_buffer("seen", torch.tensor([1.0 + here]))
    module[0].grad = torch.full((2,), 4.0 + here)
    if here == 1:
        module[1].grad = torch.full((2,), 3.0)
    data, again = (data_ranks.DataRanks.of(MeshAxis.of(mesh, "tensor")) for _ in range(2))
    assert data.group_name == again.group_name
    data.average_gradients(module)
    found = [None if p.grad is None else p.grad.mean().item() for p in module]
    other = nn.Linear(2, 1 + here)
    return found, module.seen.tolist(), refusal(lambda: data.copy_first(other))


def seed_of_workers(folder: str) -> tuple[int, int]:
    """This rank's process, and the rank that seeds of its data's workers follow from."""
    trainer = trainer_of(sharded_toy(), folder, dataloader_num_workers=2)
    seed: Any = trainer.get_train_dataloader().worker_init_fn
    return trainer.args.process_index, seed.keywords["rank"]


def other_modules(folder: str) -> None:
    """A module that is not of transformers, made by the trainer itself, and a file of its weights."""
    alone = trainer_of(None, str(Path(folder) / f"unsharded{dist.get_rank()}"), model_init=Classifier)
    alone.train()
    sharded = trainer_of(None, folder, model_init=classifier)
    sharded.train()
    sharded.save_model()
    weights = load_file(Path(folder) / "model.safetensors")
    torch.testing.assert_close(weights, dict(alone.model.state_dict()), rtol=0, atol=1e-5)
