"""``tpcompile.verify``: what is right is found right, and of what is wrong, where it begins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import LlamaConfig, LlamaForCausalLM, PixioConfig, PixioModel

import tpcompile
from tests.helpers import toys
from tests.helpers.odd_faults import Counted, NotDoubled
from tests.on_ranks import valid_programs
from tpcompile.capture.held_caches import Held
from tpcompile.compile_program import Compiler
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.ir.graph_edit import call_behind
from tpcompile.ir.layout.segment import Segment
from tpcompile.ir.torch_internals import detect_fake_mode
from tpcompile.lowering.simulate import lower_all, sent
from tpcompile.lowering.state import SOURCE
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.ranks.compare_sent import refuse_unlike
from tpcompile.rules import table
from tpcompile.runtime.read_request import read_options
from tpcompile.runtime.verify.compare import difference
from tpcompile.runtime.verify.one_process import VerifyRequest, _tokens, examine
from tpcompile.runtime.verify.report import Report
from tpcompile.runtime.verify.trial import SimulatedCompiler, Trial

X = (2, 4, 12)


def test_what_is_right() -> None:
    """Results, buffers and gradients, with dynamic sizes; the model stays as it is."""
    torch.manual_seed(0)
    model = Counted().double()
    model.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    report = tpcompile.verify(model, 3, (torch.randn(X, dtype=torch.float64),))
    assert report.ok
    assert {f.sort for f in report.findings} == {"result", "buffer", "gradient"}
    assert len(report.findings) == 2 + 1 + 7
    assert "the same as the unsharded model" in str(report)
    assert model.seen == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and steps, over whole caches that are cut for the ranks; a step that goes wrong is seen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=1, **sizes)).double().eval()
    call = {"input_ids": torch.randint(30, (2, 5)), "attention_mask": torch.ones(2, 5).long()}
    report = tpcompile.verify(model, 2, example_kwargs=call, gradients=False, generate=3)
    assert report.ok, report
    assert {f.sort for f in report.findings} == {"result", "buffer", "token"}
    right = Held.part
    monkeypatch.setattr(Held, "part", lambda *args: right(*args) * 1e3)
    options = read_options(model, "auto", None, "cpu", True, None, ())
    assert _tokens(model, VerifyRequest(call, options, 2, generate=3)).error > 0


class Forgets(Counted):
    """Writes its buffer where no capture sees it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result = super().forward(x)
        if detect_fake_mode(x) is None:
            self.seen += 1
        return result


def test_a_buffer_that_only_python_writes() -> None:
    report = tpcompile.verify(Forgets().double(), 2, (torch.randn(X, dtype=torch.float64),), gradients=False)
    assert report.kind == "capture"
    assert [(f.sort, f.name) for f in report.wrong] == [("buffer", "seen")]
    assert report.first_difference is not None
    assert report.first_difference.node == "the buffer seen"


# Capture.


def _capture_of_another(monkeypatch: pytest.MonkeyPatch, lose: Callable[[nn.Module], None]) -> None:
    """Capture is given another model than the one that runs: something is lost."""
    right = Compiler.capture_call

    def capture(self: Compiler, model: nn.Module, bound: dict[str, Any]) -> Any:
        other = copy.deepcopy(model)
        with monkeypatch.context():
            lose(other)
            return right(self, other, bound)

    monkeypatch.setattr(Compiler, "capture_call", capture)


def _counted() -> Report:
    return tpcompile.verify(Counted().double(), 2, (torch.randn(X, dtype=torch.float64),))


def test_capture_that_loses_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    _capture_of_another(monkeypatch, lambda model: model.last._forward_hooks.clear())  # type: ignore[union-attr]
    report = _counted()
    assert (report.ok, report.kind) == (False, "capture")
    assert report.first_difference is not None
    assert report.first_difference.module == "last"
    assert not report.first_difference.backward


def test_capture_that_loses_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    _capture_of_another(monkeypatch, lambda model: model.__setattr__("function", NotDoubled))
    report = _counted()
    assert report.kind == "capture"
    assert {f.sort for f in report.wrong} == {"gradient"}
    assert report.first_difference is not None
    assert report.first_difference.backward
    assert report.first_difference.module == "mlp"


# The plan and what follows.


def test_a_rule_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax whose rows are said to be free; its first half is another number than it should be."""
    monkeypatch.setattr(table, "_USER", {"aten._softmax": "... d -> ... d", "aten.softmax": "... d -> ... d"})
    model = nn.Sequential(nn.Linear(12, 20), nn.Softmax(-1), nn.Linear(20, 12)).double()
    report = tpcompile.verify(model, 2, (torch.randn(X, dtype=torch.float64),), gradients=False)
    assert report.kind == "rewrite"
    assert report.first_difference is not None
    assert "softmax" in report.first_difference.text
    assert report.first_difference.rule
    assert report.first_difference.module == "1"
    assert "1 of 2" not in str(report)
    assert "softmax" in str(report)


class SwapAddends(Pass):
    """A pass of a user's that proves, and computes something else."""

    name = "swap-addends"

    def apply(self, program: GlobalProgram) -> bool:
        found = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
        for node in found:
            node.args = (node.args[1], node.args[0])
        return bool(found)


class Minus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = toys.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mlp(x)


def test_a_pass_that_changes_what_is_computed() -> None:
    report = tpcompile.verify(
        Minus().double(), 2, (torch.randn(X, dtype=torch.float64),), passes=[SwapAddends()]
    )
    first = report.first_difference
    assert (report.ok, report.kind) == (False, "rewrite")
    assert first is not None
    assert "aten.sub" in first.text
    assert "in forward" in first.line
    assert len(first.agreed) == 2


class Autocast(Minus):
    """Float32 weights, of which python makes bfloat16 on the way."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class SubtractMore(Pass):
    """Makes differences wrong by a hundredth."""

    name = "subtract-more"

    def apply(self, program: GlobalProgram) -> bool:
        found = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
        for node in found:
            node.kwargs = {"alpha": 1.01}
        return bool(found)


def test_half_precision_on_the_way_hides_nothing() -> None:
    """What a model computes in bfloat16 in between sets a limit of 6 %; without rounding there is none."""
    x = torch.randn(X)
    assert tpcompile.verify(Autocast(), 2, (x,)).ok
    report = tpcompile.verify(Autocast(), 2, (x,), passes=[SubtractMore()])
    assert (report.ok, report.kind) == (False, "rewrite")


class FillsIn(Minus):
    """Fills an empty tensor, which functionalised is ``aten.copy``: it has no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        filled = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        filled[..., : x.shape[-1]].copy_(super().forward(x))
        filled[..., x.shape[-1] :].copy_(x)
        return filled


def test_faults_are_found_where_values_are_copied() -> None:
    x = torch.randn(X, dtype=torch.float64)
    report = tpcompile.verify(FillsIn().double(), 2, (x,), passes=[SubtractMore()])
    assert (report.ok, report.kind) == (False, "rewrite")
    assert report.first_difference is not None and "aten.sub" in report.first_difference.text


def _examined(model: nn.Module, ranks: int, lower: Callable[[GlobalProgram], list[GraphModule]]) -> Report:
    options = read_options(model, "auto", None, "cpu", True, None, ())
    bound = bind_call(model, (torch.randn(X, dtype=torch.float64),), {})
    return examine(model, VerifyRequest(bound, options, ranks, lower=lower))


def test_one_ranks_graph() -> None:
    """A rank that computes another function than all others, in the second of its calls."""

    def lower(program: GlobalProgram) -> list[GraphModule]:
        programs = lower_all(program)
        for node in programs[1].graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.silu.default
        return programs

    report = _examined(toys.Mlp().double(), 3, lower)
    assert report.kind == "rewrite"
    assert report.first_difference is not None
    assert "relu" in report.first_difference.text
    assert report.first_difference.placement == "S(2)"
    assert any("S(2)" in operand for operand in report.first_difference.agreed)


def test_a_gradient_that_no_rank_sums_up() -> None:
    """Forward is right; the first gradient that is wrong is the one that was not summed up."""

    def lower(program: GlobalProgram) -> list[GraphModule]:
        programs = lower_all(program)
        for local in programs:
            copies = torch.ops.tpcompile.copy_to_ranks.default
            for node in local.graph.find_nodes(op="call_function", target=copies):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        return programs

    report = _examined(toys.Mlp().double(), 2, lower)
    assert report.kind == "rewrite"
    assert {f.name for f in report.wrong} == {"x"}
    assert report.first_difference is not None
    assert report.first_difference.backward
    assert report.first_difference.text.startswith("copy_to_ranks")


def test_slices_that_are_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Segment.take

    def take(self: Segment, full: Tensor, box: Any) -> Tensor:
        found = right(self, full, box)
        return found.roll(1, 0) if found.shape != full.shape and full.ndim == 2 else found

    monkeypatch.setattr(Segment, "take", take)
    report = tpcompile.verify(toys.Mlp().double(), 2, (torch.randn(X, dtype=torch.float64),), gradients=False)
    assert report.kind == "rewrite"
    assert report.first_difference is not None
    assert report.first_difference.node in ("up.weight", "down.weight")


class Amplifies(nn.Module):
    """Makes large differences of small ones: little of what comes out is right in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = toys.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e4 * self.mlp(x))


def test_rounding_is_told_from_faults() -> None:
    torch.manual_seed(0)
    report = tpcompile.verify(Amplifies(), 2, (torch.randn(X),))
    assert (report.ok, report.kind) == (True, "numerics")
    assert report.wrong


class Cancels(nn.Module):
    """Two ways to the same value, whose difference is rounding; a small part of it is what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.other = toys.Mlp(), toys.Mlp()
        weights, turned = self.mlp.state_dict(), torch.arange(20).flip(0)
        weights |= {name: weights[name][turned] for name in ("up.weight", "up.bias")}
        self.other.load_state_dict(weights | {"down.weight": weights["down.weight"][:, turned]})

    def forward(self, x: Tensor) -> Tensor:
        return (self.mlp(x) - self.other(x)) + 1e-8 * self.mlp(x)


def test_a_model_that_amplifies_rounding() -> None:
    """What the model's own python does when weights change in their last bit is no fault; more is."""
    x = torch.randn(X, dtype=torch.float64)
    report = tpcompile.verify(Cancels().double(), 2, (x,), gradients=False)
    assert (report.ok, report.kind) == (True, "numerics")
    assert report.wrong and "last bits" in str(report)
    report = tpcompile.verify(Cancels().double(), 2, (x,), gradients=False, passes=[SubtractMore()])
    assert (report.ok, report.kind) == (False, "rewrite")


class Noise(Cancels):
    """What is left of the difference, which is rounding, is made large."""

    def forward(self, x: Tensor) -> Tensor:
        rest = self.mlp(x) - self.other(x)
        return rest / rest.abs().amax()


def test_noise_is_no_fault_and_not_right() -> None:
    report = tpcompile.verify(Noise().double(), 2, (torch.randn(X, dtype=torch.float64),), gradients=False)
    assert (report.ok, report.kind, report.first_difference) == (False, "undecided", None)
    assert "NOT COMPARABLE" in str(report) and "last bits" in str(report)


class Normed(nn.Module):
    """An MLP behind a norm that is computed in float32, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = toys.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.mlp((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


class LargerEpsilon(Pass):
    """Adds more than the model does before it takes a root: a fault smaller than float32's rounding."""

    name = "larger-epsilon"

    def apply(self, program: GlobalProgram) -> bool:
        found = [n for n in program.graph.nodes if len(n.args) > 1 and n.args[1] == 1e-6]
        for node in found:
            node.update_arg(1, 2e-6)
        return bool(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_smaller_than_rounding(dtype: torch.dtype) -> None:
    """The model runs in float64, also where its python asks for float32."""
    model, x = Normed().to(dtype), torch.randn(X, dtype=dtype)
    right = tpcompile.verify(model, 2, (x,))
    assert right.ok
    assert "in float64 the error is" in right.notes[0]
    report = tpcompile.verify(model, 2, (x,), passes=[LargerEpsilon()])
    assert (report.ok, report.kind, report.precision) == (False, "rewrite", "float64")
    assert report.first_difference is not None
    assert "aten.add" in report.first_difference.text


class InSingle(torch.autograd.Function):
    """A sine that is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad.float() * torch.cos(x.float())).to(grad.dtype)


class CallsInSingle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.last = toys.Mlp(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(InSingle.apply(self.mlp(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_python_inside_of_programs_is_no_false_alarm(dtype: torch.dtype) -> None:
    """Autograd functions, which are called as they are, compute in float32 wherever they are called."""
    report = tpcompile.verify(CallsInSingle().to(dtype), 2, (torch.randn(X, dtype=dtype),))
    assert report.ok, report


class ByDefault(toys.Mlp):
    """Whole numbers times, or by, a number: of the type that torch makes by default."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y + (1 - mask) * torch.finfo(y.dtype).min, y * (mask / 3)


def test_whole_numbers_become_doubles_in_programs_too() -> None:
    """In single precision the largest double is infinite, and a third differs by 1e-8."""
    mask = torch.tensor([1, 1, 1, 0])[:, None]
    report = tpcompile.verify(ByDefault(), 2, (torch.randn(X), mask))
    assert report.ok, report
    assert "in float64 the error is" in report.notes[-1]
    assert torch.get_default_dtype() == torch.float32


class Picky(Normed):
    """Takes nothing but float32."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().forward(x)


def test_what_does_not_run_in_float64() -> None:
    report = tpcompile.verify(Picky(), 2, (torch.randn(X),))
    assert report.ok
    assert "does not run in float64" in str(report)


class Handed(nn.Module):
    """An MLP, of whose result a function is handed out."""

    def __init__(self, hand_out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mlp, self.hand_out = toys.Mlp().double(), hand_out

    def forward(self, x: Tensor) -> Any:
        return self.hand_out(self.mlp(x))


class Weighed(nn.Module):
    """Rows are weighed, then added up, as those of experts are: ranks add theirs up before they talk."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = toys.Mlp().double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.mlp(x) * t).sum(1)


def test_what_is_refused() -> None:
    x = torch.randn(X)
    with torch.device("meta"), pytest.raises(TpCompileError, match="no weights"):
        tpcompile.verify(toys.Mlp(), 2, (x,))
    with pytest.raises(TpCompileError, match="random numbers"):
        tpcompile.verify(nn.Sequential(toys.Mlp(), nn.Dropout()), 2, (x,))
    for wrong in ({"ranks": 0}, {"ranks": 2, "gradients": "yes"}, {"ranks": 2, "plan": "none"}):
        with pytest.raises(TpCompileError):
            tpcompile.verify(toys.Mlp(), example_args=(x,), **wrong)


def test_nothing_is_not_called_right() -> None:
    """A call of which nothing can be compared is refused; where no gradient is, none is counted."""
    x = torch.randn(X, dtype=torch.float64)
    for none in (None, 5, ()):
        with pytest.raises(TpCompileError, match="leaves no tensor behind"):
            tpcompile.verify(Handed(lambda y, none=none: none), 2, (x,))
    with pytest.raises(TpCompileError, match="all results are zero"):
        tpcompile.verify(Handed(lambda y: y * 0), 2, (x,))
    for hand_out in (Tensor.detach, lambda y: y.argmax(-1)):
        report = tpcompile.verify(Handed(hand_out), 2, (x,))
        assert report.ok, report
        assert {f.sort for f in report.findings} == {"result"}
        assert "no gradients were compared" in str(report)
        assert "no gradients" not in str(tpcompile.verify(Handed(hand_out), 2, (x,), gradients=False))


def test_a_summand_times_infinity_is_told() -> None:
    """The limit that docs/proof.md states: summands of two signs, and the whole value is infinite."""
    x, t = torch.randn(X, dtype=torch.float64), torch.ones(2, 4, 1, dtype=torch.float64)
    assert tpcompile.verify(Weighed(), 2, (x, t), gradients=False).ok
    t[0, 0] = torch.inf
    report = tpcompile.verify(Weighed(), 2, (x, t), gradients=False)
    assert report.kind == "rewrite"
    assert report.first_difference is not None
    assert "aten.mul" in report.first_difference.text
    assert "summands" in report.first_difference.why


def test_what_does_not_run_on_parts_is_planned_again() -> None:
    """As on a mesh: an operator that refuses one rank's part is computed whole, and all is right."""
    picky = valid_programs.register_picky("verified", lambda x: x.shape[-1] != 3)
    model = valid_programs.Between(picky, 7).double()
    report = tpcompile.verify(model, 2, (torch.randn(4, 6, dtype=torch.float64),))
    assert report.ok, report


def test_ranks_that_send_different_things() -> None:
    def lower(program: GlobalProgram) -> list[GraphModule]:
        programs = lower_all(program)
        reduces = torch.ops.tpcompile.all_reduce.default
        (node,) = programs[1].graph.find_nodes(op="call_function", target=reduces)
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        programs[1].graph.erase_node(node)
        return programs

    with pytest.raises(TpCompileError, match="rank 1 nothing more"):
        _examined(toys.Mlp().double(), 2, lower)


def test_every_rank_has_a_copy_of_the_call() -> None:
    """Programs write into static caches that they are given: not into the caller's, nor all into one."""
    model, x = toys.Mlp().double(), torch.randn(X, dtype=torch.float64)
    options = read_options(model, "auto", None, "cpu", True, None, ())
    trial = Trial(model, bind_call(model, (x,), {}), SimulatedCompiler(options, 2), False)
    given = [x]

    def watch(rank: int, node: Node, value: Any) -> None:
        if node.op == "placeholder" and node.meta[SOURCE].spec.kind == "user":
            given.append(value)

    trial.on_ranks(watch)
    assert len({value.data_ptr() for value in given}) == 3


@dataclass(frozen=True)
class Halved(Pass):
    """Rounds what matmuls give to half precision."""

    kind: torch.dtype
    name = "halved"
    before_planning = True

    def apply(self, program: GlobalProgram) -> bool:
        found = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        for node in found:
            half = call_behind(node, torch.ops.aten.to.dtype, node, self.kind)
            back = call_behind(half, torch.ops.aten.to.dtype, half, node.meta["val"].dtype)
            node.replace_all_uses_with(back, delete_user_cb=lambda user, half=half: user is not half)
        return bool(found)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float64, torch.bfloat16), (torch.float32, torch.float16)], ids=str
)
def test_a_cast_does_not_widen_the_limit(dtype: torch.dtype, kind: torch.dtype) -> None:
    """The model's python computes in one type: what a program does in another is no excuse."""
    x = torch.randn(X, dtype=dtype)
    report = tpcompile.verify(toys.Mlp().to(dtype), 2, (x,), passes=[Halved(kind)])
    assert (report.ok, report.kind) == (False, "rewrite")


def test_a_cast_that_only_traced_python_makes_widens_the_limit() -> None:
    """transformers interpolates a table of positions in float32 where python takes it as it is."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = PixioModel(PixioConfig(image_size=8, patch_size=4, **sizes)).double().eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    report = tpcompile.verify(model, 2, (torch.randn(2, 3, 8, 8, dtype=torch.float64),), dynamic=False)
    assert report.ok and 1e-9 < max(f.error for f in report.findings) < 1e-7
    assert "in float64 the error is" in str(report)


def test_collectives_are_told_by_what_they_send() -> None:
    """Two sums of one shape and type: what one rank adds to the first another must not add to the second."""
    model = nn.Sequential(toys.Mlp(), toys.Mlp()).double()
    x = torch.randn(X, dtype=torch.float64)
    compiler = SimulatedCompiler(read_options(model, "auto", None, "cpu", True, None, ()), 2)
    trial = Trial(model, bind_call(model, (x,), {}), compiler, True)
    everyone = sent(trial.rewritten.axis_sizes, trial.programs)
    one, two = (i for i, each in enumerate(everyone[1]) if each.kind.startswith("all_reduce"))
    everyone[1][one], everyone[1][two] = everyone[1][two], everyone[1][one]
    with pytest.raises(TpCompileError, match="send different things"):
        refuse_unlike(everyone)


@pytest.mark.parametrize("fill", [-1e9, -1e4, float(torch.finfo(torch.float32).min), float("-inf")])
def test_errors_are_not_measured_against_what_a_mask_has_made(fill: float) -> None:
    values = torch.linspace(-3, 3, 100)
    mask = torch.zeros(100)
    mask[60:] = fill
    assert difference(values + 0.1 + mask, values + mask) > 0.01
    assert difference(values * (1 + 2e-7) + mask, values + mask) < 1e-6
    assert difference(values + mask.clamp(min=-10), values + mask) > 0.01
    outlier = torch.cat([values, torch.tensor([2000.0])])  # a single one is what it is
    assert difference(outlier + 1e-3, outlier) < 1e-6


def test_one_part_of_a_complex_number_may_be_infinite() -> None:
    want = torch.tensor([complex(math.inf, 1.0), 2.0, complex(0.0, -math.inf)], dtype=torch.complex128)
    assert difference(want + 1e-15j, want) < 1e-10
    assert difference(want + 0.1j, want) > 0.01
    assert difference(want.conj(), want) == math.inf
    assert difference(want.conj(), want.conj()) == 0.0
