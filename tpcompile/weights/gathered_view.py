"""What torch would return as a view of a sharded weight: a view of the gathered one, that is written back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import disabled_torch_function_impl, is_alias_of, tree_leaves, tree_map

from .tensor_layout import TensorLayout

_MAY_DRAW = ("attention", "sdp", "rnn")


class GatheredTensor:
    """A gathered tensor.

    Args:
        local: this rank's part.
        placing: how the whole is laid out.

    Attributes:
        whole: the gathered tensor.
        version: the state of the part that is in it.
    """

    def __init__(self, local: Tensor, placing: TensorLayout) -> None:
        self.local, self.placing = local, placing
        self.whole, self.version = placing.gather(local.detach()), _version(local)

    def check(self) -> None:
        """Refuses a tensor whose part has changed since: only all ranks together could gather it again.

        Raises:
            TpCompileError: it has changed.
        """
        if _version(self.local) != self.version:
            raise TpCompileError(
                "a view of a sharded weight is used after the weight has changed",
                where=self.placing.name,
                todo="take it again",
            )

    def write_back(self) -> None:
        """The part of what was written into the whole."""
        if not self.placing.whole:
            with torch.no_grad():
                self.local.detach().copy_(self.placing.cut(self.whole))
        if not self.local.is_inference():
            increment_version(self.local)
        self.version = _version(self.local)


class GatheredView(Tensor):
    """A view of a gathered tensor.

    Attributes:
        viewed: the view.
        source: what it is a view of.
    """

    viewed: Tensor
    source: GatheredTensor

    @staticmethod
    def __new__(cls, viewed: Tensor, source: GatheredTensor) -> GatheredView:
        """See the attributes."""
        with torch.inference_mode(False):  # autograd takes it for a view of a parameter, which has versions
            made = Tensor._make_wrapper_subclass(
                cls, viewed.shape, strides=viewed.stride(), dtype=viewed.dtype, device=viewed.device
            )
        made.viewed, made.source = viewed, source
        return made

    def refuse_other(self, local: Tensor) -> None:
        """Refuses to become the data of a weight, unless it is a view of that weight.

        Raises:
            TpCompileError: it is of another one, whose memory the weight would share.
        """
        if not is_alias_of(self.source.local, local):
            raise TpCompileError(
                "a weight is given the memory of another one, and would get a copy of it",
                where=self.source.placing.name,
                todo="copy the values (copy_), or tie the weights before parallelize",
            )

    def _now(self) -> Tensor:
        self.source.check()
        return self.viewed.detach()

    def numpy(self, *, force: bool = False) -> Any:
        """The values; what would be written to them would not reach the weight, and is refused."""
        array = self._now().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """The values."""
        return self._now().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self._now().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._now().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.viewed)

    __torch_function__ = disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes with the viewed; what is written reaches the weight.

        Raises:
            TpCompileError: the weight has changed since; or random numbers are drawn.
        """
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            raise TpCompileError(
                f"{func} of a view of a sharded weight", where="a gathered tensor", todo="clone it first"
            )
        views = [a for a in tree_leaves((args, kwargs)) if isinstance(a, GatheredView)]
        for view in views:
            view.source.check()
        if draws(func):
            refuse_random(func, views[0].source.placing)
        plain = tree_map(lambda a: a.viewed if isinstance(a, GatheredView) else a, (args, kwargs))
        out = func(*plain[0], **plain[1])
        written = False
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[at] if at < len(args) else kwargs.get(argument.name)
                for view in tree_leaves(value):
                    if isinstance(view, GatheredView):
                        view.source.write_back()
                        written = True
        if written:
            return args[0] if isinstance(args[0], GatheredView) else out
        if not any(a.alias_info is not None for a in func._schema.arguments):
            return out
        return tree_map(lambda o: GatheredView(o, views[0].source) if type(o) is Tensor else o, out)


def gathered(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On whole tensors. What is written is cut again."""
    sources: dict[int, GatheredTensor] = {}

    def whole(a: Any) -> Any:
        if not isinstance(a, kind):
            return a
        if id(a) not in sources:
            sources[id(a)] = GatheredTensor(a._local_tensor, a.placing)
        return sources[id(a)].whole

    with torch.no_grad():
        out = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    changed = changed_by(func, args, kwargs)
    if changed:
        for t in tree_leaves(changed):
            if isinstance(t, kind):
                sources[id(t)].write_back()
        return changed[0] if len(func._schema.returns) == 1 and isinstance(changed[0], Tensor) else out
    if any(a.alias_info is not None for a in func._schema.arguments):
        base = next((s for s in sources.values() if not s.placing.whole), None)
        if base is not None:
            return tree_map(lambda o: GatheredView(o, base) if isinstance(o, Tensor) else o, out)
    return out


@functools.cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operator writes: positions, or names."""
    arguments = enumerate(func._schema.arguments)
    return tuple(
        a.name if a.kwarg_only else i
        for i, a in arguments
        if a.alias_info is not None and a.alias_info.is_write
    )


def changed_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that it writes."""
    return [kwargs.get(at) if isinstance(at, str) else args[at] for at in _written(func)]


def draws(func: Any) -> bool:
    """Whether an operator draws random numbers; attention and LSTM, only for a dropout inside."""
    name = func.overloadpacket.__name__
    return torch.Tag.nondeterministic_seeded in func.tags and not any(word in name for word in _MAY_DRAW)


def refuse_random(func: Any, where: TensorLayout) -> NoReturn:
    """Refuses to fill or to mask a weight with random numbers.

    Raises:
        TpCompileError: always.
    """
    raise TpCompileError(
        f"{func} of a sharded weight: every rank would draw numbers of its own",
        where=where.name,
        todo="initialise before parallelize; or draw a whole tensor, equal on all ranks, and copy_ it",
    )


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written; not known of one that was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def local(kind: Any) -> Callable[[Any], Any]:
    return lambda a: a._local_tensor if isinstance(a, kind) else a
