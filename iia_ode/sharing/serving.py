"""The guidance scales that a fit serves: errors at further scales, compared with solvers without a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_number
from ..errors import GridError, InputError
from ..grids import karras
from ..iia.batch import Batch
from ..iia.provenance import finite
from ..ode import ProbabilityFlowODE
from ..ode.guidance import Scales
from ..plan import Plan, check_start, trace
from ..schedules.levels import default_levels
from ..solvers import get_solver
from ..teacher import Teacher
from .records import Served

__all__ = ["at_scale", "checked_scales", "measured", "range_of"]

_RIVALS = ("dpmpp_2m", "ipndm3", "heun")
_CHUNK = 64


def at_scale(ode: ProbabilityFlowODE, scale: float) -> ProbabilityFlowODE:
    """The ODE at another guidance scale.

    Raises
    ------
    InputError : the ODE has no null condition.
    """
    view = ode.condition(**ode.conditioning)
    view.guidance_scale = scale
    view._check_guidance()
    return view


def checked_scales(scales: object, own: float | Scales) -> list[float]:
    """Sort guidance scales; InputError for none, for an entry that is no number, and for a fit with a scale by time."""
    if isinstance(own, Scales) and own.kind == "per time":
        raise InputError(
            f"the guidance scale of this fit is a function of the time ({own}), and serves measures numbers."
        )
    if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
        raise InputError(f"scales must be numbers, such as [1.0, 2.0, 3.0], got {scales!r}.")
    return sorted({check_number("a guidance scale", scale) for scale in scales})


def measured(
    plan: Plan, ode: ProbabilityFlowODE, x: Tensor, scales: Sequence[float], sigma_min: float | None, progress: bool
) -> tuple[Served, ...]:
    """Errors of a plan at guidance scales, each against accurate states from the same noise."""
    check_start(ode, x)
    rivals = _rivals(plan, sigma_min)
    found = []
    for scale in tqdm(scales, desc="guidance scales", disable=not progress):
        view = at_scale(ode, scale)
        teacher = Teacher.solve(view, x, plan.grid[0], plan.grid[-1], sigma_min=sigma_min, chunk_size=_CHUNK)
        batch = Batch(view, x, teacher, _CHUNK)
        others = {name: error for name, rival in rivals.items() if (error := _rms(batch, rival)) is not None}
        best = min(others, key=lambda name: others[name], default="")
        found.append(Served(scale, _rms(batch, plan), best, others.get(best)))
    return tuple(found)


def range_of(served: Sequence[Served], own: float | Scales) -> tuple[float, float] | None:
    """The range around the scale of the fit in which no solver without a fit is better, at any measured scale.

    None if the scale of the fit is not finite.
    """
    low, high = own.range if isinstance(own, Scales) else (own, own)
    below = [s for s in served if s.scale <= low][::-1]
    above = [s for s in served if s.scale >= high]
    for side, better in ((below, min), (above, max)):
        for entry in side:
            if not entry.good:
                break
            low, high = (better(low, entry.scale), high) if side is below else (low, better(high, entry.scale))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _rms(batch: Batch, plan: Plan) -> float | None:
    return finite(float(batch.errors(plan).square().mean().sqrt()))


def _rivals(plan: Plan, sigma_min: float | None) -> dict[str, Plan]:
    """Solvers without a fit with as many evaluations, on Karras grids from the first time of the plan."""
    schedule = plan.schedule
    top, level = default_levels(schedule)[1], schedule.noise_to_signal(plan.grid[0])

    def family(n: int) -> Tensor:
        grid = karras(n, sigma_min, level if math.isfinite(level) else top, schedule=schedule)
        return torch.cat([torch.tensor(plan.grid[:1], dtype=torch.float64, device="cpu"), grid[1:]])

    found = {}
    for name in _RIVALS:
        solver = get_solver(name)
        try:
            found[name] = trace(solver, schedule, solver.grid_for(plan.nfe, family, schedule))
        except GridError:  # this number of evaluations is not possible
            continue
    return found
