"""What the pages of the documentation take for granted: names, and folders that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import tpcompile
from tests.helpers import quantised, rule_cases
from tests.helpers.toys import Mlp
from tests.on_ranks import models

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

Names = dict[str, Any]


class Styled(nn.Module):
    """A model of somebody's own: words, and a style that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mlp = nn.Embedding(32, 12), Mlp()

    def forward(self, words: Tensor, style: Tensor | None = None) -> Tensor:
        x = self.words(words)
        y: Tensor = self.mlp(x if style is None else x + style)
        return y


def names_of(what: str) -> Names:
    """All that a page, or a block that stands apart, finds when it begins."""
    common: Names = {"torch": torch, "tpcompile": tpcompile, "init_device_mesh": init_device_mesh}
    return common | NAMES.get(what, llama)()


def llama() -> Names:
    """A decoder of one layer and what is done with it; its checkpoint where pages look for one."""
    config = LlamaConfig(**SIZES | HEADS)
    model = LlamaForCausalLM(config)
    for path in ("path/or/name", "Qwen/Qwen3-0.6B"):
        _saved(model, path)
    ids = torch.arange(10).reshape(2, 5)
    return {
        **{"config": config, "model": model, "path": "path/or/name", "ids": ids, "input_ids": ids},
        **{"inputs": {"input_ids": ids}, "mesh": models.mesh()},
        **{"LlamaForCausalLM": LlamaForCausalLM, "LlamaConfig": LlamaConfig},
    }


def _saved(model: Any, path: str) -> None:
    """Writes a checkpoint, on one of the ranks."""
    if dist.get_rank() == 0:
        model.save_pretrained(path)
    dist.barrier()


def _sharded() -> Names:
    names = llama()
    model = tpcompile.parallelize(names["model"], names["mesh"], example_kwargs=names["inputs"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=names["ids"], labels=names["ids"]).loss.backward()
    optimizer.step()
    return names | {
        "optimizer": optimizer,
        "sharded": model,
        "batch": names["inputs"],
        "labels": names["ids"],
    }


def _checkpoints() -> Names:
    from tpcompile import checkpoint

    return _sharded() | {"checkpoint": checkpoint}


def _styled() -> Names:
    style = torch.randn(2, 5, 12)
    names = llama() | {"model": Styled(), "words": torch.arange(10).reshape(2, 5), "style": style}
    return names | {"LlamaForCausalLM": LlamaForCausalLM}


def _scan() -> Names:
    """The recurrence of the page, as an operator of somebody's library; it is defined once in a process."""

    @torch.library.custom_op("mylib::scan", mutates_args=())
    def scan(x: Tensor, decay: Tensor) -> Tensor:
        state, found = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            found.append(state := decay * state + x[:, t])
        return torch.stack(found, 1)

    scan.register_fake(lambda x, decay: torch.empty_like(x))
    return {"_case": rule_cases._case, "signed": rule_cases.signed, "aten": torch.ops.aten}


def _generation() -> Names:
    names = llama()
    return names | {
        "StaticCache": transformers.StaticCache,
        "prompt": names["ids"],
        "token": names["ids"][:, :1],
        "prompts": [[1, 2, 3], [4, 5]],
        "GenerationConfig": transformers.GenerationConfig,
        "ContinuousBatchingConfig": transformers.ContinuousBatchingConfig,
    }


def _dry_run() -> Names:
    return llama() | {"mesh": init_device_mesh("cpu", (1, 1), mesh_dim_names=("node", "gpu"))}


def _models() -> Names:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    names = llama()
    _saved(transformers.T5ForConditionalGeneration(config), "t5")
    return names | {"path": "t5", "T5ForConditionalGeneration": transformers.T5ForConditionalGeneration}


def _fp8() -> Names:
    """A checkpoint in eight bits."""
    names = llama()
    quantised.fp8(Path("path/or/name"), (4, 4))
    return names


def _pipeline() -> Names:
    """A model in two halves, of which each takes what the other gives."""
    return {
        "part_of_the_layers": lambda stage: Mlp(12, 20),
        **{"PipelineStage": PipelineStage, "Schedule1F1B": Schedule1F1B, "device": torch.device("cpu")},
        **{"loss_fn": nn.functional.mse_loss, "x": torch.randn(4, 12), "target": torch.randn(4, 12)},
        "microbatches": 2,
    }


def _replicas() -> Names:
    return llama() | {"DistributedDataParallel": nn.parallel.DistributedDataParallel}


def _randomness() -> Names:
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=4)
    return llama() | {"model": transformers.GPT2LMHeadModel(config)}


def _readme() -> Names:
    """With a tokenizer beside the checkpoint."""
    names = llama()
    words = {"[UNK]": 0, "Can": 1, "I": 2, "help": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("Qwen/Qwen3-0.6B")
    return names


def _report() -> Names:
    names = llama()
    return names | {"plan": tpcompile.plan(names["model"], 2)}


def _logging() -> Names:
    import logging

    return llama() | {"logging": logging}


def _serving() -> Names:
    return llama() | {"run_server": lambda model: model.generate(torch.arange(3)[None], max_new_tokens=2)}


def _strategies() -> Names:
    """A model with experts; the dots of a configuration are its sizes."""
    mixtral = transformers.MixtralConfig(**SIZES | HEADS, num_local_experts=2)
    return llama() | {
        "model": transformers.MixtralForCausalLM(mixtral),
        "Phi3Config": lambda sizes: transformers.Phi3Config(**SIZES | HEADS, pad_token_id=0),
    }


def _to_transformers() -> Names:
    return llama() | {
        "DistributedConfig": DistributedConfig,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
    }


def _trainer() -> Names:
    from peft import LoraConfig, get_peft_model

    names = llama()
    args = transformers.TrainingArguments(
        "out", max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": ids, "labels": ids} for ids in names["ids"]]
    return names | {
        **{"args": args, "data": data, "tokenizer": None, "Trainer": transformers.Trainer},
        **{"LoraConfig": LoraConfig, "get_peft_model": get_peft_model},
    }


NAMES: dict[str, Callable[[], Names]] = {
    "README": _readme,
    "adding_a_rule": _scan,
    "artifacts": _styled,
    "checkpoints": _checkpoints,
    "dry_run": _dry_run,
    "generation": _generation,
    "models": _models,
    "randomness": _randomness,
    "reading_a_plan": _logging,
    "report": _report,
    "serving": _serving,
    "sharded_modules": _sharded,
    "strategies": _strategies,
    "trainer": _trainer,
    "fp8": _fp8,
    "pipeline": _pipeline,
    "replicas": _replicas,
    "to_transformers": _to_transformers,
    "sharded": _sharded,
}
"""What makes the names of a page, or of blocks that stand apart; of others it is `llama`."""
