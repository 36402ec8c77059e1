"""What a rank's program is given in a dry run: tensors of its sizes, without values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.torch_internals import FakeTensorMode
from tpcompile.runtime.verify.inputs import Inputs


@dataclass
class FakeInputs(Inputs):
    """As ``Inputs``, without values.

    Attributes:
        mode: makes the tensors.
    """

    mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def _value(self, kind: str, name: str) -> Any:
        if kind in ("param", "buffer"):
            return self._empty(self.layout.local_shape(name, self.rank), self.layout.params[name].dtype)
        value = super()._value(kind, name)
        return self._empty(value.shape, value.dtype) if isinstance(value, Tensor) else value

    def _empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def _learns(self, kind: str, name: str, value: Any) -> bool:
        return self.learning and kind == "param" and self.tensors[name].requires_grad
