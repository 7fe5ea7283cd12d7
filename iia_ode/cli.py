"""The command line, ``iia-ode``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import Tensor
from tqdm import tqdm

from . import grids
from .__about__ import __version__
from .denoisers import TrainingOptions, save_denoiser, train_digits
from .denoisers.pretrained import DIGITS_SOURCE, DIGITS_WEIGHTS
from .errors import IIAError, MissingDependencyError
from .experiments import Comparison, Setting, batch_seed, compare, get_setting, setting_names
from .files import check_writable, write_bytes, write_tensors
from .iia import PRESETS, FittedSolver, load, preset
from .iia.fitted import describe
from .integrate import sample, torchdiffeq_methods
from .ode import ProbabilityFlowODE
from .plots import error_against_nfe, image_grid, sample_panels, save_figure
from .solvers import Solver, get_solver, same_solver, solver_names

__all__ = ["cli", "main"]

_MANY = 10_000_000  # beyond this a count is a slip of the finger, and would end in a kill for lack of memory


class _Range(click.FloatRange):
    """A range of numbers; NaN, which no comparison finds outside, is outside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


_COUNT = click.IntRange(1, _MANY)
_NFE = click.IntRange(1, 10_000)
_SEED = click.IntRange(0, 2**62)
_LEVEL = _Range(0, 1e9, min_open=True)
_WITH_RHO = ("karras", "polyexponential")


def _interactive() -> bool:
    """Bars are for people: in a log they are noise."""
    return sys.stderr.isatty()


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    convert: Callable[..., int] = _NFE.convert  # click's own annotation has it from int to int
    return tuple(dict.fromkeys(convert(v, param, ctx) for v in value.split(",")))


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(v.strip() for v in value.split(",")))


def _rho(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and 0 < value < 0.1:  # sigma^(1/rho) overflows
        raise click.BadParameter(f"{value:g} is too small: use 0 for a log-SNR grid, or at least 0.1.")
    return value


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        torch.ones(1, device=value).cpu()  # "meta" makes tensors that cannot be read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{value!r} cannot be used here: {reason}") from error
    return value


_MODEL_OPTIONS = [
    click.option("--setting", default="digits", show_default=True, help=f"Model: {', '.join(setting_names())}."),
    click.option(
        "--guidance",
        type=_Range(-1e3, 1e3),
        default=1.0,
        show_default=True,
        help="Scale of classifier-free guidance.",
    ),
    click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of noise and labels."),
    click.option("--device", default="cpu", show_default=True, callback=_device, help="Where the model runs."),
    click.option(
        "--grid",
        type=click.Choice(list(grids.GRIDS)),
        default="karras",
        show_default=True,
        help="Family of grids: how noise levels are spaced.",
    ),
    click.option(
        "--rho",
        type=_Range(0, 1e3),
        callback=_rho,
        help="Exponent of a karras grid [default: 7; 0 for log_snr] or a polyexponential one [default: 1].",
    ),
    click.option("--sigma-min", type=_LEVEL, help="Last positive noise level [default: the setting's]."),
    click.option("--sigma-max", type=_LEVEL, help="First noise level [default: the setting's]."),
]


@dataclass(frozen=True)
class _Job:
    """What `_MODEL_OPTIONS` say: a model, its noise and a family of grids."""

    setting: Setting
    guidance: float
    seed: int
    device: str
    grid: str
    rho: float | None
    sigma_min: float | None

    def family(self) -> Callable[[int], Tensor]:
        """From a number of levels to a grid."""
        low = self.setting.sigma_min if self.sigma_min is None else self.sigma_min
        levels: dict[str, Any] = {
            "sigma_min": low,
            "sigma_max": self.setting.sigma_max,
            "schedule": self.setting.schedule,
        }
        if self.rho is not None and self.grid not in _WITH_RHO:
            raise click.UsageError(f"--rho goes with --grid {' or '.join(_WITH_RHO)}, not with {self.grid}.")
        if self.grid == "karras" and self.rho == 0:
            return partial(grids.log_snr, **levels)
        if self.rho is not None:
            levels["rho"] = self.rho
        return partial(grids.GRIDS[self.grid], **levels)

    def draw(self, samples: int, *, unseen: bool) -> tuple[ProbabilityFlowODE, Tensor]:
        """Initial states for a fit, or such as no fit has seen."""
        seed = batch_seed(self.seed, unseen=unseen)
        return self.setting.draw(samples, seed, guidance_scale=self.guidance, device=self.device)


def _on_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `_MODEL_OPTIONS`, and hand them to it as one `_Job`."""

    @wraps(command)
    def run(setting: str, sigma_max: float | None, **options: Any) -> None:
        own = {name: options.pop(name) for name in ("guidance", "seed", "device", "grid", "rho", "sigma_min")}
        job = _Job(get_setting(setting), **own)
        if sigma_max is not None:
            job.setting.sigma_max = sigma_max
        command(job, **options)

    for option in reversed(_MODEL_OPTIONS):
        run = option(run)
    return run


def _help_by_default(ctx: click.Context) -> None:
    """What a group alone does. Click's own way is an error in some versions, and errors are one line here."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="iia-ode")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Sample diffusion and flow models in few evaluations, and measure how well."""
    _help_by_default(ctx)


@cli.command("compare")
@_on_a_model
@click.option(
    "--solvers",
    callback=_names,
    metavar="NAME,NAME,...",
    default="ddim,iia-ddim,heun,biia-edm,iia-edm",
    show_default=True,
    help="Registered solvers and presets.",
)
@click.option(
    "--nfe",
    callback=_numbers,
    metavar="N,N,...",
    default="5,6,7,8,9,10,11,15,20",
    show_default=True,
    help="Evaluations; a solver sits out those it cannot make.",
)
@click.option("--samples", type=_COUNT, default=128, show_default=True, help="Unseen initial states to measure on.")
@click.option("--fit-samples", type=_COUNT, default=200, show_default=True, help="Initial states that fits see.")
@click.option(
    "--target",
    type=click.Choice(["substeps", "local"]),
    default="substeps",
    show_default=True,
    help="What presets are fitted to: sub-steps of the base, as in the paper, or an accurate integration.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/compare", show_default=True)
def compare_command(
    job: _Job,
    solvers: tuple[str, ...],
    nfe: tuple[int, ...],
    samples: int,
    fit_samples: int,
    target: str,
    out: Path,
) -> None:
    """Fit, sample, measure: endpoint error of solvers at equal evaluations, on noise that no fit has seen.

    Prints a table and writes into --out: compare.csv, table.md, compare.json (what was run), compare.png, samples.png
    (images from the same noise, a panel per solver) and the fitted solvers.
    """
    check_writable(out / "compare.csv")
    result = compare(
        job.setting,
        solvers,
        nfe,
        job.family(),
        samples=samples,
        fit_samples=fit_samples,
        target=target,
        guidance_scale=job.guidance,
        seed=job.seed,
        device=job.device,
        progress=_interactive(),
        report=partial(tqdm.write, file=sys.stderr),
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
    """The reference, and each solver at the middle one of the counts that all can make (or at its own middle one)."""
    counts = {s: [r.nfe for r in result.rows if r.solver == s] for s in result.solvers}
    shared = [n for n in result.nfes if all(n in c for c in counts.values())]
    panels = {"converged reference": result.reference}
    for solver, own in counts.items():
        if own:
            among = shared or own
            nfe = among[len(among) // 2]
            panels[f"{solver}, {nfe} evaluations, RMSE {result.error(solver, nfe):.3f}"] = result.samples[solver, nfe]
    return panels


@cli.command("fit")
@_on_a_model
@click.option("--preset", "name", default="iia-edm", show_default=True, help=f"Method: {', '.join(PRESETS)}.")
@click.option("--nfe", type=_NFE, default=9, show_default=True, help="Evaluations of the fitted solver.")
@click.option("--samples", type=_COUNT, default=200, show_default=True, help="Initial states to fit on.")
@click.option("--history", type=click.IntRange(0, 10_000), help="Earlier steps to use, r [default: the preset's].")
@click.option("--substeps", type=click.IntRange(1, 10_000), help="Sub-steps of the target, M [default: the preset's].")
@click.option("--target", type=click.Choice(["substeps", "local"]), default="substeps", show_default=True)
@click.option("--chunk-size", type=_COUNT, help="Samples that go through the model at once [default: all].")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
def fit_command(
    job: _Job,
    name: str,
    nfe: int,
    samples: int,
    history: int | None,
    substeps: int | None,
    target: str,
    chunk_size: int | None,
    out: Path,
) -> None:
    """Fit a preset of IIA to a model and save it as one safetensors file."""
    changes = {"history": history, "substeps": substeps, "target": target}
    method = preset(name, **{k: v for k, v in changes.items() if v is not None})
    grid = method.base_solver.grid_for(nfe, job.family(), job.setting.schedule)
    check_writable(out)
    ode, x = job.draw(samples, unseen=False)
    fit = method.fit(ode, grid, x, chunk_size=chunk_size, seed=job.seed, progress=_interactive())
    fit.save(out)
    click.echo(str(fit))
    click.echo(f"\nwritten: {out}")


@cli.command("sample")
@_on_a_model
@click.argument("solver")
@click.option("--nfe", type=_NFE, default=9, show_default=True, help="Evaluations, where the solver is a name.")
@click.option("--samples", type=_COUNT, default=64, show_default=True, help="How many samples.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/samples", show_default=True)
def sample_command(
    job: _Job,
    solver: str,
    nfe: int,
    samples: int,
    out: Path,
) -> None:
    """Draw samples with SOLVER: a registered name, or a file that `iia-ode fit` wrote, which brings its own grid.

    Writes samples.safetensors and, where the samples are images, samples.png into --out.
    """
    known = {*PRESETS, *solver_names()}
    method: Solver | FittedSolver
    if solver.endswith(".safetensors") or (solver not in known and Path(solver).is_file()):
        _refuse_grid_options(solver)
        method = load(solver)
        grid, about = method.grid, {"solver": method.about | {"name": method.name}, "nfe": method.nfe}
        job.setting.sigma_max = method.plan.schedule.noise_to_signal(method.plan.grid[0])
    elif solver in PRESETS:
        raise click.UsageError(f"{solver} has to be fitted first: iia-ode fit --preset {solver} --out FILE.safetensors")
    else:
        method = get_solver(solver)
        grid = method.grid_for(nfe, job.family(), job.setting.schedule)
        about = {"solver": {"name": method.name, "options": method.options()}, "nfe": nfe, "grid": grid.tolist()}
    check_writable(out / "samples.safetensors")
    ode, x = job.draw(samples, unseen=True)
    final = sample(ode, x, grid, method, progress=_interactive())
    about |= {"setting": job.setting.name, "seed": job.seed, "guidance_scale": job.guidance}
    paths = [write_tensors(out / "samples.safetensors", "samples", {"samples": final}, about)]
    if job.setting.is_image:
        try:
            paths.append(save_figure(image_grid(final), out / "samples.png"))
        except MissingDependencyError as error:
            click.echo(f"no picture: {error}", err=True)
    click.echo(f"written: {', '.join(map(str, paths))}")


def _refuse_grid_options(file: str) -> None:
    ctx = click.get_current_context()
    for name in ("nfe", "grid", "rho", "sigma_min", "sigma_max"):
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{file} brings its own grid: leave out {option}, or fit again with it.")


@cli.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", "with_plan", is_flag=True, help="Print every instruction of the plan too.")
def show_command(file: Path, with_plan: bool) -> None:
    """Print a fitted solver's file, readably: what it is for, how it was made, and every coefficient."""
    text = describe(file)
    click.echo(f"{text}\n\n{load(file).plan}" if with_plan else text)


@cli.command("solvers")
def solvers_command() -> None:
    """List the solvers: registered ones, presets of IIA, and torchdiffeq's methods."""
    click.echo(f"{'name':<20} {'order':>5}  {'evaluations':<14} what it is")
    schedule = get_setting("gaussian").schedule
    for name in solver_names():
        solver = get_solver(name)
        spent = solver.plan(schedule, grids.uniform(12, 2.0, 1.0)).nfe
        count = (
            f"{spent // 12} a step" if spent % 12 == 0 else f"{spent} in 12 steps"
        )  # a costlier start, or a free one
        click.echo(f"{name:<20} {solver.order:>5}  {count:<14} {_what_it_is(solver)}")
    click.echo("\nIIA, fitted to a model before use:")
    for name, method in PRESETS.items():
        click.echo(f"{name:<12} over {method.base_solver.name}, history {method.history}, {method.substeps} sub-steps")
    click.echo(f"\ntorchdiffeq, in odeint and sample of the Python API: {', '.join(torchdiffeq_methods())}")


def _what_it_is(solver: Solver) -> str:
    """The first line of its description, or the solver that it is a variant of; and its other names."""
    base = get_solver(solver.name).options()
    changed = [f"{k}={v}" for k, v in solver.options().items() if v != base[k]]
    line = f"{solver.name} with {', '.join(changed)}" if changed else (solver.__doc__ or "").strip().splitlines()[0]
    others = same_solver(solver.label)[1:]
    return f"{line} (also {', '.join(others)})" if others else line


@cli.group("train", invoke_without_command=True)
@click.pass_context
def train_group(ctx: click.Context) -> None:
    """Train the networks that ship with the package."""
    _help_by_default(ctx)


@train_group.command("digits")
@click.option("--steps", type=_COUNT, default=TrainingOptions.steps, show_default=True, help="Optimiser steps.")
@click.option("--batch", type=_COUNT, default=TrainingOptions.batch, show_default=True, help="Images a step.")
@click.option("--seed", type=_SEED, default=TrainingOptions.seed, show_default=True)
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DIGITS_WEIGHTS.name,
    show_default=True,
    help="File to write.",
)
def train_digits_command(steps: int, batch: int, seed: int, device: str, out: Path) -> None:
    """Train the digits denoiser from scratch (about a quarter of an hour on two cores)."""
    options = TrainingOptions(steps=steps, batch=batch, seed=seed)
    check_writable(out)
    result = train_digits(options, device=device, progress=_interactive())
    about = {
        "data": DIGITS_SOURCE,
        "options": options.to_dict(),
        "train_loss": result.train_loss,
        "held_out_loss": result.held_out_loss,
    }
    save_denoiser(out, result.denoiser, about)
    click.echo(f"loss {result.train_loss:.4f}, held out {result.held_out_loss:.4f}; written: {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors are one line on stderr and exit status 2."""
    try:
        cli.main(arguments, prog_name="iia-ode", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("iia-ode: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except (IIAError, OSError) as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:  # torch: out of memory, trouble with a device; the rest is advice
        _fail(f"{type(error).__name__}: {(str(error).strip() or 'out of memory').splitlines()[0]}")


def _fail(message: str) -> None:
    click.echo(f"iia-ode: error: {' '.join(message.split())}", err=True)
    sys.exit(2)
