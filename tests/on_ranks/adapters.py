"""What ranks do in ``test_adapters``: adapters of PEFT in a sharded model, and in an unsharded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.on_ranks.module_life import refusal

from . import training

WORDS = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": WORDS, "labels": WORDS}


def adapted(seed: int = 5) -> Any:
    """A toy with two adapters, one of them with weights of its own kind (DoRA) and a whole layer."""
    model = training.toy()
    torch.manual_seed(seed)
    first = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    second = LoraConfig(
        r=3,
        target_modules=["up"],
        use_dora=True,
        use_rslora=True,
        modules_to_save=["head"],
        init_lora_weights=False,
    )
    model = get_peft_model(model, first)
    model.add_adapter("second", second)
    return model


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _states(model: Any) -> Iterator[str]:
    """A model with its adapters switched in different ways."""
    yield "first"
    with model.disable_adapter():
        yield "none"
    model.set_adapter("second")
    yield "second"
    model.set_adapter("default")
    model.merge_adapter()
    yield "merged"
    model.unmerge_adapter()
    yield "unmerged"


def train_switch_save_load(folder: str) -> None:
    """Steps, switches, files and loading are those of PEFT alone."""
    alone, sharded = adapted(), tpcompile.parallelize(adapted(), example_kwargs=CALL, dynamic=False)
    for name in ("default", "second"):
        for model in (alone, sharded):
            model.set_adapter(name)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                model(**CALL).loss.backward()
                optimizer.step()
        _same(sharded(**CALL).loss, alone(**CALL).loss)
    assert len(sharded.programs) == 2, "one for each adapter"
    for model in (alone, sharded):
        model.set_adapter("default")
    for _ in zip(_states(alone), _states(sharded), strict=True):
        with torch.no_grad():
            _same(sharded(**CALL).logits, alone(**CALL).logits)

    own = Path(folder) / f"alone{dist.get_rank()}"
    alone.save_pretrained(own)
    sharded.save_pretrained(folder)
    weights = sharded.full_state_dict()
    for place in (".", "second"):
        files = [{p.name for p in (each / place).glob("adapter*")} for each in (Path(folder), own)]
        assert files[0] == files[1]
        stored = [load_file(each / place / "adapter_model.safetensors") for each in (Path(folder), own)]
        torch.testing.assert_close(*stored, rtol=0, atol=1e-5)
    again = PeftModel.from_pretrained(training.toy(), folder)
    again.load_adapter(str(Path(folder) / "second"), "second")
    fresh = tpcompile.parallelize(adapted(seed=6), example_kwargs=CALL, dynamic=False)
    fresh.load_adapter(folder, "default")
    fresh.load_adapter(str(Path(folder) / "second"), "second")
    for found in (again.state_dict(), fresh.full_state_dict()):
        for name in found:
            if "default" in name or "second" in name:
                assert torch.equal(found[name], weights[name]), name


def trainer(folder: str) -> None:
    """Trainer updates, saves and resumes the adapter alone."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    alone = training.trainer_of(adapted(), str(Path(folder) / f"alone{dist.get_rank()}"), **args)
    alone.train()
    for resume in (None, str(Path(folder) / "checkpoint-1")):
        model = adapted(5 if resume is None else 6)
        tpcompile.parallelize(model, example_kwargs=training.step_example())
        own = training.trainer_of(model, folder, **args)
        own.train(resume_from_checkpoint=resume)
        names = ("loss", "grad_norm")
        expected, found = (torch.tensor(training.history(each, *names)) for each in (alone, own))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert len(own.optimizer.state) == 4  # A and B of two layers
    state = torch.load(Path(folder) / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert all(each["exp_avg"].shape[0] in (4, 22, 42) for each in state.values())


def prompted() -> Any:
    """A model with a trained prompt, which python puts in front of the words."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def prompt_tuning(folder: str) -> None:
    """Steps and files are those of PEFT alone."""
    call = {**CALL, "attention_mask": torch.ones_like(WORDS)}
    alone, sharded = prompted(), tpcompile.parallelize(prompted(), example_kwargs=call)
    for model in (alone, sharded):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**call).loss.backward()
            optimizer.step()
        assert len(optimizer.state) == 1
    _same(sharded(**call).loss, alone(**call).loss)
    sharded.save_pretrained(folder)
    (own,) = (p.detach() for p in alone.parameters() if p.requires_grad)
    (stored,) = load_file(Path(folder) / "adapter_model.safetensors").values()
    _same(stored, own)


def loaded(folder: str) -> list[str]:
    """A checkpoint that is loaded with a new adapter around it, or with one that was saved."""
    base, call = f"{folder}/base", {**CALL, "use_cache": False}
    if dist.get_rank() == 0:
        prompted().get_base_model().save_pretrained(base)
    dist.barrier()
    kind = {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "down_proj"]}
    whole = LlamaForCausalLM.from_pretrained(base)
    model: Any = tpcompile.from_pretrained(base, adapter=LoraConfig(**kind, modules_to_save=["lm_head"]))
    _same(model(**call).logits, whole(**call).logits)  # a new adapter changes nothing yet
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learned) == 5 and all("lora" in name or "modules_to_save" in name for name in learned)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**call).loss.backward()
        optimizer.step()
    model.save_pretrained(f"{folder}/adapter")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(whole, f"{folder}/adapter")(**call).logits
        again: Any = tpcompile.from_pretrained(base, adapter=f"{folder}/adapter")
        assert (expected - model(**call).logits).abs().max() < 1e-5 < (expected - expected[0]).abs().max()
        _same(again(**call).logits, expected)
        again.merge_adapter()
        _same(again(**call).logits, expected)
    odd = [LoraConfig(**kind, use_dora=True), LoraConfig(**kind, init_lora_weights="pissa"), 5, folder]
    return [refusal(lambda odd=adapter: tpcompile.from_pretrained(base, adapter=odd)) for adapter in odd]


def refused(folder: str) -> list[str]:
    """Adapters that come after ``parallelize``."""
    sharded = tpcompile.parallelize(training.toy())
    sharded(input_ids=WORDS)
    more = tpcompile.parallelize(adapted())
    config = LoraConfig(r=4, target_modules=["up"])
    calls: list[Callable[[], Any]] = [
        lambda: get_peft_model(sharded, config),
        lambda: more.add_adapter("third", config),
        lambda: more.save_pretrained(folder, state_dict={}),
    ]
    return [refusal(call) for call in calls]
