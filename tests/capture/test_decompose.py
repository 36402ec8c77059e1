"""Composite operators that no rule knows are captured as what torch composes them of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from transformers import StaticCache

from tests.helpers import families, programs
from tpcompile.capture.export import capture_model
from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.decompose import decompose, decompositions
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.rules import table
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import register_rule


class Aliases(nn.Module):
    """A feed-forward layer written with the second names of operators, and a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.multiply(self.up(x), torch.absolute(self.up(x)))
        joined = torch.concat([self.down(inner), torch.subtract(x, 1.0)], dim=1)
        y: Tensor = torch.fft.fftn(joined, dim=(1, 2)).real
        return y


def _targets(model: nn.Module, x: Tensor) -> set[str]:
    return {str(n.target) for n in programs.captured(model, x).graph.nodes if n.op == "call_function"}


def test_aliases_are_what_they_stand_for() -> None:
    model, x = Aliases().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    program = programs.planned(model, x)
    assert all(isinstance(rule, Rule) for rule in program.planned_factors.rules.values())
    with torch.no_grad():
        torch.testing.assert_close(programs.run_whole(program, model, x), [model(x)])


def test_a_users_rule_keeps_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_USER", {})
    model, x = Aliases(), torch.randn(2, 5, 12)
    assert "aten.fft_fftn.default" not in _targets(model, x)
    register_rule("aten.fft_fftn", "b s h -> b s h; whole s h; linear 0")
    assert "aten.fft_fftn.default" in _targets(model, x)


def test_operators_with_rules_stay() -> None:
    kept = {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.layer_norm.default"}
    assert not kept & set(map(str, decompositions()))
    assert "aten.multiply.Tensor" in map(str, decompositions())


class Rearranged(nn.Module):
    """Calls that are views or not, of sizes that are products; pieces; a cast that does nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        rows = x.transpose(0, 1).reshape(batch * length, width).to(torch.float64)
        left, right = rows.float().chunk(2, dim=-1)
        return left.contiguous() * right, rows.to(rows.dtype), rows + 1


class Padded(nn.Module):
    """A size that is a product of a sum: torch computes it in another way than we do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, 1:]], 1).transpose(1, 2).flatten(1)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y


class Keeps(nn.Module):
    """Writes of which nobody has a view: their results are new values."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        before = y.sum()
        y.add_(1).clamp_(max=2)
        values = x.topk(2).values
        values /= values.sum(-1, keepdim=True)
        z = torch.bmm(x, x.mT).unsqueeze(1).mul_(3)
        return y, before, y + x, values, z


class Shares(nn.Module):
    """Writes that others see: through a view taken before, through the tensor itself, in an input's copy."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        first = y[:, 0]
        y.add_(1)
        left, right = (x + 1).chunk(2, -1)
        left.mul_(2)
        whole = x.exp()
        whole.view(x.shape[0], -1).neg_()
        counts = x.argmax(-1)
        counts.mul_(2)
        return first + 0, left, right, whole, counts


class Fills(nn.Module):
    """Writes into parts of what is new, which is read and viewed later."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.zeros_like(x)
        y[:, :, 0] = x[:, :, 1]
        before, y[:, 1] = y.sum(), x[:, 1]
        y[:, 2:, 3:].copy_(x[:, :-2, 3:] * 2)
        return y.view(x.shape[0], -1), before, y[:, 1] + 1


class FillsSeen(nn.Module):
    """Writes into parts that others see: through a view taken before, and by the result of the write."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, z = x * 2, x * 3
        seen, part = y[:, 0], z[:, 0].copy_(x[:, 1])
        y[:, :, 0], z[:, :, 0] = x[:, :, 1], x[:, :, 2]
        return seen + 0, y, part + 0, z


class Counts(nn.Module):
    """Writes into buffers: into all of one, twice, and into a part of another, first or last."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("sums", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        before = self.count + 1
        self.count.add_(1).mul_(2)
        if self.part == "first":
            self.sums[1:].neg_()
        self.sums.add_(x.sum((0, 1)))
        if self.part == "last":
            self.sums[1:].neg_()
        y: Tensor = x * before + self.sums / self.count
        return y


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT


class Normed(nn.Module):
    """In training the norm writes its running statistics, which shows when it is taken apart, last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.dropout(x.mT.contiguous(), 0.5, self.training)
        return x.contiguous(), self.norm(x)


class Shifts(nn.Module):
    """Moves positions on, as a cache that is full does, writes behind them, and puts all in its place."""

    def forward(self, x: Tensor) -> Tensor:
        cache, moved, other = x.clone(), x.roll(-1, 1), x.clone()
        moved[:, torch.tensor([-1])] = x[:, :1] * 2
        other[:, :, torch.tensor([0, 2])] = x[:, :, 3:5]
        cache.copy_(moved)
        return cache + other


def _captured(
    model: nn.Module, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    """How often torch traced a program anew, and the program's calls."""
    traced = []
    original = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, table: Any) -> ExportedProgram:
        traced.append(program)
        return original(program, table)

    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", run)
        graph = capture(model, bind_call(model, (), call)).graph_module.graph
    numbers: dict[Node, str] = {}
    lines = []
    for node in graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        val = node.meta["val"] if node.op == "call_function" else None
        layout = (val.shape, val.stride(), val.dtype) if isinstance(val, Tensor) else val
        where = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        lines.append(f"{numbers.setdefault(node, f'%{len(numbers)}')} {node.target} {args} {layout} {where}")
    return len(traced), lines


TOYS = {
    "rearranged": (Rearranged(), 0),
    "writes": (Writes(), 1),
    "casts": (Casts(), 1),
    "norm": (Normed().eval(), 0),
    "norm in training": (Normed(), 1),
}


@pytest.mark.parametrize("name", [*TOYS, "phi3", "bloom"])
def test_calls_taken_apart_one_by_one_are_as_torch_has_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = TOYS[name] if name in TOYS else (families.build(name), 0)
    call = {"x": torch.randn(2, 5, 6)} if name in TOYS else families.inputs(name)
    traced, found = _captured(model, call, monkeypatch)
    assert traced == expected
    assert capture_model.decompose is decompose
    monkeypatch.setattr(capture_model, "decompose", lambda p: p.run_decompositions(decompositions()))
    assert _captured(model, call, monkeypatch) == (1, found)


def test_sizes_that_are_made_on_the_way() -> None:
    program = programs.captured(Padded(), torch.randn(2, 5, 6), dynamic=True)
    for sizes in ((2, 5, 6), (3, 9, 6)):
        x = torch.randn(sizes)
        torch.testing.assert_close(programs.run_whole(program, Padded(), x), [Padded()(x)])


@pytest.mark.parametrize(
    ("model", "traces"),
    [(Keeps(), 0), (Shares(), 1), (Shifts(), 0), (Writes(), 1), (Fills(), 0), (FillsSeen(), 1)],
)
def test_writes(model: nn.Module, traces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _captured(model, {"x": torch.randn(2, 5, 6)}, monkeypatch)[0] == traces
    program = programs.captured(model, torch.randn(2, 5, 6), dynamic=True)
    for sizes in ((2, 5, 6), (3, 9, 6)):
        x = torch.randn(sizes)
        expected = model(x)
        found = programs.run_whole(program, model, x)
        torch.testing.assert_close(found, [*expected] if isinstance(expected, tuple) else [expected])
    assert not any(n.op == "call_function" and "_." in str(n.target) for n in program.graph.nodes)


@pytest.mark.parametrize(("part", "traces"), [("", 0), ("first", 1), ("last", 0)])
def test_written_buffers(part: str, traces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they become is a result of the program."""
    x, model = torch.randn(2, 5, 6), Counts(part)
    assert _captured(model, {"x": x}, monkeypatch)[0] == traces
    program = programs.captured(model, x)
    names = {
        spec.name: i for i, spec in enumerate(program.captured.outputs) if spec.kind == "buffer_mutation"
    }
    found = programs.run_whole(program, model, x)
    torch.testing.assert_close(found[0], model(x))
    torch.testing.assert_close(found[names["count"]], model.count)
    torch.testing.assert_close(found[names["sums"]], model.sums)


class Forbidden(nn.Module):
    """Writes into a frozen parameter or a plain tensor, and into a buffer beside it."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(6))
        self.scale: Tensor = torch.ones(6) if plain else nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        self.count.add_(1)
        return x * self.scale + self.count


@pytest.mark.parametrize(("plain", "message"), [(False, "changes scale in place"), (True, "is mutated")])
def test_writes_into_parameters_and_constants_are_refused(plain: bool, message: str) -> None:
    with pytest.raises(TpCompileError, match=message):
        programs.captured(Forbidden(plain), torch.randn(2, 6))


def test_a_static_cache_takes_no_other_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are arguments that are written; ``test_generate`` compares the tokens."""
    model = families.build("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)  # type: ignore[arg-type]
    call = families.causal_inputs(2, 3) | {"use_cache": True, "past_key_values": cache}
    traced, lines = _captured(model, call, monkeypatch)
    assert traced == 0
    assert sum("aten.index_copy.default" in line for line in lines) == 4
