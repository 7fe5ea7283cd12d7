"""Plots of a fitted solver, written by several commands."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import MissingDependencyError
from ..iia import FittedSolver
from ..plots import plot_coefficients, plot_ingredients, plot_residuals, save_figure

__all__ = ["FOLDER", "draw_fit"]

FOLDER = click.Path(file_okay=False, path_type=Path)


def draw_fit(fit: FittedSolver, folder: Path) -> list[Path]:
    """Draw a fitted solver into PNG files.

    Every fit has a plot of its coefficients. A fit made step by step has a plot of residuals, and a fit made by
    :func:`iia_ode.fit` has a plot of the ingredients tried. Without matplotlib, print a line on stderr and draw nothing.

    Parameters
    ----------
    fit : fitted solver.
    folder : folder to write into.

    Returns
    -------
    Paths of the PNG files.
    """
    drawings = {"coefficients": plot_coefficients}
    if fit.reports:
        drawings["residuals"] = plot_residuals
    if fit.record.search is not None:
        drawings["ingredients"] = plot_ingredients
    try:
        return [save_figure(draw(fit), folder / f"{name}.png") for name, draw in drawings.items()]
    except MissingDependencyError as error:
        click.echo(f"no plots: {error}", err=True)
        return []
