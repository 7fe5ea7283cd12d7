"""Pages of results: the question, the answer, the figure, the tables, and the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .agreement import agreement
from .experiment import Claim, Experiment, markdown
from .measurements import Measurements

__all__ = ["claims_table", "page"]


def page(
    experiment: Experiment,
    found: Measurements,
    about: Mapping[str, Any],
    image: str,
    again: tuple[Measurements, Mapping[str, Any]] | None = None,
) -> str:
    """Write the page of an experiment.

    Parameters
    ----------
    experiment : the experiment.
    found : its measurements.
    about : account of the runs, from :func:`~iia_ode.evidence.running.about`.
    image : address of the figure, relative to the page.
    again : measurements and account of a second run on other seeds.

    Returns
    -------
    The page in Markdown.
    """
    parts = [
        f"# {experiment.title}",
        experiment.question,
        f"**Answer.** {experiment.answer(found)}",
        f"![{experiment.title}]({image})",
        "Errors are means over seeds with one standard error.",
    ]
    for part in experiment.tables(found):
        parts += [part.caption, part.table]
    parts += _notes(experiment, found)
    parts += ["## How it was measured", experiment.method, _run(about)]
    if experiment.fits_of:
        parts.append(
            f"The fits are those of commit {experiment.fits_of}, whose budgets took about five times as many sample "
            "evaluations as the budgets of now."
        )
    missing = [cell.name for cell in experiment.cells(quick=False) if cell.name not in about["cells"]]
    if about["quick"]:
        parts.append("This was a smoke run, too small for an answer.")
    elif missing:
        parts.append(f"Not measured yet: {'; '.join(missing)}. The command measures what is missing.")
    if again is not None:
        other, its = again
        seeds, both = ", ".join(map(str, its["seeds"])), Measurements([*found.rows, *other.rows])
        parts += [
            "## Second run",
            f"A second run on seeds {seeds} repeated the experiment: {agreement(experiment, found, other)}.",
            f"**Answer of both runs together.** {experiment.answer(both)}",
            *_notes(experiment, both, "### In detail, both runs"),
        ]
    return "\n\n".join(parts) + "\n"


def _notes(experiment: Experiment, found: Measurements, heading: str = "## In detail") -> list[str]:
    """The notes as a list under a heading; nothing without notes."""
    notes = experiment.notes(found)
    return [heading, "\n".join(f"- {note}" for note in notes)] if notes else []


def _run(about: Mapping[str, Any]) -> str:
    """The command, the seeds, and the versions."""
    commands = "\n".join(about["commands"])
    seeds, versions = ", ".join(map(str, about["seeds"])), about["surroundings"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"```sh\n{commands}\n```\n\nSeeds {seeds}; {said}."


def claims_table(claims: Sequence[tuple[Experiment, Claim]], address: str) -> str:
    """A table of claims: each with what was measured, the verdict and a link; `address` has a place for the name."""
    rows = [[c.text, c.measured, c.verdict, f"[{e.name}]({address.format(name=e.name)})"] for e, c in claims]
    return markdown(["claim or question", "measured", "verdict", "page"], rows, left=4)
