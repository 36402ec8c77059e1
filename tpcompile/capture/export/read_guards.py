"""Reads what an exported program demands of its input sizes."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from tpcompile.ir.sizes import simplify_size
from tpcompile.ir.torch_internals import FakeTensor, PythonPrinter, int_oo


def read_ranges(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the inclusive bounds of every symbol.

    Those of sizes begin at 2, as export assumes (see ``dynamic_dims``).
    """
    ranges = {}
    for symbol, bounds in program.range_constraints.items():
        if not symbol.is_Symbol:
            continue  # such as s3 + 1, which follows from s3
        high = None if bounds.upper >= int_oo else int(bounds.upper)
        low = 1 if bounds.lower <= 1 else int(bounds.lower)  # a number read from a tensor has no bounds
        ranges[str(symbol)] = (low, high)
    return ranges


def read_guards(program: ExportedProgram) -> tuple[str, ...]:
    """Return the conditions between or beyond simple bounds under which the program was traced."""
    env = _shape_env(program)
    if env is None:
        return ()
    known = set(program.range_constraints)
    found: dict[str, None] = {}
    for guard in env.guards:
        expression = simplify_size(env.simplify(guard.expr))
        if not expression.free_symbols or not expression.free_symbols <= known:
            continue
        # Without axioms: by default the guards themselves are among them, and each would follow from itself.
        if env._maybe_evaluate_static(expression, axioms=()) is not None or _is_bound(expression):
            continue
        found[to_python(expression)] = None
    return tuple(found)


def _is_bound(expression: Any) -> bool:
    """Tell whether a guard says no more than a range: one symbol against one number."""
    if not expression.is_Relational or expression.func.__name__ in ("Unequality", "Equality"):
        return False
    left, right = expression.lhs, expression.rhs
    return bool((left.is_Symbol and right.is_number) or (left.is_number and right.is_Symbol))


def to_python(expression: Any) -> str:
    """Print a sympy expression so that python can evaluate it with the symbols' values."""
    return str(PythonPrinter().doprint(expression))


def _shape_env(program: ExportedProgram) -> Any:
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode.shape_env
    return None
