"""What a sharded model does otherwise than transformers when it generates: ranks must take the same steps.

The caches hold each rank's heads; all else that ranks do alike is in ``generates_alike``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from tpcompile.weights.shard import sharded_class

from .compile_options import for_group
from .generates_alike import GeneratesAlike, WithoutBatching
from .module import ShardedModule
from .runtime import Runtime


class ShardedGeneration(GeneratesAlike, ShardedModule):
    """Mixed into the class of a parallelised model that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the model's own ``generate``, with its arguments, on all ranks of the mesh together.

        Every rank must make the same call. Where tokens are drawn at random, rank 0's random state is
        everybody's, before and after; set its seed for reproducible tokens. When to stop (``max_time``,
        ``stop_strings``, stopping criteria of your own) is said by rank 0. Ranks may have streamers of their
        own, or none.

        Raises:
            TpCompileError: on all ranks, if the calls differ, or ask for a cache that cannot be divided; or a
                function of the user's fails on one of them, or says something else there.
        """
        original = super().generate  # type: ignore[misc]
        with _announced(self._tp, args, kwargs):
            return self._generate(original, args, kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, with its arguments, on all ranks of the mesh together.

        Every rank makes the same call, and gets the same results. Rank 0 decides which requests a step takes.

        Raises:
            TpCompileError: on all ranks: the calls differ, the model or an argument cannot be served so; or
                the ranks could not go on, on whichever of them.
        """
        from .batching import generate_batch  # imports transformers

        return generate_batch(self, super().generate_batch, args, kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own: a manager, on all ranks together. Rank 0 is given the requests.

        Raises:
            TpCompileError: as ``generate_batch``.
        """
        from .batching import make_manager  # imports transformers

        return make_manager(self, super().init_continuous_batching, args, kwargs)  # type: ignore[misc]

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, on all ranks together.

        Raises:
            TpCompileError: as ``generate_batch``.
        """
        from .batching import manage  # imports transformers

        return manage(super().continuous_batching_context_manager, args, kwargs)  # type: ignore[misc]

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What transformers calls for the steps after the first, with a static cache on a GPU."""
        config = compile_config or self._default_compile_config()
        options = for_group(config.to_dict(), self._tp.group)

        def compiled_call(*args: Any, **kwargs: Any) -> Any:
            with compiling(self._tp, options):
                return self(*args, **kwargs)

        return compiled_call

    def _default_compile_config(self) -> Any:
        from transformers import CompileConfig

        return getattr(super(), "_default_compile_config", CompileConfig)()

    def _where(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


class GeneratesWithin(WithoutBatching, ShardedModule):
    """Mixed into the class of a model whose ``generate`` is that of a model in it, such as a PEFT model's."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        original = super().generate  # type: ignore[misc]
        with _announced(self._tp, args, kwargs):
            return original(*args, **kwargs)


def _announced(
    runtime: Runtime, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Around ``generate``: ranks that follow this one make the call too, without its streamer."""
    if runtime.leader is None:
        return nullcontext()
    sent = {name: value for name, value in kwargs.items() if name != "streamer"}
    announced: AbstractContextManager[None] = runtime.leader.announced("generate", args, sent)
    return announced


@contextmanager
def compiling(runtime: Runtime, options: dict[str, Any]) -> Iterator[None]:
    """Runs a model's programs under torch.compile for a while."""
    before = runtime.compile_options
    runtime.compile_options = options
    try:
        yield
    finally:
        runtime.compile_options = before


def class_when_sharded(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of this class once it is sharded."""
    if not hasattr(original, "generate"):
        return sharded_class(original, ShardedModule)
    return sharded_class(original, ShardedGeneration if hasattr(original, "_sample") else GeneratesWithin)
