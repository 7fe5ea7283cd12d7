"""Schedules from functions of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ScheduleError
from .base import Schedule, derivative_of

__all__ = ["FromFunctions", "from_functions"]

_F64 = torch.float64


@dataclass(frozen=True)
class FromFunctions(Schedule):
    """A schedule from two functions of time; made by :func:`from_functions`."""

    alpha_function: Callable[[Tensor], Tensor]
    sigma_function: Callable[[Tensor], Tensor]
    t_data: float = 0.0
    t_noise: float = 1.0
    name: str = "custom"
    _ends_at_noise: ClassVar[bool] = True

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alpha_function(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_function(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # Monotone by the check in `from_functions`. Of 64 parts of the bracket the one that holds the level is kept: 17 times
        # are 102 halvings, which reach the last bit of any bracket, for a sixth of the calls.
        fractions = torch.arange(1, 64, dtype=_F64, device=lam.device) / 64
        data, noise = torch.full_like(lam, self.t_data)[..., None], torch.full_like(lam, self.t_noise)[..., None]
        for _ in range(17):
            inside = data + (noise - data) * fractions
            cleaner = (self._lam(inside) > lam[..., None]).sum(dim=-1, keepdim=True)
            points = torch.cat([data, inside, noise], dim=-1)
            data, noise = points.gather(-1, cleaner), points.gather(-1, cleaner + 1)
        data, noise = data[..., 0], noise[..., 0]
        # An end is returned as itself, not as the last midpoint before it.
        t = (data + noise) / 2
        t = torch.where(lam >= self._lam(torch.full_like(lam, self.t_data)), torch.full_like(lam, self.t_data), t)
        t = torch.where(lam <= self._lam(torch.full_like(lam, self.t_noise)), torch.full_like(lam, self.t_noise), t)
        return torch.where(lam.isnan(), lam, t)

    def config(self) -> dict[str, Any]:
        """Name, ends, and values of lambda in between."""
        return {"type": "FromFunctions", "name": self.name, **self._behaviour()}


def from_functions(
    alpha: Callable[[Tensor], Tensor],
    sigma: Callable[[Tensor], Tensor],
    t_data: float = 0.0,
    t_noise: float = 1.0,
    name: str = "custom",
) -> FromFunctions:
    """A schedule from functions alpha(t), sigma(t) of a float64 tensor; derivatives come from autograd.

    Parameters
    ----------
    alpha, sigma : differentiable torch functions, elementwise.
    t_data, t_noise : times of the data (sigma = 0 or as near as it gets) and of the noisiest state; either may be larger.
    name : kept in the files of fitted solvers.

    Raises
    ------
    ScheduleError : the values are not finite and non-negative, or sigma/alpha does not increase towards the noise.
    """
    if not callable(alpha) or not callable(sigma):
        raise ScheduleError(f"alpha and sigma must be functions of a float64 tensor, got {alpha!r} and {sigma!r}.")
    schedule = FromFunctions(alpha, sigma, float(t_data), float(t_noise), name)
    times = torch.linspace(schedule.t_data, schedule.t_noise, 129, dtype=_F64, device="cpu")
    try:
        a, s = alpha(times), sigma(times)
        slopes = derivative_of(alpha, times), derivative_of(sigma, times)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ScheduleError(
            f"alpha and sigma must be torch functions of a float64 tensor that autograd can follow: {error}."
        ) from error
    if any(v.shape != times.shape or v.dtype != _F64 for v in (a, s)):
        raise ScheduleError("alpha and sigma must map a float64 tensor to a float64 tensor of the same shape.")
    if any(bool((v != v[0]).any()) and not bool(slope.any()) for v, slope in zip((a, s), slopes, strict=True)):
        raise ScheduleError(
            "alpha and sigma must be torch functions: autograd finds no dependence on t in one of them."
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(s).all() and (a >= 0).all() and (s >= 0).all()):
        raise ScheduleError("alpha and sigma must be finite and non-negative between t_data and t_noise.")
    lam = schedule._lam(times)
    if bool(lam.isnan().any()) or not bool((lam.diff() < 0).all()):
        raise ScheduleError("sigma/alpha must increase strictly from t_data to t_noise.")
    return schedule
