"""Write the table of recorded public runs and the solvers that repeat them: python benchmarks/golden_table.py.

Reads tests/data/golden.json.gz and writes tests/data/golden_table.md. tests/test_golden.py repeats the runs themselves.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from evidence import golden

from iia_ode import IIAError

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
HEAD = """# What repeats which public run

Written by `python benchmarks/golden_table.py` from `golden.json.gz`. `repeated by` is the solver with its options, the
schedule, and the first and last time of the grid. Solvers whose names are in CamelCase are not registered: they are the
variants of `benchmarks/evidence/upstream.py`, whose names say what public code does otherwise.

"""


def table(entries: Sequence[golden.Entry]) -> str:
    """Solver, options and grid that repeat each entry, and the reasons of entries that no solver repeats."""
    covered, rest = [], []
    for entry in entries:
        try:
            case = golden.case_for(entry)
            covered.append(f"| `{entry['name']}` | {case} | {case.nfe} | {entry['status']} |")
        except IIAError as error:
            rest.append(f"| `{entry['name']}` | {error} |")
    lines = [f"## Covered: {len(covered)}", "", "| entry | repeated by | evaluations | status |", "|---|---|---|---|"]
    lines += [*covered, "", f"## Not covered: {len(rest)}", ""]
    lines += ["| entry | reason |", "|---|---|", *rest] if rest else ["None."]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    with gzip.open(DATA / "golden.json.gz", "rt") as file:
        entries = json.load(file)["entries"]
    (DATA / "golden_table.md").write_text(table(entries))
