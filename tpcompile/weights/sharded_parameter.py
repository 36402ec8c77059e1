"""A rank's part of a parameter, which says so in its type: an operation is right for the whole, or refused.

It is a ``DTensor``, so that code that looks for those (FSDP, accelerate, checkpoints) finds one, with our
layouts and our dispatch (see ``dispatch``). Programs do not read it: they read the plain leaf inside of it,
to which gradients and hooks belong (see ``runtime/fetch_inputs``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor, Replicate

from tpcompile.errors import TpCompileError

from .asked_by_mode import ASKED, ask_by_mode
from .checkpoint_boxes import box_at, chunks, write_items
from .dispatch import dispatch
from .gathered_view import GatheredView
from .stored_part import stored_part
from .tensor_layout import TensorLayout
from .whole_and_part import FromWhole, Gathered, ToLocal, move_gradient

_TENSOR: Any = Tensor
_TODO = "use full_tensor(), or model.full_state_dict(), on all ranks; to_local() is this rank's part"


class ShardedParameter(DTensor):
    """A rank's part of a parameter, of its gradient, or of an optimizer's state for it.

    Attributes:
        placing: how the whole is laid out.
        read: whether python that runs as it is has computed with the parameter: then it stays whole.
        averaged: whether data parallelism averages the gradients of the leaf (``DistributedDataParallel``).
        retyped: how many of all models' parameters have got another type or device through ``data``.
    """

    placing: TensorLayout
    read = False
    averaged = False
    retyped = 0

    @staticmethod
    def __new__(cls, local: Tensor, where: TensorLayout, requires_grad: bool = False) -> ShardedParameter:
        """See the attributes.

        Args:
            local: this rank's part; it is not copied.
            where: the layout.
            requires_grad: whether autograd records what is done to it.
        """
        spec = where.spec(local.dtype)
        made: ShardedParameter = _TENSOR._dtensor__new__(cls, local, spec, requires_grad=requires_grad)
        made.placing = where
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def parameter(cls, local: Tensor, where: TensorLayout, requires_grad: bool) -> ShardedParameter:
        """A parameter: its part becomes a leaf, which gets the gradients."""
        made = cls(local.detach(), where, requires_grad)
        made._is_param = True
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(cls, func, args, kwargs or {})

    @property
    def grad(self) -> Tensor | None:
        """The gradient, laid out as the parameter."""
        local, held = self._local_tensor.grad, self.__dict__.get("_gradient")
        if local is None or (held is not None and held._local_tensor is local):
            return None if local is None else held
        self.placing.check_gradient(local)
        # A wrapper costs more than a small update: it is used again if nobody else can see it.
        free = held is not None and sys.getrefcount(held) == 3 and held._use_count() == 1
        if held is None or not free or held.dtype != local.dtype:
            held = self.__dict__["_gradient"] = ShardedParameter(local, self.placing)
        held._local_tensor = local
        return held

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        held = self.__dict__.get("_gradient")
        if held is not None and sys.getrefcount(held) == 3 and held._use_count() == 1:
            held._local_tensor = self._local_tensor  # lets go of the old gradient
        else:
            self.__dict__.pop("_gradient", None)
        self._local_tensor.grad = None if value is None else self.part_of(value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @property
    def grad_dtype(self) -> torch.dtype | None:
        """As of any tensor: the type of the gradient, or None for any."""
        found: torch.dtype | None = _TENSOR.grad_dtype.__get__(self._local_tensor)
        return found

    @grad_dtype.setter
    def grad_dtype(self, value: torch.dtype | None) -> None:
        _TENSOR.grad_dtype.__set__(self._local_tensor, value)

    @property
    def requires_grad(self) -> bool:
        """As of any tensor."""
        return bool(_TENSOR.requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ShardedParameter:
        """As of any tensor."""
        Tensor.requires_grad_(self, requires_grad)
        if self._local_tensor.is_leaf:
            self._local_tensor.requires_grad_(requires_grad)
        self._watch()
        return self

    def _watch(self) -> None:
        """Sees to it that gradients that come here reach the leaf."""
        if self.requires_grad and self._is_param and not self._post_accumulate_grad_hooks:
            Tensor.register_post_accumulate_grad_hook(self, move_gradient)

    @property
    def data(self) -> Tensor:
        """As of any tensor."""
        return _TENSOR.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, GatheredView):
            value.refuse_other(self._local_tensor)
        local = self.part_of(value)
        if local.dtype != self.dtype or local.device != self.device:
            _TENSOR.data.__set__(self, ShardedParameter(local, self.placing))
            self._spec = self.placing.spec(local.dtype)
            self.__dict__.pop("_gradient", None)
            ShardedParameter.retyped += 1
        self._local_tensor.data = local

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """As of any tensor; its gradient has this layout."""
        if not self._is_param:
            return Tensor.register_hook(self, hook)

        def inner(grad: Tensor) -> Tensor | None:
            new = hook(ShardedParameter(grad, self.placing))
            return None if new is None else self.part_of(new)

        return self._local_tensor.register_hook(inner)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Any:
        """As of any tensor."""
        return self._local_tensor.register_post_accumulate_grad_hook(lambda _: hook(self))

    @property
    def _is_param(self) -> bool:
        """Whether this is an ``nn.Parameter``; torch asks, and says so."""
        return self.__dict__.get("_parameter", False)

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.__dict__["_parameter"] = value
        if value:
            self._local_tensor = nn.Parameter(self._local_tensor.detach(), self.requires_grad)
            self._watch()

    def part_of(self, value: Tensor) -> Tensor:
        """This rank's part of a tensor that is whole, or laid out as this one, or otherwise.

        Raises:
            TpCompileError: the tensor has another shape.
        """
        if isinstance(value, ShardedParameter):
            alike = value.placing == self.placing
            return value._local_tensor if alike else self.placing.cut(value.full_tensor())
        if isinstance(value, DTensor):
            value = value.full_tensor()
        self.placing.check_whole(value)
        return self.placing.cut(value.detach())

    def from_whole(self, value: Tensor) -> ShardedParameter:
        """A whole tensor laid out as this one, which gets its gradient.

        Raises:
            TpCompileError: the tensor has another shape.
        """
        self.placing.check_whole(value)
        return FromWhole.apply(value, self.placing, type(self))

    def lay_out(self, where: TensorLayout) -> None:
        """Gives the whole parameter another layout, in place: optimizers hold this object."""
        assert self.placing.whole, "only what is whole can be divided"
        gradient = self._local_tensor.grad
        self._local_tensor.grad = None
        self._local_tensor.data = where.cut(self._local_tensor.detach())
        self._local_tensor.grad = None if gradient is None else where.cut(gradient)
        self.placing, self._spec = where, where.spec(self.dtype)
        self.__dict__.pop("_gradient", None)

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        """This rank's part, a plain tensor; of a parameter, the leaf that gets the gradients."""
        if grad_placements is not None:
            self._refuse("get gradients in other placements (grad_placements)")
        if self.grad_fn is None:
            return self._local_tensor
        return ToLocal.apply(self)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole tensor, on every rank; all ranks must call it, and compute the same with it."""
        return Gathered.apply(self.to_local(grad_placements=grad_placements), self.placing)

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **kwargs: Any) -> DTensor:
        """To the whole tensor on every rank, or as it is.

        Raises:
            TpCompileError: another placement, mesh or type is asked for.
        """
        if any(value for value in kwargs.values()) or device_mesh not in (None, self.device_mesh):
            self._refuse("be laid out over another mesh, or have other types on the way")
        if placements is None or tuple(placements) == tuple(self._spec.placements):
            return self
        if any(not isinstance(p, Replicate) for p in placements):
            self._refuse(f"be laid out as {tuple(placements)}")
        return DTensor.from_local(self.full_tensor(), self.device_mesh, placements, run_check=False)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ShardedParameter({tuple(self.shape)}, local={self._local_tensor})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedParameter:
        if id(self) not in memo:
            memo[id(self)] = new = self._with(self._local_tensor.detach().clone())
            gradient = self._local_tensor.grad
            new._local_tensor.grad = None if gradient is None else gradient.clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return stored_part, (self._local_tensor.detach(), self.placing.rank, self.placing.text())

    def __copy__(self) -> ShardedParameter:
        return self._with(self._local_tensor.detach())

    def _with(self, local: Tensor) -> ShardedParameter:
        make = ShardedParameter.parameter if self._is_param else ShardedParameter
        return make(local, self.placing, self.requires_grad)

    def data_ptr(self) -> int:
        """Where all of it is in memory; 0 for torch.distributed, as of a DTensor: it copies by it."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed."):
            return 0
        return self._local_tensor.data_ptr() if self.placing.whole else self.numpy()

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Refused: what reads memory would take the part for the whole."""
        self._refuse("be read as memory, or traced (torch.export)")

    storage = untyped_storage = __dlpack__ = tolist = numpy  # type: ignore[assignment]

    def _refuse(self, what: str) -> NoReturn:
        raise TpCompileError(f"a rank's part of a weight cannot {what}", where=self.placing.name, todo=_TODO)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return write_items(fqn, self._local_tensor, self.size(), self._boxes())

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return chunks(self._boxes())

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return box_at(self._local_tensor.detach(), self._boxes(), index)

    def _boxes(self) -> Any:
        return self.placing.layout.pieced_boxes(self.placing.name, self.placing.rank)


if not ASKED:
    ask_by_mode(ShardedParameter, dispatch)


def local_tensor(value: Tensor) -> Tensor:
    """What a program computes with: this rank's part; of a further divided one (FSDP), what it holds now."""
    if type(value) is ShardedParameter:
        return value._local_tensor if value.grad_fn is None else value.to_local()
    return value.to_local() if isinstance(value, DTensor) else value
