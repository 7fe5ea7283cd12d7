"""Options shared by several commands: the model, its noise, a family of grids; counts and numbers."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import Tensor

from .. import grids
from ..errors import first_line
from ..experiments import Setting, batch_seed, get_setting, setting_names
from ..noise import sample_seeds
from ..ode import ProbabilityFlowODE
from .model import OwnModel, own_model
from .ranks import process_count

__all__ = [
    "COUNT",
    "NFE",
    "SEED",
    "Job",
    "Range",
    "findings_as_lines",
    "given",
    "interactive",
    "names",
    "numbers",
    "on_a_model",
    "seed_numbers",
    "usable_device",
    "warnings_as_lines",
]

_MANY = 10_000_000  # a larger count is a typing error, and the process would be killed for lack of memory


class Range(click.FloatRange):
    """A range of numbers without NaN. click's own range lets NaN pass, because every comparison with NaN is false."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail with a usage error."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


COUNT = click.IntRange(1, _MANY)
NFE = click.IntRange(1, 10_000)
SEED = click.IntRange(0, 2**31 - 1)  # each seed serves two batches, and generators use 32 bits of a seed
LEVEL = Range(0, 1e9, min_open=True)
_WITH_RHO = ("karras", "polyexponential")


def interactive() -> bool:
    """Whether to show progress bars: only in a terminal."""
    return sys.stderr.isatty()


def numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Parse numbers of evaluations separated by commas; a callback of click."""
    convert: Callable[..., int] = NFE.convert  # click's own annotation has it from int to int
    return tuple(dict.fromkeys(convert(v, param, ctx) for v in value.split(",")))


def given(name: str) -> bool:
    """Whether the user gave this option of the running command."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Parse names separated by commas, none without a value; a callback of click."""
    return () if value is None else tuple(dict.fromkeys(v.strip() for v in value.split(",")))


def _rho(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and 0 < value < 0.1:  # sigma^(1/rho) overflows
        raise click.BadParameter(f"{value:g} is too small: use 0 for a log-SNR grid, or at least 0.1.")
    return value


def usable_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check that tensors can be made on a device and read from it; a callback of click."""
    try:
        torch.ones(1, device=value).cpu()  # reading refuses "meta", whose tensors have no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here: {first_line(error)}") from error
    return value


def seed_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Parse seeds such as ``0-999,5000``; a callback of click."""
    if value is None:
        return None
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = (v.strip() for v in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
            raise click.BadParameter(f"{part!r} is no seed and no range: use numbers and ranges, such as 0-49999.")
        if len(found) + int(last or first) - int(first) >= _MANY:
            raise click.BadParameter(f"{value!r} has more than {_MANY} seeds.")
        found.extend(range(int(first), int(last or first) + 1))
    return found


_MODEL_OPTIONS = [
    click.option("--setting", default="digits", show_default=True, help=f"Model: {', '.join(setting_names())}."),
    click.option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Model of your own, instead of --setting: a function without arguments that returns a ProbabilityFlowODE, a pair "
        "(ode, shape), or an object with attributes ode and shape and, if wanted, conditions (a function from a seed to the "
        "conditions of one sample), decode (from states to images), sigma_min and sigma_max.",
    ),
    click.option(
        "--guidance",
        type=Range(-1e3, 1e3),
        help="Scale of classifier-free guidance [default: 1, or the model's own].",
    ),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of noise and labels."),
    click.option(
        "--device",
        default="cpu",
        callback=usable_device,
        help="Where the model runs [default: cpu, or where a --model is].",
    ),
    click.option(
        "--grid",
        type=click.Choice(list(grids.GRIDS)),
        default="karras",
        show_default=True,
        help="Family of grids: how noise levels are spaced.",
    ),
    click.option(
        "--rho",
        type=Range(0, 1e3),
        callback=_rho,
        help="Exponent of a karras grid [default: 7; 0 for log_snr] or a polyexponential one [default: 1].",
    ),
    click.option("--sigma-min", type=LEVEL, help="Last positive noise level [default: the setting's]."),
    click.option("--sigma-max", type=LEVEL, help="First noise level [default: the setting's]."),
]


@dataclass(frozen=True)
class Job:
    """Values of `_MODEL_OPTIONS`: a model, its noise and a family of grids.

    Attributes
    ----------
    setting : model and noise; its `sigma_max` is the first noise level.
    guidance : scale of classifier-free guidance.
    seed : seed of noise and labels.
    device : device of the model.
    grid : name of the family of grids.
    rho : exponent of the grid; None for the family's default.
    sigma_min : last positive noise level sigma/alpha; None for the setting's.
    """

    setting: Setting
    guidance: float
    seed: int
    device: str
    grid: str
    rho: float | None
    sigma_min: float | None

    @property
    def lowest(self) -> float:
        """Last positive noise level sigma/alpha."""
        return self.setting.sigma_min if self.sigma_min is None else self.sigma_min

    def family(self) -> Callable[[int], Tensor]:
        """Make the family of grids: a function from a number of levels to a grid, float64 [levels]."""
        levels: dict[str, Any] = {
            "sigma_min": self.lowest,
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

    def draw(self, samples: int) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw the ODE and the initial states [samples, ...] of a fit."""
        seed = batch_seed(self.seed, unseen=False)
        return self.setting.draw(samples, seed, guidance_scale=self.guidance, device=self.device)

    def draw_each(self, index: slice) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw the ODE and the initial states of some samples of a run, each sample from its own seed."""
        seeds = sample_seeds(self.seed, range(index.start, index.stop))
        return self.setting.draw_each(seeds, guidance_scale=self.guidance, device=self.device)

    @property
    def own(self) -> OwnModel | None:
        """The model of ``--model``; None for a built-in setting."""
        return self.setting if isinstance(self.setting, OwnModel) else None


def on_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add `_MODEL_OPTIONS` to a command, which receives them as one `Job`."""

    @wraps(command)
    def run(setting: str, model: str | None, sigma_max: float | None, **options: Any) -> None:
        own = {name: options.pop(name) for name in ("guidance", "seed", "device", "grid", "rho", "sigma_min")}
        if model is None:
            job = Job(get_setting(setting), **{**own, "guidance": 1.0 if own["guidance"] is None else own["guidance"]})
            if sigma_max is not None:
                job.setting.sigma_max = sigma_max
        else:
            if given("setting"):
                raise click.UsageError("--model brings a model of its own: leave out --setting.")
            found = own_model(model, own["guidance"], own["sigma_min"], sigma_max)
            scale = found.ode.guidance_scale
            own |= {"guidance": scale if isinstance(scale, float) else 1.0, "device": _device_of(found, own["device"])}
            job = Job(found, **own)
        command(job, **options)

    for option in reversed(_MODEL_OPTIONS):
        run = option(run)
    return run


def _device_of(model: OwnModel, device: str) -> str:
    """Device of a model of the user's own: ``--device``, or else where the model is."""
    place = model.ode.device
    if given("device") or place is None:
        return device
    return place.type if process_count() > 1 else str(place)  # of several processes, each has a device of its own


@contextmanager
def warnings_as_lines(shown: bool = True) -> Iterator[None]:
    """Print each warning as one line on stderr when the block ends; print none if not `shown`.

    Of several processes, only one shows its warnings.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in caught) if shown else ():
                click.echo(f"iia-ode: warning: {' '.join(text.split())}", err=True)


class _Lines(logging.Handler):
    """Pass each record of a logger on as a line of text."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        self.say(record.getMessage())


@contextmanager
def findings_as_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Pass every line that the library logs inside the block to `say`."""
    logger, handler = logging.getLogger("iia_ode"), _Lines(say)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
