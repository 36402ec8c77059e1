"""What a strategy of ours is: a wish for the parameters that its rule names, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpcompile.ir.check import checked_fields

Division = Literal["out", "in", "rows", "columns", "experts", "whole", "any"]
"""Which dimension of a parameter is divided.

``out``: the one that its matmul keeps; ``in``: the one that it sums over; ``rows`` and ``columns``: the
first and the last dimension of an embedding's table; ``experts``: the dimension of a stack of experts;
``whole``: none; ``any``: the planner decides.
"""


@checked_fields
@dataclass(frozen=True)
class Strategy:
    """A way to hold the parameters of a module.

    It becomes pins for the planner. How activations travel follows from those, so that no strategy can
    make a result wrong: where a plan does not fit together, the compiler converts.

    Attributes:
        division: which dimension of the parameters is divided.
        whole_input: whoever takes the plan literally gives the module its input whole.
        whole_result: whoever takes the plan literally makes the module's result whole at once.
        sequence: the sequence is divided where the module's results are.
    """

    division: Division
    whole_input: bool = False
    whole_result: bool = False
    sequence: bool = False
