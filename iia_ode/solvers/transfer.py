"""The exactly solved linear part of the ODE, and integrals of interpolated model outputs over it.

With the noise estimate eps, x / alpha obeys d(x / alpha) = eps d(rho) where rho = sigma / alpha; with the data estimate D,
x / sigma obeys d(x / sigma) = D d(1 / rho). Every exponential integrator, DEIS and pseudo-numerical method interpolates one
of the two in some variable and integrates it over the step:

    noise:  x_s = (alpha_s / alpha_t) x + alpha_s int eps d(rho)
    data:   x_s = (sigma_s / sigma_t) x + sigma_s int D d(1 / rho)
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

from ..schedules import Schedule

__all__ = [
    "Interval",
    "data_step",
    "exponential_moments",
    "fractions",
    "lagrange_integrals",
    "noise_step",
    "noise_weights_in_time",
    "singular",
]

Array = npt.NDArray[np.float64]


def singular(schedule: Schedule, t: float, s: float) -> bool:
    """Whether log-SNR is infinite at an end of the interval: at the data, or where alpha = 0."""
    return not (math.isfinite(schedule.lam(t)) and math.isfinite(schedule.lam(s)))


def data_step(schedule: Schedule, x: Any, data: Any, t: float, s: float) -> Any:
    """x at s if the data estimate is constant from t on; exact to sigma = 0 and from alpha = 0."""
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return ratio * x + (schedule.alpha(s) - schedule.alpha(t) * ratio) * data


def noise_step(schedule: Schedule, x: Any, noise: Any, t: float, s: float) -> Any:
    """x at s if the noise estimate is constant from t on (PNDM's transfer); alpha must not be 0 at t."""
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return ratio * x + (schedule.sigma(s) - schedule.sigma(t) * ratio) * noise


@dataclass(frozen=True)
class Interval:
    """A step in log-SNR, on data or on noise: x_s = keep x + scale int_0^1 H e^(-H (1 - u)) m(u) du.

    m is the model output in the form asked for, u runs linearly in log-SNR from t (0) to s (1). The two forms share every
    formula: H is the step in log-SNR for data, and minus that for noise.

    Attributes
    ----------
    keep : sigma_s / sigma_t for data, alpha_s / alpha_t for noise.
    scale : alpha_s for data, sigma_s for noise.
    H : signed step, not zero and finite.
    """

    keep: float
    scale: float
    H: float

    @classmethod
    def of(cls, schedule: Schedule, form: str, t: float, s: float) -> Interval:
        """The interval from t to s, neither of them :func:`singular`."""
        h = schedule.lam(s) - schedule.lam(t)
        if form == "data":
            return cls(schedule.sigma(s) / schedule.sigma(t), schedule.alpha(s), h)
        return cls(schedule.alpha(s) / schedule.alpha(t), schedule.sigma(s), -h)

    def moments(self, n: int) -> list[float]:
        """scale * int_0^1 H e^(-H (1 - u)) u^k du for k < n: weights of the Taylor terms m, m' , m'' / 2, ... in u."""
        return [self.scale * w for w in exponential_moments(self.H, n)]

    def weights(self, nodes: Sequence[float]) -> list[float]:
        """Weights of outputs at the given u (0 is t, 1 is s, earlier steps are negative): exact for polynomials in u."""
        return [
            self.scale * w for w in lagrange_integrals(nodes, 0.0, 1.0, lambda u: self.H * np.exp(self.H * (u - 1)))
        ]


def fractions(schedule: Schedule, t: float, s: float, times: Sequence[float]) -> list[float]:
    """Where times stand in the step from t (0) to s (1), in log-SNR; earlier steps are negative."""
    start = schedule.lam(t)
    step = schedule.lam(s) - start
    return [(schedule.lam(u) - start) / step for u in times]


def exponential_moments(H: float, n: int) -> list[float]:
    """int_0^1 H e^(-H (1 - u)) u^k du for k < n.

    By quadrature, because the closed forms 1 - e^(-H), 1 - w0 / H, 1 - 2 w1 / H, ... cancel at small H; the first is
    written with expm1.
    """
    u, q = _unit_rule()
    measure = q * H * np.exp(H * (u - 1))
    return [-math.expm1(-H), *(float((measure * u**k).sum()) for k in range(1, n))]


def lagrange_integrals(
    nodes: Sequence[float], a: float, b: float, measure: Callable[[Array], Array] | None = None
) -> list[float]:
    """int_a^b L_j(u) measure(u) du for each Lagrange polynomial L_j on `nodes`."""
    u, q = _unit_rule()
    u, q = a + (b - a) * u, (b - a) * q
    if measure is not None:
        q = q * measure(u)
    return [float((q * basis).sum()) for basis in _lagrange(nodes, u)]


def noise_weights_in_time(schedule: Schedule, nodes: Sequence[float], t: float, s: float) -> list[float]:
    """int L_j(t(rho)) d(rho) over a step, rho = sigma / alpha and L_j on the times `nodes`.

    Integrated in theta = asinh(rho), which is linear in rho near the data and logarithmic far from it, on panels that shrink
    towards the data, where the time of some schedules is nearly singular as a function of rho.
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
