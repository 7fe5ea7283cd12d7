r"""The parts of an exponential integrator: the exact linear transfer, phi-functions, and weights of interpolated outputs.

With the noise estimate eps, x / alpha obeys d(x / alpha) = eps d(rho), where rho = sigma / alpha; with the data estimate D,
x / sigma obeys d(x / sigma) = D d(1 / rho). Exponential integrators, DEIS and pseudo-numerical methods interpolate eps or D
in some variable and integrate the interpolant over the step from t to s:

    noise:  x_s = (alpha_s / alpha_t) x + alpha_s int eps d(rho)
    data:   x_s = (sigma_s / sigma_t) x + sigma_s int D d(1 / rho)

:func:`ddim_step` and :func:`noise_step` are the transfers for a constant output, :func:`first_order_step` chooses between
them, and :class:`ExponentialStep` is the transfer for outputs interpolated in log-SNR. The following solver has order 2 and
makes one evaluation a step. It falls back to DDIM on its first step and on steps with infinite log-SNR::

    from iia_ode.solvers import ExponentialStep, ddim_step, first_order_step, is_singular, log_snr_fractions


    class Two(iia.Solver):
        order = 2

        def step(self, ode, x, t, s, past):
            schedule = ode.schedule
            if is_singular(schedule, t, s):
                return first_order_step(ode, x, t, s)
            data = ode.data(x, t)
            if not past.memory:
                return ddim_step(schedule, x, data, t, s), (t, data)
            before, earlier = past.memory
            step = ExponentialStep.of(schedule, "data", t, s)
            w = step.weights([0.0, *log_snr_fractions(schedule, t, s, [before])])
            return step.keep * x + w[0] * data + w[1] * earlier, (t, data)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..checks import check_number, check_whole
from ..errors import GridError
from ..schedules import Schedule

__all__ = [
    "ExponentialStep",
    "ddim_step",
    "exponential_moments",
    "first_order_step",
    "is_singular",
    "lagrange_weights",
    "log_snr_fractions",
    "noise_step",
    "noise_weights",
    "phi_functions",
]

Array = npt.NDArray[np.float64]


def is_singular(schedule: Schedule, t: float, s: float) -> bool:
    """Whether log-SNR is infinite at an end of the interval: at the data (sigma = 0), or where alpha = 0."""
    return not (math.isfinite(schedule.lam(t)) and math.isfinite(schedule.lam(s)))


def ddim_step(schedule: Schedule, x: Any, data: Any, t: float, s: float) -> Any:
    """DDIM's step from t to s, exact for a constant data estimate D.

    x_s = (sigma_s / sigma_t) x + (alpha_s - alpha_t sigma_s / sigma_t) D.

    The step is finite to sigma = 0, where it returns alpha_s D, and from alpha = 0. Every exponential method falls back to
    this step.

    Parameters
    ----------
    schedule : the noise schedule.
    x, data : state and data estimate at t; tensors [B, ...], or the symbolic vectors of a plan.
    t, s : times; sigma must not be 0 at t, since the data estimate does not determine the noise there. For such a step see
        :func:`first_order_step`.

    Raises
    ------
    GridError : sigma is 0 at t.
    """
    if schedule.sigma(t) == 0:
        raise GridError(
            f"DDIM's step on the data estimate cannot start at the data (t = {t:g}, sigma = 0): use first_order_step, or "
            "noise_step with ode.noise(x, t)."
        )
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return ratio * x + (schedule.alpha(s) - schedule.alpha(t) * ratio) * data


def first_order_step(ode: Any, x: Any, t: float, s: float) -> Any:
    """Take DDIM's step from t to s with the model's output at t; one evaluation, valid from every time of a schedule.

    The step is :func:`ddim_step` on the data estimate. Where t is the data (sigma = 0), the step is :func:`noise_step` on the
    noise estimate, because the data estimate is the state itself there and does not determine the noise.

    Parameters
    ----------
    ode : the ODE of a solver's step.
    x : state at t; a tensor [B, ...], or a symbolic vector of a plan.
    t, s : times.
    """
    if ode.is_data(t):
        return noise_step(ode.schedule, x, ode.noise(x, t), t, s)
    return ddim_step(ode.schedule, x, ode.data(x, t), t, s)


def noise_step(schedule: Schedule, x: Any, noise: Any, t: float, s: float) -> Any:
    """The step from t to s, exact for a constant noise estimate eps.

    x_s = (alpha_s / alpha_t) x + (sigma_s - sigma_t alpha_s / alpha_t) eps.

    PNDM calls the step its transfer [Liu et al. 2022]. Where ``noise`` is the noise of the data estimate, the step equals
    :func:`ddim_step`.

    Parameters
    ----------
    schedule : the noise schedule.
    x, noise : state and noise estimate at t; tensors [B, ...], or the symbolic vectors of a plan.
    t, s : times; alpha must not be 0 at t.
    """
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return ratio * x + (schedule.sigma(s) - schedule.sigma(t) * ratio) * noise


@dataclass(frozen=True)
class ExponentialStep:
    """A step in log-SNR on data or on noise: x_s = keep x + scale int_0^1 H e^(-H (1 - u)) m(u) du.

    m is the model output in the form ``"data"`` or ``"noise"``; u runs linearly in log-SNR from t (u = 0) to s (u = 1). Both
    forms have the same formulas: H is the step in log-SNR for data, and its negative for noise.

    Attributes
    ----------
    keep : sigma_s / sigma_t for data, alpha_s / alpha_t for noise.
    scale : alpha_s for data, sigma_s for noise.
    H : signed step, finite and not zero.
    """

    keep: float
    scale: float
    H: float

    @classmethod
    def of(cls, schedule: Schedule, form: str, t: float, s: float) -> ExponentialStep:
        """The step from t to s on outputs of the form ``"data"`` or ``"noise"``; no end may be singular."""
        h = schedule.lam(s) - schedule.lam(t)
        if form == "data":
            return cls(schedule.sigma(s) / schedule.sigma(t), schedule.alpha(s), h)
        return cls(schedule.alpha(s) / schedule.alpha(t), schedule.sigma(s), -h)

    def moments(self, n: int) -> list[float]:
        """Weights of the Taylor terms m, m', m'' / 2, ... in u: scale int_0^1 H e^(-H (1 - u)) u^k du for k < n.

        In phi-functions the weight k is scale H k! phi_{k+1}(-H).
        """
        return [self.scale * w for w in exponential_moments(self.H, n)]

    def weights(self, nodes: Sequence[float]) -> list[float]:
        """Weights of the outputs at the nodes u (0 is t, 1 is s, earlier steps are negative).

        With n nodes the step is exact for outputs that are polynomials of degree n - 1 in u.
        """
        return [self.scale * w for w in lagrange_weights(nodes, 0.0, 1.0, lambda u: self.H * np.exp(self.H * (u - 1)))]


def log_snr_fractions(schedule: Schedule, t: float, s: float, times: Sequence[float]) -> list[float]:
    """The positions u of `times` in the step from t (u = 0) to s (u = 1), linear in log-SNR; earlier steps are negative."""
    start = schedule.lam(t)
    step = schedule.lam(s) - start
    return [(schedule.lam(u) - start) / step for u in times]


def phi_functions(z: float, n: int) -> list[float]:
    """phi_1(z), ..., phi_n(z) with phi_k(z) = int_0^1 e^(z (1 - u)) u^(k-1) / (k-1)! du [Hochbruck & Ostermann 2010].

    phi_1(z) = (e^z - 1) / z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z, and phi_k(0) = 1/k!. The recursion cancels at small z, so
    the integrals are computed by quadrature, to rounding for abs(z) up to about 40.

    Parameters
    ----------
    z : argument; a step of length h in log-SNR has z = -h on data and z = h on noise.
    n : number of functions, from 1.

    Raises
    ------
    InputError : z is not a finite number, or n is not a positive whole number.
    """
    z, n = check_number("z", z), check_whole("n", n, least=1)
    u, q = _unit_rule()
    decay = q * np.exp(z * (1 - u))
    first = math.expm1(z) / z if z else 1.0
    return [first, *(float((decay * u**k).sum()) / math.factorial(k) for k in range(1, n))]


def exponential_moments(H: float, n: int) -> list[float]:
    """int_0^1 H e^(-H (1 - u)) u^k du for k < n: H k! phi_{k+1}(-H).

    The integrals are computed by quadrature, because the closed forms 1 - e^(-H), 1 - w0 / H, 1 - 2 w1 / H, ... cancel at
    small H; the first moment is written with expm1.
    """
    u, q = _unit_rule()
    measure = q * H * np.exp(H * (u - 1))
    return [-math.expm1(-H), *(float((measure * u**k).sum()) for k in range(1, n))]


def lagrange_weights(
    nodes: Sequence[float], a: float, b: float, measure: Callable[[Array], Array] | None = None
) -> list[float]:
    """int_a^b L_j(u) measure(u) du for each Lagrange polynomial L_j on `nodes`: weights of values at the nodes.

    Parameters
    ----------
    nodes : distinct positions of the values; they may lie outside of [a, b].
    a, b : ends of the integral.
    measure : density as a function of a float64 array; 1 by default, which gives the weights of Adams methods.
    """
    u, q = _unit_rule()
    u, q = a + (b - a) * u, (b - a) * q
    if measure is not None:
        q = q * measure(u)
    return [float((q * basis).sum()) for basis in _lagrange(nodes, u)]


def noise_weights(schedule: Schedule, nodes: Sequence[float], t: float, s: float) -> list[float]:
    """int L_j(t(rho)) d(rho) over the step from t to s, with rho = sigma / alpha and L_j on the times `nodes`.

    These are the weights of DEIS for noise estimates that are interpolated in time [Zhang & Chen 2023].

    The integral runs in theta = asinh(rho), which is linear in rho near the data and logarithmic far from the data. Its panels
    shrink towards the data, where the time of some schedules is nearly singular as a function of rho.
    """
    first, last = (math.asinh(schedule.noise_to_signal(u)) for u in (t, s))
    top, end = max(first, last), min(first, last)
    panels = [top]
    while panels[-1] > max(2 * end, 1e-3 * top):
        panels.append(panels[-1] / 2)
    panels.append(end)
    u, q = _unit_rule()
    theta = np.concatenate([b + (a - b) * u for a, b in zip(panels, panels[1:], strict=False)])
    steps = np.concatenate([(a - b) * q for a, b in zip(panels, panels[1:], strict=False)])
    rho = np.sinh(theta)
    times = schedule.t_of_lam(torch.from_numpy(-np.log(rho))).numpy()
    measure = steps * np.cosh(theta) * (1.0 if last > first else -1.0)
    return [float((measure * basis).sum()) for basis in _lagrange(nodes, times)]


def _lagrange(nodes: Sequence[float], u: Array) -> list[Array]:
    return [
        np.prod([(u - other) / (node - other) for other in nodes if other != node], axis=0) + np.zeros_like(u)
        for node in nodes
    ]


@cache
def _unit_rule() -> tuple[Array, Array]:
    """Gauss-Legendre on [0, 1]; 48 points integrate e^(H u) times a cubic to rounding for |H| up to about 40."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    return (nodes + 1) / 2, weights / 2
