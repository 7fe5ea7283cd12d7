"""Measure every registered solver for the documentation: python benchmarks/solver_table.py [NAME ...] [--table].

Writes docs/results/solvers.json, the table docs/results/solvers.md, and a table docs/results/solvers_FAMILY.md for each
module of solvers. A row has the measured orders (with the start-up steps left out, and from a cold start), evaluations a step,
vectors held, the step to sigma = 0 and the stability limit. With names, only those solvers are measured again. Rows of solvers
that are no longer registered are dropped. All solvers take about ten minutes. With --table, the tables are written from the
stored rows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from iia_ode.grids import karras
from iia_ode.schedules import EDM
from iia_ode.solvers import get_solver, same_solver, solver_names
from iia_ode.testing import OrderMeasurement, measure_orders, stability_limit
from iia_ode.testing.cases import SCHEDULES
from iia_ode.testing.certificate import final_step

Row: TypeAlias = dict[str, Any]
"""Measurements of one solver: JSON-ready, with the keys of :func:`facts` and :func:`measured`."""

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "solvers.json"
"""The measurements that the documentation shows."""

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
"""Columns of the table: header, and the text of a cell from a row."""


def table(rows: Sequence[Row], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Markdown table of solvers, one row each; `columns` are names of ``COLUMNS``."""
    body = [[COLUMNS[column](row) for column in columns] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def family(name: str) -> str:
    """The module that defines the class of a registered solver."""
    return type(get_solver(name)).__module__.rpartition(".")[2]


def facts(name: str) -> Row:
    """Properties that need no integration: names, claimed order, evaluations a step, vectors held and last step.

    Evaluations are counted in the first, a middle and the last step of a grid of 12 steps to the data.
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
    """Measurements that take seconds: orders, from an exact start and from a cold one, and the stability limit.

    An order is None where errors are rounding from the coarsest grid on.
    """
    return {
        "orders": _orders(measure_orders(name)),
        "cold_orders": _orders(measure_orders(name, from_exact_start=False)),
        "stability": _rounded(stability_limit(name)),
    }


def load_rows() -> list[Row]:
    """The stored measurements; none before the first run."""
    rows: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def save_rows(rows: Iterable[Row]) -> None:
    """Write the rows of registered solvers as JSON, as one table, and as a table for each family."""
    known = {row["name"]: row for row in rows if row["name"] in solver_names()}
    ordered = sorted(known.values(), key=lambda row: (row["family"], row["name"]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    # One line a solver: a new solver changes one line.
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
    RESULTS.with_suffix(".md").write_text(table(ordered))
    columns = [column for column in COLUMNS if column != "family"]
    for name, own in groupby(ordered, key=lambda row: str(row["family"])):
        RESULTS.with_name(f"solvers_{name}.md").write_text(table(list(own), columns))


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


def main() -> None:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("names", nargs="*", metavar="NAME", help="solvers to measure (default: all)")
    found.add_argument("--table", action="store_true", help="only write the tables, from the stored rows")
    options = found.parse_args()
    rows = {row["name"]: row for row in load_rows()}
    if options.table:
        save_rows(rows.values())
        return
    chosen = [get_solver(name).label for name in options.names] or solver_names()
    for k, name in enumerate(chosen, start=1):
        began = time.perf_counter()
        rows[name] = facts(name) | measured(name)
        line = table([rows[name]]).splitlines()[-1]
        print(f"{k:>3}/{len(chosen)} {time.perf_counter() - began:5.1f} s {line}", flush=True)
        save_rows(rows.values())  # after each solver, so that an interrupted run keeps its rows


if __name__ == "__main__":
    main()
