"""A plan: what was decided, in a form that can be read, explained, saved and used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from tpcompile.capture.checkpointing import Asked
from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import Must, checked, short
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.units import size_text, time_text
from tpcompile.planner.search.cost import CostModel

from .collective import Collective
from .diff_plans import diff_text, plan_title
from .dry_run.estimate import Estimate, Mode
from .explain import explain_module
from .plan_data import PlanData
from .print_plan import collective_lines, idle_lines, layout_lines
from .report.notebook import plan_html
from .report.page import report_page
from .write_file import check_place, write_whole

VERSION = 2

Count = Annotated[int, Must("a whole number from 1 on", lambda count: count > 0)]


@dataclass
class Plan(PlanData):
    """The placements of a model on a mesh axis, and of one program on it.

    Attributes:
        layout: where every parameter and buffer is.
        decisions: per sub-axis, the choices made for the program's calls.
        fingerprint: of the captured graph that the decisions are about.
        collectives: what one forward communicates.
        fallbacks: a line per operator that is computed whole although it uses divided parameters.
        notes: what else the user should know.
        cost: the cost model.
        seconds: the modelled time of one forward of the example.
        sequence: whether the sequence was to be divided between the blocks, or at which modules.
        recomputed: what is computed again in backward, a line for layers that are alike.
        proof: that the rewritten program's placements follow from the rules; None for a plan from disk, which
            is proved again when it is followed.
        timings: seconds that the stages took where the plan was made.
        planned: the planned program, and
        pins: what its parameters were held to, for explanations; None for a plan from disk, as is
        rewritten: the program with its collectives.
        estimator: what ``estimate`` asks; None unless the plan comes from ``tpcompile.plan``.
    """

    @checked
    def explain(self, name: str) -> str:
        """Why a module's parameters are placed as they are: alternatives with their cost, and refusals.

        Args:
            name: a module or a parameter, by its qualified name.

        Raises:
            TpCompileError: there is no such module, or the plan was loaded from disk.
        """
        if self.planned is None or self.pins is None:
            raise TpCompileError(
                "a plan from disk has no alternatives to compare",
                where=name,
                todo="make the plan again with tpcompile.plan",
            )
        return explain_module(self.planned, self.cost, self.pins, name)

    @checked
    def diff(self, other: Plan) -> str:
        """What differs: ``-`` for this plan, ``+`` for the other."""
        return diff_text(self, other)

    @checked
    def report(
        self,
        path: str | PathLike[str],
        title: str = "",
        *,
        explain: bool = True,
        beside: Plan | None = None,
    ) -> None:
        """Writes a page of HTML that shows the plan; it needs nothing beside itself.

        Args:
            path: the file.
            title: what the page is called, such as the model's name.
            explain: with the alternatives of every weight, each of which is planned for it; a plan from disk
                has none.
            beside: another plan, to be shown with what differs.

        Raises:
            TpCompileError: it cannot be written.
        """
        what, where = "the report cannot be written", f"path: {path}"
        writing = partial(refusing, what, where=where, todo="give a file")
        with writing():  # before it is made, which takes a while
            check_place(Path(path))
        page = report_page(self, title, explain=explain, beside=beside)
        with writing():
            write_whole(Path(path), page)

    @checked
    def estimate(
        self,
        mode: Mode = "prefill",
        *,
        batch: Count | None = None,
        seq: Count | None = None,
        device: str | CostModel | None = None,
        optimizer: str | Callable[..., Any] = "adamw",
        checkpointing: bool | Asked | None = None,
        sequence_parallel: bool | None = None,
    ) -> Estimate:
        """What one step takes on every rank: bytes of memory by kind, seconds by kind, what is sent.

        The rank's programs for the step are compiled and run without values, in this process
        (``docs/dry_run.md``). The estimate says what each of its numbers rests on.

        Args:
            mode: ``"prefill"``: one forward, of a prompt; ``"decode"``: one more token for each text;
                ``"train"``: forward, backward and the optimizer's update.
            batch: texts in the step. Without ``batch`` and ``seq``: the call that the plan was made for.
            seq: tokens of each text; for ``"decode"``, those in the cache.
            device: ``"h100"``, ``"h200"``, ``"b200"``, ``"a100"``, ``"cpu"``, for nodes of 8
                ``"h100x8"``, or a ``CostModel`` such as ``tpcompile.calibrate`` measures; by default that of
                the plan.
            optimizer: for ``"train"``: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"momentum"``, ``"rmsprop"``,
                ``"adagrad"``, or a function that makes one of torch's optimizers for a list of parameters.
            checkpointing: for ``"train"``: what is computed again in backward, as ``parallelize`` takes it;
                True: all layers, False: what forward itself says; by default as in the plan.
            sequence_parallel: whether the sequence is divided between the blocks; by default as in the plan.

        Raises:
            TpCompileError: the plan was not made by ``tpcompile.plan``, or the step cannot be run like this.
        """
        if self.estimator is None:
            raise TpCompileError(
                "the plan has no model to estimate",
                where="Plan.estimate",
                todo="make it with tpcompile.plan, and estimate that one",
            )
        sequence = self.sequence if sequence_parallel is None else sequence_parallel
        return self.estimator(self, mode, batch, seq, device or self.cost, optimizer, checkpointing, sequence)

    @checked
    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan as JSON; the file appears whole or not at all.

        Raises:
            TpCompileError: it cannot be written.
        """
        with refusing("the plan cannot be written", where=f"path: {path}", todo="give a file"):
            write_whole(Path(path), json.dumps(self.to_json(), indent=1))

    @staticmethod
    @checked
    def load(path: str | PathLike[str]) -> Plan:
        """Reads a saved plan.

        Raises:
            TpCompileError: the file is not a plan, of another version, or was changed.
        """
        with refusing("not a plan", where=repr(path), todo="save one with plan.save"):
            return _read(json.loads(Path(path).read_text()), str(path))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with a digest of it."""
        data = {
            "version": VERSION,
            "layout": self.layout.to_json(),
            "decisions": self.decisions,
            "graph": self.fingerprint,
            "collectives": [asdict(c) for c in self.collectives],
            "fallbacks": list(self.fallbacks),
            "notes": list(self.notes),
            "cost": asdict(self.cost),
            "seconds": self.seconds,
            "sequence": self.sequence if isinstance(self.sequence, bool) else sorted(self.sequence),
            "recomputed": list(self.recomputed),
        }
        return data | {"digest": digest_of(data)}

    @staticmethod
    @checked
    def from_json(data: Mapping[str, Any]) -> Plan:
        """What ``to_json`` gave.

        Raises:
            TpCompileError: it is something else, of another version, or was changed: nobody could see from
                a plan alone that it is right.
        """
        with refusing("not a plan", where="Plan.from_json", todo="give what to_json gave"):
            return _read(data, "Plan.from_json")

    def __repr__(self) -> str:
        sent = sum(c.count for c in self.collectives)
        return (
            f"<Plan for {plan_title(self)}: {size_text(self.model_bytes)} of weights, {sent} collectives and "
            f"{time_text(self.seconds)} a forward>"
        )

    def _repr_html_(self) -> str:
        return plan_html(self)

    def __str__(self) -> str:
        lines = [
            *layout_lines(self.layout, self.model_bytes),
            "",
            *collective_lines(self.collectives),
            "",
            f"modelled time of the example: {time_text(self.seconds)} ({self.cost.name})",
        ]
        lines += [self.proof.head] if self.proof is not None else []
        lines += [f"recomputed in backward: {line}" for line in self.recomputed]
        lines += [f"fallback: {line}" for line in self.fallbacks]
        lines += [f"note: {line}" for line in (*self.notes, *idle_lines(self.layout))]
        return "\n".join(lines)


def _read(data: Any, where: str) -> Plan:
    if data["version"] != VERSION:
        what = f"plan of version {short(data['version'])}, this is version {VERSION}"
        raise TpCompileError(what, where=where, todo="plan again")
    if data["digest"] != digest_of(data):
        raise TpCompileError(
            "the plan was changed since it was made",
            where=where,
            todo="plan again, with a dict of rules for what you want otherwise",
        )
    sequence = data["sequence"]
    return Plan(
        WeightLayout.from_json(data["layout"]),
        list(data["decisions"]),
        data["graph"],
        tuple(Collective(**c) for c in data["collectives"]),
        tuple(data["fallbacks"]),
        tuple(data["notes"]),
        CostModel(**data["cost"]),
        data["seconds"],
        sequence if isinstance(sequence, bool) else frozenset(sequence),
        tuple(data.get("recomputed", ())),
    )


def digest_of(data: Mapping[str, Any]) -> str:
    """The SHA-256 of plain data, but for the digest in it."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sequence_text(sequence: bool | frozenset[str]) -> str:
    """Where the sequence is to be divided, for comparison."""
    return str(sequence) if isinstance(sequence, bool) else ", ".join(sorted(sequence))
