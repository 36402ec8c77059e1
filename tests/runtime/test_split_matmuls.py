"""Matmuls of few rows with many columns: taken apart where it pays, with the same result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from tpcompile.ir.dynamo_internals import inductor_config
from tpcompile.runtime.compile_step import CompiledSteps
from tpcompile.runtime.split_matmuls import SplitMatmuls, last_pass, split_matmuls

MM = torch.ops.aten.mm.default
pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL's are taken apart")


@pytest.mark.parametrize(
    ("rows", "wide", "dtype", "transposed", "threads", "parts"),
    [
        (3, 5000, torch.float32, True, 1, 5),
        (128, 4096, torch.float32, True, 1, 4),
        (3, 9000, torch.float32, True, 2, 5),
        (3, 5000, torch.float32, True, 2, 1),
        (1, 5000, torch.float32, True, 1, 1),
        (129, 5000, torch.float32, True, 1, 1),
        (3, 4095, torch.float32, True, 1, 1),
        (3, 5000, torch.bfloat16, True, 1, 1),
        (3, 5000, torch.float32, False, 1, 1),
    ],
)
def test_parts(
    rows: int,
    wide: int,
    dtype: torch.dtype,
    transposed: bool,
    threads: int,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.t() if transposed else weight) + 1

    x = torch.randn(rows, 8).to(dtype)
    weight = torch.randn(*((wide, 8) if transposed else (8, wide))).to(dtype)
    made = make_fx(multiply, tracing_mode="fake")(x, weight)
    split_matmuls(made.graph)
    made.recompile()
    assert len(made.graph.find_nodes(op="call_function", target=MM)) == parts
    torch.testing.assert_close(made(x, weight), multiply(x, weight))


def test_programs_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, weight = torch.randn(3, 8), torch.randn(5000, 8)
    graph = symbolic_trace(lambda x, weight: (torch.ops.aten.linear.default(x, weight),))
    steps = CompiledSteps(graph, (0, 1), ((3, 8), (5000, 8)), None, {})
    steps.bind(True)
    with torch.no_grad():
        (found,), (code,) = run_and_get_code(steps, [x, weight])
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight))
    assert code.count("extern_kernels.mm(") == 5 and "cat" not in code.partition("def call")[2]


def test_the_users_last_pass_stays() -> None:
    kept = SplitMatmuls()
    with inductor_config.patch(post_grad_custom_post_pass=kept):
        assert last_pass() is kept
    assert last_pass() == kept and last_pass() is not kept
