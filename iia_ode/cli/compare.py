"""``iia-ode compare``: compare solvers at equal numbers of evaluations."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import click
from torch import Tensor
from tqdm import tqdm

from ..autofit import BUDGETS
from ..errors import MissingDependencyError
from ..experiments import Comparison, compare
from ..experiments.compare import RECIPE
from ..files import check_writable, write_bytes
from ..plots import error_against_nfe, sample_panels, save_figure
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
    help=f"Registered solvers, presets, and {RECIPE!r}: the solver found by iia_ode.fit, on its own grid.",
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
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/compare", show_default=True)
def compare_command(
    job: Job,
    solvers: tuple[str, ...],
    nfe: tuple[int, ...],
    samples: int,
    fit_samples: int,
    target: str,
    budget: str,
    out: Path,
) -> None:
    """Compare the endpoint errors of solvers at equal numbers of evaluations, on unseen noise.

    Prints a table and writes into --out: compare.csv, table.md, compare.json (settings of the run), compare.png,
    samples.png (images from the same noise, a panel per solver) and the fitted solvers.
    """
    if given("budget") and RECIPE not in solvers:
        raise click.UsageError(f"--budget is for solver {RECIPE!r}: add {RECIPE} to --solvers, or leave out --budget.")
    check_writable(out / "compare.csv")
    say = partial(tqdm.write, file=sys.stderr)
    with findings_as_lines(lambda line: say(f"  {line}")):
        result = compare(
            job.setting,
            solvers,
            nfe,
            job.family(),
            samples=samples,
            fit_samples=fit_samples,
            target=target,
            budget=budget,
            guidance_scale=job.guidance,
            seed=job.seed,
            device=job.device,
            progress=interactive(),
            report=say,
        )
    written = _write_comparison(result, job.setting.is_image, out)
    click.echo(f"\nRMSE of the final state against a converged reference, {samples} unseen samples (lowest: *)\n")
    click.echo(result.table())
    fits = sum(p.parent != out for p in written)
    names = [p.name for p in written if p.parent == out] + ([f"fits/*.safetensors ({fits})"] if fits else [])
    click.echo(f"\nwritten to {out}/: {', '.join(names)}")


def _write_comparison(result: Comparison, is_image: bool, out: Path) -> list[Path]:
    written = [
        write_bytes(out / "compare.csv", result.csv().encode()),
        write_bytes(out / "table.md", (result.table(markdown=True) + "\n").encode()),
        write_bytes(out / "compare.json", (json.dumps(result.settings, indent=2) + "\n").encode()),
    ]
    for (name, count), fit in result.fits.items():
        written.append(fit.save(out / "fits" / f"{name}-{count}.safetensors"))
    try:
        written.append(save_figure(error_against_nfe(result), out / "compare.png"))
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
    panels = {"converged reference": result.reference}
    for solver, own in counts.items():
        if own:
            among = shared or own
            nfe = among[len(among) // 2]
            panels[f"{solver}, {nfe} evaluations, RMSE {result.error(solver, nfe):.3f}"] = result.samples[solver, nfe]
    return panels
