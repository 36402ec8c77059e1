"""Programs that Inductor is handed without dynamo: right for every kind of call, and for none too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, symbolic_trace

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import compiled as on_ranks
from tests.on_ranks import own_kernel
from tpcompile import TpCompileError
from tpcompile.runtime.await_collectives import await_collectives
from tpcompile.runtime.compile_options import read_compile
from tpcompile.runtime.compile_step import CompiledSteps

F32 = 1e-5


def test_every_kind_of_call_gets_what_was_compiled_for_it() -> None:
    for found in run_spmd(on_ranks.kinds, 2, {"backend": "aot_eager"}):
        assert found["worst"] <= F32
        assert found["calls"] == 9
        assert found["dynamo"] == 0
        # With gradients, without (no_grad and inference_mode), a single row; the same tensor twice, which is
        # a program of its own; frozen.
        assert found["compiled"] == [(2, 2), (1, 2), (1, 1), (1, 1), (1, 1)]


def test_inductor_trains() -> None:
    for found in run_spmd(on_ranks.trained, 2, True):
        assert found["worst"] <= F32
        assert found["compiled"] == [(1, 1)]


def test_what_a_compiler_assumes_of_sizes_is_asked_of_every_call() -> None:
    for found in run_spmd(on_ranks.assumptions, 2):
        assert found["made"] == ["fours few", "others few", "fours many", "others many"]
        few, many = ["fours few"] * 2 + ["others few"] * 2, ["fours many"] * 3 + ["others many"]
        assert found["ran"] == [*few, *many, "others few", "fours few"]
        # Whoever looks at operators sees them. A rank has half of the hidden units.
        assert found["flops"] == 2 * (2 * 4 * 12 * 10)
        assert "relu" in found["seen"]
        assert not found["unseen"]


def _steps(rows: int) -> CompiledSteps:
    """A program of one input, handed to a compiler that runs it as it is."""
    options = {"backend": lambda graph, inputs: graph.forward}
    graph = symbolic_trace(lambda x: (x + 1,))
    made = CompiledSteps(graph, (0,), ((rows,),), None, options)
    made.bind(True)
    return made


@pytest.mark.parametrize(
    "turned",
    [torch.ones(1, dtype=torch.complex64).conj().imag, torch.ones(3, dtype=torch.complex64).conj()],
    ids=["negated", "conjugated"],
)
def test_a_sign_that_is_not_in_memory_is_not_left_out(turned: Tensor) -> None:
    steps = _steps(len(turned))
    assert turned.is_contiguous()
    assert steps([turned]) is None
    assert steps([turned.resolve_conj().resolve_neg()]) is not None
    assert steps([turned]) is None


def test_another_precision_of_matmuls_is_compiled_anew() -> None:
    steps, before = _steps(3), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            steps([torch.ones(3)])
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(steps.compiled) == 3


def test_others_operators_are_held_to_what_they_announce() -> None:
    @torch.library.custom_op("tests::lies", mutates_args=())
    def lies(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    lies.register_fake(torch.empty_like)
    call = torch.ops.tests.lies.default
    made = CompiledSteps(symbolic_trace(lambda x: (call(x) + 1,)), (0,), ((3,),), None, {})
    made.bind(True)
    with pytest.raises(AssertionError, match="expected size"):
        made([torch.ones(3)])


def test_cpp_around_kernels() -> None:
    for found in run_spmd(on_ranks.in_cpp, 2, timeout=400):
        assert found["worst"] <= F32 and found["compiled"] == [(1, 1)]
        assert found["late"] or found["turns"] > 20  # who waits for another rank does not keep python's lock
    for found in run_spmd(on_ranks.trained, 2, {"cpp_wrapper": True}, timeout=400):
        assert found["worst"] <= F32 and found["compiled"] == [(1, 1)]


def test_collectives_in_native_code_keep_their_order() -> None:
    c10d, graph = torch.ops._c10d_functional, Graph()
    x = graph.placeholder("x")
    first, second = (graph.call_function(c10d.all_reduce.default, (x, "sum", name)) for name in "ab")
    waits = [graph.call_function(c10d.wait_tensor.default, (sent,)) for sent in (second, first)]
    total = graph.call_function(torch.ops.aten.add.Tensor, tuple(waits))
    graph.output((total,))
    await_collectives(graph)
    assert list(graph.nodes)[1:-1] == [first, second, total] and total.args == (second, first)
    assert [node.args[-1] for node in (first, second)] == [None, first]


def test_a_kernel_of_ones_own_for_a_sum_a_residual_and_a_norm() -> None:
    """Inductor's pattern matcher finds them in a rank's graph, twice in each of two calls."""
    for worst, ran in run_spmd(own_kernel.taken, 2):
        assert worst <= F32 and ran == 4


def test_repeated_layers_are_one_region() -> None:
    for found in run_spmd(on_ranks.layers, 2, {"backend": "aot_eager"}):
        assert found["worst"] <= F32
        assert found["regions"] == [0, 7]  # of 8 layers, one stands by itself


def test_what_is_asked_of_the_compiler() -> None:
    assert read_compile(False) is None and read_compile({"disable": True}) is None
    assert read_compile(True) == {} == read_compile({})
    assert read_compile("max-autotune") == {"mode": "max-autotune"}
    assert read_compile({"max_autotune": True}) == {"options": {"max_autotune": True}}
    assert read_compile({"backend": "aot_eager"}) == {"backend": "aot_eager"}


@pytest.mark.parametrize(
    "asked",
    [
        {"max_autotuner": True},
        {"max_autotune": "yes"},
        {"mode": "default", "max_autotune": True},
        {"mode": "max-autotune", "options": {"max_autotune": True}},
        {"backend": "none such"},
    ],
)
def test_what_torch_does_not_know_is_refused(asked: Any) -> None:
    with pytest.raises(TpCompileError, match=r"torch\.compile"):
        read_compile(asked)
