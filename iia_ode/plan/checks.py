"""What a time grid and a state must be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GridError, InputError
from ..ode import ProbabilityFlowODE
from ..schedules import Schedule

__all__ = ["check_grid", "check_ode", "check_start", "check_state"]


def check_grid(schedule: Schedule, grid: object) -> list[float]:
    """The times of a grid, once it is known to be usable.

    Raises
    ------
    GridError : not 1-dimensional, fewer than two times, not finite, outside the schedule, not strictly monotone in
        sigma/alpha, or starting at the data.
    """
    try:
        values = (
            torch.as_tensor(grid, dtype=torch.float64, device="cpu")
            if isinstance(grid, Tensor | list | tuple)
            else None
        )
    except (TypeError, ValueError, OverflowError):
        values = None
    if isinstance(grid, Tensor) and grid.is_complex():
        values = None
    if values is None or values.ndim != 1 or len(values) < 2:
        what = f"shape {list(values.shape)}" if values is not None else type(grid).__name__
        raise GridError(
            f"a grid is a 1-d float64 tensor of at least two times, such as iia.grids.karras(10); got {what}."
        )
    values = values.detach()
    level = schedule.sigma(values), schedule.alpha(values)
    if not bool(torch.isfinite(values).all()) or not schedule.covers(values):
        raise GridError(f"the grid leaves the {type(schedule).__name__} schedule: {_brief(values)}.")
    angle = torch.atan2(*level)  # monotone in sigma/alpha, and finite where alpha = 0
    decreasing = angle.diff() < 0
    if not bool(decreasing.all()) and bool(decreasing.any() or (angle.diff() == 0).any()):
        bad = int((decreasing != decreasing[0]).nonzero()[0]) if bool((decreasing != decreasing[0]).any()) else 0
        raise GridError(
            f"a grid must be strictly monotone from noise to data (or back): {_brief(values)} turns or stands still "
            f"between its points {bad} and {bad + 1} ({values[bad]:g}, {values[bad + 1]:g})."
        )
    if float(level[0][0]) == 0:
        raise GridError(
            f"the grid starts at the data (t = {float(values[0]):g}, sigma = 0), where no model can be evaluated: "
            "start at a small sigma."
        )
    return list(values.tolist())


def _brief(values: Tensor) -> str:
    shown = [f"{v:g}" for v in values.tolist()]
    return "[" + ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]) + "]"


def check_state(x: object) -> Tensor:
    """x, once it is known that it can be a state: float32 or float64, with a batch dimension; else InputError."""
    if not isinstance(x, Tensor):
        raise InputError(f"the state must be a torch.Tensor, got {type(x).__name__}.")
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"the state must be float32 or float64, got {x.dtype}: pass x.float(). The model keeps its own dtype "
            "(ProbabilityFlowODE casts at the call)."
        )
    if x.ndim == 0 or x.numel() == 0:
        raise InputError(
            f"the state needs a non-empty batch dimension first, and components, got shape {list(x.shape)}."
        )
    return x


def check_start(ode: object, x: object) -> None:
    """Raise InputError unless x can be a state of the ODE: what every integration asks of its arguments first."""
    found = check_ode(ode)
    state = check_state(x)
    found.check_state_shape(state)
    # Of the whole batch: a chunk of it may happen to have as many samples as a condition has entries.
    found.check_conditions(len(state))


def check_ode(ode: object) -> ProbabilityFlowODE:
    """`ode`, if it is a ProbabilityFlowODE; else InputError."""
    if not isinstance(ode, ProbabilityFlowODE):
        raise InputError(
            f"expected a ProbabilityFlowODE, got {type(ode).__name__}: wrap the model as "
            "iia_ode.ProbabilityFlowODE(model, iia_ode.EDM(), prediction='data')."
        )
    return ode
