"""Custom strategies for tests; ``ColwiseParallel`` is the worked example of transformers' document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import tpcompile
from tpcompile import ParallelInterface, TensorParallelLayer, get_packed_weights, get_tensor_shard


class ColwiseParallel(TensorParallelLayer):
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
        dim = -1 if param_type == "bias" else -2
        parameter = get_tensor_shard(param, empty_param, device_mesh, rank, dim).to(param_casting_dtype)
        if to_contiguous:
            parameter = parameter.contiguous()
        if self.use_dtensor:
            parameter = DTensor.from_local(
                parameter,
                device_mesh,
                [Shard(dim)],
                run_check=False,
                shape=empty_param.size(),
                stride=empty_param.stride(),
            )
        return nn.Parameter(parameter, requires_grad=parameter.is_floating_point())

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: Any
    ) -> Any:
        tensor = inputs[0]
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, device_mesh, input_layouts, run_check=False)
        return tensor.redistribute(placements=desired_input_layouts, device_mesh=device_mesh)

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: Any
    ) -> Any:
        outputs = outputs.redistribute(placements=output_layouts, device_mesh=device_mesh)
        return outputs.to_local() if use_local_output else outputs


class Plain(TensorParallelLayer):
    """Column-wise with plain tensors, written with ``self``: the compiler adds up the input's gradient."""

    def __init__(self) -> None:
        self.input_layouts = Replicate()
        self.output_layouts = Shard(-1)
        self.use_dtensor = False

    def partition_tensor(
        self,
        param: Tensor,
        empty_param: Tensor,
        param_type: str,
        dtype: Any,
        contiguous: Any,
        rank: int,
        mesh: Any,
    ) -> Tensor:
        return get_tensor_shard(param, empty_param, mesh, rank, 0)

    def _prepare_input_fn(self, layouts: Any, desired: Any, mod: Any, inputs: Any, mesh: Any) -> Any:  # type: ignore[override]
        return inputs

    def _prepare_output_fn(self, layouts: Any, local: Any, mod: Any, outputs: Any, mesh: Any) -> Any:  # type: ignore[override]
        return outputs


class PackedPlain(Plain):
    """A packed projection: each rank has a part of both blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.output_layouts = tpcompile.Shard(-1, 1)

    def partition_tensor(
        self,
        param: Tensor,
        empty_param: Tensor,
        param_type: str,
        dtype: Any,
        contiguous: Any,
        rank: int,
        mesh: Any,
    ) -> Tensor:
        return get_packed_weights(param, empty_param, mesh, rank, 0)

    # A bare function, as the document prints it.
    def _prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh):  # type: ignore
        assert output_layouts == tpcompile.Shard(-1, 1)
        return outputs


class Gathering(ColwiseParallel):
    """Column-wise, and gathered at once; each rank's rows are cut unevenly, as ``torch.chunk`` does."""

    def __init__(self) -> None:
        super().__init__(output_layouts=Replicate())


class Halved(Plain):
    """Holds half of every value, and doubles the result: no selection of elements."""

    def partition_tensor(
        self,
        param: Tensor,
        empty_param: Tensor,
        param_type: str,
        dtype: Any,
        contiguous: Any,
        rank: int,
        mesh: Any,
    ) -> Tensor:
        return get_tensor_shard(param, empty_param, mesh, rank, 0) / 2

    def _prepare_output_fn(self, layouts: Any, local: Any, mod: Any, outputs: Any, mesh: Any) -> Any:  # type: ignore[override]
        return outputs * 2


class ReturnsNothing(Plain):
    def partition_tensor(self, *args: Any, **kwargs: Any) -> Any:
        return None


class WrongType(Plain):
    def partition_tensor(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        return param.to(torch.bfloat16)


class WrongShape(Plain):
    """Declares the whole, and returns its part."""

    def __init__(self) -> None:
        super().__init__()
        self.output_layouts = Replicate()


class Contiguous(PackedPlain):
    """A packed weight whose output is said to be contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.output_layouts = Shard(-1)


class NoMethods(TensorParallelLayer):
    pass


STRATEGIES = {
    "colwise_custom": ColwiseParallel,
    "plain_custom": Plain,
    "packed_custom": PackedPlain,
    "gathering_custom": Gathering,
    "halved_custom": Halved,
    "nothing_custom": ReturnsNothing,
    "wrong_type_custom": WrongType,
    "wrong_shape_custom": WrongShape,
    "contiguous_custom": Contiguous,
    "no_methods_custom": NoMethods,
}


def register() -> None:
    """Registers all of them."""
    for name, strategy in STRATEGIES.items():
        ParallelInterface.register_strategy(name, strategy)
