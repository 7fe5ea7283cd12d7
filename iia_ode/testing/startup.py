"""Find the vectors of a plan that are states at grid points: overwriting them makes the first steps exact."""

from __future__ import annotations

import math

import torch

from ..forms import conversion
from ..plan import Combine, Instruction, Plan, run_code
from .cases import Model

__all__ = ["known_states"]

_F64 = torch.float64
OFFSET = 7.3  # offset of the solution with constant velocity; a sum of weights is unlikely to match it by chance


def known_states(plan: Plan, points: int) -> dict[int, tuple[int, float]]:
    """Vectors that equal the state at one of the grid points 1 .. `points` up to a factor: index to (grid point, factor).

    The first kind of vector is a grid state itself. The second kind is any other vector that a step passes to later steps,
    such as a corrected state beside the predicted state on the grid, or the state in another scale. Vectors of the second kind
    are identified by their values on two solutions that solvers reproduce exactly: constant data and noise (the state is
    alpha_t data + sigma_t noise), and constant velocity.
    """
    ends = [k for k, ins in enumerate(plan.code, start=1) if isinstance(ins, Combine) and ins.step is not None]
    known = {k: (point, 1.0) for point, k in enumerate(ends[:points], start=1)}
    carried = {
        k: point  # the interval before this grid point
        for point, (before, end) in enumerate(zip([0, *ends], ends[:points], strict=False), start=1)
        for k in range(before + 1, end)
        if isinstance(plan.code[k - 1], Combine) and plan.last_use[k] > end
    }
    if carried:
        code = plan.code[: ends[points - 1]]
        parts, line = _on_constant_data(plan, code), _on_constant_velocity(plan, code)
        for k, point in carried.items():
            for j in (point - 1, point):
                factor = _factor(plan, j, parts[k], line[k])
                if factor is not None:
                    known[k] = j, factor
    return known


def _factor(plan: Plan, point: int, parts: tuple[float, float], line: float) -> float | None:
    """The ratio of a vector to the state at a grid point, from its values on the two solutions; None without a fixed ratio."""
    t = plan.grid[point]
    alpha, sigma = plan.schedule.alpha(t), plan.schedule.sigma(t)
    size = math.hypot(*parts)
    if min(parts) > 0 and abs(parts[0] * sigma - parts[1] * alpha) <= 1e-9 * size * math.hypot(alpha, sigma):
        return size / math.hypot(alpha, sigma)
    return 1.0 if abs(line - (OFFSET + t - plan.grid[0])) <= 1e-9 * OFFSET else None


def _on_constant_data(plan: Plan, code: tuple[Instruction, ...]) -> dict[int, tuple[float, float]]:
    """The coefficients of data and noise in every vector."""
    schedule, t = plan.schedule, plan.grid[0]

    def model(x: torch.Tensor, t: float, form: str) -> torch.Tensor:
        p, q = conversion(schedule, t, "data", form)
        return torch.as_tensor(p * x + q * _tensor(1.0, 0.0))

    values = _values(code, _tensor(schedule.alpha(t), schedule.sigma(t)), model)
    return {k: (float(v[0]), float(v[1])) for k, v in values.items()}


def _on_constant_velocity(plan: Plan, code: tuple[Instruction, ...]) -> dict[int, float]:
    def model(x: torch.Tensor, t: float, form: str) -> torch.Tensor:
        p, q = conversion(plan.schedule, t, "velocity", form)
        return torch.as_tensor(p * x + q * _tensor(1.0))

    return {k: float(v) for k, v in _values(code, _tensor(OFFSET), model).items()}


def _values(code: tuple[Instruction, ...], start: torch.Tensor, model: Model) -> dict[int, torch.Tensor]:
    values = {0: start}
    for _ in run_code(code, values, model):
        pass
    return values


def _tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=_F64, device="cpu")
