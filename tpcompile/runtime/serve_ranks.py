"""One rank calls a sharded model, and the others follow: for what lives in one process, such as a server.

Every call of the leader is told to the others, which make it too. It is the same call that all ranks would
make by themselves, so that everything that ranks compare they compare here.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompile.capture.caches.register import is_cache
from tpcompile.errors import RanksApart, TpCompileError, refusing
from tpcompile.ir.torch_internals import tree_map_only
from tpcompile.ranks.agree import alike, share_failure
from tpcompile.ranks.exchange import exchange

if TYPE_CHECKING:
    from .runtime import Runtime

_TODO = "give arguments of classes and functions that other processes can import"
_NEXT, _DONE = "serve the next call", "serve a call"
_EVER = 10 * 365 * 86400.0
"""Seconds that ranks wait for a call: nobody may ask for hours. A process that ends is noticed at once."""


@dataclass(frozen=True)
class _Sent:
    """A tensor on its way: its values on the CPU, and the type of device that it was on."""

    values: Tensor
    device: str


@dataclass(frozen=True)
class _Request:
    """A call that ranks are to make.

    Attributes:
        path: the submodule that is called; ``""`` is the model.
        method: its name; ``"__call__"`` calls the module.
        arguments: positional and keyword arguments, pickled: a rank that cannot read them says so.
        training: the mode of the model.
        gradients: whether gradients are recorded, for a model without weights to train.
        inference: whether inference mode is on.
        autocast: the type of autocast on the model's device, or None.
    """

    path: str
    method: str
    arguments: bytes
    training: bool
    gradients: bool
    inference: bool
    autocast: torch.dtype | None


class Leader:
    """Tells the other ranks of the calls of a model; calls of several threads take turns.

    Args:
        model: the sharded model.
        group: its ranks.
        device: the type of device that it is on.

    Attributes:
        apart: whether the ranks are out of step, so that nobody can be told anything.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, device: str) -> None:
        self._model, self._group, self._device = model, group, device
        self._turn, self._inside = threading.RLock(), False
        self.apart = False

    @contextmanager
    def announced(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], path: str = ""
    ) -> Iterator[None]:
        """Around a call: the others begin it too, unless it is part of one that they have heard of.

        Raises:
            TpCompileError: it cannot be told to them, and nothing was sent; or it failed on one of them.
        """
        with self._turn:
            if self._inside:
                yield
                return
            exchange(self._group, _NEXT, self._request(method, args, kwargs, path))
            self._inside, failure = True, None
            try:
                yield
            except Exception as error:
                if isinstance(error, RanksApart):
                    self.apart = True
                    raise
                failure = error
            except BaseException:  # the others are in the call, and wait for this rank
                self.apart = True
                raise
            finally:
                self._inside = False
            share_failure(self._group, _DONE, failure)

    def _request(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], path: str) -> _Request:
        where = f"{path}.{method}" if path else method
        if any(is_cache(value) for value in (*args, *kwargs.values())):
            raise TpCompileError(
                "a call with a cache, of which every rank has its own heads: the others do not have theirs",
                where=where,
                todo="let generate make the cache, or pass use_cache=False",
            )
        trained = any(p.requires_grad for p in self._model.parameters())
        if method == "__call__" and torch.is_grad_enabled() and trained:
            raise TpCompileError(
                "a call that records gradients, of which the others would not hear when backward runs",
                where=where,
                todo="call it under torch.no_grad(), or train on all ranks",
            )
        positional, named = tree_map_only(
            Tensor, lambda t: _Sent(t.detach().cpu(), t.device.type), (tuple(args), dict(kwargs))
        )
        with refusing("the other ranks cannot be told of this call", where=where, todo=_TODO):
            arguments = pickle.dumps((positional, named))
        cast = torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else None
        modes = self._model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast
        return _Request(path, method, arguments, *modes)

    def finish(self) -> None:
        """Lets the others go."""
        with self._turn:
            if not self.apart:
                exchange(self._group, _NEXT, None)


@contextmanager
def serve_ranks(model: nn.Module, runtime: Runtime) -> Iterator[bool]:
    """See ``ShardedModule.serve_ranks``.

    Raises:
        TpCompileError: on all ranks: some of them do something else; or this is in such a block already.
    """
    group, axis = runtime.compiler.group, runtime.compiler.axis
    if group is None or axis is None or group.size() == 1:
        yield True
        return
    if runtime.leader is not None:
        raise TpCompileError(
            "the ranks follow already", where="serve_ranks", todo="call the model: you are in such a block"
        )
    device = axis.device_type
    with alike(group, "serve_ranks"):
        runtime.served = True
        try:
            if group.rank() != 0:
                _follow(model, group, device)
                yield False
                return
            leader = runtime.leader = Leader(model, group, device)
            try:
                yield True
            except RanksApart:
                leader.apart = True
                raise
            finally:
                runtime.leader = None
                leader.finish()
        finally:
            runtime.served = False


def _follow(model: nn.Module, group: dist.ProcessGroup, device: str) -> None:
    """Makes the leader's calls until there are no more."""
    here = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    while True:
        request: _Request | None = exchange(group, _NEXT, None, patience=_EVER)[0]
        if request is None:
            return
        failure: Exception | None = None
        try:
            args, kwargs = tree_map_only(
                _Sent,
                lambda sent: sent.values.to(here if sent.device == here.type else sent.device),
                pickle.loads(request.arguments),
            )
            with ExitStack() as modes:
                modes.enter_context(torch.inference_mode(request.inference))
                modes.enter_context(torch.set_grad_enabled(request.gradients))
                cast = request.autocast
                modes.enter_context(torch.autocast(device, cast, enabled=cast is not None))
                if model.training != request.training:
                    model.train(request.training)
                getattr(model.get_submodule(request.path), request.method)(*args, **kwargs)
        except RanksApart:
            raise
        except Exception as error:
            failure = error
        try:
            share_failure(group, _DONE, failure)
        except RanksApart:
            raise
        except Exception:
            continue  # the leader raises it, or its own: it is the one that was called
