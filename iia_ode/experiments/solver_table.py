"""What is measured of every registered solver, as a table: benchmarks/solver_table.py makes it, the documentation shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError, unknown_name
from ..grids import karras
from ..schedules import EDM
from ..solvers import get_solver, same_solver, solver_names
from ..testing import OrderMeasurement, measure_orders, stability_limit
from ..testing.cases import SCHEDULES
from ..testing.certificate import final_step

__all__ = ["RESULTS", "Row", "SolverTable", "facts", "family", "load_rows", "measured", "save_rows", "solver_table"]

Row: TypeAlias = dict[str, Any]
"""Of one solver: JSON-ready, with the keys of :func:`facts` and :func:`measured`."""

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "solvers.json"
"""The committed measurements; a checkout has them, an installed package does not."""

LONG = 48  # steps, of the grid to the data that vectors are counted on

_DATA, _EULER = "the model's data estimate", "an Euler step"

COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "solver": lambda row: ", ".join(f"`{name}`" for name in (row["name"], *row["other_names"])),
    "family": lambda row: str(row["family"]).replace("_", " "),
    "order": lambda row: str(row["order"]),
    "measured": lambda row: _range(row["orders"]),
    "cold start": lambda row: _range(row["cold_orders"]),
    "NFE": lambda row: _evaluations(row["evaluations"]),
    "vectors": lambda row: str(row["peak_vectors"]),
    "last step": lambda row: _final_step(row["final_step"]),
    "stable to": lambda row: "no limit" if row["stability"] is None else f"{-row['stability']:.2f}",
}
"""Of the table: header to text of a cell."""


@dataclass(frozen=True)
class SolverTable:
    """Rows to show: ``str()`` is Markdown, which is what notebooks draw.

    Attributes
    ----------
    rows : one a solver.
    columns : which of ``COLUMNS``.
    """

    rows: Sequence[Row]
    columns: Sequence[str] = tuple(COLUMNS)

    def __str__(self) -> str:
        body = [[COLUMNS[column](row) for column in self.columns] for row in self.rows]
        lines = [list(self.columns), ["---"] * len(self.columns), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _repr_markdown_(self) -> str:
        return str(self)


def solver_table(family: str | None = None) -> SolverTable:
    """The measurements that the documentation shows.

    Parameters
    ----------
    family : module of the solvers, such as ``"multistep"``; all of them by default.

    Raises
    ------
    UnknownNameError : no such family; lists those that there are.
    InputError : the measurements are not there, as in a package without its repository.
    """
    rows = load_rows()
    if family is None:
        return SolverTable(rows)
    families = list(dict.fromkeys(row["family"] for row in rows))
    if family not in families:
        raise unknown_name("family", family, families)
    own = [row for row in rows if row["family"] == family]
    return SolverTable(own, [column for column in COLUMNS if column != "family"])


def family(name: str) -> str:
    """The module that a registered solver's class stands in."""
    return type(get_solver(name)).__module__.rpartition(".")[2]


def facts(name: str) -> Row:
    """What can be said of a solver in a moment: its names, order, evaluations a step, vectors held and last step.

    Evaluations are those of the first, a middle and the last step of a grid of 12 steps to the data.
    """
    solver, schedule = get_solver(name), EDM()
    counts = list(solver.plan(schedule, karras(12)).evaluations_per_step)
    return {
        "name": name,
        "other_names": [other for other in same_solver(name) if other != name],
        "family": family(name),
        "order": solver.order,
        "evaluations": [counts[0], counts[6], counts[-1]],
        "peak_vectors": solver.plan(schedule, karras(LONG)).peak_vectors,
        "final_step": {type(s).__name__: final_step(solver, s) for s in SCHEDULES},
    }


def measured(name: str) -> Row:
    """What takes seconds: measured orders, from an exact start and from a cold one, and the stability limit.

    An order is None where errors are rounding from the coarsest grid on.
    """
    return {
        "orders": _orders(measure_orders(name)),
        "cold_orders": _orders(measure_orders(name, from_exact_start=False)),
        "stability": _rounded(stability_limit(name)),
    }


def load_rows(path: Path = RESULTS) -> list[Row]:
    """The rows that :func:`save_rows` wrote.

    Raises
    ------
    InputError : there is no such file.
    """
    if not path.exists():
        raise InputError(
            f"no measurements at {str(path)!r}: run python benchmarks/solver_table.py in a clone of the repository."
        )
    rows: list[Row] = json.loads(path.read_text())
    return rows


def save_rows(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Write the rows of registered solvers, family by family, as JSON and, beside it, as a table."""
    known = {row["name"]: row for row in rows if row["name"] in solver_names()}
    ordered = sorted(known.values(), key=lambda row: (row["family"], row["name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line a solver: whoever adds one changes one line.
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
    path.with_suffix(".md").write_text(f"{SolverTable(ordered)}\n")


def _orders(measurements: Sequence[OrderMeasurement]) -> dict[str, float | None]:
    return {f"{m.schedule}, {m.problem}, {m.grid}": _rounded(m.order) for m in measurements}


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def _range(measurements: Mapping[str, float | None]) -> str:
    orders = [order for order in measurements.values() if order is not None]
    return f"{min(orders):.2f}\u2013{max(orders):.2f}" if orders else "exact"


def _evaluations(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def _final_step(by_schedule: Mapping[str, str]) -> str:
    kinds = set(by_schedule.values())
    if kinds == {_DATA}:
        return "data"
    # Where alpha and sigma are linear in t, an Euler step lands on the data estimate: it is called that there.
    return "Euler" if kinds <= {_DATA, _EULER} else "own"
