"""``iia-ode sample``: draw samples with a registered solver, or with a fitted solver from a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ..errors import MissingDependencyError
from ..experiments.lines import RECIPE
from ..files import check_writable, to_json, write_tensors
from ..iia import PRESETS, FittedSolver
from ..iia.fitted import read_fit
from ..integrate import sample
from ..many import sample_many
from ..many.conditions import Given
from ..ode import ProbabilityFlowODE, distributed
from ..plots import image_grid, save_figure
from ..sharing.hub import SOLVER
from ..solvers import Solver, get_solver, solver_names
from .options import COUNT, NFE, Job, given, interactive, on_a_model, seed_numbers, warnings_as_lines
from .ranks import joined, ranked

__all__ = ["sample_command"]

_OF_MANY = ("batch", "format")
_OF_ONE = ("samples", "seed")


@click.command("sample")
@on_a_model
@click.argument("solver")
@click.option("--nfe", type=NFE, default=9, show_default=True, help="Evaluations, if SOLVER is a name.")
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Number of samples.")
@click.option(
    "--seeds",
    callback=seed_numbers,
    metavar="N-N,N,...",
    help="Seeds of the samples, such as 0-49999, instead of --samples and --seed: writes a folder of files in batches, goes "
    "on where it was stopped, and shares the work with other processes on the same folder.",
)
@click.option("--batch", type=COUNT, default=64, show_default=True, help="With --seeds: samples per call of the model.")
@click.option(
    "--format",
    type=click.Choice(["safetensors", "png"]),
    default="safetensors",
    show_default=True,
    help="With --seeds: a safetensors file per batch, or a PNG file per image.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/samples", show_default=True)
def sample_command(
    job: Job,
    solver: str,
    nfe: int,
    samples: int,
    seeds: list[int] | None,
    batch: int,
    format: str,
    out: Path,
) -> None:
    """Draw samples with SOLVER: a registered name, or a file written by `iia-ode fit`. A file brings its own grid.

    Writes samples.safetensors into --out, and samples.png for images. Every sample has its own seed, made from --seed and
    the number of the sample. More samples, or several processes under torchrun, change no sample by more than the rounding
    of the model. With --seeds, sample k has exactly the given seed, and --out gets a file per batch or per image.
    """
    method = _method(job, solver, nfe)
    for name in _OF_MANY if seeds is None else _OF_ONE:
        if given(name):
            which = "goes with --seeds" if seeds is None else "does not go with --seeds"
            raise click.UsageError(f"--{name} {which}: leave it out.")
    if seeds is not None:
        _sample_many(job, method, seeds, batch, format, out)
        return
    with joined(job.device) as process, warnings_as_lines(process.leads):
        if process.leads:
            check_writable(out / "samples.safetensors")
        ode, x = replace(job, device=process.device).draw_each(slice(0, samples))
        final = sample(distributed(ode), x, method.grid, method.solver, progress=process.leads and interactive())
    if process.leads:
        _write(final if job.own is None or job.own.decode is None else job.own.decode(final), method.about, job, out)


@dataclass(frozen=True)
class _Method:
    """A solver with its grid, and its description."""

    solver: Solver | FittedSolver
    grid: Tensor
    about: dict[str, Any]


def _method(job: Job, solver: str, nfe: int) -> _Method:
    """The solver of the argument: of a name, of a file, or of a folder with a solver."""
    known = {*PRESETS, RECIPE, *solver_names()}
    if solver not in known and (Path(solver) / SOLVER).is_file():
        solver = str(Path(solver) / SOLVER)
    if solver.endswith(".safetensors") or (solver not in known and Path(solver).is_file()):
        _refuse_grid_options(solver)
        fit = read_fit(solver)
        job.setting.sigma_max = fit.plan.schedule.noise_to_signal(fit.plan.grid[0])
        return _Method(fit, fit.grid, {"solver": to_json(fit.record) | {"name": fit.name}, "nfe": fit.nfe})
    if solver in (*PRESETS, RECIPE):
        option = f"--nfe {nfe}" if solver == RECIPE else f"--solver {solver}"
        raise click.UsageError(f"{solver} has to be fitted first: iia-ode fit {option} --out FILE.safetensors")
    found = get_solver(solver)
    grid = found.grid_for(nfe, job.family(), job.setting.schedule)
    about = {"solver": {"name": found.name, "options": found.options()}, "nfe": nfe, "grid": grid.tolist()}
    return _Method(found, grid, about)


def _sample_many(job: Job, method: _Method, seeds: list[int], batch: int, format: str, out: Path) -> None:
    """Write a folder of samples, alone or beside other processes."""
    process = ranked(job.device)
    with warnings_as_lines(process.leads):
        ode, conditions, like = _each(replace(job, device=process.device), seeds)
        result = sample_many(
            ode,
            method.solver,
            seeds,
            tuple(like.shape[1:]),
            out,
            conditions,
            grid=method.grid,
            batch=batch,
            format=format,
            decode=None if job.own is None else job.own.decode,
            dtype=like.dtype,
            device=process.device,
            progress=process.leads and interactive(),
        )
    if process.leads:
        click.echo(f"written: {len(seeds)} samples in {out}, {result.made} of them by this process now")


def _each(job: Job, seeds: list[int]) -> tuple[ProbabilityFlowODE, Given, Tensor]:
    """The ODE, the conditions of the seeds, and a state of one sample; a setting with classes has class seed mod classes."""
    if job.own is not None:
        ode, conditions = job.own.each(seeds)
        return ode.to(job.device), conditions, torch.empty((1, *job.own.shape), device="cpu")
    ode, like = job.setting.draw_each([0], guidance_scale=job.guidance, device=job.device)
    null = ode.unconditional.get("class_labels")  # the label after the last class
    return ode, None if null is None else lambda seed: {"class_labels": seed % int(null)}, like


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
