"""Write measured figures into the README and the documentation: python benchmarks/update_figures.py [DIR].

Replaces the README's block of fitted solvers by the stored results of benchmarks/acceptance.py and benchmarks/further.py. With
DIR, the output of `iia-ode compare`, also copies compare.png, samples.png and table.md into the documentation. `make figures`
runs the comparison first.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from further import CASES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FITTED = "<!-- fitted: made by `python benchmarks/update_figures.py` -->", "<!-- end of fitted -->"
NFES = (5, 6, 8, 10)
ROWS = {
    "digits 8x8": ("digits", 0),
    "digits 8x8, other noise": ("digits", 1),
    "patches 16x16": ("patches", 0),
    "mixture, 64-d": ("mixture64", 0),
    "mixture, 64-d, other noise": ("mixture64", 1),
}

Rows = dict[str, dict[str, Any]]


def ratio(rows: Rows, budget: str = "standard") -> float:
    """Error of a fit divided by the error of the best classic solver."""
    return float(rows[budget]["rmse"] / rows["classic"]["rmse"])


def stored(folder: str, pattern: str) -> list[Rows]:
    """The stored results of all files that match."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob(pattern))]


def columns(rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first row is its head; all columns but the first are right-aligned."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def fitted() -> str:
    """The table of `iia_ode.fit` against the best classic solvers, and a sentence on each of its limits."""
    rows = [["setting / NFE", *map(str, NFES)]]
    for title, (setting, seed) in ROWS.items():
        found = (stored("acceptance", f"{setting}-nfe{nfe:02}-seed{seed}.json") for nfe in NFES)
        rows.append([title, *(f"{ratio(one):.2f}" for (one,) in found)])
    other: dict[bool, list[float]] = {True: [], False: []}
    for name, case in CASES.items():
        other[case.seen] += [ratio(one) for one in stored("further", f"{name}-nfe*.json")]
    both = [one for name in CASES for one in stored("further", f"{name}-nfe*.json")]
    costs = [one["thorough"]["sample_evaluations"] / one["standard"]["sample_evaluations"] for one in both]
    gains = [one["thorough"]["rmse"] / one["standard"]["rmse"] for one in both]
    return f"""{columns(rows)}

NFE is the number of network evaluations. Each classic solver had its grid tuned. `python benchmarks/acceptance.py` makes the
table; `--seed 1` makes the rows with other noise, where fits and errors use other draws. Those rows influenced no default.
[The full results](docs/results/acceptance.md) have all errors and costs.

- Three small denoisers of other data took no part in choosing any default. On them the ratio is at most
  {max(other[False]):.2f} at 5 and 8 evaluations. On three others, which were in view when the sizes of the budgets were
  chosen, it is at most {max(other[True]):.2f} (`python benchmarks/further.py`; [results](docs/results/further.md)).
- On the mixture, one to three in a hundred samples end in another mode of the data and make up nearly all of the error. The
  152 draws that `"standard"` uses show few of them.
- `budget="thorough"` costs up to {max(costs):.0f} times as much as `"standard"`, the default, and leaves {min(gains):.2f} to
  {max(gains):.2f} of its error on these six."""


def replaced(text: str, marks: tuple[str, str], block: str) -> str:
    """The text with another block between two marks."""
    begin, end = marks
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{block}\n\n{end}{tail}"


def main(made: Path | None) -> None:
    readme = ROOT / "README.md"
    text = replaced(readme.read_text(), FITTED, fitted())
    if made is not None:
        for name, folder in (("compare.png", "images"), ("samples.png", "images"), ("table.md", "results")):
            target = ROOT / "docs" / folder
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made / name, target / name)
    readme.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
