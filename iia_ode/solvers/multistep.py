"""Linear multistep methods: one evaluation per step, combined with the model outputs of earlier steps.

A method defines the interpolated form of the output and the weights. :class:`Multistep` has the common part: the memory, the
lower orders of the first steps, and the steps with infinite log-SNR at an end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import check_choice, check_whole
from ..plan import Past
from ..schedules import Schedule
from .base import Solver, register
from .transfer import ExponentialStep, first_order_step, is_singular, lagrange_weights, log_snr_fractions, noise_weights

__all__ = ["LMS", "AdamsBashforth", "DEISTime", "DPMSolverMultistep", "ExponentialAdams", "Multistep"]


@dataclass(frozen=True)
class Output:
    """A model output and its time, the memory of a multistep method."""

    t: float
    value: Any


class Multistep(Solver):
    """Base of the linear multistep methods: ``keep * x + sum_j w_j m_j`` over the newest outputs m_0, m_1, ...

    A subclass has fields ``form`` and ``max_order``, and defines the weights in :meth:`coefficients`. The first steps use the
    outputs available.
    """

    form: str
    max_order: int

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order."""
        return self.max_order

    @abstractmethod
    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The factor of x and the weights of the outputs at `times`, newest first; the step starts at ``times[0]``."""

    def first_order(self, schedule: Schedule, t: float, s: float) -> bool:
        """Whether the step from t to s must be DDIM's."""
        return is_singular(schedule, t, s)

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The combination, and the outputs for the next step."""
        if self.first_order(ode.schedule, t, s):
            # The memory is cleared: no polynomial passes through an output at infinite log-SNR.
            return first_order_step(ode, x, t, s), ()
        now = Output(t, ode.as_form(x, t, self.form))
        history = (now, *past.memory)[: self.max_order]
        keep, weights = self.coefficients(ode.schedule, [output.t for output in history], s)
        return keep * x + sum(w * output.value for w, output in zip(weights, history, strict=True)), history


@register(
    "expab2",
    variants={
        "expab3": {"max_order": 3},
        "expab4": {"max_order": 4},
        **{f"deis_lab{k}": {"form": "noise", "max_order": k} for k in (1, 2, 3)},
    },
)
@dataclass(frozen=True)
class ExponentialAdams(Multistep):
    """Exponential Adams-Bashforth: order 2 to 4, one evaluation a step, DDIM to sigma = 0 [Hochbruck & Ostermann 2010].

    The polynomial in log-SNR through the newest outputs is integrated exactly over the step. The multistep formulas of
    DPM-Solver++ approximate the method on the data estimate. The formulas of DPM-Solver approximate the method on the noise
    estimate. On the noise estimate the method is DEIS in log-SNR, ``deis_lab1``-``deis_lab3`` [Lu et al. 2022b; Zhang & Chen
    2023].

    Parameters
    ----------
    form : ``"data"`` or ``"noise"``.
    max_order : 1 to 4.
    """

    form: str = "data"
    max_order: int = 2

    def __post_init__(self) -> None:
        check_choice("form of expab2", self.form, ("data", "noise"))
        check_whole("max_order of expab2", self.max_order, least=1, most=4)

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The integrals of the Lagrange polynomials in log-SNR."""
        interval = ExponentialStep.of(schedule, self.form, times[0], s)
        return interval.keep, interval.weights(log_snr_fractions(schedule, times[0], s, times))


class _OverRho(Multistep):
    """Base of methods that integrate the noise estimate over rho = sigma/alpha; sigma = 0 is an ordinary point of rho."""

    form = "noise"

    @abstractmethod
    def integrals(self, schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
        """int L_j d(rho) over the step to s, for each Lagrange polynomial on the method's variable at `times`."""

    def first_order(self, schedule: Schedule, t: float, s: float) -> bool:
        """Only alpha = 0 is a singular point of rho."""
        return schedule.alpha(t) == 0 or schedule.alpha(s) == 0

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The coefficients of x_s = (alpha_s/alpha_t) x + alpha_s int eps d(rho)."""
        scale = schedule.alpha(s)
        return scale / schedule.alpha(times[0]), [scale * w for w in self.integrals(schedule, times, s)]


@register(
    "lms",
    variants={f"{name}{k}": {"max_order": k} for name in ("lms", "deis_rhoab") for k in (1, 2, 3)},
)
@dataclass(frozen=True)
class LMS(_OverRho):
    """LMS of k-diffusion, DEIS's rho-AB: order 1 to 4, one evaluation a step, to sigma = 0 too [Zhang & Chen 2023].

    The polynomial in rho = sigma/alpha through the newest noise estimates is integrated exactly: variable-step
    Adams-Bashforth for d(x/alpha) = eps d(rho) [Hairer, Norsett, Wanner 1993, section III.5].

    Parameters
    ----------
    max_order : 1 to 4.
    """

    max_order: int = 4

    def __post_init__(self) -> None:
        check_whole("max_order of lms", self.max_order, least=1, most=4)

    def integrals(self, schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
        """Integrals of the Lagrange polynomials in rho."""
        nodes = [schedule.noise_to_signal(u) for u in times]
        return lagrange_weights(nodes, nodes[0], schedule.noise_to_signal(s))


@register("deis_tab3", variants={f"deis_tab{k}": {"max_order": k} for k in (1, 2)})
@dataclass(frozen=True)
class DEISTime(_OverRho):
    """DEIS's t-AB: order 1 to 4, one evaluation a step, to sigma = 0 too [Zhang & Chen 2023, eq. 15].

    The polynomial in the schedule's own time through the newest noise estimates is integrated exactly over rho = sigma/alpha.
    Numbers in the names are orders; DEIS's paper counts the degree of the polynomial.

    Parameters
    ----------
    max_order : 1 to 4.
    """

    max_order: int = 3

    def __post_init__(self) -> None:
        check_whole("max_order of deis_tab3", self.max_order, least=1, most=4)

    def integrals(self, schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
        """Integrals over rho of the Lagrange polynomials in time."""
        return noise_weights(schedule, times, times[0], s)


@register("ab4", variants={f"ab{k}": {"max_order": k} for k in (2, 3)})
@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """Variable-step Adams-Bashforth on dx/dt: order 1 to 4, one evaluation a step [Hairer, Norsett, Wanner 1993, III.5].

    The polynomial in t through the newest velocities is integrated exactly over the step, including the step to sigma = 0. The
    schedule enters through the velocity only, so the method is the natural choice for flow matching.

    Parameters
    ----------
    max_order : 1 to 4.
    """

    max_order: int = 4
    form = "velocity"

    def __post_init__(self) -> None:
        check_whole("max_order of ab4", self.max_order, least=1, most=4)

    def first_order(self, schedule: Schedule, t: float, s: float) -> bool:
        """False: the velocity has no singular point."""
        return False

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The integrals of the Lagrange polynomials in t."""
        return 1.0, lagrange_weights(times, times[0], s)


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

    The method works on the data estimate (++, [Lu et al. 2022b, alg. 2]) or on the noise. With the outputs m_j, newest first,
    their positions u_j < 0 in units of the step in log-SNR, and w_k = int_0^1 H e^(-H(1-u)) u^k du:

        2M: keep x + scale (w_0 m_0 + w_0/2 (m_0 - m_1)/(-u_1)),    taylor: w_1 in place of w_0/2
        3M: keep x + scale (w_0 m_0 + w_1 q_1 + w_2/2 q_2),         m_0 + q_1 u + q_2 u^2 through the three newest outputs

    Erratum: the integral of the quadratic has w_2 q_2, twice the last term. Every public implementation of 3M has the halved
    term, and therefore order 2; ``expab3`` has the exact weight, and order 3.

    Parameters
    ----------
    form : ``"data"`` (++) or ``"noise"``.
    max_order : number of combined outputs, 1, 2 or 3.
    solver_type : second-order formula, ``"midpoint"`` or ``"taylor"`` ("heun" in diffusers, here ``expab2``).
    """

    form: str = "data"
    max_order: int = 2
    solver_type: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("form of dpmpp_2m", self.form, ("data", "noise"))
        check_choice("solver_type of dpmpp_2m", self.solver_type, ("midpoint", "taylor"))
        check_whole("max_order of dpmpp_2m", self.max_order, least=1, most=3)

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order, at most 2: the published third-order formula has order 2."""
        return min(self.max_order, 2)

    def coefficients(self, schedule: Schedule, times: Sequence[float], s: float) -> tuple[float, list[float]]:
        """The published weights."""
        interval, u = (
            ExponentialStep.of(schedule, self.form, times[0], s),
            log_snr_fractions(schedule, times[0], s, times),
        )
        w = interval.moments(3)
        if len(u) == 1:
            return interval.keep, [w[0]]
        if len(u) == 2:
            slope = (w[1] if self.solver_type == "taylor" else w[0] / 2) / -u[1]
            return interval.keep, [w[0] + slope, -slope]
        # Newton's form is m_0 + u [m_0, m_1] + u (u - u_1) [m_0, m_1, m_2]. The exact weight of the last divided difference
        # is w_2 - u_1 w_1.
        second = [1 / (u[1] * u[2]), 1 / (u[1] * (u[1] - u[2])), 1 / (u[2] * (u[2] - u[1]))]
        first = [-1 / u[1], 1 / u[1], 0.0]
        last = w[2] / 2 - u[1] * w[1]  # erratum: the published formula has w_2 / 2 in place of w_2
        return interval.keep, [
            w[0] * (j == 0) + w[1] * a + last * b for j, (a, b) in enumerate(zip(first, second, strict=True))
        ]
