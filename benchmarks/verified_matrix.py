"""Proves and verifies every family of tiny models on simulated ranks: the second table of docs/support.md.

    python -m benchmarks.verified_matrix [family ...] [--ranks 2 3 4 8]

One process, float64, results and gradients, without and with sequence parallelism. These programs are right:
whatever is refused or found here is a false alarm, or a fault of ours. Rows of the same versions stay.
"""

from __future__ import annotations

import argparse
import time

import torch

import tpcompile
from benchmarks.support_matrix import PAGE, first_line, line, rows_text, versions
from tests.helpers import families

SIZES = (2, 16)
SECTION = "\n## Proved and verified\n"
COLUMNS = ("family", "ranks", "proved and verified", "with sequence parallelism")


def heading() -> str:
    """What stands above the table; rows below another one are of other versions."""
    return f"""{SECTION}
Every row was measured by `python -m benchmarks.verified_matrix` with {versions()}:
`tpcompile.verify` on simulated ranks in one process, float64, results and gradients. A program that cannot be
[proved](proof.md) is not run. The number is the largest difference of a result or a gradient from the model's
python, relative to the largest value.

{line(list(COLUMNS))}
{line(["---"] * len(COLUMNS))}
"""


def cell(name: str, ranks: int, sequence: bool) -> str:
    """What becomes of one family."""
    model, call = families.build(name, torch.float64), families.inputs(name, *SIZES, torch.float64)
    try:
        report = tpcompile.verify(model, ranks, example_kwargs=call, sequence_parallel=sequence)
    except Exception as error:  # a cell of the table, whatever it is
        return f"**failed**: {first_line(error)}"
    if not report.ok:
        return f"**no**: {report.kind}, {report.first_difference.node if report.first_difference else ''}"
    return f"yes, {max(f.error for f in report.findings):.1e}"


def measured(text: str) -> dict[tuple[str, int], str]:
    """The rows of a page, if its table has the present heading."""
    _, found, rows = text.partition(heading())
    lines = rows.splitlines() if found else []
    return {(c[1].strip(), int(c[2])): each for each in lines for c in [each.split("|")]}


def write(rows: dict[tuple[str, int], str]) -> None:
    """Writes the table behind what the page has above it."""
    above = PAGE.read_text().partition(SECTION)[0]
    PAGE.write_text(above + heading() + rows_text(rows))


def main() -> None:
    """Measures row by row, and keeps the page up to date all the while."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="family", help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    options = parser.parse_args()
    for name in options.names or families.FAMILIES:
        for ranks in options.ranks:
            rows = {k: row for k, row in measured(PAGE.read_text()).items() if k[0] in families.FAMILIES}
            if (name, ranks) in rows:
                continue
            start = time.perf_counter()
            rows[name, ranks] = line([name, str(ranks), *(cell(name, ranks, s) for s in (False, True))])
            print(f"{time.perf_counter() - start:5.0f} s  {rows[name, ranks]}", flush=True)
            write(rows)


if __name__ == "__main__":
    main()
