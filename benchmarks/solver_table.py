"""Measure every registered solver for the documentation: python benchmarks/solver_table.py [NAME ...].

Writes docs/results/solvers.json and docs/results/solvers.md: orders (with the start-up steps left out, and from a cold
start), evaluations a step, vectors held, the step to sigma = 0 and the stability limit. With names, only those are measured
again; rows of solvers that are no longer registered go. Some ten minutes for all of them.
"""

import sys
import time

from iia_ode import get_solver, solver_names
from iia_ode.experiments.solver_table import RESULTS, SolverTable, facts, load_rows, measured, save_rows


def main(names: list[str]) -> None:
    rows = {row["name"]: row for row in load_rows()} if RESULTS.exists() else {}
    chosen = [get_solver(name).label for name in names] or solver_names()
    for k, name in enumerate(chosen, start=1):
        began = time.perf_counter()
        rows[name] = facts(name) | measured(name)
        line = str(SolverTable([rows[name]])).splitlines()[-1]
        print(f"{k:>3}/{len(chosen)} {time.perf_counter() - began:5.1f} s {line}", flush=True)
        save_rows(rows.values())  # after each, so that an interrupted run keeps what it has


if __name__ == "__main__":
    main(sys.argv[1:])
