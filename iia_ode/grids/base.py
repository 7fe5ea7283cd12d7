"""Shared parts of the grids: argument checks, and times from noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_whole
from ..errors import GridError
from ..schedules import EDM, Schedule
from ..schedules.levels import default_levels, known_level
from .origin import made_for

__all__ = [
    "as_count",
    "as_grid",
    "as_positive",
    "as_range",
    "as_schedule",
    "as_time",
    "data_time",
    "spaced",
    "times_of",
]


def as_count(n: Any, what: str) -> int:
    """n as an int if it is a positive whole number."""
    return check_whole(f"n, the number of {what}s of a grid,", n, least=1, such_as=10, error=GridError)


def as_positive(value: Any, name: str) -> float:
    """The value as a float if it is a finite positive number."""
    return check_number(name, value, above=0, error=GridError)


def as_time(value: Any, name: str) -> float:
    """The value as a float if it is a finite number."""
    return check_number(name, value, error=GridError)


def as_range(sigma_min: Any, sigma_max: Any, schedule: Schedule | None) -> tuple[float, float]:
    """The two ends of a range of noise levels as floats, if 0 < sigma_min < sigma_max; None is the schedule's own level."""
    schedule = as_schedule(schedule)
    lowest, highest = default_levels(schedule)
    low = lowest if sigma_min is None else known_level(schedule, sigma_min, "sigma_min")
    high = highest if sigma_max is None else known_level(schedule, sigma_max, "sigma_max")
    if not low < high:
        raise GridError(f"a grid needs 0 < sigma_min < sigma_max, got {low} and {high}.")
    return low, high


def as_schedule(schedule: Schedule | None) -> Schedule:
    """The schedule of a grid; EDM, where time is the level, by default."""
    schedule = EDM() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise GridError(f"schedule must be a Schedule, such as iia_ode.VP(), got {schedule!r}.")
    return schedule


def as_grid(times: Iterable[float]) -> Tensor:
    """Times as a grid: float64, on the host for every default device."""
    return torch.tensor(list(times), dtype=torch.float64, device="cpu")


def spaced(n: int, low: float, high: float, level: Callable[[float], float]) -> list[float]:
    """n levels from `high` to `low`, both exact; `level` maps the fraction of the way, 0 to 1, to a level in between."""
    return [high] if n == 1 else [high, *(level(i / (n - 1)) for i in range(1, n - 1)), low]


def times_of(levels: list[float], schedule: Schedule | None, to_data: bool) -> Tensor:
    """Times of the given levels of sigma/alpha, and the time of the data if `to_data`."""
    schedule = as_schedule(schedule)
    beyond = math.copysign(math.inf, schedule.t_noise - schedule.t_data)
    ends = sorted((schedule.t_data, schedule.t_noise if schedule._ends_at_noise else beyond))
    times = [_time_of(level, schedule, *ends) for level in levels]
    if to_data:
        times.append(data_time(schedule))
    for i, (t, s) in enumerate(pairwise(times)):
        if t == s:
            raise GridError(
                f"points {i} and {i + 1} of the grid coincide in floating point (time {t:g}): take a smaller n, or a "
                "family of grids that spreads its levels more evenly."
            )
    return made_for(as_grid(times), schedule)


def _time_of(level: float, schedule: Schedule, low: float, high: float) -> float:
    t = min(max(schedule.t_of_noise_to_signal(level), low), high)  # the level of an end itself may round beyond it
    if not math.isclose(schedule.noise_to_signal(t), level, rel_tol=1e-6):
        first, last = (abs(schedule.noise_to_signal(end)) for end in (schedule.t_data, schedule.t_noise))  # no "-0"
        raise GridError(
            f"the {type(schedule).__name__} schedule does not reach sigma/alpha = {level:g}, it goes from {first:g} "
            f"to {last:g}: choose sigma_min and sigma_max in between."
        )
    return t


def data_time(schedule: Schedule) -> float:
    """The time of the data, if the schedule reaches the data."""
    if schedule.sigma(schedule.t_data) > 0:
        raise GridError(
            f"the {type(schedule).__name__} schedule ends at sigma = {schedule.sigma(schedule.t_data):g} and not at the "
            "data: use to_data=False."
        )
    return schedule.t_data
