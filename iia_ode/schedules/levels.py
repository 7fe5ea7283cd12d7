"""The levels sigma/alpha between which a model is evaluated: the schedule's known levels, and defaults without them."""

from __future__ import annotations

import math

from ..checks import check_number
from ..errors import GridError
from .base import Schedule
from .standard import Discrete

__all__ = ["check_floor", "default_levels", "known_level", "lowest_level"]

_LOWEST, _HIGHEST = 0.002, 80.0  # of EDM [Karras et al. 2022], for data of unit size
_ROUNDING = 0.01  # published levels are rounded: 0.029 for 0.02917, 14.615 for 14.6146


def default_levels(schedule: Schedule) -> tuple[float, float]:
    """The default lowest and highest level sigma/alpha of a grid.

    The defaults are the known levels that a user stated, or else 0.002 and 80. These two numbers are limited to the range of
    the schedule, and to the levels of the timesteps of a discrete schedule.

    Parameters
    ----------
    schedule : the noise schedule.

    Returns
    -------
    Both levels, positive and finite.
    """
    if schedule.known_levels is not None and not isinstance(schedule, Discrete):
        low, high = schedule.known_levels
        return low or min(_LOWEST, high / 2), high if high < math.inf else max(_HIGHEST, 2 * low)
    if schedule.known_levels is not None:
        low, high = schedule.known_levels
    else:
        low = schedule.noise_to_signal(schedule.t_data)
        high = schedule.noise_to_signal(schedule.t_noise) if schedule._ends_at_noise else math.inf
    return max(_LOWEST, low), min(_HIGHEST, high)


def lowest_level(schedule: Schedule, usual: float = _LOWEST) -> float:
    """The level sigma/alpha of the last evaluation before the data: `usual`, but not below the lowest known level."""
    return usual if schedule.known_levels is None else max(usual, schedule.known_levels[0])


def known_level(schedule: Schedule, level: object, name: str) -> float:
    """A level sigma/alpha of an argument, checked against the known levels of the schedule.

    A level less than 1% beyond an end is replaced by the end, because published levels are rounded.

    Parameters
    ----------
    schedule : the noise schedule.
    level : the argument.
    name : of the argument.

    Returns
    -------
    The level.

    Raises
    ------
    GridError : not a finite positive number, or outside of the known levels.
    """
    value = check_number(name, level, above=0, error=GridError)
    if schedule.known_levels is None:
        return value
    low, high = schedule.known_levels
    if low <= value <= high:
        return value
    for end in (low, high):
        if math.isclose(value, end, rel_tol=_ROUNDING):
            return end
    ends = "timesteps 0 and T - 1" if isinstance(schedule, Discrete) else "its training, by known_levels"
    raise GridError(
        f"{name} = {value:g} lies {'below' if value < low else 'above'} the levels sigma/alpha that the model knows, "
        f"{low:.4g} to {high:.4g} (of {ends}): omit {name}, or choose a level in between."
    )


def check_floor(sigma_min: float, noisy: float) -> None:
    """Raise GridError unless the level next to the data lies between 0 and the level of the noisy end."""
    if not 0 < sigma_min < noisy:
        raise GridError(f"sigma_min must lie between 0 and the level of the noisy end, got {sigma_min:g}.")
