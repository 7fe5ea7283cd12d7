"""Time grids: float64 tensors from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .errors import GridError
from .schedules import EDM, Discrete, Schedule

__all__ = ["discrete", "karras", "log_snr", "quadratic", "uniform"]


def _count(n: Any, what: str) -> int:
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise GridError(f"a grid needs at least one {what}, got n={n!r}.")
    return int(n)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise GridError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _range(sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    low, high = _number(sigma_min, "sigma_min"), _number(sigma_max, "sigma_max")
    if not 0 < low < high < math.inf:
        raise GridError(f"a grid needs 0 < sigma_min < sigma_max, got {low} and {high}.")
    return low, high


def _levels(n: int, low: float, high: float, up: Callable[[float], float], down: Callable[[float], float]) -> Tensor:
    """n levels from `high` to `low`, equidistant after the map `up`, with both ends exact."""
    if n == 1:
        return _tensor([high])
    a, b = up(high), up(low)
    inner = [down(a + i / (n - 1) * (b - a)) for i in range(1, n - 1)]
    return _tensor([high, *inner, low])


def _times(levels: Tensor, schedule: Schedule | None, to_data: bool) -> Tensor:
    """Times at which sigma/alpha takes the given levels, and the data if asked for."""
    schedule = EDM() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise GridError(f"schedule must be a Schedule, such as iia_ode.VP(), got {schedule!r}.")
    beyond = math.copysign(math.inf, schedule.t_noise - schedule.t_data)
    low, high = sorted((schedule.t_data, schedule.t_noise if schedule._ends_at_noise else beyond))
    times = []
    for level in levels.tolist():
        t = min(max(schedule.t_of_noise_to_signal(level), low), high)  # the level of an end itself may round beyond it
        if not math.isclose(schedule.noise_to_signal(t), level, rel_tol=1e-6):
            first, last = (schedule.noise_to_signal(end) for end in (schedule.t_data, schedule.t_noise))
            raise GridError(
                f"the {type(schedule).__name__} schedule does not reach sigma/alpha = {level:g}, it goes from {first:g} "
                f"to {last:g}: choose sigma_min and sigma_max in between."
            )
        times.append(t)
    return _tensor([*times, _data(schedule)] if to_data else times)


def _data(schedule: Schedule) -> float:
    """The time of the data, if the schedule gets there."""
    if schedule.sigma(schedule.t_data) > 0:
        raise GridError(
            f"the {type(schedule).__name__} schedule ends at sigma = {schedule.sigma(schedule.t_data):g} and not at the "
            "data: use to_data=False."
        )
    return schedule.t_data


def _tensor(times: list[float]) -> Tensor:
    return torch.tensor(times, dtype=torch.float64, device="cpu")


def karras(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels equidistant in sigma^(1/rho), then 0 [Karras et al. 2022, eq. 5].

    Parameters
    ----------
    n : noise levels; a solver with one evaluation a step makes n evaluations.
    sigma_min, sigma_max : last and first level of sigma/alpha, the noise level in EDM's sense for every schedule.
    rho : 7 in EDM; larger puts more levels near the data.
    schedule : whose times to return; EDM, where time is the level itself, by default.
    to_data : append the data (sigma = 0).

    Returns
    -------
    float64 [n + 1] times ([n] without the data). With one level it is `sigma_max`.

    Raises
    ------
    GridError : n < 1, levels out of order or out of the schedule's reach, or rho not positive.
    """
    n, (low, high), rho = _count(n, "level"), _range(sigma_min, sigma_max), _number(rho, "rho")
    if not 0 < rho < math.inf:
        raise GridError(f"rho must be positive, got {rho}.")
    try:
        levels = _levels(n, low, high, lambda v: v ** (1 / rho), lambda u: u**rho)
    except OverflowError:
        raise GridError(f"rho = {rho:g} is too small: sigma_max^(1/rho) is not a number. Use rho = 7.") from None
    return _times(levels, schedule, to_data)


def log_snr(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels equidistant in log-SNR, then 0; arguments as for :func:`karras` [Lu et al. 2022]."""
    n, (low, high) = _count(n, "level"), _range(sigma_min, sigma_max)
    return _times(_levels(n, low, high, math.log, math.exp), schedule, to_data)


def uniform(n: int, t_start: float, t_end: float) -> Tensor:
    """n intervals equidistant in t: float64 [n + 1] from `t_start` to `t_end`, both exact."""
    return _power(n, t_start, t_end, 1)


def quadratic(n: int, t_start: float, t_end: float) -> Tensor:
    """n intervals equidistant in sqrt(t): float64 [n + 1] from `t_start` to `t_end` [Song et al. 2021, DDIM, appendix D]."""
    return _power(n, t_start, t_end, 2)


def _power(n: int, t_start: float, t_end: float, power: int) -> Tensor:
    n, t_start, t_end = _count(n, "interval"), _number(t_start, "t_start"), _number(t_end, "t_end")
    if t_start == t_end or not (math.isfinite(t_start) and math.isfinite(t_end)):
        raise GridError(f"a grid needs two different finite ends, got {t_start} and {t_end}.")
    if power > 1 and min(t_start, t_end) < 0:
        raise GridError(f"a quadratic grid needs times that are not negative, got {t_start} and {t_end}.")
    a, b = t_start ** (1 / power), t_end ** (1 / power)
    inner = [(a + i / n * (b - a)) ** power for i in range(1, n)]
    return _tensor([t_start, *inner, t_end])


def discrete(n: int, schedule: Discrete, spacing: str = "trailing", *, to_data: bool = True) -> Tensor:
    """n integer timesteps of a discrete schedule, then the data [Lin et al. 2024, table 2].

    Parameters
    ----------
    n : timesteps, at most as many as the schedule has.
    spacing : ``"leading"`` (0, k, 2k, ... with k = T // n), ``"trailing"`` (T - 1 downwards by T / n) or ``"linspace"``
        (both ends included), each rounded to integers.
    to_data : append alpha = 1 (time -1).

    Raises
    ------
    GridError : n out of range or another spacing.
    """
    if not isinstance(schedule, Discrete):
        raise GridError(f"timesteps need a Discrete schedule, got {schedule!r}: use karras or log_snr for others.")
    total = len(schedule.alphas_cumprod)
    if not isinstance(n, Integral) or isinstance(n, bool) or not 1 <= n <= total:
        raise GridError(f"a grid on {total} timesteps has 1 to {total} of them, got n={n!r}.")
    n = int(n)
    match spacing:
        case "leading":
            times = [i * (total // n) for i in reversed(range(n))]
        case "trailing":
            times = [round(total - i * total / n) - 1 for i in range(n)]
        case "linspace":
            times = [round((total - 1) * (1 - i / (n - 1))) for i in range(n)] if n > 1 else [total - 1]
        case _:
            raise GridError(f"unknown spacing {spacing!r}: use 'leading', 'trailing' or 'linspace'.")
    return _tensor([*times, schedule.t_data] if to_data else times)
