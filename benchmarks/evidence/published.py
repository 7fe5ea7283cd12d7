"""Formulas of public samplers, as published, that lose order, accuracy or consistency to a defect.

Each class implements the published mathematics. An option or a sibling has the corrected formula where one exists.
docs/errata.md describes each defect, and :mod:`.defects` measures it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from iia_ode.solvers import DEISTime, ExponentialAdams, Solver, UniPC
from iia_ode.solvers.transfer import ddim_step, lagrange_weights


@dataclass(frozen=True)
class RosenbrockAdams(Solver):
    """REAB: exponential Adams on what is left of the ODE once the flow of unit-variance data is taken out.

    With u = log(sigma/alpha), r^2 = alpha^2 + sigma^2 and f = alpha x / (sigma r) - D r / sigma:

        x_s = (r_s/r_t) x + r sum_j f_j int e^v / (1 + e^(2v)) l_j(v) dv,    r = r_s, published: r^2 = alpha_s^2 + sigma_t^2

    Parameters
    ----------
    max_order : 1 to 4.
    published : with sigma_t where sigma_s belongs.
    """

    max_order: int = 2
    published: bool = False
    consistent = False

    @property
    def order(self) -> int:
        """max_order; 1 as published."""
        return 1 if self.published else self.max_order

    def step(self, ode, x, t, s, past):
        """The combination of the newest f."""
        alpha, sigma = ode.schedule.alpha, ode.schedule.sigma
        if ode.is_data(s):
            return ddim_step(ode.schedule, x, ode.data(x, t), t, s), ()
        size = math.hypot(alpha(t), sigma(t))
        f = ode.hold(alpha(t) / (sigma(t) * size) * x - size / sigma(t) * ode.data(x, t))
        history = ((-ode.schedule.lam(t), f), *past.memory)[: self.max_order]
        nodes, end = [u for u, _ in history], -ode.schedule.lam(s)
        weights = lagrange_weights(nodes, nodes[0], end, lambda v: 0.5 / np.cosh(v))
        scale = math.hypot(alpha(s), sigma(t if self.published else s))
        moved = sum(scale * w * g for w, (_, g) in zip(weights, history, strict=True))
        return math.hypot(alpha(s), sigma(s)) / size * x + moved, history


@dataclass(frozen=True)
class ClassicRungeKutta(Solver):
    """The classic fourth-order weights on nodes c; the nodes of torchdyn are 0, 0, 1/2, 1/2.

    It is no :class:`iia_ode.RungeKutta`, which refuses a tableau whose rows do not sum to its nodes.
    """

    nodes: tuple[float, ...] = (0.0, 0.5, 0.5, 1.0)
    order = 4

    def step(self, ode, x, t, s, past):
        """x + h (k1 + 2 k2 + 2 k3 + k4) / 6."""
        h, k = s - t, []
        for part, node in zip((0.0, 0.5, 0.5, 1.0), self.nodes, strict=True):
            k.append(ode.velocity(x + part * h * k[-1] if k else x, t + node * h))
        return x + h / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3])


@dataclass(frozen=True)
class HeunPlusPlus(Solver):
    """Heun++: slopes at t, s and the grid point after s, weighted by their noise levels relative to the first one.

    On noise levels t_0, ..., t, s, s', ... they are w2 = s / (3 t_0), w3 = s' / (3 t_0) and 1 - w2 - w3; the last step but one
    has two slopes, with w2 = s / (2 t_0), and the last has one.

    Parameters
    ----------
    spacing : in what the grid is uniform, ``"t"`` or ``"log-SNR"``: a step does not see the grid beyond s.
    """

    spacing: str = "log-SNR"
    order = 1

    def step(self, ode, x, t, s, past):
        """The weighted mean of up to three slopes."""
        (top,) = past.memory or (t,)
        h, first = s - t, ode.velocity(x, t)
        if past.remaining == 0:
            return x + h * first, (top,)
        y = x + h * first
        second = ode.velocity(y, s)
        if past.remaining == 1:
            w = s / (2 * top)
            return x + h * ((1 - w) * first + w * second), (top,)
        after = s * s / t if self.spacing == "log-SNR" else 2 * s - t
        third = ode.velocity(y + (after - s) * second, after)
        w2, w3 = s / (3 * top), after / (3 * top)
        return x + h * ((1 - w2 - w3) * first + w2 * second + w3 * third), (top,)


@dataclass(frozen=True)
class ClosedFormDEIS(ExponentialAdams):
    """DEIS in log(sigma/alpha), order 3, its integrals as differences of an antiderivative in a given precision.

    int (log r - c)(log r - d) dr = r (log^2 r - (c + d + 2) log r + c d + c + d + 2).
    """

    form: str = "noise"
    max_order: int = 3
    precision: str = "float32"

    def coefficients(self, schedule, times, s):
        """The weights, in the precision of the levels."""
        kind = np.dtype(self.precision).type
        start, end, *others = (kind(schedule.noise_to_signal(u)) for u in (times[0], s, *times[1:]))
        logs = [np.log(start), *(np.log(r) for r in others)]
        weights = []
        for j, own in enumerate(logs):
            rest = [c for i, c in enumerate(logs) if i != j]
            scale = math.prod([own - c for c in rest])
            weights.append(float((_antiderivative(end, rest) - _antiderivative(start, rest)) / scale))
        alpha = schedule.alpha(s)
        return alpha / schedule.alpha(times[0]), [alpha * w for w in weights]


def _antiderivative(r, roots):
    """Of the product of (log r - c) over up to two roots c, without its factor."""
    log, one = np.log(r), r.dtype.type(1)
    if len(roots) == 2:
        c, d = roots
        return r * (log * log - (c + d + one + one) * log + c * d + c + d + one + one)
    return r * (log - one - roots[0]) if roots else r


@dataclass(frozen=True)
class StochasticAdams(Solver):
    """SA-Solver without noise: exponential Adams predictor of order p and corrector of order p + 1, on the data.

    x_s = (sigma_s/sigma_t) x + sigma_s sum_j D_j int e^v l_j(v) dv in v = log(alpha/sigma), the integrals of the monomials in
    closed form and in a given precision.
    """

    max_order: int = 3
    precision: str = "float32"
    order = 4

    def step(self, ode, x, t, s, past):
        """Predict, evaluate, correct; the evaluation starts the next step."""
        known = past.memory or ((ode.schedule.lam(t), ode.data(x, t)),)
        outputs = known[: self.max_order]
        y = self._combine(ode.schedule, x, t, s, outputs)
        if past.remaining == 0:
            return y, ()
        outputs = ((ode.schedule.lam(s), ode.data(y, s)), *outputs)
        return self._combine(ode.schedule, x, t, s, outputs), outputs

    def _combine(self, schedule, x, t, s, outputs):
        kind = np.dtype(self.precision).type
        nodes = np.array([v for v, _ in outputs], dtype=kind)
        start, end = kind(schedule.lam(t)), kind(schedule.lam(s))
        moments = [_exponential_moment(start, end, k) for k in range(len(nodes))]
        total = schedule.sigma(s) / schedule.sigma(t) * x
        for j, (_, output) in enumerate(outputs):
            rest = np.delete(nodes, j)
            basis = np.atleast_1d(np.poly(rest))[::-1] / np.prod(nodes[j] - rest)
            weight = sum(c * moment for c, moment in zip(basis, moments, strict=True))
            total = total + schedule.alpha(s) * float(weight) * output
        return total


def _exponential_moment(a, b, k):
    """int_a^b e^(v - b) v^k dv = [sum_j (-1)^(k-j) k!/j! v^j e^(v - b)] from a to b, in the precision of a and b."""
    kind = a.dtype.type
    terms = [kind((-1) ** (k - j) * math.factorial(k) / math.factorial(j)) for j in range(k + 1)]
    at = [sum(c * v**j for j, c in enumerate(terms)) for v in (a, b)]
    return at[1] - at[0] * np.exp(a - b)


@dataclass(frozen=True)
class SummedDEIS(DEISTime):
    """DEIS in time with its integrals as sums over equidistant points, both ends counted whole, in float64.

    Parameters
    ----------
    points : how many.
    """

    points: int = 10_000

    def integrals(self, schedule, times, s):
        """The sums."""
        t = times[0]
        u = torch.linspace(t, s, self.points, dtype=torch.float64)
        alpha, sigma = schedule.alpha(u), schedule.sigma(u)
        slope = (schedule.sigma_prime(u) * alpha - sigma * schedule.alpha_prime(u)) / alpha**2
        weights = []
        for node in times:
            basis = torch.ones_like(u)
            for other in times:
                if other != node:
                    basis = basis * (u - other) / (node - other)
            weights.append(float((slope * basis).sum() * (s - t) / self.points))
        return weights


class SolvedUniPC(UniPC):
    """UniPC with the weight of a single difference solved for, as all others are, in place of the constant 1/2."""

    def _combine(self, interval, x, u, m):
        weights = interval.weights(u)
        return interval.keep * x + sum(w * output for w, output in zip(weights, m, strict=True))
