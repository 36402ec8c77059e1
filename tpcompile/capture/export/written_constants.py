"""Tensors from outside of a model that a trace writes into: those calls are run, and are taken back after it.

A call that is given no traced tensor, such as ``TABLE.add_(1)``, computes with real values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from tpcompile.ir.torch_internals import unset_fake_temporarily


class WrittenConstants:
    """What real tensors were before calls that may write into them; behind the block they are that again."""

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []

    def note(self, func: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        """Keeps the values of what a call is given, if it may write them.

        Args:
            func: what is called.
            kwargs: its arguments by name.
            tensors: all of its tensors; none of them is traced.
        """
        name = getattr(func, "__name__", "")
        writes = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and name[-2:] != "__")
        if not writes and kwargs.get("out") is None:
            return
        with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.no_grad():
            plain = [x for x in tensors if x.layout is torch.strided and not x.is_inference()]
            self._before += [(x, x.detach().clone()) for x in plain]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        """Gives all of them the values that they had, the first one's last."""
        with torch.no_grad():
            for tensor, before in reversed(self._before):
                if tensor.shape == before.shape and not torch.equal(tensor, before):
                    tensor.copy_(before)
        self._before.clear()
