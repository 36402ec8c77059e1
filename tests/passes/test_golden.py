"""Each pass on a toy: the text that it gives, how many calls it adds, and that results stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import programs, toys
from tests.helpers.golden_text import stable_text
from tpcompile.errors import CannotCapture
from tpcompile.ir.markers import COMMUNICATING, all_reduce, all_reduce_coalesced
from tpcompile.passes.annotate_placements import AnnotatePlacements
from tpcompile.passes.canonicalise import Canonicalise
from tpcompile.passes.choose_collectives import ChooseCollectives
from tpcompile.passes.coalesce_collectives import CoalesceCollectives
from tpcompile.passes.divide_sequence import DivideSequence
from tpcompile.passes.expand_losses import ExpandLosses
from tpcompile.passes.flatten_strided import FlattenStrided
from tpcompile.passes.insert_gradient_copies import InsertGradientCopies
from tpcompile.passes.insert_reshards import InsertReshards
from tpcompile.passes.keep_whole import KeepWhole
from tpcompile.passes.lift_reductions import LiftReductions
from tpcompile.passes.merge_matmuls import MergeMatmuls
from tpcompile.passes.pipeline import run_passes
from tpcompile.passes.simplify_masks import SimplifyMasks
from tpcompile.passes.split_packed_matmul import SplitPackedMatmul, group_of, packed_values
from tpcompile.pipeline import after_planning, rewrite
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.plan_layout import layout_of

ANNOTATE, RESHARD, COPY, CHOOSE = (
    AnnotatePlacements(),
    InsertReshards(),
    InsertGradientCopies(),
    ChooseCollectives(),
)


@dataclass(frozen=True)
class Case:
    """One pass on one toy.

    Attributes:
        module: the toy.
        shapes: its inputs.
        one: the pass.
        added: by how much the number of calls grows.
        before: the passes that run before it.
        planned: plan the program before all of them.
        dynamic: leave the batch open.
        ranks: for how many ranks.
    """

    module: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    one: Pass
    added: int
    before: tuple[Pass, ...] = ()
    planned: bool = True
    dynamic: bool = False
    ranks: int = 2


def _attention(packed: bool) -> Callable[[], nn.Module]:
    return lambda: toys.Attention(packed)


def _grouped_norms() -> nn.Module:
    """Fewer key heads than ranks: the two statistics are sums on different sub-axes."""
    return toys.NormedHeads(heads=8, groups=2)


X12, X20, PAIR = ((3, 7, 12),), ((3, 7, 20),), ((3, 12), (3, 14))
CANONICAL, ANNOTATE, RESHARD, CHOOSE = (
    Canonicalise(),
    AnnotatePlacements(),
    InsertReshards(),
    ChooseCollectives(),
)
SPLIT, COPY, COALESCE = SplitPackedMatmul(frozenset({"qkv"})), InsertGradientCopies(), CoalesceCollectives()
EXPAND, X5 = ExpandLosses(frozenset({"classes of head.weight"})), ((5, 12),)
PLACED = (ANNOTATE, RESHARD)
KEEP = KeepWhole(frozenset({"up"}), frozenset({"down"}))

CASES = {
    "canonicalise_rearranged": Case(toys.Rearranged, X12, CANONICAL, -3, planned=False),
    "canonicalise_dynamic": Case(_attention(True), X20, CANONICAL, -1, planned=False, dynamic=True),
    "canonicalise_weight_norm": Case(toys.NormedConvolution, X12, CANONICAL, 3, planned=False),
    "flatten_strided_windows": Case(toys.Windows, X12, FlattenStrided(), 3, planned=False),
    "simplify_masks_masked": Case(
        toys.Masked, X12, SimplifyMasks(), -6, (CANONICAL,), planned=False, dynamic=True
    ),
    "split_packed_matmul_attention": Case(_attention(True), X20, SPLIT, -1, (CANONICAL,), planned=False),
    "expand_losses_classifier": Case(toys.Classifier, X5, EXPAND, 26, (CANONICAL,), planned=False),
    "keep_whole_mlp": Case(toys.Mlp, X12, KEEP, 2, (CANONICAL,), planned=False),
    "annotate_placements_mlp": Case(toys.Mlp, X12, ANNOTATE, 0),
    "annotate_placements_attention": Case(_attention(False), X20, ANNOTATE, 0),
    "insert_reshards_mlp": Case(toys.Mlp, X12, RESHARD, 2, (ANNOTATE,)),
    "insert_reshards_parallel": Case(toys.Parallel, X20, RESHARD, 2, (ANNOTATE,)),
    "insert_reshards_tower": Case(toys.Tower, PAIR, RESHARD, 2, (ANNOTATE,)),
    "insert_gradient_copies_mlp": Case(toys.Mlp, X12, COPY, 1, PLACED),
    "insert_gradient_copies_attention": Case(_attention(False), X20, COPY, 1, PLACED),
    "choose_collectives_mlp": Case(toys.Mlp, X12, CHOOSE, 0, PLACED),
    "choose_collectives_tower": Case(toys.Tower, PAIR, CHOOSE, 0, PLACED),
    "lift_reductions_parallel": Case(toys.Parallel, X20, LiftReductions(), -1, (*PLACED, CHOOSE)),
    "lift_reductions_flattened": Case(toys.Flattened, X12, LiftReductions(), 0, (*PLACED, CHOOSE)),
    "divide_sequence_blocks": Case(
        toys.Blocks, X12, DivideSequence(), 8, (*PLACED, COPY, CHOOSE, LiftReductions()), dynamic=True
    ),
    "coalesce_collectives_norms": Case(toys.NormedHeads, X20, COALESCE, 1, (*PLACED, CHOOSE)),
    "coalesce_collectives_grouped": Case(_grouped_norms, X20, COALESCE, 2, (*PLACED, COPY, CHOOSE), ranks=4),
    "merge_matmuls_attention": Case(_attention(True), X20, MergeMatmuls(), 1, (*PLACED, COPY, CHOOSE)),
}


def _model(case: Case) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return case.module().eval(), [torch.randn(shape) for shape in case.shapes]


def _before(case: Case, model: nn.Module, inputs: list[Tensor]) -> GlobalProgram:
    make = programs.planned if case.planned else programs.captured
    program = make(model, *inputs, dynamic=case.dynamic, ranks=case.ranks)
    run_passes(program, case.before)
    return program


def _results(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("name", CASES)
def test_pass(name: str, golden: Callable[[str, str], None]) -> None:
    """The text before and after, the calls added, and the graph's results at global shapes."""
    case = CASES[name]
    model, inputs = _model(case)
    program = _before(case, model, inputs)
    before, calls = stable_text(program), program.call_count()
    same = programs.run_whole(program, model, *inputs)
    run_passes(program, [case.one])
    golden(name, f"before:\n{before}\n\nafter {case.one.name}:\n{stable_text(program)}")
    assert program.call_count() - calls == case.added
    for got, old, wanted in zip(
        programs.run_whole(program, model, *inputs), same, _results(model, inputs), strict=True
    ):
        torch.testing.assert_close(got, old, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


TOYS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (toys.Mlp, X12),
    "attention": (_attention(False), X20),
    "packed": (_attention(True), X20),
    "classifier": (toys.Classifier, X5),
    "parallel": (toys.Parallel, X20),
    "norms": (toys.NormedHeads, X20),
    "rearranged": (toys.Rearranged, X12),
    "windows": (toys.Windows, X12),
    "tower": (toys.Tower, PAIR),
    "weight_norm": (toys.NormedConvolution, X12),
    "repeated": (toys.Repeated, X12),
    "weight_standard": (toys.StandardisedConvolution, X12),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", TOYS)
def test_all_passes_then_lowered(name: str, ranks: int) -> None:
    """The whole pipeline, lowered and run on simulated ranks, gives the module's results and gradients."""
    module, shapes = TOYS[name]
    torch.manual_seed(0)
    model, inputs = module().double().eval(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    program = programs.planned(model, *inputs, ranks=ranks)
    rewrite(program, training=True)
    wanted = _results(model, inputs)
    for results in programs.run_ranks(program, model, *inputs):
        for got, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, *inputs)


@pytest.mark.parametrize("ranks", [4, 8])
def test_statistics_on_different_sub_axes_travel_together(ranks: int) -> None:
    """One collective for both, one for the result; values and gradients are those of the module."""
    model, inputs = _grouped_norms().double(), [torch.randn(3, 7, 20, dtype=torch.float64)]
    program = programs.planned(model, *inputs, ranks=ranks)
    assert program.axis_sizes == (2, ranks // 2)
    rewrite(program, training=True)
    assert [n.target for n in program.graph.nodes if n.target in COMMUNICATING] == [
        all_reduce_coalesced,
        all_reduce,
    ]
    for results in programs.run_ranks(program, model, *inputs):
        torch.testing.assert_close(results, _results(model, inputs), rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, *inputs)


@pytest.mark.parametrize("left_out", ["insert-gradient-copies", "coalesce-collectives"])
def test_optional_passes_change_no_result(left_out: str) -> None:
    model, inputs = toys.NormedHeads().double(), [torch.randn(3, 7, 20, dtype=torch.float64)]
    program = programs.planned(model, *inputs)
    run_passes(program, [p for p in after_planning(training=True) if p.name != left_out])
    for results in programs.run_ranks(program, model, *inputs):
        torch.testing.assert_close(results, _results(model, inputs), rtol=1e-11, atol=1e-11)


def test_what_is_kept_whole_is_gathered() -> None:
    """Both matmuls are divided, each by itself: what they give is gathered, and all is right."""
    model, inputs = toys.Mlp().double(), [torch.randn(3, 7, 12, dtype=torch.float64)]
    base = programs.canonicalised(model, *inputs)
    run_passes(base, [KEEP])
    program = programs.planned_work(base)
    rewrite(program, training=True)
    assert program.text().count(" = all_gather(") == 2
    for results in programs.run_ranks(program, model, *inputs):
        torch.testing.assert_close(results, _results(model, inputs), rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, *inputs)


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        # By groups of channels, although the lengths of its taps are sums over all channels.
        (toys.NormedConvolution, "conv.parametrizations.weight.original1"),
        (toys.StandardisedConvolution, "weight"),
    ],
)
def test_a_weight_that_is_computed_is_divided(module: Callable[[], nn.Module], weight: str) -> None:
    model = module()
    program = programs.planned(model, torch.randn(12, 7, 12), ranks=4)
    layout = layout_of(program, programs.tensors_of(model))
    assert layout.local_shape(weight, 0)[0] == 3


def test_split_segments_lie_as_the_layout_says() -> None:
    """After the split, each segment is fed from the packed weight; nothing else of it is used."""
    model, inputs = toys.Attention(True).double(), [torch.randn(3, 7, 20, dtype=torch.float64)]
    program = programs.canonicalised(model, *inputs)
    run_passes(program, [SPLIT])
    held = {(s.spec.name, s.order): s.segment.shape for s in program.sources.values() if s.segment}
    assert held[("qkv.weight", 0)] == (30, 20)
    assert held[("qkv.weight", 2)] == (10, 20)
    assert ("qkv.weight", -1) not in held
    torch.testing.assert_close(programs.run_whole(program, model, *inputs), _results(model, inputs))


def test_a_second_run_changes_nothing() -> None:
    """Canonical form is reached in one go, and only what is named is split."""
    model, inputs = toys.Attention(True), [torch.randn(3, 7, 20)]
    program = programs.canonicalised(model, *inputs)
    before = program.text()
    assert not CANONICAL.apply(program)
    assert not SplitPackedMatmul().apply(program)
    assert program.text() == before
    assert [group_of(value) for value, _ in packed_values(program)] == ["qkv"]


def test_conversions_are_shared() -> None:
    """Query, key and value need one copy and one conversion of their input between them."""
    model = nn.Sequential(toys.Mlp(20, 28), toys.Attention(False))
    program = programs.planned(model, torch.randn(3, 7, 20))
    rewrite(program, training=True)
    text = program.text()
    assert text.count(" = all_reduce(") == 2
    assert text.count(" = copy_to_ranks(") == 2


def _reads(read: Callable[[Tensor], Tensor]) -> nn.Module:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return read(x + 1)

    return Reads()


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y[:, ::2].as_strided((6, 2), (4, 1), 1),  # in gaps
        lambda y: y[2:].as_strided((2, 4), (4, 1), 0),  # before
        lambda y: y[:2].as_strided((2, 4), (4, 1), 16),  # behind
        lambda y: torch.as_strided_scatter(y, y.new_zeros(4), (4,), (1,)),
    ],
)
def test_what_is_no_part_of_a_value_is_not_read_by_strides(read: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotCapture, match="strides"):
        programs.canonicalised(_reads(read), torch.randn(6, 4))


def test_strides_from_an_open_place_on() -> None:
    model = _reads(lambda y: y.as_strided((y.shape[0] // 2, 8), (8, 1), y.shape[0] // 2 * 8))
    program = programs.canonicalised(model, torch.randn(8, 8), dynamic=True)
    for rows in (8, 12):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(programs.run_whole(program, model, x), [model(x)])
