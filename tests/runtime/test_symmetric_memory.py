"""Programs have the forms that Inductor looks for where cards read each other's memory; without cards."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import symmetric_memory as on_ranks

F32 = 1e-5


def test_matmuls_beside_collectives_of_positions() -> None:
    """Torch's pass takes what goes to and comes from a matmul, where the ranks divide the positions."""
    for found in run_spmd(on_ranks.fused, 2):
        worst, (forward, backward), run = found[2, 8, 12]
        assert worst <= F32
        # The first block reads the whole input; what the last one gives is gathered for the result.
        assert forward == {
            "fused_matmul_reduce_scatter": 2,
            "fused_all_gather_matmul": 1,
            "all_gather_into_tensor": 1,
            "wait_tensor": 1,
        }
        # The gradient of what two layers read is a sum of two products, which torch's operators are not.
        assert backward["fused_all_gather_matmul"] == 2 and backward["reduce_scatter_tensor"] == 1
        assert run == {"fused_matmul_reduce_scatter": 2, "fused_all_gather_matmul": 3}
        worst, graphs, run = found[2, 7, 12]
        assert worst <= F32 and not run
        assert sum(graph["reduce_scatter_tensor"] for graph in graphs) == 3


def test_small_sums_in_one_step() -> None:
    for found in run_spmd(on_ranks.summed, 2):
        assert max(worst for worst, _ in found.values()) <= F32
        counts = {name: count for name, (_, count) in found.items()}
        assert counts == {"fixed sizes": 2, "open sizes": 0, "larger than that": 0}


def test_torch_is_told_of_a_models_groups() -> None:
    assert run_spmd(on_ranks.told, 2) == [(False, True)] * 2


def test_no_memory_of_cards() -> None:
    for found in run_spmd(on_ranks.refused, 2):
        assert [unchanged for _, unchanged in found] == [True, True]
        assert all("ranks that talk over gloo share no memory of cards" in message for message, _ in found)
