"""Figures without pyplot, and their files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingDependencyError
from ..files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["axes_of", "error_axis", "figure_of", "save_figure"]


def axes_of(ax: Axes | None, **size: Any) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    return figure_of(**size).add_subplot()


def figure_of(**size: Any) -> Figure:
    """A new figure.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'iia-ode[plot]'.") from error
    # Without pyplot, a figure needs no display and leaves no global state behind.
    return Figure(layout="constrained", **size)


def error_axis(ax: Axes) -> None:
    """Make the vertical axis logarithmic, with few ticks, and draw grid lines."""
    ax.set_yscale("log")
    if ax.get_ylim()[1] > 10 * ax.get_ylim()[0]:  # else minor ticks have the only labels
        ax.yaxis.set_tick_params(which="minor", left=False)
    ax.grid(alpha=0.3)


def save_figure(drawing: Figure | Axes, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG or SVG, atomically. Equal figures give equal bytes.

    Parameters
    ----------
    drawing : figure, or axes of a figure.
    path : file to write; an existing file is replaced. The ending ``.svg`` makes an SVG file, any other a PNG file.

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
    if Path(path).suffix == ".svg":
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": "iia_ode"}):  # names of the file's parts, which are random otherwise
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    else:
        # Without matplotlib's version in the file, equal pictures have equal bytes.
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())
