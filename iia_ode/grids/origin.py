"""Checks of a grid against the schedule of a model: times of the same schedule, inside the known levels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GridError
from ..schedules import EDM, Discrete, Schedule

__all__ = ["check_levels", "check_origin", "made_for", "origin_of"]

_SAME = 1e-6  # relative difference of equal levels by the arithmetic of two schedules
_SLOW = 0.02  # share of the largest step in log-level, below which the last steps belong to levels read as timesteps


def made_for(grid: Tensor, schedule: Schedule) -> Tensor:
    """The same grid with a note of its schedule; a changed or copied tensor has no note."""
    grid.made_for = schedule, _version(grid)  # type: ignore[attr-defined]
    return grid


def origin_of(grid: object) -> Schedule | None:
    """The schedule of a grid's note; None for a tensor without a note, and for a grid changed since."""
    schedule, version = getattr(grid, "made_for", (None, None))
    return schedule if isinstance(grid, Tensor) and version == _version(grid) else None


def _version(grid: Tensor) -> int:
    return 0 if grid.is_inference() else grid._version


def check_origin(schedule: Schedule, grid: object, values: Tensor) -> None:
    """Raise GridError if a grid was made for another schedule, on which the same times have other levels.

    Parameters
    ----------
    schedule : the schedule of the model.
    grid : the grid as given.
    values : its times, float64 [N + 1], on the host.
    """
    made = origin_of(grid)
    if made is None and isinstance(schedule, Discrete):
        made = EDM() if _are_levels(schedule, values) else None
    if made is None or made is schedule:
        return
    meant, found = made.noise_to_signal(values), schedule.noise_to_signal(values)
    if bool(torch.isclose(meant, found, rtol=_SAME, atol=0.0).all()):
        return
    kind, here = type(made).__name__, type(schedule).__name__
    own = "noise levels sigma" if isinstance(made, EDM) else f"times of another {kind} schedule"
    raise GridError(
        f"the grid holds {own}, {float(values[0]):g} to {float(values[-1]):g}, and the model's {here} schedule would read "
        "these numbers as its own times: make the grid for that schedule, as in "
        "iia_ode.grids.karras(n, schedule=ode.schedule). If the numbers are meant as times, pass grid.clone()."
    )


def _are_levels(schedule: Discrete, values: Tensor) -> bool:
    """Whether times on a discrete schedule are a grid of noise levels: they crowd below timestep 1, and stop at 0 or above."""
    times = values.sort(descending=True).values
    inside = (times >= 0) & (times <= schedule.t_noise)
    if len(times) < 3 or not bool(inside.all()) or not float(times[-2]) < 1 or float(times[0]) < 1:
        return False
    steps = schedule.lam(times).diff()
    return float(steps[-2:].min()) < _SLOW * float(steps.max())


def check_levels(schedule: Schedule, values: Tensor) -> None:
    """Raise GridError if a time of a grid lies outside of the schedule's known levels; the data may end a grid.

    Parameters
    ----------
    schedule : the schedule of the grid.
    values : times, float64 [N + 1], on the host.
    """
    asked = values[schedule.sigma(values) > 0]
    if schedule.knows(asked):
        return
    low, high = schedule.known_levels or (0.0, 0.0)
    bad = next(t for t in asked.tolist() if not schedule.knows(t))
    level = schedule.noise_to_signal(bad)
    if isinstance(schedule, Discrete):
        advice = f"The model knows timesteps 0 to {schedule.t_noise:g}: end at timestep 0, or at the data (time -1)."
    else:
        advice = f"The model knows {low:g} to {high:g}, by known_levels: stay in between, or end at the data."
    raise GridError(
        f"the grid has the time {bad:g}, level sigma/alpha {level:.4g}, which the model does not know. {advice}"
    )
