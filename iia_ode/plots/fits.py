"""Plots of fitted solvers: coefficients, residuals, and the ingredients of a search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..plan.vectors import weight_mean
from .figures import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..iia import FittedSolver, StepReport

__all__ = ["plot_coefficients", "plot_ingredients", "plot_residuals"]

_BASE, _FITTED, _QUIET = "#0072B2", "#D55E00", "#999999"


def plot_coefficients(fit: FittedSolver) -> Figure:
    """Plot the corrections of a fitted solver step by step, a line per coefficient.

    A correction of 0 is the base. Steps where the guard keeps the base are shaded gray.

    A refined fit has no corrections, because its weights were fitted all together. The lines are then the weights of each
    state on the data estimates before it, the latest estimate first.

    Parameters
    ----------
    fit : fitted solver.

    Returns
    -------
    A matplotlib figure.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    figure = figure_of(figsize=(7.2, 4.2))
    ax = figure.add_subplot()
    lines = _corrections(fit) if fit.reports else _data_weights(fit)
    for k, (label, points) in enumerate(lines.items()):
        marker = "os^Dvx+*"[k % 8]
        ax.plot([p[0] for p in points], [p[1] for p in points], marker=marker, markersize=5, linewidth=1, label=label)
    for report in fit.reports:
        if not report.accepted:
            place = _place(fit, report)
            ax.axvspan(place - 0.4, place + 0.4, color=_QUIET, alpha=0.25, linewidth=0)
    sizes = sorted(abs(p[1]) for points in lines.values() for p in points if p[1])
    if sizes and sizes[-1] > 30 * sizes[len(sizes) // 2]:
        ax.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(sizes[len(sizes) // 2])))
    ax.axhline(0, color="black", linewidth=0.8)
    _step_axis(ax, fit, "correction of the base" if fit.reports else _weight_label(fit))
    if lines:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def plot_residuals(fit: FittedSolver) -> Figure:
    """Plot the distance of each step to its target, for the base and for the fit.

    Solid lines are measured on the samples of the fit, dashed lines on held-out samples.

    Parameters
    ----------
    fit : fitted solver.

    Returns
    -------
    A matplotlib figure.

    Raises
    ------
    InputError : the weights were refined all together, so no step has a target.
    MissingDependencyError : matplotlib is not installed.
    """
    if not fit.reports:
        raise InputError(f"{fit.name} has no residuals of single steps: its weights were not fitted step by step.")
    figure = figure_of(figsize=(6.4, 4.4))
    ax = figure.add_subplot()
    rows: dict[str, tuple[list[float | None], dict[str, Any]]] = {
        "base": ([r.before for r in fit.reports], {"color": _BASE, "marker": "o"}),
        "fitted": ([r.after for r in fit.reports], {"color": _FITTED, "marker": "o"}),
        "base, held out": ([r.held_before for r in fit.reports], {"color": _BASE, "marker": "s", "linestyle": "--"}),
        "fitted, held out": ([r.held_after for r in fit.reports], {"color": _FITTED, "marker": "s", "linestyle": "--"}),
    }
    for label, (values, style) in rows.items():
        points = [(_place(fit, r), v) for r, v in zip(fit.reports, values, strict=True) if v is not None]
        if points:
            ax.plot([p[0] for p in points], [p[1] for p in points], markersize=5, label=label, **style)
    ax.set_yscale("log")
    _step_axis(ax, fit, "residual (RMS per component)")
    ax.legend()
    return figure


def plot_ingredients(fit: FittedSolver) -> Figure:
    """Plot the error on held-out noise of every solver tried by :func:`iia_ode.fit`, in order, the chosen one in color.

    Parameters
    ----------
    fit : fitted solver made by :func:`iia_ode.fit`.

    Returns
    -------
    A matplotlib figure.

    Raises
    ------
    InputError : the fit was not made by :func:`iia_ode.fit`.
    MissingDependencyError : matplotlib is not installed.
    """
    if (search := fit.record.search) is None:
        raise InputError(f"{fit.name} has no list of ingredients: it was not made by iia_ode.fit.")
    ingredients = search.ingredients
    figure = figure_of(figsize=(6.4, 1.1 + 0.4 * len(ingredients)))
    ax = figure.add_subplot()
    errors = [i.error for i in ingredients if i.error] or [1.0]
    for place, entry in enumerate(ingredients):
        error = entry.error
        if error:
            ax.barh(place, error, color=_FITTED if entry.chosen else _QUIET, height=0.7)
        text = "not possible" if error is None else f" {error:.3g}"
        ax.text(error or min(errors) / 2, place, text, va="center", fontsize="small")
    ax.set_yticks(range(len(ingredients)), [i.name for i in ingredients])
    ax.invert_yaxis()
    ax.set_xscale("log")
    low, high = min(errors) / 2, 1.1 * max(errors) * (max(errors) / min(errors)) ** 0.15  # room for the number
    ticks = [m * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for m in (1, 2, 5)]
    ticks = [v for v in ticks if low < v < high]
    ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.set_xlabel("endpoint error on held-out noise (RMSE per component)")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.set_title(f"{fit.name}: judged by {fit.record.held_out + search.final_draws} noise samples", fontsize="medium")
    return figure


def _corrections(fit: FittedSolver) -> dict[str, list[tuple[int, float]]]:
    """Collect the step and the value of every correction, by symbol."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for report in fit.reports:
        for symbol, value in zip(report.symbols, report.corrections, strict=True):
            lines.setdefault(symbol, []).append((_place(fit, report), value))
    return dict(sorted(lines.items()))


def _place(fit: FittedSolver, report: StepReport) -> int:
    """Find the step of a report in the plan. A plan may begin with steps that were not fitted."""
    return min(range(fit.plan.steps), key=lambda k: abs(fit.plan.grid[k] - report.t))


def _data_weights(fit: FittedSolver) -> dict[str, list[tuple[int, float]]]:
    """Collect the weight of every state on the data estimates before it, by the lag of the estimate."""
    form = fit.plan.canonical()
    lines: dict[str, list[tuple[int, float]]] = {}
    for place, row in enumerate([*form.states, form.final]):
        for lag in range(place):
            weight = weight_mean(row.weights.get(place - lag, 0.0))
            lines.setdefault(f"D[i-{lag}]" if lag else "D[i]", []).append((place - 1, weight))
    return lines


def _weight_label(fit: FittedSolver) -> str:
    """Label the axis of weights: a tensor weight is shown by its mean."""
    form = fit.plan.canonical()
    numbers = all(isinstance(w, float | int) for row in (*form.states, form.final) for w in row.weights.values())
    return "weight" if numbers else "weight (mean over components)"


def _step_axis(ax: Axes, fit: FittedSolver, label: str) -> None:
    """Mark the steps and their start times on the horizontal axis."""
    steps = range(fit.plan.steps)
    every = -(-len(steps) // 10)
    ax.set_xticks(steps[::every], [f"{k}\n{fit.plan.grid[k]:.2g}" for k in steps[::every]])
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.set_xlabel("step, and its start time")
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    ax.set_title(f"{fit.name}: {fit.nfe} evaluations", fontsize="medium")
