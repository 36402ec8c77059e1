"""The call that a model is captured for when no example is given."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import families
from tpcompile.capture.export.default_example import default_example


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper", "vit"])
def test_the_model_takes_it(name: str, dtype: torch.dtype) -> None:
    model = families.build(name, dtype)
    example = default_example(model)
    assert example is not None
    with torch.no_grad():
        model(**example)
