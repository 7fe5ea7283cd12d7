"""``iia-ode compare``: compare solvers at equal numbers of evaluations."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from tqdm import tqdm

from ..autofit import BUDGETS
from ..errors import MissingDependencyError, unknown_name
from ..experiments import Comparison, batch_seed, compare
from ..experiments.lines import RECIPE
from ..files import check_writable, write_bytes
from ..grids import GRIDS
from ..iia import FittedSolver
from ..iia.fitted import read_fit
from ..plots import error_against_nfe, error_against_seconds, sample_panels, save_figure
from .options import COUNT, Job, findings_as_lines, given, interactive, names, numbers, on_a_model

__all__ = ["compare_command"]


@click.command("compare")
@on_a_model
@click.option(
    "--solvers",
    callback=names,
    metavar="NAME,NAME,...",
    default="ddim,iia-ddim,heun,biia-edm,iia-edm",
    show_default=True,
    help="Registered solvers, presets, files of fitted solvers (FILE.safetensors, each on its own grid and at its own number "
    f"of evaluations), and {RECIPE!r}: the solver found by iia_ode.fit, on its own grid.",
)
@click.option(
    "--grids",
    "families",
    callback=names,
    metavar="NAME,NAME,...",
    help=f"Compare on several families of grids, instead of --grid: {', '.join(GRIDS)}.",
)
@click.option(
    "--nfe",
    callback=numbers,
    metavar="N,N,...",
    default="5,6,7,8,9,10,11,15,20",
    show_default=True,
    help="Numbers of evaluations. A solver is left out where it cannot make the number exactly.",
)
@click.option("--samples", type=COUNT, default=128, show_default=True, help="Unseen initial states to measure on.")
@click.option("--fit-samples", type=COUNT, default=200, show_default=True, help="Initial states that fits see.")
@click.option(
    "--target",
    type=click.Choice(["substeps", "local", "trajectory"]),
    default="substeps",
    show_default=True,
    help="Target of the presets' steps: sub-steps of the base, as in the paper; an accurate integration of each step; or "
    "the accurate trajectory from the same noise.",
)
@click.option(
    "--budget",
    type=click.Choice(list(BUDGETS)),
    default="closed-form",
    show_default=True,
    help=f"Budget for fitting the solver {RECIPE!r}.",
)
@click.option(
    "--csv",
    "table",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write all rows to this file; iia_ode.experiments.Comparison.read_csv reads the file back.",
)
@click.option(
    "--resume",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep the reference and every finished cell in this folder, and find them again: the same command goes on after an "
    "interruption.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/compare", show_default=True)
def compare_command(
    job: Job,
    solvers: tuple[str, ...],
    nfe: tuple[int, ...],
    samples: int,
    fit_samples: int,
    target: str,
    budget: str,
    families: tuple[str, ...],
    table: Path | None,
    resume: Path | None,
    out: Path,
) -> None:
    """Compare the endpoint errors of solvers at equal numbers of evaluations, on unseen noise.

    Prints a table and writes into --out: compare.csv, table.md, compare.json (settings of the run), compare.png and
    seconds.png (errors against evaluations and against sampling time), samples.png (images from the same noise, a panel per
    solver) and the fitted solvers.
    """
    if given("budget") and RECIPE not in solvers:
        raise click.UsageError(f"--budget is for solver {RECIPE!r}: add {RECIPE} to --solvers, or leave out --budget.")
    if families and given("grid"):
        raise click.UsageError("--grids names all families of the comparison: leave out --grid.")
    for family in families:
        if family not in GRIDS:
            raise unknown_name("family of grids", family, GRIDS)
    for path in (out / "compare.csv", *([] if table is None else [table])):
        check_writable(path)
    say = partial(tqdm.write, file=sys.stderr)
    with findings_as_lines(lambda line: say(f"  {line}")):
        result = compare(
            **_task(job, samples, fit_samples),
            solvers=_loaded(solvers),
            nfes=nfe,
            grids={name: replace(job, grid=name).family() for name in families or (job.grid,)},
            target=target,
            budget=budget,
            seed=job.seed,
            resume=resume,
            progress=interactive(),
            report=say,
        )
    written = _write_comparison(result, job.setting.is_image, out)
    if table is not None:
        result.csv(table)
    click.echo(f"\nRMSE of the final state against a converged reference, {samples} unseen samples (lowest: *)\n")
    click.echo(result.table())
    fits = sum(p.parent != out for p in written)
    names = [p.name for p in written if p.parent == out] + ([f"fits/*.safetensors ({fits})"] if fits else [])
    click.echo(f"\nwritten to {out}/: {', '.join(names)}" + ("" if table is None else f"; {table}"))


def _task(job: Job, samples: int, fit_samples: int) -> dict[str, Any]:
    """The arguments of a comparison on a setting, or on a model of the user's own."""
    if job.own is None:
        scale, device = job.guidance, job.device
        model: dict[str, Any] = {"model": job.setting, "samples": samples, "guidance_scale": scale, "device": device}
        return {**model, "fit_samples": fit_samples}
    seeds = (batch_seed(job.seed, unseen=unseen) for unseen in (True, False))
    (ode, x), (_, fit_x) = (
        job.setting.draw(n, seed, device=job.device) for n, seed in zip((samples, fit_samples), seeds, strict=True)
    )
    return {"model": ode, "x": x, "fit_x": fit_x, "sigma_min": job.lowest, "name": job.setting.name}


def _loaded(solvers: tuple[str, ...]) -> dict[str, str | FittedSolver]:
    """Read the files among the solvers. The name of a file's line is the name of the file, without folder and ending."""
    files = {s: Path(s) for s in solvers if s.endswith(".safetensors")}
    return {s: s for s in solvers if s not in files} | {path.stem: read_fit(path) for path in files.values()}


def _write_comparison(result: Comparison, is_image: bool, out: Path) -> list[Path]:
    result.csv(out / "compare.csv")
    written = [
        out / "compare.csv",
        write_bytes(out / "table.md", (result.table(markdown=True) + "\n").encode()),
        write_bytes(out / "compare.json", (json.dumps(result.settings, indent=2) + "\n").encode()),
    ]
    for (name, count), fit in result.fits.items():
        file = re.sub(r"[^\w.=-]+", "-", f"{name}-{count}")
        written.append(fit.save(out / "fits" / f"{file}.safetensors"))
    try:
        written.append(save_figure(error_against_nfe(result), out / "compare.png"))
        written.append(save_figure(error_against_seconds(result), out / "seconds.png"))
        if is_image:
            written.append(save_figure(sample_panels(_panels(result)), out / "samples.png"))
    except MissingDependencyError as error:
        click.echo(f"no plots: {error}", err=True)
    return written


def _panels(result: Comparison) -> dict[str, Tensor]:
    """Choose the images to show: the reference, and each solver at the middle number of evaluations possible for all.

    If no number is possible for all solvers, each has its own middle number.
    """
    counts = {s: [r.nfe for r in result.rows if r.solver == s] for s in result.solvers}
    shared = [n for n in result.nfes if all(n in c for c in counts.values())]
    panels = {} if result.reference is None else {"converged reference": result.reference}
    for solver, own in counts.items():
        if own:
            among = shared or own
            nfe = among[len(among) // 2]
            panels[f"{solver}, {nfe} evaluations, RMSE {result.error(solver, nfe):.3f}"] = result.samples[solver, nfe]
    return panels
