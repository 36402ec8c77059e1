"""torch's helpers for states (``get_state_dict``, ``set_state_dict``): right with each option, or refused."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import state_helpers

REFUSED = {
    "lacks": "the state dict lacks up.bias",
    "a slice": "(10,) where the model has (42,)",
    "other values": "rank 0 has 'up.bias: ",
    "other states": "different states of an optimizer",
}


def test_states_with_every_option() -> None:
    for found in run_spmd(state_helpers.helpers, 2, timeout=300):
        for name, said in found.items():
            if name in REFUSED:
                assert said.startswith("TpCompileError") and REFUSED[name] in said, (name, said)
            else:
                assert said == [], (name, said)
        assert found.keys() > REFUSED.keys()
