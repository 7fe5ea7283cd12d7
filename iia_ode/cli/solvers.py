"""``iia-ode solvers``: list the solvers by name."""

from __future__ import annotations

import click

from .. import grids
from ..experiments import get_setting
from ..experiments.lines import RECIPE
from ..iia import PRESETS
from ..solvers import Solver, get_solver, same_solver, solver_names

__all__ = ["solvers_command"]

_RECIPE = "found by iia_ode.fit and iia-ode fit for a number of evaluations: grid and weights"


@click.command("solvers")
def solvers_command() -> None:
    """List the solvers: registered ones, presets of IIA, and torchdiffeq's methods."""
    click.echo(f"{'name':<20} {'order':>5}  {'evaluations':<14} description")
    schedule = get_setting("gaussian").schedule
    for name in solver_names():
        solver = get_solver(name)
        spent = solver.plan(schedule, grids.uniform(12, 2.0, 1.0)).nfe
        # Some solvers have a costlier first step, or a free one.
        count = f"{spent // 12} per step" if spent % 12 == 0 else f"{spent} in 12 steps"
        click.echo(f"{name:<20} {solver.order:>5}  {count:<14} {_description(solver)}")
    click.echo("\nIIA, to be fitted to a model before use:")
    for name, method in PRESETS.items():
        click.echo(f"{name:<12} over {method.base_solver.name}, history {method.history}, {method.substeps} sub-steps")
    click.echo(f"{RECIPE:<12} {_RECIPE}")
    click.echo(f"\ntorchdiffeq, in odeint and sample of the Python API: {', '.join(solver_names(torchdiffeq=True))}")


def _description(solver: Solver) -> str:
    """Describe a solver: the first line of its docstring, or the options of a variant; then its other names."""
    base = get_solver(solver.name).options()
    changed = [f"{k}={v}" for k, v in solver.options().items() if v != base[k]]
    line = f"{solver.name} with {', '.join(changed)}" if changed else (solver.__doc__ or "").strip().splitlines()[0]
    others = same_solver(solver.label)[1:]
    return f"{line} (also {', '.join(others)})" if others else line
