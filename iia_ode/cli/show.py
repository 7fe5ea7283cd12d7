"""``iia-ode show``: what a file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import FileFormatError
from ..iia import Ingredient, describe, load
from .drawing import FOLDER, draw_fit

__all__ = ["ingredients_table", "show_command"]


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", "with_plan", is_flag=True, help="Print every instruction of the plan too.")
@click.option("--plots", type=FOLDER, help="Draw the fit into this folder.")
def show_command(file: Path, with_plan: bool, plots: Path | None) -> None:
    """Print a fitted solver's file, readably: what it is for, how it was made, every coefficient, and what they mean.

    For what iia_ode.fit made, all ingredients that were tried follow, with their errors and costs.
    """
    text = describe(file)
    try:
        fit = load(file)
    except FileFormatError as error:  # a schedule that no file can hold: what needs none is shown nevertheless
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
    """What a fit tried: error on held-out noise, evaluations and seconds, a star on what it chose."""
    width = max(len("ingredient"), *(len(i.name) for i in ingredients))
    lines = [f"{'ingredient':<{width}} {'error':>10} {'sample evaluations':>19} {'seconds':>8}"]
    for i in ingredients:
        error = f"{i.error:.4g}" if i.error is not None else "-"
        star = "*" if i.chosen else " "
        lines.append(f"{i.name:<{width}} {error:>9}{star} {i.sample_evaluations:>19} {i.seconds:>8.1f}")
    return "\n".join(lines)
