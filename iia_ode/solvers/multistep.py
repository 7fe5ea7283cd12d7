"""Linear multistep methods: one evaluation a step, and the model outputs of earlier steps.

A method here says which form of the output it interpolates and with which weights; the memory, the lower orders of the first
steps and the ends where log-SNR is infinite are the same for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..plan import Past
from ..schedules import Schedule
from .base import Solver, register
from .transfer import (
    Interval,
    check_choice,
    check_order,
    data_step,
    lagrange_integrals,
    noise_weights_in_time,
    singular,
)

__all__ = ["Adams", "DPMSolverMultistep", "Multistep"]


@dataclass(frozen=True)
class Output:
    """A model output and the time that it was made at: what a multistep method remembers."""

    t: float
    value: Any


class Multistep(Solver):
    """Base of the linear multistep methods: ``keep * x + sum_j w_j m_j`` over the newest outputs m_0, m_1, ...

    A subclass has fields ``form`` and ``max_order``, and says the weights. The first steps use what outputs there are.
    """

    form: str
    max_order: int

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order."""
        return self.max_order

    @abstractmethod
    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The factor of x and the weights of the outputs made at `times` (newest first; the step starts at the first)."""

    def first_order(self, schedule: Schedule, t: float, s: float) -> bool:
        """Whether only DDIM's step is possible from t to s."""
        return singular(schedule, t, s)

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The combination, and the outputs that the next step may use."""
        evaluation = ode.evaluate(x, t, self.form)
        # Where alpha = 0 log-SNR is infinite: no polynomial goes through an output made there.
        usable = [output for output in past.memory if ode.schedule.alpha(output.t) > 0]
        if self.first_order(ode.schedule, t, s):
            memory = (Output(t, evaluation.as_form(self.form)), *usable) if ode.schedule.alpha(t) > 0 else ()
            return data_step(ode.schedule, x, evaluation.data, t, s), memory[: self.max_order]
        history = (Output(t, evaluation.as_form(self.form)), *usable)[: self.max_order]
        keep, weights = self.coefficients(ode.schedule, [output.t for output in history], s)
        return keep * x + sum(w * output.value for w, output in zip(weights, history, strict=True)), history


_FORMS = {"log_snr": ("data", "noise"), "rho": ("noise",), "time": ("noise", "velocity")}


@register(
    "expab2",
    variants={
        "expab3": {"max_order": 3},
        "expab4": {"max_order": 4},
        **{f"deis_lab{k}": {"form": "noise", "max_order": k} for k in (1, 2, 3)},
        **{f"deis_tab{k}": {"form": "noise", "variable": "time", "max_order": k} for k in (1, 2, 3)},
        "lms": {"form": "noise", "variable": "rho", "max_order": 4},
        **{f"lms{k}": {"form": "noise", "variable": "rho", "max_order": k} for k in (1, 2, 3)},
        **{f"deis_rhoab{k}": {"form": "noise", "variable": "rho", "max_order": k} for k in (1, 2, 3)},
        **{f"ab{k}": {"form": "velocity", "variable": "time", "max_order": k} for k in (2, 3, 4)},
    },
)
@dataclass(frozen=True)
class Adams(Multistep):
    """Adams-Bashforth with exact weights on any grid: order 1 to 4, one evaluation a step.

    The polynomial in `variable` through the newest outputs is integrated exactly over the step. The choices of form and
    variable are the methods that people know by other names:

    - data or noise in log-SNR: exponential Adams, ``expab2``-``expab4`` and ``deis_lab1``-``deis_lab3``; first order to
      sigma = 0, where log-SNR is infinite [Lu et al. 2022b with the exact weights; Zhang & Chen 2023];
    - noise in rho = sigma/alpha: ``lms`` of k-diffusion, which is DEIS's rhoAB (``deis_rhoab1``-``deis_rhoab3``);
    - noise in time: DEIS's tAB, ``deis_tab1``-``deis_tab3`` [Zhang & Chen 2023, eq. 15];
    - velocity in time: ``ab2``-``ab4``, the classic on dx/dt [Hairer, Norsett, Wanner 1993, section III.5].

    Parameters
    ----------
    form : ``"data"``, ``"noise"`` or ``"velocity"``.
    variable : ``"log_snr"``, ``"rho"`` or ``"time"``; data goes with log_snr, velocity with time.
    max_order : 1 to 4.
    """

    form: str = "data"
    variable: str = "log_snr"
    max_order: int = 2

    def __post_init__(self) -> None:
        check_order("expab2", self.max_order, 4)
        check_choice("expab2", "variable", self.variable, tuple(_FORMS))
        if self.form not in _FORMS[self.variable]:
            raise InputError(
                f"in {self.variable} the form is one of {', '.join(map(repr, _FORMS[self.variable]))}, got {self.form!r}."
            )

    def first_order(self, schedule: Schedule, t: float, s: float) -> bool:
        """In rho and in time sigma = 0 is a point like any other; alpha = 0 is one only for the velocity."""
        if self.form == "velocity":
            return False
        if self.variable == "log_snr":
            return singular(schedule, t, s)
        return schedule.alpha(t) == 0 or schedule.alpha(s) == 0

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The factor of x and the integrals of the Lagrange polynomials."""
        t = times[0]
        if self.form == "velocity":
            return 1.0, lagrange_integrals(times, t, s)
        if self.variable == "log_snr":
            interval, start = Interval.of(schedule, self.form, t, s), schedule.lam(t)
            step = schedule.lam(s) - start
            return interval.keep, interval.weights([(schedule.lam(u) - start) / step for u in times])
        if self.variable == "rho":
            rho = schedule.noise_to_signal
            weights = lagrange_integrals([rho(u) for u in times], rho(t), rho(s))
        else:
            weights = noise_weights_in_time(schedule, times, t, s)
        return schedule.alpha(s) / schedule.alpha(t), [schedule.alpha(s) * w for w in weights]


@register(
    "dpmpp_2m",
    variants={
        "dpmpp_3m": {"max_order": 3},
        "dpm_solver_2m": {"form": "noise"},
        "dpm_solver_3m": {"form": "noise", "max_order": 3},
    },
)
@dataclass(frozen=True)
class DPMSolverMultistep(Multistep):
    """DPM-Solver and DPM-Solver++, multistep, as published: order 2, one evaluation a step, DDIM to sigma = 0.

    On the data estimate (++, [Lu et al. 2022b, alg. 2]) or on the noise. With m_j the outputs, newest first, u_j < 0 where
    they were made in units of the step in log-SNR, and w_k = int_0^1 H e^(-H(1-u)) u^k du:

        2M: keep x + scale (w_0 m_0 + w_0/2 (m_0 - m_1)/(-u_1)),    taylor: w_1 in place of w_0/2
        3M: keep x + scale (w_0 m_0 + w_1 q_1 + w_2/2 q_2),         m_0 + q_1 u + q_2 u^2 through the three newest outputs

    Erratum: the integral of that quadratic has w_2 q_2, twice the last term. Every public implementation of 3M has the half,
    and is therefore of order 2; ``expab3`` has the exact weight, and order 3.

    Parameters
    ----------
    form : ``"data"`` (++) or ``"noise"``.
    max_order : 1, 2 or 3: how many outputs are combined.
    solver_type : of the second order, ``"midpoint"`` or ``"taylor"`` (called "heun" in diffusers), which is ``expab2``.
    """

    form: str = "data"
    max_order: int = 2
    solver_type: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("dpmpp_2m", "form", self.form, ("data", "noise"))
        check_choice("dpmpp_2m", "solver_type", self.solver_type, ("midpoint", "taylor"))
        check_order("dpmpp_2m", self.max_order, 3)

    @property
    def order(self) -> int:  # type: ignore[override]
        """At most 2: the published third-order formula is not of order 3."""
        return min(self.max_order, 2)

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The published weights."""
        interval, start = Interval.of(schedule, self.form, times[0], s), schedule.lam(times[0])
        u = [(schedule.lam(t) - start) / (schedule.lam(s) - start) for t in times]
        w = interval.moments(3)
        if len(u) == 1:
            return interval.keep, [w[0]]
        if len(u) == 2:
            slope = (w[1] if self.solver_type == "taylor" else w[0] / 2) / -u[1]
            return interval.keep, [w[0] + slope, -slope]
        # Newton's form: m_0 + u [m_0, m_1] + u (u - u_1) [m_0, m_1, m_2]; the exact weight of the last divided difference
        # is w_2 - u_1 w_1.
        second = [1 / (u[1] * u[2]), 1 / (u[1] * (u[1] - u[2])), 1 / (u[2] * (u[2] - u[1]))]
        first = [-1 / u[1], 1 / u[1], 0.0]
        last = w[2] / 2 - u[1] * w[1]  # erratum: the published formula has w_2 / 2 here, where w_2 belongs
        return interval.keep, [
            w[0] * (j == 0) + w[1] * a + last * b for j, (a, b) in enumerate(zip(first, second, strict=True))
        ]
