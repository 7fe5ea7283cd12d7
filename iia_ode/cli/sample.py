"""``iia-ode sample``: draw samples with a registered solver, or with a fitted solver from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from ..errors import MissingDependencyError
from ..experiments.lines import RECIPE
from ..files import check_writable, to_json, write_tensors
from ..iia import PRESETS, FittedSolver
from ..iia.fitted import read_fit
from ..integrate import sample
from ..ode import distributed
from ..plots import image_grid, save_figure
from ..solvers import Solver, get_solver, solver_names
from .options import COUNT, NFE, Job, given, interactive, on_a_model, warnings_as_lines
from .ranks import joined

__all__ = ["sample_command"]


@click.command("sample")
@on_a_model
@click.argument("solver")
@click.option("--nfe", type=NFE, default=9, show_default=True, help="Evaluations, if SOLVER is a name.")
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Number of samples.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/samples", show_default=True)
def sample_command(
    job: Job,
    solver: str,
    nfe: int,
    samples: int,
    out: Path,
) -> None:
    """Draw samples with SOLVER: a registered name, or a file written by `iia-ode fit`. A file brings its own grid.

    Writes samples.safetensors into --out, and samples.png for images. Every sample has its own seed, made from --seed and
    the number of the sample. More samples, or several processes under torchrun, change no sample by more than the rounding
    of the model.
    """
    known = {*PRESETS, RECIPE, *solver_names()}
    method: Solver | FittedSolver
    if solver.endswith(".safetensors") or (solver not in known and Path(solver).is_file()):
        _refuse_grid_options(solver)
        method = read_fit(solver)
        grid, about = method.grid, {"solver": to_json(method.record) | {"name": method.name}, "nfe": method.nfe}
        job.setting.sigma_max = method.plan.schedule.noise_to_signal(method.plan.grid[0])
    elif solver in (*PRESETS, RECIPE):
        option = f"--nfe {nfe}" if solver == RECIPE else f"--solver {solver}"
        raise click.UsageError(f"{solver} has to be fitted first: iia-ode fit {option} --out FILE.safetensors")
    else:
        method = get_solver(solver)
        grid = method.grid_for(nfe, job.family(), job.setting.schedule)
        about = {"solver": {"name": method.name, "options": method.options()}, "nfe": nfe, "grid": grid.tolist()}
    with joined(job.device) as process, warnings_as_lines(process.leads):
        if process.leads:
            check_writable(out / "samples.safetensors")
        ode, x = replace(job, device=process.device).draw_each(slice(0, samples))
        final = sample(distributed(ode), x, grid, method, progress=process.leads and interactive())
    if process.leads:
        _write(final, about, job, out)


def _write(final: Tensor, about: dict[str, Any], job: Job, out: Path) -> None:
    about |= {"setting": job.setting.name, "seed": job.seed, "guidance_scale": job.guidance}
    paths = [write_tensors(out / "samples.safetensors", "samples", {"samples": final}, about)]
    if job.setting.is_image:
        try:
            paths.append(save_figure(image_grid(final), out / "samples.png"))
        except MissingDependencyError as error:
            click.echo(f"no picture: {error}", err=True)
    click.echo(f"written: {', '.join(map(str, paths))}")


def _refuse_grid_options(file: str) -> None:
    for name in ("nfe", "grid", "rho", "sigma_min", "sigma_max"):
        if given(name):
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{file} brings its own grid: leave out {option}, or fit again with it.")
