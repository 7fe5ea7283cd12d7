"""The plots that commands write beside their files."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import MissingDependencyError
from ..iia import FittedSolver
from ..plots import plot_coefficients, plot_ingredients, plot_residuals, save_figure

__all__ = ["FOLDER", "draw_fit"]

FOLDER = click.Path(file_okay=False, path_type=Path)


def draw_fit(fit: FittedSolver, folder: Path) -> list[Path]:
    """What can be drawn of a fit: its coefficients, residuals of steps that were fitted one by one, what was tried."""
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
