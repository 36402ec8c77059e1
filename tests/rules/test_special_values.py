"""Every rule of the table with values and sizes that operators treat in ways of their own, on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tests.helpers.check_rule import blame
from tests.helpers.rule_cases import CASES
from tests.helpers.special_cases import empty, special
from tpcompile.ir.placements import P, R
from tpcompile.rules.choices import Choice
from tpcompile.rules.rule import Rule
from tpcompile.runtime.verify.rule_program import RuleProgram
from tpcompile.runtime.verify.run_rule import compare

Asked = tuple[RuleProgram, Callable[[Choice], bool]]
"""A call, and which of its ways are to be tried."""
KERNEL = ("aten.einsum.default", "(S(4), S(3)) -> P(sum)")
"""torch's own fault: its kernel for bfloat16 has 5 columns of infinity make no number, and 10 infinity."""
COMPLEX = (torch.ops.aten.complex.default, torch.ops.aten.view_as_complex.default)
HALVES = (torch.float16, torch.bfloat16)


def _is_product(program: RuleProgram, choice: Choice) -> bool:
    """Whether ranks have summands of one operand, and the whole of another, with which they multiply them."""
    wants = list(zip(program.inputs, program.wants(choice) or (), strict=True))
    whole = any(want == R and x.is_floating_point() for x, want in wants)
    return whole and any(want == P for _, want in wants)


def _wrong(programs: Iterator[Asked], runs: int) -> None:
    """Runs the ways of calls that are asked for; there are at least so many, and all are right."""
    wrong = []
    for program, asked in programs:
        for choice in filter(asked, program.choices()[1:] if isinstance(program.rule, Rule) else ()):
            if (str(program.case.op), str(choice)) == KERNEL:
                continue
            runs -= 1
            try:
                compare(program, (2,), (choice,))
            except Exception as error:
                wrong.append(f"{blame(program, (2,), (choice,))}\n  {type(error).__name__}: {error}")
    assert not wrong, "".join(wrong)
    assert runs <= 0


def test_values() -> None:
    """Half precision, what is infinite or no number, ties, zeros of both signs, positions from the end.

    But for infinity in what summands are multiplied with: that is a limit, which docs/proof.md states.
    """

    def programs() -> Iterator[Asked]:
        for number, case in enumerate(CASES):
            # On some CPUs kernels of convolutions in half precision fill channels up with zeros, which times
            # infinity are no number.
            half = torch.float32 if "conv" in str(case.op) else HALVES[number % 2]
            # Torch has no sums of complex numbers in half precision on a CPU.
            program = special(case, half) if case.op not in COMPLEX else None
            if program is not None:
                yield program, lambda c, p=program: not _is_product(p, c)
                if any(_is_product(program, c) for c in program.choices()):
                    finite = special(case, half, infinite=False) or program
                    yield finite, lambda c, p=finite: _is_product(p, c)

    _wrong(programs(), 900)


def test_sizes_of_zero() -> None:
    found = (empty(case, number) for number, case in enumerate(CASES))
    _wrong(((program, lambda choice: True) for program in found if program is not None), 300)
