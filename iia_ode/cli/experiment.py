"""``iia-ode experiment``: run an experiment on the paper's claims and open questions."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from ..errors import MissingDependencyError
from ..evidence import EXPERIMENTS, get_experiment, load, run
from ..evidence.page import page
from ..evidence.running import about
from ..files import check_writable, write_bytes
from ..plots import save_figure
from .drawing import FOLDER
from .options import findings_as_lines, seed_numbers

__all__ = ["experiment_command"]


@click.command("experiment")
@click.argument("name", required=False, type=click.Choice(EXPERIMENTS))
@click.option("--quick", is_flag=True, help="A smoke run: one seed, few and small cells.")
@click.option(
    "--seeds",
    callback=seed_numbers,
    metavar="N,N-M,...",
    help="Seeds of the noise; by default those of the experiment.",
)
@click.option(
    "--out",
    type=FOLDER,
    help="Folder of the results; by default build/experiments/NAME, or build/experiments/NAME-quick with --quick.",
)
@click.option(
    "--against", type=FOLDER, metavar="FOLDER", help="Results of another run on other seeds, to report how they agree."
)
def experiment_command(
    name: str | None, quick: bool, seeds: tuple[int, ...] | None, out: Path | None, against: Path | None
) -> None:
    """Run an experiment on the paper's claims and open questions; without a NAME, list the experiments.

    Writes seed-K.json and results.csv (all measurements), page.md (the question, the answer, tables), figure.png and
    figure.svg. Finished cells are kept: the same command goes on after an interruption.
    """
    if name is None:
        for known in EXPERIMENTS:
            click.echo(f"{known:<10} {get_experiment(known).question}")
        return
    experiment = get_experiment(name)
    folder = out or Path("build") / "experiments" / (f"{name}-quick" if quick else name)
    check_writable(folder / "results.csv")
    say = partial(tqdm.write, file=sys.stderr)
    command = " ".join(["iia-ode", *map(shlex.quote, sys.argv[1:])])
    with findings_as_lines(lambda line: say(f"  {line}")):
        found = run(experiment, folder, seeds or None, quick=quick, command=command, say=say)
    again = None if against is None else (load(experiment, against), about(against))
    write_bytes(folder / "page.md", page(experiment, found, about(folder), "figure.svg", again).encode())
    names = ["results.csv", "page.md"]
    try:
        figure = experiment.figure(found)
        names += [save_figure(figure, folder / f"figure.{kind}").name for kind in ("png", "svg")]
    except MissingDependencyError as error:
        click.echo(f"no figure: {error}", err=True)
    click.echo(f"{experiment.question}\n\n{experiment.answer(found)}\n\nwritten to {folder}/: {', '.join(names)}")
