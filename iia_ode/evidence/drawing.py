"""Panels and lines of the experiments' figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..plots.figures import error_axis, figure_of
from .measurements import Estimate, Measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "lines_with_bands", "panels", "ratio_map"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def panels(
    rows: int, columns: int, width: float = 3.6, height: float = 3.0, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels, as rows of axes; `height` is the mean height of a row, and `ratios` has the relative heights."""
    figure = figure_of(figsize=(width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios)
    return figure, [list(row) for row in axes]


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


def ratio_map(ax: Axes, lines: Sequence[str], columns: Sequence[object], ratios: Sequence[Sequence[Estimate]]) -> None:
    """Draw ratios of errors as a colored table: blue where the error falls, orange where it rises.

    A ratio whose 95% interval contains 1 is in brackets. Colors end at a factor of 4.

    Parameters
    ----------
    ax : the axes.
    lines, columns : labels.
    ratios : a ratio for each line and column; without seeds where there is none.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("ratio", [COLORS[0], "#FFFFFF", COLORS[1]])
    shades = [[math.log2(r.mean) if r.seeds and r.mean > 0 else math.nan for r in line] for line in ratios]
    ax.imshow(shades, cmap=colors, vmin=-2, vmax=2, aspect="auto")
    for i, line in enumerate(ratios):
        for j, r in enumerate(line):
            if r.seeds:
                text = f"{r.mean:.2f}" if r.mean < 10 else f"{r.mean:.0f}"
                clear = r.seeds < 2 or r.below(1) or r.above(1)
                dark = abs(shades[i][j]) > 1.4
                ax.text(
                    j,
                    i,
                    text if clear else f"({text})",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(lines)), list(lines))
