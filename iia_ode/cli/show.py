"""``iia-ode show``: print a fitted solver's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import FileFormatError
from ..iia import Ingredient, describe
from ..iia.fitted import read_fit
from .drawing import FOLDER, draw_fit

__all__ = ["ingredients_table", "show_command"]


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", "with_plan", is_flag=True, help="Also print every instruction of the plan.")
@click.option("--plots", type=FOLDER, help="Draw the fit into this folder.")
def show_command(file: Path, with_plan: bool, plots: Path | None) -> None:
    """Print a fitted solver's file: its purpose, its provenance, every coefficient, and an explanation in words.

    For a solver made by iia_ode.fit, all ingredients tried follow, with their errors and costs.
    """
    text = describe(file)
    try:
        fit = read_fit(file)
    except FileFormatError as error:  # the file has no schedule of its own, and `describe` needs none
        if with_plan or plots:
            raise
        click.echo(f"{text}\n\nnot explained: {error}")
        return
    parts = [text, fit.explain()]
    if fit.record.search is not None:
        parts.append(ingredients_table(fit.record.search.ingredients))
    if with_plan:
        parts.append(str(fit.plan))
    if plots and (drawn := draw_fit(fit, plots)):
        parts.append(f"written: {', '.join(map(str, drawn))}")
    click.echo("\n\n".join(parts))


def ingredients_table(ingredients: Sequence[Ingredient]) -> str:
    """Format the ingredients of a search as a table, a line each; a star marks the chosen one.

    Parameters
    ----------
    ingredients : solvers that the search made, and attempts that failed.

    Returns
    -------
    The table as text.
    """
    width = max(len("ingredient"), *(len(i.name) for i in ingredients))
    lines = [f"{'ingredient':<{width}} {'error':>10} {'sample evaluations':>19} {'seconds':>8}"]
    for i in ingredients:
        error = f"{i.error:.4g}" if i.error is not None else "-"
        star = "*" if i.chosen else " "
        lines.append(f"{i.name:<{width}} {error:>9}{star} {i.sample_evaluations:>19} {i.seconds:>8.1f}")
    return "\n".join(lines)
