"""What a transformers ``tp_plan`` does when taken literally, and what the best plan would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .compile_program import Compiler
from .errors import TpCompileError
from .ir.check import checked
from .ir.module_tensors import whole_tensors
from .ir.names import starred
from .ir.nodes import module_path, operands
from .ir.units import size_text, time_text
from .ir.unwrap import unwrapped_copy
from .passes.keep_whole import KeepWhole
from .passes.pipeline import run_passes
from .planner.compare_plans import Outcome, outcome_of
from .planner.options import Options
from .planner.pins import unmet
from .planner.plan import Plan
from .planner.search.cost import CostModel, preset
from .planner.search.must_divide import weight_root
from .planner.search.quantities import Quantities
from .rules.rule import Rule
from .runtime.check_model import check_model
from .runtime.read_request import Keywords, Ranks, example_call
from .strategies.hf_plan import hf_plan, model_of
from .strategies.match_rules import names_of
from .strategies.parallel_interface import STRATEGIES
from .strategies.read_rules import Rules, Wish, read_rules


@dataclass(frozen=True)
class PlanReport:
    """What was found; ``print`` shows it.

    Attributes:
        ranks: how many ranks share the model.
        unknown: rules with a style that nobody knows, by glob.
        unmatched: rules that name nothing in the model.
        unmet: rules that ask for what cannot be done, a line each.
        replicated: parameters (numbers as ``*``) that every rank keeps whole, with their bytes.
        replicated_share: the share of all bytes that they are.
        gathered: projections whose results are gathered at once.
        repeated: modules whose attention, or other arithmetic without weights, every rank repeats.
        literal: what the plan costs when it is taken literally.
        best: what ``plan="auto"`` costs.
    """

    ranks: int
    unknown: Mapping[str, str]
    unmatched: tuple[str, ...]
    unmet: tuple[str, ...]
    replicated: Mapping[str, int]
    replicated_share: float
    gathered: tuple[str, ...]
    repeated: tuple[str, ...]
    literal: Outcome
    best: Outcome

    @property
    def clean(self) -> bool:
        """Whether there is nothing to complain of (small parameters may be whole)."""
        found = (self.unknown, self.unmatched, self.unmet, self.gathered, self.repeated)
        return not any(found) and self.replicated_share < 0.02

    def __str__(self) -> str:
        lines = [f"the plan on {self.ranks} ranks"]
        lines += [f"  unknown style {style!r} for {glob}" for glob, style in self.unknown.items()]
        lines += [f"  names nothing: {glob}" for glob in self.unmatched]
        lines += [f"  {line}" for line in self.unmet]
        if self.replicated:
            total = sum(self.replicated.values())
            lines.append(
                f"  whole on every rank: {size_text(total)}, {self.replicated_share:.1%} of the model"
            )
            most = sorted(self.replicated.items(), key=lambda item: -item[1])
            large = [(name, size) for name, size in most if size * 100 >= total / self.replicated_share]
            lines += [f"    {name}: {size_text(size)}" for name, size in large]
            if len(large) < len(most):
                rest = sum(self.replicated.values()) - sum(size for _, size in large)
                lines.append(f"    {len(most) - len(large)} small ones: {size_text(rest)}")
        lines += [f"  gathers what {name} computes" for name in self.gathered]
        lines += [f"  every rank repeats the attention of {name}" for name in self.repeated]
        lines += [f"  as it says:  {self.literal}", f'  plan="auto": {self.best}', f"  {self._saving()}"]
        return "\n".join(lines)

    def _saving(self) -> str:
        mine, best = self.literal, self.best
        parts = []
        if best.collectives < mine.collectives:
            parts.append(f"{mine.collectives - best.collectives} collectives")
        if best.moved < mine.moved:
            parts.append(f"{size_text(mine.moved - best.moved)} sent")
        if best.held < mine.held * 0.99:
            parts.append(f"{size_text(mine.held - best.held)} of weights per rank")
        if best.seconds < mine.seconds * 0.99:
            parts.append(
                f"{time_text(mine.seconds - best.seconds)} modelled ({1 - best.seconds / mine.seconds:.0%})"
            )
        return f'plan="auto" saves {", ".join(parts)}' if parts else 'plan="auto" saves nothing'


@checked
def lint_plan(
    model_or_config: Any,
    tp_plan: Mapping[str, str] | str,
    ranks: Ranks,
    example_args: Sequence[Any] = (),
    example_kwargs: Keywords = None,
    *,
    cost_model: CostModel | str = "h100",
) -> PlanReport:
    """What is wrong with, and what is lost by, a ``tp_plan`` of transformers.

    The plan is taken literally here: what no rule covers is whole, what a style gathers or reduces is
    gathered or reduced at once. (``parallelize(plan=...)`` takes it as pins and does better.) Nothing
    is run: neither weights nor processes are needed.

    Args:
        model_or_config: a model (``meta`` will do), or the config of a causal language model.
        tp_plan: the rules; ``"hf"`` for the model's own.
        ranks: how many ranks share the model.
        example_args: a typical call, as for ``plan``; transformers models have a default.
        example_kwargs: keyword arguments of that call.
        cost_model: as for ``plan``.

    Raises:
        TpCompileError: the model cannot be captured, or has no plan of its own.
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else model_of(model_or_config)
    model = unwrapped_copy(model)
    check_model(model)
    if isinstance(tp_plan, str) and tp_plan != "hf":
        raise TpCompileError(
            f"unknown plan {tp_plan!r}", where="tp_plan", todo='give a dict of rules, or "hf"'
        )
    plan = dict(hf_plan(model) if isinstance(tp_plan, str) else tp_plan)
    names = names_of(model)
    unknown = {glob: style for glob, style in plan.items() if style not in STRATEGIES}
    known = {glob: style for glob, style in plan.items() if glob not in unknown}
    unmatched = [glob for glob in known if not names.targets(glob) and not names.modules_of(glob)]
    rules = _literal(model, read_rules(model, known, own=True))
    cost = cost_model if isinstance(cost_model, CostModel) else preset(cost_model)
    compiler = Compiler(Options(cost, rules), ranks)
    base = compiler.canonical(model, example_call(model, example_args, example_kwargs))
    tensors = whole_tensors(model)
    best = compiler.without_rules().plan_captured(base, tensors)
    refused = tuple(unmet(base, rules.wishes))
    run_passes(base, [KeepWhole(frozenset(rules.whole_results), frozenset(rules.whole_inputs))])
    literal = compiler.plan_captured(base, tensors, coalesce=False)
    replicated = _replicated(literal)
    return PlanReport(
        ranks,
        unknown,
        tuple(unmatched),
        refused,
        replicated,
        sum(replicated.values()) / max(literal.model_bytes, 1),
        _gathered(model, known),
        _repeated(literal),
        outcome_of(literal),
        outcome_of(best),
    )


def _literal(model: nn.Module, rules: Rules) -> Rules:
    """Rules with those added that transformers applies to everything else: it stays whole."""
    whole = Wish("", "nothing", "whole", optional=True)
    asked = {
        name: tuple(replace(w, want="whole") if w.want == "any" else w for w in wishes)
        for name, wishes in rules.wishes.items()
    }
    return replace(rules, wishes={n: asked.get(n, (whole,)) for n, _ in model.named_parameters()})


def _replicated(plan: Plan) -> dict[str, int]:
    """Bytes of parameters that are whole, by name with numbers as ``*``."""
    found: dict[str, int] = {}
    for name, param in plan.layout.params.items():
        if all(shard is None for segment in param.segments for shard in segment.shards):
            key = starred(name)
            found[key] = found.get(key, 0) + param.bytes
    return found


def _gathered(model: nn.Module, plan: Mapping[str, str]) -> tuple[str, ...]:
    """Projections of layers whose divided results a plan gathers; the head has to be."""
    names = names_of(model)
    found = []
    for glob, style in plan.items():
        strategy = STRATEGIES[style]
        if getattr(strategy, "whole_result", False) and getattr(strategy, "division", "") == "out":
            found += [starred(n) for n in names.modules_of(glob) if any(p.isdigit() for p in n.split("."))]
    return tuple(dict.fromkeys(found))


def _repeated(plan: Plan) -> tuple[str, ...]:
    """Modules with arithmetic between activations that is not divided."""
    program = plan.planned
    assert program is not None
    factors, params = program.planned_factors, set(program.params())
    quantities = Quantities(program.graph, factors)
    found = []
    for node in program.decisions[0].nodes:
        rule = factors.rules.get(node)
        if not isinstance(rule, Rule) or not rule.contraction or not quantities.operations(node):
            continue
        if any(weight_root(operand, params, rows=True) for operand in operands(node)):
            continue
        if all(d.nodes[node].factor is None for d in program.decisions):
            found.append(starred(module_path(node)))
    return tuple(dict.fromkeys(found))
