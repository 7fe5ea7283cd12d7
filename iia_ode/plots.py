"""Plots of comparisons and images, which draw on given axes or their own, and figures of fits. The extra is ``plot``."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import InputError, MissingDependencyError
from .files import write_bytes
from .plan.vectors import weight_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .experiments import Comparison
    from .iia import FittedSolver, StepReport

__all__ = [
    "error_against_nfe",
    "image_grid",
    "plot_coefficients",
    "plot_ingredients",
    "plot_residuals",
    "sample_panels",
    "save_figure",
]

# A fitted solver has its base's colour (Okabe and Ito's palette), so that the eye compares the pairs that matter.
_STYLE: dict[str, dict[str, Any]] = {
    "ddim": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "iia-ddim": {"color": "#0072B2", "marker": "o"},
    "heun": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "iia-edm": {"color": "#D55E00", "marker": "s"},
    "biia-edm": {"color": "#E69F00", "marker": "^"},
    "iia": {"color": "#009E73", "marker": "D"},
}
_BASE, _FITTED, _QUIET = "#0072B2", "#D55E00", "#999999"


def _axes(ax: Axes | None, **size: Any) -> Axes:
    if ax is not None:
        return ax
    return _figure(**size).add_subplot()


def _figure(**size: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'iia-ode[plot]'.") from error
    # Not pyplot: a figure of its own needs no display and leaves no global state behind.
    return Figure(layout="constrained", **size)


def error_against_nfe(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """RMSE of the final state against evaluations, on log axes; bars are one standard error, fitted solvers are solid."""
    ax = _axes(ax, figsize=(6.4, 4.4))
    for solver in comparison.solvers:
        rows = sorted((r for r in comparison.rows if r.solver == solver), key=lambda r: r.nfe)
        if rows:
            x, y, e = [r.nfe for r in rows], [r.rmse for r in rows], [r.standard_error for r in rows]
            ax.errorbar(x, y, yerr=e, label=solver, markersize=5, capsize=2, **_STYLE.get(solver, {"marker": "x"}))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(comparison.nfes, [str(n) for n in comparison.nfes])
    ax.minorticks_off()
    ax.set_xlabel("model evaluations (NFE)")
    ax.set_ylabel("endpoint error (RMSE per component)")
    ax.grid(alpha=0.3)
    ax.legend()
    s = comparison.settings
    ax.set_title(f"{s['setting']}: {s['samples']} unseen samples, fits on {s['fit_samples']}", fontsize="medium")
    return ax


def image_grid(images: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Grey or RGB images [B, C, H, W] in [-1, 1] as one picture, row by row, with a one-pixel border between them."""
    ax = _axes(ax, figsize=(4, 4))
    rows = -(-len(images) // columns)
    b, c, h, w = *images.shape[:2], images.shape[2] + 1, images.shape[3] + 1
    tiles = images.new_zeros((rows * columns, c, h, w))
    tiles[:b, :, :-1, :-1] = images
    picture = tiles.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    values = ((picture[:-1, :-1].clamp(-1, 1) + 1) / 2).cpu().numpy()
    ax.imshow(values if c == 3 else values[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def sample_panels(panels: Mapping[str, Tensor], *, count: int = 32, columns: int = 8) -> Figure:
    """A grid of images per title, the first `count` of each, for samples that started from the same noise."""
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    rows = -(-min(count, max(len(v) for v in panels.values())) // columns)
    figure = _figure(figsize=(3.2 * across, (3.0 * rows / columns + 0.45) * down))
    for k, (title, images) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(down, across, k)
        image_grid(images[:count], ax, columns=columns)
        ax.set_title(title, fontsize="small")
    return figure


def plot_coefficients(fit: FittedSolver) -> Figure:
    """What is added to the base, step by step: a line per coefficient, 0 is the base; steps that keep it are grey.

    A fit without steps of its own, whose weights were refined together, has no base: lines are then the weights of each
    state on the data estimates before it, the latest first.
    """
    figure = _figure(figsize=(7.2, 4.2))
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
    """Distance of each step to its target, of the base and fitted, on the samples of the fit and on held-out ones.

    Raises
    ------
    InputError : the fit has no steps of its own, since its weights were refined together.
    """
    if not fit.reports:
        raise InputError(f"{fit.name} has no residuals of single steps: its weights were not fitted step by step.")
    figure = _figure(figsize=(6.4, 4.4))
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
    """What :func:`iia_ode.fit` tried, in its order: the error on held-out noise with each, the chosen one in colour.

    Raises
    ------
    InputError : the fit is not one that :func:`iia_ode.fit` made.
    """
    if (search := fit.record.search) is None:
        raise InputError(f"{fit.name} has no list of ingredients: it was not made by iia_ode.fit.")
    ingredients = search.ingredients
    figure = _figure(figsize=(6.4, 1.1 + 0.4 * len(ingredients)))
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
    ax.set_title(f"{fit.name}: judged by {fit.record.held_out + search.final_draws} draws of noise", fontsize="medium")
    return figure


def _corrections(fit: FittedSolver) -> dict[str, list[tuple[int, float]]]:
    """By symbol, step and correction."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for report in fit.reports:
        for symbol, value in zip(report.symbols, report.corrections, strict=True):
            lines.setdefault(symbol, []).append((_place(fit, report), value))
    return dict(sorted(lines.items()))


def _place(fit: FittedSolver, report: StepReport) -> int:
    """The step of the plan that a report is of: a plan may begin with steps that were not fitted."""
    return min(range(fit.plan.steps), key=lambda k: abs(fit.plan.grid[k] - report.t))


def _data_weights(fit: FittedSolver) -> dict[str, list[tuple[int, float]]]:
    """By how many estimates ago, the state and its weight on that estimate."""
    form = fit.plan.canonical()
    lines: dict[str, list[tuple[int, float]]] = {}
    for place, row in enumerate([*form.states, form.final]):
        for lag in range(place):
            weight = weight_mean(row.weights.get(place - lag, 0.0))
            lines.setdefault(f"D[i-{lag}]" if lag else "D[i]", []).append((place - 1, weight))
    return lines


def _weight_label(fit: FittedSolver) -> str:
    """What a weight of the plan is shown by."""
    form = fit.plan.canonical()
    numbers = all(isinstance(w, float | int) for row in (*form.states, form.final) for w in row.weights.values())
    return "weight" if numbers else "weight (mean over components)"


def _step_axis(ax: Axes, fit: FittedSolver, label: str) -> None:
    """Steps across, with the times that they start at."""
    steps = range(fit.plan.steps)
    every = -(-len(steps) // 10)
    ax.set_xticks(steps[::every], [f"{k}\n{fit.plan.grid[k]:.2g}" for k in steps[::every]])
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.set_xlabel("step, and the time that it starts at")
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    ax.set_title(f"{fit.name}: {fit.nfe} evaluations", fontsize="medium")


def save_figure(drawing: Figure | Axes, path: str | os.PathLike[str]) -> Path:
    """Write a figure, or the figure that axes are on, as PNG, atomically."""
    buffer = io.BytesIO()
    figure = drawing.get_figure(root=True)
    if figure is None:
        raise InputError("these axes are on no figure.")
    # Without matplotlib's version in the file, the same picture is the same bytes.
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())
