"""How a call is told from others: by the names that its arguments have now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils.deprecation import deprecate_kwarg

from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call


class Renamed(nn.Module):
    """A forward of which an argument was called otherwise before."""

    @deprecate_kwarg("past", "1000.0.0", new_name="cache")
    def forward(self, x: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        return x


def test_an_older_name_is_the_same_argument() -> None:
    x, cache = torch.ones(2), torch.zeros(2)
    calls: list[dict[str, Any]] = [{"past": cache}, {"cache": cache}]
    assert [list(bind_call(Renamed(), (x,), call)) for call in calls] == [["x", "cache"]] * 2
    with pytest.warns(UserWarning, match="cache is taken"):  # as transformers' own decorator says
        bound = bind_call(Renamed(), (x,), {"past": x, "cache": cache})
    assert bound["cache"] is cache and list(bound) == ["x", "cache"]
    with pytest.raises(TpCompileError, match="'cache' was given twice"):
        bind_call(Renamed(), (x, cache), {"past": cache})
