"""Plots of comparisons: error against evaluations, against seconds, and error of single steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .figures import axes_of, error_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..experiments import Comparison, Row, StepErrors

__all__ = ["error_against_nfe", "error_against_seconds", "error_of_steps"]

# A fitted solver has the color of its base (Okabe and Ito's palette), so the two are easy to compare.
_STYLE: dict[str, dict[str, Any]] = {
    "ddim": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "iia-ddim": {"color": "#0072B2", "marker": "o"},
    "heun": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "iia-edm": {"color": "#D55E00", "marker": "s"},
    "biia-edm": {"color": "#E69F00", "marker": "^"},
    "iia": {"color": "#009E73", "marker": "D"},
}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (3, 3)))


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
    ax = _work_precision(comparison, comparison.rows, lambda r: r.nfe, ax)
    ax.set_xticks(comparison.nfes, [str(n) for n in comparison.nfes])
    ax.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
    ax.set_xlabel("model evaluations (NFE)")
    return ax


def error_against_seconds(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Plot the endpoint error of solvers against the wall-clock time of a run, on logarithmic axes.

    Times are the seconds of the rows, for all samples together. The cost of fits is not included. Colors, markers and error
    bars are those of :func:`error_against_nfe`.

    Parameters
    ----------
    comparison : result of :func:`iia_ode.experiments.compare`, or ``Comparison(rows)`` of rows with seconds.
    ax : axes to draw on; by default those of a new figure.

    Returns
    -------
    The axes.

    Raises
    ------
    InputError : no row has seconds.
    MissingDependencyError : matplotlib is not installed.
    """
    rows = [r for r in comparison.rows if r.seconds > 0]
    if not rows:
        raise InputError("no row of the comparison has seconds: measure with compare, or give Row(..., seconds=...).")
    ax = _work_precision(comparison, rows, lambda r: r.seconds, ax)
    device = "" if comparison.protocol is None else f", {comparison.protocol.device}"
    ax.set_xlabel(f"sampling time (seconds{device})")
    return ax


def _work_precision(comparison: Comparison, rows: Sequence[Row], work: Callable[[Row], float], ax: Axes | None) -> Axes:
    """Draw a line of errors against work for each line of the comparison."""
    lines = {s: sorted((r for r in rows if r.solver == s), key=lambda r: r.nfe) for s in comparison.solvers}
    fitted = {solver: any(r.fitted for r in own) for solver, own in lines.items() if own}
    ax, beside = _axes_for(len(fitted), ax)
    for solver, style in _line_styles(fitted).items():
        own = lines[solver]
        x, y, e = [work(r) for r in own], [r.rmse for r in own], [r.standard_error for r in own]
        ax.errorbar(x, y, yerr=e, label=solver, markersize=5, capsize=2, **style)
    ax.set_xscale("log")
    ax.set_ylabel("endpoint error (RMSE per component)")
    _finish(ax, beside, "solid: fitted" if len(set(fitted.values())) > 1 else None)
    if (protocol := comparison.protocol) is not None:
        fits = f", fits on {protocol.fit_samples}" if protocol.fit_samples else ""
        ax.set_title(f"{protocol.setting}: {protocol.samples} unseen samples{fits}", fontsize="medium")
    return ax


def error_of_steps(errors: StepErrors, ax: Axes | None = None) -> Axes:
    """Plot the local error of each step against the noise level at the start of the step, from noise on the left to data.

    Every line of the study has a line for each number of evaluations. A start at an infinite level, where alpha is 0, is drawn
    at twice the largest finite level. Error bars are one standard error. A gray line marks the estimated error of the accurate
    trajectories; errors below a tenth of it are not shown.

    Parameters
    ----------
    errors : result of :func:`iia_ode.experiments.step_errors`.
    ax : axes to draw on; by default those of a new figure.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    several = len({r.nfe for r in errors.rows}) > 1
    lines: dict[str, list[Any]] = {}
    for row in errors.rows:
        lines.setdefault(f"{row.solver}, {row.nfe} evaluations" if several else row.solver, []).append(row)
    ax, beside = _axes_for(len(lines), ax)
    finite = [r.level for r in errors.rows if r.level < float("inf")]
    first = 2 * max(finite, default=1.0)
    for name, style in _line_styles({name: own[0].fitted for name, own in lines.items()}).items():
        own = lines[name]
        x, y, e = [min(r.level, first) for r in own], [r.rmse for r in own], [r.standard_error for r in own]
        ax.errorbar(x, y, yerr=e, label=name, markersize=5, capsize=2, **style)
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xlabel("noise level sigma/alpha at the start of the step")
    ax.set_ylabel("local error (RMSE per component)")
    if errors.teacher_error:
        ax.axhline(errors.teacher_error, color="#999999", linewidth=0.8)
        ax.set_ylim(bottom=errors.teacher_error / 10)
    _finish(ax, beside, "solid: fitted" if len({own[0].fitted for own in lines.values()}) > 1 else None)
    if not several:
        ax.set_title(f"steps of {errors.rows[0].nfe} evaluations", fontsize="medium")
    return ax


def _axes_for(lines: int, ax: Axes | None) -> tuple[Axes, bool]:
    """Axes of a size for a number of lines, and whether the legend goes beside them: many entries would hide the lines."""
    beside = lines > 6
    return axes_of(ax, figsize=(8.8 if beside else 6.4, max(4.4, 0.22 * lines))), beside


def _finish(ax: Axes, beside: bool, title: str | None) -> None:
    """Logarithmic errors, grid lines, and the legend."""
    error_axis(ax)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": "small"} if beside else {}
    ax.legend(title=title, title_fontsize="small", handlelength=3.5, **place)


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
