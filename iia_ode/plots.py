"""Plots of comparisons, images and fitted solvers. They need matplotlib: the extra ``plot``.

Plots of a single panel draw on the given axes, or on new ones; plots of a fit make a figure.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
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

# A fitted solver has the color of its base (Okabe and Ito's palette), so the two are easy to compare.
_STYLE: dict[str, dict[str, Any]] = {
    "ddim": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "iia-ddim": {"color": "#0072B2", "marker": "o"},
    "heun": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "iia-edm": {"color": "#D55E00", "marker": "s"},
    "biia-edm": {"color": "#E69F00", "marker": "^"},
    "iia": {"color": "#009E73", "marker": "D"},
}
_BASE, _FITTED, _QUIET = "#0072B2", "#D55E00", "#999999"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (3, 3)))


def _axes(ax: Axes | None, **size: Any) -> Axes:
    if ax is not None:
        return ax
    return _figure(**size).add_subplot()


def _figure(**size: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'iia-ode[plot]'.") from error
    # Without pyplot, a figure needs no display and leaves no global state behind.
    return Figure(layout="constrained", **size)


def error_against_nfe(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Plot the endpoint error of solvers against their number of evaluations, on logarithmic axes.

    Lines of fitted solvers are solid; all other lines are dashed or dotted. Two lines differ in color or marker, and for up to
    seven lines in both. The legend says which lines are solid where a plot has both kinds. Error bars are one standard error.

    Parameters
    ----------
    comparison : result of :func:`iia_ode.experiments.compare`, or ``Comparison(rows)`` of measurements of your own.
    ax : axes to draw on; by default those of a new figure.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    lines = {s: sorted((r for r in comparison.rows if r.solver == s), key=lambda r: r.nfe) for s in comparison.solvers}
    fitted = {solver: any(r.fitted for r in rows) for solver, rows in lines.items() if rows}
    beside = len(fitted) > 6  # so many entries would hide the lines
    ax = _axes(ax, figsize=(8.8 if beside else 6.4, max(4.4, 0.22 * len(fitted))))
    for solver, style in _line_styles(fitted).items():
        rows = lines[solver]
        x, y, e = [r.nfe for r in rows], [r.rmse for r in rows], [r.standard_error for r in rows]
        ax.errorbar(x, y, yerr=e, label=solver, markersize=5, capsize=2, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(comparison.nfes, [str(n) for n in comparison.nfes])
    ax.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
    if ax.get_ylim()[1] > 10 * ax.get_ylim()[0]:  # else minor ticks have the only labels
        ax.yaxis.set_tick_params(which="minor", left=False)
    ax.set_xlabel("model evaluations (NFE)")
    ax.set_ylabel("endpoint error (RMSE per component)")
    ax.grid(alpha=0.3)
    title = "solid: fitted" if len(set(fitted.values())) > 1 else None
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": "small"} if beside else {}
    ax.legend(title=title, title_fontsize="small", handlelength=3.5, **place)
    if (protocol := comparison.protocol) is not None:
        fits = f", fits on {protocol.fit_samples}" if protocol.fit_samples else ""
        ax.set_title(f"{protocol.setting}: {protocol.samples} unseen samples{fits}", fontsize="medium")
    return ax


def _line_styles(fitted: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Choose a style for each line, solid for the fitted ones; no two lines have the same color and marker."""
    styles = {
        name: _STYLE[name] for name, solid in fitted.items() if name in _STYLE and solid == _is_solid(_STYLE[name])
    }
    chosen: dict[str, dict[str, Any]] = {}
    for name, solid in fitted.items():
        taken = [*styles.values(), *(style for key, style in chosen.items() if key not in styles)]

        def least(key: str, values: Sequence[Any], taken: list[dict[str, Any]] = taken) -> list[Any]:
            return sorted(values, key=lambda v: sum(style.get(key) == v for style in taken))

        pairs = {(style["color"], style["marker"]) for style in taken}
        free = [(c, m) for c in least("color", _COLORS) for m in least("marker", _MARKERS) if (c, m) not in pairs]
        color, marker = free[0] if free else (_COLORS[len(taken) % 7], _MARKERS[len(taken) % 10])
        dash = "-" if solid else least("linestyle", _DASHES)[0]
        chosen[name] = styles.get(name, {"color": color, "marker": marker, "linestyle": dash})
    return chosen


def _is_solid(style: Mapping[str, Any]) -> bool:
    return bool(style.get("linestyle", "-") == "-")


def image_grid(images: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draw images row by row as one picture, with a border of one pixel between them.

    Parameters
    ----------
    images : gray or RGB images [B, C, H, W] in [-1, 1], C = 1 or 3. Values outside are clamped.
    ax : axes to draw on; by default those of a new figure.
    columns : images per row.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
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
    """Draw a grid of images for each of several solvers, to compare samples made from the same noise.

    Parameters
    ----------
    panels : images [B, C, H, W] in [-1, 1] by the title of their panel.
    count : number of images to show per panel, the first ones.
    columns : images per row of a panel.

    Returns
    -------
    A matplotlib figure.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
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


def save_figure(drawing: Figure | Axes, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, atomically.

    Parameters
    ----------
    drawing : figure, or axes of a figure.
    path : file to write; an existing file is replaced.

    Returns
    -------
    The path of the file.

    Raises
    ------
    InputError : the axes belong to no figure.
    OSError : the file cannot be written.
    """
    buffer = io.BytesIO()
    figure = drawing.get_figure(root=True)
    if figure is None:
        raise InputError("the axes belong to no figure: give axes made by Figure.add_subplot, or a figure.")
    # Without matplotlib's version in the file, equal pictures have equal bytes.
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())
