"""Measure the defects of docs/errata.md, and make its tables and its figure: python benchmarks/errata.py [--quick].

The formulas are in evidence/published.py, each beside its correction in evidence/defects.py. The tables go to
docs/results/errata.md and the figure to docs/images/errata.png. With --quick one problem per formula is measured, and
nothing is written.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from evidence.defects import (
    EDM,
    ERRORS,
    LOG_SNR,
    ORDERS,
    TABLEAUS,
    TORCHDYN_NODES,
    UNIFORM,
    VP,
    OrderRow,
    final_error,
    quick_order,
    tableau_order,
    uneven,
)
from evidence.published import ClassicRungeKutta, ClosedFormDEIS, RosenbrockAdams
from evidence.upstream import IPNDMvAsPublished

import iia_ode as iia
from iia_ode.experiments import get_setting
from iia_ode.metrics import rmse
from iia_ode.solvers import PNDM, DPMSolverMultistep, Solver, as_solver
from iia_ode.testing.cases import SCHEDULES, TRACKS, Track, draw, gaussian, rms
from iia_ode.testing.orders import local_slopes, measure_order

ROOT = Path(__file__).resolve().parent.parent
TABLES, FIGURE = ROOT / "docs/results/errata.md", ROOT / "docs/images/errata.png"
COUNTS = (20, 60, 150, 300, 600)


def least_order(solver: Solver, schedule: iia.Schedule, tracks: Sequence[Track] = TRACKS) -> float:
    """The least order that a solver shows on a schedule: over both problems and all grids, start-up steps aside."""
    return min(m.order for track in tracks for m in measure_order(solver, schedule, track))


def orders(row: OrderRow, tracks: Sequence[Track] = TRACKS) -> tuple[float, float]:
    """Least measured orders of the published and the correct formula."""
    published = min(least_order(row.published_on(k), s, [k]) for s in row.schedules for k in tracks)
    return published, min(least_order(as_solver(row.correct), s, tracks) for s in SCHEDULES)


# ---- what users see ----------------------------------------------------------------------------------------------------

EVALUATIONS = (6, 10, 15, 20, 30, 50, 100)
PAIRS: tuple[tuple[str, Solver, str], ...] = (
    ("DPM-Solver++(3M)", DPMSolverMultistep(max_order=3), "expab3"),
    ("DPM-Solver-3M", DPMSolverMultistep(form="noise", max_order=3), "deis_lab3"),
    ("iPNDM-v, order 3", IPNDMvAsPublished(max_order=3), "lms3"),
    ("iPNDM-v, order 4", IPNDMvAsPublished(max_order=4), "lms"),
    ("iPNDM, order 4", PNDM(), "lms"),
    ("REAB, order 2", RosenbrockAdams(2, published=True), "expab2"),
    ("REAB, order 3", RosenbrockAdams(3, published=True), "expab3"),
)


def few_evaluations(solver: Solver | str) -> list[float]:
    """RMSE on the mixture of `iia-ode compare` at each of EVALUATIONS, from noise to data on the grids of EDM."""
    ode, x, exact = _mixture_setting()
    plans = (iia.plan.trace(as_solver(solver), EDM, iia.grids.karras(n), consistent=False) for n in EVALUATIONS)
    return [rmse(plan.run(ode, x), exact) for plan in plans]


@cache
def _mixture_setting():
    ode, x = get_setting("mixture").draw(200, seed=1)
    return ode, x, iia.reference.solve(ode, x, 80.0, 0.0, sigma_min=0.002)


# ---- tables and figure -----------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """A table in Markdown; `sides` says l or r for each column."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * w if side == "l" else "-" * (w - 1) + ":" for side, w in zip(sides, widths, strict=True)]
    lines = [
        [v.ljust(w) if side == "l" else v.rjust(w) for v, w, side in zip(row, widths, sides, strict=True)]
        for row in (head, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def link(name: str, section: str) -> str:
    """To a section of docs/errata.md."""
    return f"[{name}](#{section})"


def order_table(tracks: Sequence[Track] = TRACKS) -> str:
    """Claimed and measured orders, and errors after 96 steps."""
    rows = []
    for row in ORDERS:
        pair = row.published_on(LOG_SNR), row.correct
        errors = [_error(final_error(s, EDM, LOG_SNR.grid(EDM, 96), exact_start=True)) for s in pair]
        here = row.here if " " in row.here else f"`{row.here}`"
        rows.append([link(row.name, row.section), row.claimed, *orders(row, tracks), here, *errors])
        if row.section == "ipndm-v":
            errors = [[final_error(s, EDM, uneven(n), exact_start=True) for n in (96, 192, 384)] for s in pair]
            slopes = [local_slopes((192, 384), e[1:])[0] for e in errors]
            name = link(f"{row.name}, steps 2 : 1", row.section)
            rows.append([name, row.claimed, *slopes, here, *(_error(e[0]) for e in errors)])
    cells = [[v if isinstance(v, str) else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    head = ["formula", "claimed", "published", "correct", "here", "error, published", "error, correct"]
    return table(head, cells, "lrrrlrr")


def node_table() -> str:
    """Orders of Runge-Kutta methods with the published nodes and with the correct ones."""
    rows = []
    for name, (rest, wrong, right) in TABLEAUS.items():
        found = tableau_order(*rest, wrong), tableau_order(*rest, wrong, autonomous=True), tableau_order(*rest, right)
        rows.append([name, "4", *(f"{v:.2f}" for v in found)])
    return table(["", "claimed", "published", "published, autonomous", "correct"], rows, "lrrrr")


def name_table() -> str:
    """How far torchdiffeq's fixed-grid rk4 is from methods of this library, after five steps."""
    problem, grid = gaussian(), UNIFORM.grid(VP, 5)
    ode, x = problem.ode(VP), draw(problem, 8, VP, float(grid[0]))
    theirs = iia.sample(ode, x, grid, "torchdiffeq:rk4")
    rows = [[f"`{k}`", _error(rms(iia.sample(ode, x, grid, k) - theirs) / rms(theirs))] for k in ("rk4_38", "rk4")]
    return table(["", "difference"], rows, "lr")


def error_table() -> str:
    """Errors after so many steps, as published and here, and the order between the last two."""
    rows = []
    for row in ERRORS:
        for name, error in ((link(row.name, row.section), row.published), (f"`{row.here}` here", row.correct)):
            errors = [error(n) for n in COUNTS]
            slope = local_slopes(COUNTS, errors)[-1]
            known = math.isfinite(slope) and errors[-2] < 1  # not the way back from overflow
            rows.append([name, *map(_error, errors), f"{slope:.1f}" if known else ""])
    return table(["", *map(str, COUNTS), "order"], rows, "l" + "r" * (len(COUNTS) + 1))


def few_table() -> str:
    """Errors of samples after few evaluations."""
    rows = []
    for name, published, here in PAIRS:
        for label, solver in ((name, published), (f"`{here}` here", here)):
            rows.append([label, *(f"{v:.3f}" for v in few_evaluations(solver))])
    return table(["", *map(str, EVALUATIONS)], rows, "l" + "r" * len(EVALUATIONS))


def _error(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "NaN"


CURVES = (
    ("DPM-Solver++(3M): half of a weight", 2, 3, DPMSolverMultistep(max_order=3), "expab3", EDM, LOG_SNR),
    ("iPNDM-v, order 4: three slips in weights", 2, 4, IPNDMvAsPublished(max_order=4), "lms", VP, UNIFORM),
    ("iPNDM, order 4: weights of a uniform grid", 2, 4, PNDM(), "lms", EDM, LOG_SNR),
    ("REAB, order 3: $\\sigma_t$ for $\\sigma_s$", 1, 3, RosenbrockAdams(3, True), RosenbrockAdams(3), EDM, LOG_SNR),
    ("rk4 of torchdyn: nodes one stage late", 1, 4, ClassicRungeKutta(TORCHDYN_NODES), "rk4", EDM, LOG_SNR),
    ("DEIS, order 3: closed forms in float32", None, 3, ClosedFormDEIS(), "deis_lab3", EDM, LOG_SNR),
)


def draw_figure():
    """Errors against steps, a panel per formula."""
    from matplotlib.figure import Figure

    counts = (24, 48, 96, 192, 384)
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for ax, (title, low, high, published, correct, schedule, track) in zip(axes.flat, CURVES, strict=True):
        for solver, order, label, color, line in (
            (published, low, "published", "#D55E00", "s--"),
            (correct, high, "correct", "#0072B2", "o-"),
        ):
            errors = [final_error(solver, schedule, track.grid(schedule, n), exact_start=True) for n in counts]
            ax.loglog(counts, errors, line, color=color, markersize=4, label=label)
            if order:
                place = {"xytext": (5, 5), "textcoords": "offset points"}
                ax.annotate(f"order {order}", (counts[2], errors[2]), **place, fontsize=8, color=color)
        ax.set_title(title, fontsize=9)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    for ax in axes[-1]:
        ax.set_xlabel("steps")
    return figure


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if "--quick" in arguments:
        for row in ORDERS:
            print(
                f"{row.name:<20} claimed {row.claimed}",
                *(f"{quick_order(s):8.2f}" for s in (row.published_on(LOG_SNR), row.correct)),
            )
        return
    makers = {"orders": order_table, "errors": error_table, "few": few_table, "nodes": node_table, "names": name_table}
    parts = {name: make() for name, make in makers.items()}
    text = "".join(f"<!-- {name} -->\n\n{body}\n\n" for name, body in parts.items())
    TABLES.write_text(f"<!-- made by benchmarks/errata.py -->\n\n{text}<!-- end -->\n")
    print(text)
    from iia_ode.plots import save_figure

    save_figure(draw_figure(), FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
