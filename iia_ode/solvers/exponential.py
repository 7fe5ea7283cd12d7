"""Singlestep exponential integrators: the linear part of the ODE is solved exactly, and no output is kept between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import check_choice, check_number, check_whole
from ..errors import InputError
from ..plan import Past
from .base import Solver, register
from .transfer import ExponentialStep, ddim_step, first_order_step, is_singular, log_snr_fractions, noise_step

__all__ = ["DDIM", "SinglestepDPMSolver"]


@register("ddim", "dpm_solver_1")
class DDIM(Solver):
    """DDIM: order 1, one evaluation a step [Song et al. 2021, eq. 12 with eta = 0].

    The data estimate D is constant over the step: x_s = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D
    = alpha_s D + sigma_s eps. DDIM is DPM-Solver-1 [Lu et al. 2022], exponential Euler in log-SNR, and exact to sigma = 0 and
    from alpha = 0.
    """

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """DDIM's transfer from t to s."""
        return first_order_step(ode, x, t, s)


@register(
    "dpmpp_2s",
    variants={
        "dpmpp_3s": {"max_order": 3},
        "dpm_solver_2s": {"form": "noise"},
        "dpm_solver_3s": {"form": "noise", "max_order": 3},
    },
)
@dataclass(frozen=True)
class SinglestepDPMSolver(Solver):
    """DPM-Solver and DPM-Solver++, singlestep: order 2 or 3, as many evaluations a step, DDIM to sigma = 0.

    The method is exponential Runge-Kutta in log-SNR with stages at fractions r1 < r2 of the step, on the noise estimate
    (DPM-Solver-2, -3 [Lu et al. 2022a, alg. 1, 2]) or on the data estimate (DPM-Solver++(2S) [Lu et al. 2022b, alg. 1]). With
    the output m_i at stage i, the step H in log-SNR (negative for noise) and w_k = int_0^1 H e^(-H(1-u)) u^k du:

        2: keep x + scale (w_0 m_0 + w_0 / (2 r1) (m_1 - m_0)),   taylor: w_1 / r1 in place of w_0 / (2 r1)
        3: keep x + scale (w_0 m_0 + w_1 / r2 (m_2 - m_0)),       taylor: the quadratic through m_0, m_1, m_2, integrated

    The third order needs r2 = 2/3 in both versions: elsewhere the error of the first stage lowers the order to 2.

    Parameters
    ----------
    form : ``"data"`` (++) or ``"noise"``.
    max_order : 1, 2 or 3.
    r1, r2 : stages as fractions of the step in log-SNR; by default 1/2, or 1/3 and 2/3.
    solver_type : ``"midpoint"`` as published, or ``"taylor"``.
    spacing : ``"log_snr"``, or ``"time"`` for stages evenly spaced in t (r1 and r2 are then ignored).
    """

    form: str = "data"
    max_order: int = 2
    r1: float | None = None
    r2: float | None = None
    solver_type: str = "midpoint"
    spacing: str = "log_snr"

    def __post_init__(self) -> None:
        check_choice("form of dpmpp_2s", self.form, ("data", "noise"))
        check_choice("solver_type of dpmpp_2s", self.solver_type, ("midpoint", "taylor"))
        check_choice("spacing of dpmpp_2s", self.spacing, ("log_snr", "time"))
        check_whole("max_order of dpmpp_2s", self.max_order, least=1, most=3)
        for name in ("r1", "r2"):
            if getattr(self, name) is not None:
                check_number(f"{name} of dpmpp_2s", getattr(self, name), above=0, below=1)
        if self.max_order == 3 and not self._fractions[0] < self._fractions[1]:
            raise InputError(f"the stages of dpmpp_3s must be in order, r1 < r2; got {self._fractions}.")

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order; 2 for the third-order formula with r2 other than 2/3."""
        return 2 if self.max_order == 3 and abs(self._fractions[1] - 2 / 3) > 1e-9 else self.max_order

    @property
    def _fractions(self) -> list[float]:
        defaults = [k / self.max_order for k in range(1, self.max_order)]
        given = (self.r1, self.r2)[: len(defaults)]
        return [d if r is None or self.spacing == "time" else r for r, d in zip(given, defaults, strict=True)]

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """One exponential Runge-Kutta step from t to s."""
        schedule = ode.schedule
        if self.max_order == 1 or is_singular(schedule, t, s):
            return first_order_step(ode, x, t, s)
        if self.spacing == "time":
            times = [t + r * (s - t) for r in self._fractions]
            stages = log_snr_fractions(schedule, t, s, times)
        else:
            start, end = schedule.lam(t), schedule.lam(s)
            stages = self._fractions
            times = [schedule.t_of_lam(start + r * (end - start)) for r in stages]
        m = [ode.as_form(x, t, self.form)]
        first = ddim_step if self.form == "data" else noise_step
        m.append(ode.as_form(first(schedule, x, m[0], t, times[0]), times[0], self.form))
        whole, r1 = ExponentialStep.of(schedule, self.form, t, s), stages[0]
        w = whole.moments(2)
        if self.max_order == 2:
            slope = (w[1] if self.solver_type == "taylor" else w[0] / 2) / r1
            return whole.keep * x + w[0] * m[0] + slope * (m[1] - m[0])
        r2, part = stages[1], ExponentialStep.of(schedule, self.form, t, times[1])
        v = part.moments(2)
        inner = part.keep * x + v[0] * m[0] + v[1] * r2 / r1 * (m[1] - m[0])
        m.append(ode.as_form(inner, times[1], self.form))
        if self.solver_type == "midpoint":
            return whole.keep * x + w[0] * m[0] + w[1] / r2 * (m[2] - m[0])
        weights = whole.weights([0.0, r1, r2])
        return whole.keep * x + sum(weight * output for weight, output in zip(weights, m, strict=True))
