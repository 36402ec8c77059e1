"""A partitioning strategy of one's own, in the recipe of transformers' document, on a Llama.

python examples/custom_strategy.py
torchrun --nproc-per-node 2 examples/custom_strategy.py
"""

from __future__ import annotations

from typing import Any

import torch
from launch import launch, say
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tpcompile import ParallelInterface, TensorParallelLayer, get_tensor_shard


class ColwiseParallel(TensorParallelLayer):
    """Divides a linear layer's rows; its input is whole, its output divided."""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        use_dtensor: bool = True,
    ) -> None:
        self.input_layouts = (input_layouts or Replicate(),)
        self.output_layouts = (output_layouts or Shard(-1),)
        self.desired_input_layouts = (Replicate(),)
        self.use_local_output = use_local_output
        self.use_dtensor = use_dtensor

    def partition_tensor(
        self,
        param: Any,
        empty_param: Any,
        param_type: str,
        param_casting_dtype: torch.dtype,
        to_contiguous: bool,
        rank: int,
        device_mesh: Any,
    ) -> nn.Parameter:
        """This rank's rows of the weight, or its part of the bias."""
        dim = -1 if param_type == "bias" else -2
        part = get_tensor_shard(param, empty_param, device_mesh, rank, dim).to(param_casting_dtype)
        if to_contiguous:
            part = part.contiguous()
        if self.use_dtensor:
            sizes = {"shape": empty_param.size(), "stride": empty_param.stride()}
            part = DTensor.from_local(part, device_mesh, [Shard(dim)], run_check=False, **sizes)
        return nn.Parameter(part, requires_grad=part.is_floating_point())

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: Any
    ) -> Any:
        whole = DTensor.from_local(inputs[0], device_mesh, input_layouts, run_check=False)
        return whole.redistribute(placements=desired_input_layouts, device_mesh=device_mesh)

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: Any
    ) -> Any:
        outputs = outputs.redistribute(placements=output_layouts, device_mesh=device_mesh)
        return outputs.to_local() if use_local_output else outputs


def main() -> None:
    """Runs on every rank."""
    ParallelInterface.register_strategy("colwise_custom", ColwiseParallel)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 200, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    # The queries go through the strategy above. Everything else is the planner's.
    sharded = tpcompile.parallelize(model, plan={"model.layers.*.self_attn.q_proj": "colwise_custom"})
    say(f"{sharded.plan}\n")
    weight = sharded.model.layers[0].self_attn.q_proj.weight
    held = list(weight.to_local().shape)
    assert held == [64 // torch.distributed.get_world_size(), 64]

    logits = sharded(input_ids=ids).logits
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5
    logits.sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
    say(f"relative error {error:.1e}; the custom layers hold {held} of [64, 64]")


if __name__ == "__main__":
    launch(main)
