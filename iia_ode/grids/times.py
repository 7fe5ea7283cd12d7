"""Grids of times: uniform, quadratic, integer timesteps, and parts of a grid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import GridError
from ..schedules import Discrete
from .base import as_count, as_grid, as_time
from .levels import beta_quantile
from .origin import made_for, origin_of

__all__ = ["cut", "discrete", "quadratic", "uniform"]


def uniform(n: int, t_start: float, t_end: float) -> Tensor:
    """n intervals equidistant in t: float64 [n + 1] from `t_start` to `t_end`, both exact."""
    return _power(n, t_start, t_end, 1)


def quadratic(n: int, t_start: float, t_end: float) -> Tensor:
    """n intervals equidistant in sqrt(t): float64 [n + 1] from `t_start` to `t_end` [Song et al. 2021, DDIM, appendix D]."""
    return _power(n, t_start, t_end, 2)


def _power(n: int, t_start: float, t_end: float, power: int) -> Tensor:
    n, (t_start, t_end) = as_count(n, "interval"), (as_time(t_start, "t_start"), as_time(t_end, "t_end"))
    if t_start == t_end:
        raise GridError(f"a grid needs two different ends, got {t_start} and {t_end}.")
    if power > 1 and min(t_start, t_end) < 0:
        raise GridError(f"a quadratic grid needs times that are not negative, got {t_start} and {t_end}.")
    a, b = t_start ** (1 / power), t_end ** (1 / power)
    inner = [(a + i / n * (b - a)) ** power for i in range(1, n)]
    return as_grid([t_start, *inner, t_end])


def discrete(n: int, schedule: Discrete, spacing: str = "trailing", *, to_data: bool = True) -> Tensor:
    """n integer timesteps of a discrete schedule, then the data [Lin et al. 2024, table 2].

    Parameters
    ----------
    n : timesteps, at most as many as the schedule has.
    spacing : ``"leading"`` (0, k, 2k, ... with k = T // n), ``"trailing"`` (T - 1 downwards by T / n), ``"linspace"`` (both
        ends included) or ``"beta"`` ((T - 1) F^-1(1 - i / n), F the distribution function of Beta(0.6, 0.6) [Lee et al.
        2024]), each rounded to integers. Where ``"beta"`` gives a timestep twice by rounding, a neighbor replaces the repeat.
    to_data : append alpha = 1 (time -1).

    Raises
    ------
    GridError : n out of range or another spacing.
    """
    if not isinstance(schedule, Discrete):
        raise GridError(f"timesteps need a Discrete schedule, got {schedule!r}: use karras or log_snr for others.")
    total = len(schedule.alphas_cumprod)
    n = check_whole(f"n, the number of timesteps of a grid on {total},", n, least=1, most=total, error=GridError)
    match spacing:
        case "leading":
            times = [i * (total // n) for i in reversed(range(n))]
        case "trailing":
            times = [round(total - i * total / n) - 1 for i in range(n)]
        case "linspace":
            times = [round((total - 1) * (1 - i / (n - 1))) for i in range(n)] if n > 1 else [total - 1]
        case "beta":
            times = _distinct([round((total - 1) * beta_quantile(1 - i / n)) for i in range(n)])
        case _:
            raise GridError(f"unknown spacing {spacing!r}: use 'leading', 'trailing', 'linspace' or 'beta'.")
    return made_for(as_grid([*times, schedule.t_data] if to_data else times), schedule)


def _distinct(times: list[int]) -> list[int]:
    """Strictly decreasing integers from 0: repeats move down, and the last entries move up rather than below 0."""
    for i in range(1, len(times)):
        times[i] = min(times[i], times[i - 1] - 1)
    return [max(t, len(times) - 1 - i) for i, t in enumerate(times)]


def cut(grid: Tensor, start: float | None = None, end: float | None = None) -> Tensor:
    """The part of a grid between two times: `start` and `end` exact, the grid's points in between.

    A multistep solver starts on the part without memory of earlier steps. To stop a run and keep its memory, use
    :func:`iia_ode.plan.advance`.

    Parameters
    ----------
    grid : float64 [n + 1] times.
    start, end : times; by default the grid's own ends. The time of a noise level is
        ``schedule.t_of_noise_to_signal(level)``.

    Raises
    ------
    GridError : `grid` is no grid, or `start` and `end` are not in order within the grid.
    """
    times = _strictly_monotone(grid)
    first = times[0] if start is None else as_time(start, "start")
    last = times[-1] if end is None else as_time(end, "end")
    down = math.copysign(1.0, times[0] - times[-1])
    if not down * times[0] >= down * first > down * last >= down * times[-1]:
        raise GridError(
            f"a part of the grid from {times[0]:g} to {times[-1]:g} starts and ends within it, in its direction: got "
            f"start = {first:g} and end = {last:g}."
        )
    # A start equal to a grid point up to rounding must not leave an interval of 1e-16.
    inner = [t for t in times if down * first > down * t > down * last and not _near(t, first) and not _near(t, last)]
    part, made = as_grid([first, *inner, last]), origin_of(grid)
    return part if made is None else made_for(part, made)


def _near(t: float, end: float) -> bool:
    return math.isclose(t, end, rel_tol=1e-9)


def _strictly_monotone(grid: Any) -> list[float]:
    try:
        times = torch.as_tensor(grid, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GridError(f"a grid is a 1-d tensor of times, got {type(grid).__name__}: {error}.") from error
    steps = times.diff() if times.ndim == 1 else times.new_empty(0)
    if len(steps) == 0 or not bool((steps < 0).all() or (steps > 0).all()) or not bool(times.isfinite().all()):
        raise GridError(
            f"a grid is a 1-d tensor of at least two times, strictly monotone, got shape {list(times.shape)}."
        )
    return list(times.tolist())
