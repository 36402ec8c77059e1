"""What the ranks do in ``test_batching``: functions that travel to the processes by their import path."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import ContinuousBatchingConfig, GenerationConfig

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import build, mesh
from tests.on_ranks.module_life import refusal
from tpcompile.runtime.batching import BatchingManager

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [3], [5] * 13, [2, 9, 4, 4, 1], [7, 7]]


def pair(name: str, layers: int = 1, attention: str = "sdpa", timeout: float = 60.0) -> tuple[Any, Any]:
    """The whole model and the sharded one."""
    model = build(name, num_hidden_layers=layers)
    model.set_attn_implementation(attention)
    whole = copy.deepcopy(model)
    given = {"example_kwargs": families.causal_inputs(), "timeout": timeout}
    return whole, tpcompile.parallelize(model, mesh(), **given)


def wishes(**options: Any) -> dict[str, Any]:
    """Few pages and few places: requests wait for others, and long prompts come in pieces."""
    greedy = GenerationConfig(
        **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    )
    small = ContinuousBatchingConfig(
        page_size=4, num_blocks=8, max_batch_tokens=16, max_requests_per_batch=3, seed=5
    )
    return {"generation_config": greedy, "continuous_batching_config": small}


def tokens(results: dict[str, Any]) -> list[list[int]]:
    """Those of every request, in order."""
    return [one.generated_tokens for one in results.values()]


def batches(name: str, layers: int, attention: str, prompts: list[list[int]], calls: int) -> dict[str, Any]:
    """Whether tokens are the same, the programs that calls took, the key heads in the pool of a rank."""
    whole, sharded = pair(name, layers, attention)
    theirs = tokens(whole.generate_batch(prompts, **wishes()))
    found: dict[str, Any] = {"same": [], "programs": []}
    for _ in range(calls):
        before = len(sharded.programs)
        found["same"].append(tokens(sharded.generate_batch(prompts, **wishes())) == theirs)
        found["programs"].append(len(sharded.programs) - before)
    with sharded.continuous_batching_context_manager(**wishes()) as manager:
        cache = manager.batch_processor.cache
        found["heads"] = {one.num_key_value_heads for one in cache.cache_allocators.values()}
    assert sharded.config._attn_implementation == attention, "over pages it has another name"
    return found


def managed(folder: str) -> dict[str, Any]:
    """Sampled requests; some that come one after the other; what else may be done meanwhile, and afterwards.

    Args:
        folder: for the programs, of which those over pages are not saved.
    """
    whole, sharded = pair("two_kv_heads")
    found: dict[str, Any] = {}
    drawn = {"do_sample": True, "num_return_sequences": 2}
    theirs = tokens(whole.generate_batch(PROMPTS[:3], **wishes(**drawn)))
    found["sampled"] = tokens(sharded.generate_batch(PROMPTS[:3], **wishes(**drawn))) == theirs
    with sharded.continuous_batching_context_manager(**wishes(do_sample=True)) as manager:
        manager.add_request(PROMPTS[0])
        while (result := manager.get_result(timeout=0.001)) is None:
            torch.rand(dist.get_rank())  # numbers that the sampler of one rank does not get
        found["drawn"] = result.generated_tokens
    theirs = tokens(whole.generate_batch(PROMPTS[:2], **wishes()))
    with sharded.continuous_batching_context_manager(**wishes()) as manager:
        mine = []
        for prompt in PROMPTS[:2]:
            manager.add_request(prompt)  # counts on rank 0 alone
            while (result := manager.get_result(timeout=1)) is None:
                assert manager.is_running()
            mine.append(result.generated_tokens)
        found["one by one"] = mine == theirs
        again = partial(sharded.generate_batch, [[1]])
        norm, call = sharded.lm_head.weight.norm, lambda: sharded(**families.causal_inputs())
        found["meanwhile"] = [refusal(do) for do in (call, norm, again, sharded.serve_ranks().__enter__)]
        with manager.pause():
            found["in a pause"] = [refusal(do) for do in (call, norm)]
    found["threads"] = [thread.name for thread in threading.enumerate() if "generation_loop" in thread.name]
    sharded.save_program(folder)
    loaded = tpcompile.load_program(folder, mesh())
    found["loaded"] = refusal(lambda: loaded.loop.generate_batch(PROMPTS))
    with torch.no_grad():
        results = [model(**families.causal_inputs()).logits for model in (whole, sharded, loaded)]
    found["after"] = max(float((result - results[0]).abs().max()) for result in results)
    return found


def replicas() -> list[bool]:
    """Two instances of a model, each with requests of its own, one after the other."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole = build("two_kv_heads", num_hidden_layers=1)
    sharded = copy.deepcopy(whole)
    given = {"example_kwargs": families.causal_inputs(), "timeout": 60.0}
    tpcompile.parallelize(sharded, both, axis="tensor", **given)
    first = both.get_local_rank("data")
    return [
        tokens(sharded.generate_batch([prompt], **wishes()))
        == tokens(whole.generate_batch([prompt], **wishes()))
        for prompt in PROMPTS[first : first + 2]
    ]


def refusals() -> list[str]:
    """Calls that must be refused on all ranks, before anything is sent."""
    _, sharded = pair("two_kv_heads")
    flags = {"use_async_batching": True, "default_compile_level": 1}
    said = [
        refusal(lambda: sharded.generate_batch([[1, 2 + dist.get_rank()]], **wishes())),
        refusal(lambda: sharded.generate_batch([[1]], **wishes(), persistent_manager=True)),
        *(
            refusal(lambda flag=flag: sharded.generate_batch([[1]], continuous_batching_config=flag))  # type: ignore[misc]
            for flag in (ContinuousBatchingConfig(**{name: value}) for name, value in flags.items())
        ),
    ]
    made = sharded.init_continuous_batching(**wishes())
    with sharded.serve_ranks() as leading:
        assert leading == (dist.get_rank() == 0)
        led = [
            refusal(lambda: sharded.generate_batch([[1]], **wishes())),
            refusal(lambda: sharded.init_continuous_batching(**wishes())),
            refusal(made.start),
        ]
    sharded.set_attn_implementation("flex_attention")
    return [*said, *led, refusal(lambda: sharded.generate_batch([[1]], **wishes()))]


def adapters() -> list[str]:
    """What a model of PEFT says, that is put around a model before and after it is divided, by both its ways;
    and whether adapters in the model's own layers serve.
    """
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    whole, sharded = pair("two_kv_heads")
    before = get_peft_model(copy.deepcopy(whole), copy.deepcopy(lora))
    given = {"example_kwargs": families.causal_inputs()}
    said = []
    for model in (tpcompile.parallelize(before, mesh(), **given), get_peft_model(sharded, lora)):
        model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
        for part in (model, model.get_base_model()):
            said.append(refusal(lambda part=part: part.generate_batch([[1]], **wishes())))  # type: ignore[misc]
            said.append(refusal(lambda part=part: part.init_continuous_batching(**wishes())))  # type: ignore[misc]
            said.append(refusal(lambda part=part: _manage(part)))  # type: ignore[misc]
    whole, sharded = pair("two_kv_heads")
    made = []
    for model in (whole, sharded):
        torch.manual_seed(3)
        inject_adapter_in_model(copy.deepcopy(lora), model)
        model(**families.causal_inputs())
        made.append(tokens(model.generate_batch(PROMPTS[:2], **wishes())))
    assert made[0] == made[1]
    return said


def _manage(model: Any) -> None:
    with model.continuous_batching_context_manager(**wishes()):
        raise AssertionError("a manager was made")


def one_fails(last: int) -> str:
    """A rank's scheduler fails in the midst of requests: what all ranks say."""
    _, sharded = pair("two_kv_heads", timeout=4.0)
    own, steps = BatchingManager._generation_step, []

    def fail(manager: Any) -> None:
        steps.append(None)
        if len(steps) > last:
            raise ValueError("no more steps")
        own(manager)

    if dist.get_rank() == 1:
        BatchingManager._generation_step = fail  # type: ignore[method-assign]
    try:
        sharded.generate_batch(PROMPTS, **wishes())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        BatchingManager._generation_step = own  # type: ignore[method-assign]
    return "accepted"
