"""What changes the weights or the structure of a sharded model: right, or refused with nothing changed."""

from __future__ import annotations

import pytest

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import changes


@pytest.mark.parametrize("tied", [False, True])
def test_changes_of_a_sharded_model(tied: bool) -> None:
    for found in run_spmd(changes.changes, 2, tied, timeout=300):
        assert not found
