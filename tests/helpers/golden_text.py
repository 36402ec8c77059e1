"""The printed form of a program with names that depend on nothing but the program."""

from __future__ import annotations

import re
from itertools import count

from tpcompile.planner.global_program import GlobalProgram


def stable_text(program: GlobalProgram) -> str:
    """The graph as printed, inputs under the model's names for them, values and symbols numbered."""
    numbers = count()
    labels: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            source = program.sources[node]
            part = f"[{source.order}]" if source.order >= 0 else ""
            labels[node.name] = source.spec.name + part
        else:
            labels[node.name] = f"%{next(numbers)}"
    symbols: dict[str, str] = {}

    def label(match: re.Match[str]) -> str:
        return labels.get(match[0], match[0])

    def symbol(match: re.Match[str]) -> str:
        return symbols.setdefault(match[0], f"s{len(symbols)}")

    # A node may be named as its operator is: that is followed by a parenthesis or stands behind a dot.
    text = re.sub(r"(?<![\w.%])[A-Za-z_]\w*(?![\w(.=])", label, program.text())
    return re.sub(r"\b[su]\d+\b", symbol, text)
