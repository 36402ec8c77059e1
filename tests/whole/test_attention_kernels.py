"""Attention kernels: divided by heads, with what their python reads, packed rows, windows and sinks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import attention_kernels

F32 = 1e-5


@pytest.mark.parametrize(
    ("ranks", "counts", "how"),
    [(4, (), {}), (3, (6, 2), {}), (2, (), {"backend": "aot_eager"}), (2, (), {"alone": True})],
)
def test_flex_attention_knows_heads_by_their_numbers(
    ranks: int, counts: tuple[int, ...], how: dict[str, Any]
) -> None:
    for found in run_spmd(partial(attention_kernels.heads, **how), ranks, *counts, timeout=300):
        assert found["worst"] <= F32
        assert found["gradients"] <= F32
        assert not found["fallbacks"]
        assert found["whole"] == (["k.weight", "v.weight"] if ranks == 3 else [])  # shared by all


def test_flex_attention_of_transformers() -> None:
    for found in run_spmd(attention_kernels.flex, 2, "gemma2", timeout=300):
        assert max(found["errors"].values()) <= F32, found["errors"]
        assert found["generated"]
        assert found["whole"] == []
