"""Counts the bytes of the tensors that are alive while code runs, real ones or ones without values."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from tpcompile.ir.torch_internals import TorchDispatchMode, is_traceable_wrapper_subclass, tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made inside of the block, as long as they live.

    What a kernel takes for itself while it runs, and what an allocator keeps, is not seen. A wrapper such as
    a ``ShardedParameter`` has no memory of its own: what is inside of it counts.

    Attributes:
        live: bytes that are alive now.
        peak: the most that were at any time; may be set back to ``live``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.hold(value)
        return result

    def hold(self, value: Tensor, *, counts: bool = True) -> bool:
        """Takes note of a tensor's storage; says whether it is a new one.

        Args:
            value: the tensor.
            counts: whether its bytes count; those of weights are known otherwise.
        """
        if is_traceable_wrapper_subclass(value):
            return False
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return False
        size = storage.nbytes() if counts else 0
        self._held[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        return True

    def _release(self, key: int, size: int) -> None:
        del self._held[key]
        self.live -= size
