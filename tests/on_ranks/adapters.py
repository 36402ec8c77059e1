"""What ranks do in ``test_adapters``: adapters of PEFT in a sharded model, and in an unsharded one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import tpcompile
from tests.on_ranks.module_life import refusal
from tpcompile.runtime.take_again import take_again

from . import training
from .models import mesh

WORDS = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": WORDS, "labels": WORDS}


FIRST = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
SECOND = LoraConfig(
    r=3,
    target_modules=["up"],
    use_dora=True,
    use_rslora=True,
    modules_to_save=["head"],
    init_lora_weights=False,
)


def adapted(seed: int = 5) -> Any:
    """A toy with two adapters, one of them with weights of its own kind (DoRA) and a whole layer."""
    return with_adapters(training.toy(), seed)


def with_adapters(model: Any, seed: int = 5) -> Any:
    """The same of any toy, sharded or not."""
    torch.manual_seed(seed)
    model = get_peft_model(model, copy.deepcopy(FIRST))
    model.add_adapter("second", copy.deepcopy(SECOND))
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


def _same_gradients(alone: Any, sharded: Any) -> None:
    for model in (alone, sharded):
        model.zero_grad()
        model(**CALL).logits.square().mean().backward()
    for (name, expected), (own, found) in zip(
        alone.named_parameters(), sharded.named_parameters(), strict=True
    ):
        assert name == own and (expected.grad is None) == (found.grad is None), (name, own)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=0, atol=1e-10)


def added(folder: str) -> None:
    """Adapters after ``parallelize``: numbers, gradients, names and files are those of PEFT alone."""
    # PEFT takes the names of a mesh's axes for a sign that modules compute with parts.
    base = tpcompile.parallelize(training.toy().double(), mesh(), example_kwargs=CALL, dynamic=False)
    held = {id(p): p.to_local().clone() for p in base.parameters()}
    alone, sharded = with_adapters(training.toy().double()), with_adapters(base)
    assert type(sharded) is not type(base) and sharded.base_model.model is base
    for name in ("default", "second"):
        for model in (alone, sharded):
            model.set_adapter(name)
        _same_gradients(alone, sharded)
    for model in (alone, sharded):
        model.set_adapter("default")
    for _ in zip(_states(alone), _states(sharded), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(sharded(**CALL).logits, alone(**CALL).logits, rtol=0, atol=1e-10)
    kept = {id(p): p.to_local() for p in sharded.parameters() if id(p) in held}
    assert kept.keys() == held.keys() and sum(p.numel() < 900 for p in kept.values()) > 3
    torch.testing.assert_close(kept, held, rtol=0, atol=1e-12)  # merging adds, and takes away
    places = sharded.plan.layout.params
    assert not any(places[name].is_whole for name in places if "lora_" in name and "magnitude" not in name)
    sharded.save_pretrained(folder)
    weights = sharded.full_state_dict()
    again = PeftModel.from_pretrained(training.toy().double(), folder)
    later = PeftModel.from_pretrained(tpcompile.parallelize(training.toy().double()), folder)
    for model in (again, later):
        model.load_adapter(str(Path(folder) / "second"), "second")
        model.set_adapter("second")
    for found in (again.state_dict(), later.full_state_dict()):
        for name in found:
            if "default" in name or "second" in name:
                assert torch.equal(found[name], weights[name]), name
    copied = copy.deepcopy(later)
    for model in (again, later):
        model.delete_adapter("second")
    assert again.state_dict().keys() == later.full_state_dict().keys()
    assert any("second" in name for name, _ in copied.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(later(**CALL).logits, again(**CALL).logits, rtol=0, atol=1e-10)


def added_to_packed() -> None:
    """A packed projection that is held in segments stays so, with the adapter in segments beside it."""
    rules = {"*.qkv_proj": "colwise", "*.o_proj": "rowwise"}
    call = {"input_ids": WORDS, "use_cache": False}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Phi3Config(vocab_size=61, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **sizes)
    torch.manual_seed(5)
    whole = Phi3ForCausalLM(config)
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), example_kwargs=call, plan=rules)
    place = sharded.model.layers[0].self_attn.qkv_proj.weight.placing
    models: list[Any] = []
    for model in (whole, sharded):
        torch.manual_seed(6)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False), model)
        models.append(model(**call).logits)
    _same(models[1], models[0])
    qkv = sharded.model.layers[0].self_attn.qkv_proj
    assert qkv.base_layer.weight.placing == place and len(place.param.segments) == 3
    assert len(qkv.lora_B.default.weight.placing.param.segments) == 3
    tokens = [
        model.generate(input_ids=WORDS, max_new_tokens=3, do_sample=False) for model in (whole, sharded)
    ]
    assert torch.equal(*tokens)


def refused(folder: str) -> list[str]:
    """What is refused leaves a model as it was."""
    whole, sharded = training.toy(), tpcompile.parallelize(training.toy(), example_kwargs=CALL)
    rank = dist.get_rank()
    held = [(id(p), p.requires_grad, p.to_local().clone()) for p in sharded.parameters()]

    def apart() -> None:
        torch.manual_seed(rank)
        get_peft_model(sharded, FIRST)

    def failing() -> None:  # after it has changed a weight itself (PiSSA)
        ranks = {"down": 4 if rank else 0}
        config = LoraConfig(target_modules=["up", "down"], init_lora_weights="pissa", rank_pattern=ranks)
        get_peft_model(sharded, config)

    def without_values() -> None:
        more = with_adapters(tpcompile.parallelize(training.toy()))
        more.add_adapter("third", FIRST, low_cpu_mem_usage=True)

    def of_another() -> None:
        other = tpcompile.parallelize(training.toy(), example_kwargs=CALL, plan={"*": Replicate()})
        take_again(sharded, "add", lambda: sharded.up.register_parameter("more", other.down.weight))

    def under_ddp() -> None:
        over = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        other = tpcompile.parallelize(training.toy(), over, axis="tp", example_kwargs=CALL)
        DistributedDataParallel(other, process_group=over.get_group("dp"))
        get_peft_model(other, FIRST)

    def otherwise() -> None:
        sharded.up = nn.Linear(22, 42)

    calls = (apart, failing, without_values, of_another, under_ddp, otherwise)
    found = [_said(call) for call in calls]
    for (was, trained, values), p in zip(held, sharded.parameters(), strict=True):
        assert id(p) == was and p.requires_grad == trained and torch.equal(p.to_local(), values)
    _same(sharded(**CALL).logits, whole(**CALL).logits)
    assert len(sharded.programs) == 1
    ordinary = tpcompile.parallelize(adapted())
    return [*found, refusal(lambda: ordinary.save_pretrained(folder, state_dict={}))]


def _said(act: Callable[[], Any]) -> str:
    """As ``refusal``, also of PEFT's own errors."""
    try:
        return refusal(act)
    except ValueError as error:
        return str(error)
