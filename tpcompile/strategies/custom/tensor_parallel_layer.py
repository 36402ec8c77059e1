"""The base of custom strategies, and what they cut weights with: the recipe of transformers' document.

A strategy of this kind does its own arithmetic: it says how a module's parameters are cut, and what happens
before and after the module's forward. The compiler takes the module as one opaque operator whose input and
output are placed as the strategy declares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import Must, checked

METHODS = ("partition_tensor", "_prepare_input_fn", "_prepare_output_fn")


Blocks = Annotated[int, Must("a positive whole number", lambda number: number > 0)]


class TensorParallelLayer:
    """Inherit, set the attributes in ``__init__``, implement the three methods, register, name it in a plan.

    Attributes:
        input_layouts: how the first input is placed when it comes, a tuple with one placement (of
            ``torch.distributed.tensor``, or of ours); further inputs are whole. The compiler delivers it.
        desired_input_layouts: what ``_prepare_input_fn`` is given under this name; nothing else reads it.
        output_layouts: how the result of ``_prepare_output_fn`` is placed, likewise. A result that is packed
            in blocks of which every rank has a part is ``tpcompile.Shard(dim, 1)``.
        use_local_output: handed to ``_prepare_output_fn``.
        use_dtensor: yours to read; by convention whether ``partition_tensor`` returns DTensors.
        whole_input_gradient: whether backward leaves whole gradients for whole inputs and whole weights on
            every rank, as DTensor does. If not, the compiler adds up what the ranks have. None: yes where
            the weights are DTensors or the output is whole, no for plain tensors with a divided output.
    """

    input_layouts: Any
    output_layouts: Any
    desired_input_layouts: Any = None
    use_local_output: bool = True
    use_dtensor: bool = True
    whole_input_gradient: bool | None = None

    def partition_tensor(
        self,
        param: Tensor,
        empty_param: Tensor,
        param_type: str,
        param_casting_dtype: torch.dtype,
        to_contiguous: bool,
        rank: int,
        device_mesh: DeviceMesh,
    ) -> nn.Parameter | Tensor:
        """This rank's part of a parameter, a plain tensor or a DTensor.

        It is also called for tensors that hold indices instead of values, to learn which elements a
        rank holds; from this follow checkpoints. It must not communicate.

        Args:
            param: the whole parameter.
            empty_param: a tensor on the meta device with the whole shape.
            param_type: the parameter's name in its module, ``weight`` or ``bias``.
            param_casting_dtype: the type that the result must have.
            to_contiguous: whether the result is to be contiguous.
            rank: this rank's position on the mesh.
            device_mesh: the mesh, of one dimension.

        Raises:
            NotImplementedError: the strategy does not say it.
        """
        raise NotImplementedError

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        """Called before the module's forward with its local inputs, a tuple; gives what forward gets."""
        raise NotImplementedError

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        """Called with forward's result; gives the module's, a local tensor or a DTensor."""
        raise NotImplementedError


@checked
def get_tensor_shard(
    param: Tensor, empty_param: Tensor, device_mesh: DeviceMesh, rank: int, dim: int
) -> Tensor:
    """A rank's part of one dimension, cut as DTensor's ``Shard`` cuts it: equal parts, the last ones smaller.

    Args:
        param: the whole parameter.
        empty_param: a tensor of its shape.
        device_mesh: the mesh that it is divided over.
        rank: the rank.
        dim: the dimension, negative ones from the back.

    Raises:
        TpCompileError: there is no such dimension or rank.
    """
    return _rank_part(param, empty_param, device_mesh, rank, dim, [empty_param.shape[_dim(empty_param, dim)]])


@checked
def get_packed_weights(
    param: Tensor,
    empty_param: Tensor,
    device_mesh: DeviceMesh,
    rank: int,
    dim: int,
    blocks: Blocks | Sequence[Blocks] = 2,
) -> Tensor:
    """A rank's part of every block of a packed dimension, such as ``[gate | up]``, one behind the other.

    Args:
        param: the whole parameter.
        empty_param: a tensor of its shape.
        device_mesh: the mesh that it is divided over.
        rank: the rank.
        dim: the packed dimension, negative ones from the back.
        blocks: how many equal blocks there are, or the size of each.

    Raises:
        TpCompileError: there is no such dimension or rank, or the blocks do not make up the dimension.
    """
    size = empty_param.shape[_dim(empty_param, dim)]
    sizes = [size // blocks] * min(blocks, size) if isinstance(blocks, int) else list(blocks)
    if sum(sizes) != size:
        raise TpCompileError(
            f"blocks {blocks} do not make up a dimension of {size}",
            where="blocks",
            todo="give the sizes of the blocks",
        )
    return _rank_part(param, empty_param, device_mesh, rank, dim, sizes)


def _rank_part(
    param: Tensor, empty_param: Tensor, device_mesh: DeviceMesh, rank: int, dim: int, blocks: Sequence[int]
) -> Tensor:
    ranks = device_mesh.size()
    if not 0 <= rank < ranks:
        raise TpCompileError(
            f"there is no rank {rank} on a mesh of {ranks}", where="rank", todo=f"give 0 to {ranks - 1}"
        )
    if param.shape != empty_param.shape:
        shapes = f"{list(param.shape)} and {list(empty_param.shape)}"
        raise TpCompileError(f"the shapes are {shapes}", where="empty_param", todo="give a tensor like param")
    axis = _dim(empty_param, dim)
    parts = []
    for start, size in zip(itertools.accumulate(blocks, initial=0), blocks, strict=False):
        step = math.ceil(size / ranks)
        first, last = min(rank * step, size), min((rank + 1) * step, size)
        parts.append(param[(slice(None),) * axis + (slice(start + first, start + last),)])
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _dim(empty_param: Tensor, dim: int) -> int:
    if not -empty_param.ndim <= dim < empty_param.ndim:
        raise TpCompileError(
            f"there is no dimension {dim} in a parameter of {empty_param.ndim} dimensions",
            where="dim",
            todo="name one that it has",
        )
    return dim % empty_param.ndim
