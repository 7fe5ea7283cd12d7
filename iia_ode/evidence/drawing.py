"""Panels and lines of the experiments' figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..plots.figures import error_axis, figure_of
from .measurements import Measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "lines_with_bands", "panels"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def panels(rows: int, columns: int, width: float = 3.6, height: float = 3.0) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels, as rows of axes."""
    figure = figure_of(figsize=(width * columns, height * rows))
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def lines_with_bands(
    ax: Axes,
    lines: Mapping[str, Measurements],
    x: str,
    value: str,
    *,
    solid: Sequence[str] | None = None,
    logarithmic: str = "xy",
) -> None:
    """Draw a line of means over seeds for each name, with error bars of one standard error.

    Parameters
    ----------
    ax : the axes.
    lines : measurements by name of the line.
    x, value : columns.
    solid : names of the solid lines, others are dashed; by default all are solid.
    logarithmic : the logarithmic axes: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
    """
    for k, (name, found) in enumerate(lines.items()):
        places = sorted(found.distinct(x))
        points = [found.estimate(value, **{x: place}) for place in places]
        ax.errorbar(
            places,
            [p.mean for p in points],
            yerr=[p.error for p in points],
            label=name,
            color=COLORS[k % len(COLORS)],
            marker=MARKERS[k % len(MARKERS)],
            linestyle="-" if solid is None or name in solid else "--",
            markersize=4,
            capsize=2,
            linewidth=1.3,
        )
    if "x" in logarithmic:
        ax.set_xscale("log")
        places = sorted({place for found in lines.values() for place in found.distinct(x)})
        if len(places) < 9:
            ax.set_xticks(places, [f"{place:g}" for place in places])
        ax.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
    if "y" in logarithmic:
        error_axis(ax)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", handlelength=3)
