"""Exponential integrators: the linear part of the ODE is solved exactly, the model's output is interpolated."""

from __future__ import annotations

from typing import Any

from ..plan import Past
from .base import Solver, register

__all__ = ["DDIM"]


@register("ddim", "dpm_solver_1")
class DDIM(Solver):
    """DDIM: order 1, one evaluation a step [Song et al. 2021, eq. 12 with eta = 0].

    The data estimate D is constant over the step: x_s = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D,
    which is alpha_s D + sigma_s eps. It is DPM-Solver-1 [Lu et al. 2022], exponential Euler in log-SNR, and exact to
    sigma = 0 and from alpha = 0.
    """

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The transfer from t to s."""
        ratio = ode.schedule.sigma(s) / ode.schedule.sigma(t)
        return ratio * x + (ode.schedule.alpha(s) - ode.schedule.alpha(t) * ratio) * ode.data(x, t)
