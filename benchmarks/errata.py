"""Defects of public samplers, and the measured orders that show them: python benchmarks/errata.py [--quick].

Each published formula is written here from its mathematics, beside the one that it should be, and both are measured on
problems with known solutions. The tables go to docs/results/errata.md and the figure to docs/images/errata.png; docs/errata.md
says where the formulas are found. With --quick one problem per formula is measured, and nothing is written.
"""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import iia_ode as iia
from iia_ode.experiments import get_setting
from iia_ode.forms import conversion
from iia_ode.metrics import rmse
from iia_ode.plan import Combine
from iia_ode.plan.instructions import run_code
from iia_ode.solvers import PNDM, DEISTime, DPMSolverMultistep, ExponentialAdams, Solver, UniPC, as_solver
from iia_ode.solvers.transfer import data_step, lagrange_integrals
from iia_ode.testing.cases import SCHEDULES, TRACKS, Track, draw, gaussian, model_of, rms
from iia_ode.testing.orders import local_slopes, measure_order
from iia_ode.testing.upstream import (
    DDIMAsInDiffusers,
    IPNDMDropsFirstEstimate,
    IPNDMvAsPublished,
)

ROOT = Path(__file__).resolve().parent.parent
TABLES, FIGURE = ROOT / "docs/results/errata.md", ROOT / "docs/images/errata.png"
EDM, VP = iia.EDM(), iia.VP()
UNIFORM, LOG_SNR, _ = TRACKS


# ---- formulas --------------------------------------------------------------------------------------------------------


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
            return data_step(ode.schedule, x, ode.data(x, t), t, s), ()
        size = math.hypot(alpha(t), sigma(t))
        f = ode.hold(alpha(t) / (sigma(t) * size) * x - size / sigma(t) * ode.data(x, t))
        history = ((-ode.schedule.lam(t), f), *past.memory)[: self.max_order]
        nodes, end = [u for u, _ in history], -ode.schedule.lam(s)
        weights = lagrange_integrals(nodes, nodes[0], end, lambda v: 0.5 / np.cosh(v))
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


# ---- orders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderRow:
    """A published formula beside the one that has the order claimed for it.

    Attributes
    ----------
    section : of docs/errata.md.
    name, claimed : as published.
    published, correct : how both are measured; `published` may depend on what the grid is uniform in.
    here : what this library has.
    schedules : where the published formula is defined.
    keeps_order : whether the defect leaves the order as it is.
    """

    section: str
    name: str
    claimed: int
    published: Solver | str | Callable[[str], Solver]
    correct: Solver | str
    here: str
    schedules: tuple[iia.Schedule, ...] = SCHEDULES
    keeps_order: bool = False

    def published_on(self, track: Track) -> Solver:
        """The published formula, for grids of a track."""
        known = isinstance(self.published, Solver | str)
        return as_solver(self.published) if known else self.published(track.spacing)


TORCHDYN_NODES = (0.0, 0.0, 0.5, 0.5)
ORDERS = (
    OrderRow("third-order-multistep-dpm-solver", "DPM-Solver++(3M)", 3, "dpmpp_3m", "expab3", "expab3"),
    OrderRow("third-order-multistep-dpm-solver", "DPM-Solver-3M", 3, "dpm_solver_3m", "deis_lab3", "deis_lab3"),
    OrderRow("reab", "REAB, order 2", 2, RosenbrockAdams(2, published=True), RosenbrockAdams(2), "expab2"),
    OrderRow("reab", "REAB, order 3", 3, RosenbrockAdams(3, published=True), RosenbrockAdams(3), "expab3"),
    OrderRow("ipndm-v", "iPNDM-v, order 4", 4, IPNDMvAsPublished(max_order=4), "lms", "lms"),
    OrderRow("ipndm-v", "iPNDM-v, order 3", 3, IPNDMvAsPublished(max_order=3), "lms3", "lms3", keeps_order=True),
    OrderRow("weights-of-a-uniform-grid", "iPNDM, order 4", 4, "ipndm", "lms", "lms"),
    OrderRow("weights-of-a-uniform-grid", "F-PNDM", 4, "fpndm", "lms", "lms"),
    OrderRow("nodes-of-runge-kutta-methods", "rk4 of torchdyn", 4, ClassicRungeKutta(TORCHDYN_NODES), "rk4", "rk4"),
    OrderRow("heun", "Heun++", 2, HeunPlusPlus, "heun3", "heun3", schedules=(EDM,)),
    OrderRow(
        "a-constant-in-unipc",
        "UniP-2",
        2,
        UniPC(2, corrector=False),
        SolvedUniPC(2, corrector=False),
        "as published",
        keeps_order=True,
    ),
    OrderRow("a-constant-in-unipc", "UniPC-1", 2, UniPC(1), SolvedUniPC(1), "as published", keeps_order=True),
)


def least_order(solver: Solver, schedule: iia.Schedule, tracks: Sequence[Track] = TRACKS) -> float:
    """The least order that a solver shows on a schedule: over both problems and all grids, start-up steps aside."""
    return min(m.order for track in tracks for m in measure_order(solver, schedule, track))


def orders(row: OrderRow, tracks: Sequence[Track] = TRACKS) -> tuple[float, float]:
    """Least measured orders of the published and the correct formula."""
    published = min(least_order(row.published_on(k), s, [k]) for s in row.schedules for k in tracks)
    return published, min(least_order(as_solver(row.correct), s, tracks) for s in SCHEDULES)


def final_error(solver, schedule, grid, *, exact_start=False, level=None) -> float:
    """RMS error of the final state on Gaussian data, relative to its size.

    Parameters
    ----------
    solver, schedule, grid : what is run.
    exact_start : overwrite the states of the first quarter of the grid by the exact ones.
    level : the time of the noise level that the model is evaluated at, by the solver's time.
    """
    problem, n = gaussian(), len(grid) - 1
    plan = iia.trace(as_solver(solver), schedule, grid, consistent=False)
    start, x = float(grid[0]), draw(problem, 8, schedule, float(grid[0]))
    values = {0: x}
    for k, ins in run_code(plan.code, values, _model(problem, schedule, level), last_use=plan.last_use):
        if exact_start and isinstance(ins, Combine) and ins.step is not None and ins.step <= n // 4:
            values[k] = problem.flow(x, schedule, start, float(grid[ins.step]))
    exact = problem.flow(x, schedule, start, float(grid[-1]))
    return rms(values[len(plan.code)] - exact) / rms(exact)


def _model(problem, schedule, level):
    if level is None:
        return model_of(problem, schedule)
    noise = model_of(problem, schedule)

    def model(x, t, form):
        p, q = conversion(schedule, t, "noise", form)
        return p * x + q * noise(x, level(t), "noise")

    return model


def quick_order(solver: Solver | str, schedule: iia.Schedule = EDM, counts: Sequence[int] = (96, 192)) -> float:
    """The order on Gaussian data, on grids uniform in log-SNR."""
    errors = [final_error(solver, schedule, LOG_SNR.grid(schedule, n), exact_start=True) for n in counts]
    return local_slopes(counts, errors)[-1]


def uneven(n: int) -> torch.Tensor:
    """Noise levels whose steps in log-SNR are in the ratio 2 : 1 : 2 : 1 ..."""
    grid = LOG_SNR.grid(EDM, 3 * n // 2)
    return grid[[i for i in range(len(grid)) if i % 3 != 1]]


def tableau_order(a, b, c, *, autonomous=False, counts=(48, 96)) -> float:
    """The order of a Runge-Kutta method, implicit or not, on the velocity of Gaussian data on VP.

    That velocity is affine in the state, so that the stages solve a linear system. With `autonomous`, it is taken as it is at
    the start of the grid, all the way.
    """
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    problem, errors = gaussian(), []
    for n in counts:
        grid = UNIFORM.grid(VP, n).tolist()
        model = model_of(problem, VP)
        x = x0 = draw(problem, 8, VP, grid[0])
        zero, one = torch.zeros(1, *problem.shape).double(), torch.ones(1, *problem.shape).double()
        for t, s in zip(grid, grid[1:], strict=False):
            h = s - t
            times = [grid[0] if autonomous else t + node * h for node in c]
            offset = torch.cat([model(zero, u, "velocity") for u in times])  # [stages, dimensions]
            gain = torch.cat([model(one, u, "velocity") for u in times]) - offset
            system = torch.eye(len(b)).double() - h * gain.T.unsqueeze(-1) * a  # [dimensions, stages, stages]
            right = gain.T * x.unsqueeze(-1) + offset.T  # [batch, dimensions, stages]
            x = x + h * torch.linalg.solve(system.expand(len(x), -1, -1, -1), right) @ b
        exact = problem.flow(x0, VP, grid[0], grid[-1])
        if autonomous:
            offset = model(zero, grid[0], "velocity")
            gain = model(one, grid[0], "velocity") - offset
            growth = (gain * (grid[-1] - grid[0])).exp()
            exact = growth * x0 + (growth - 1) / gain * offset
        errors.append(rms(x - exact) / rms(exact))
    return local_slopes(counts, errors)[-1]


ROOT_3 = math.sqrt(3)
GAUSS_LEGENDRE = [[1 / 4, 1 / 4 - ROOT_3 / 6], [1 / 4 + ROOT_3 / 6, 1 / 4]], [1 / 2, 1 / 2]
CLASSIC = [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]
TABLEAUS = {
    "gl4 of torchdiffeq": (GAUSS_LEGENDRE, [1 / 2 - ROOT_3 / 6] * 2, [1 / 2 - ROOT_3 / 6, 1 / 2 + ROOT_3 / 6]),
    "rk4 of torchdyn": (CLASSIC, TORCHDYN_NODES, (0.0, 0.5, 0.5, 1.0)),
}
"""Rows and weights, published nodes, correct nodes."""


# ---- errors ----------------------------------------------------------------------------------------------------------

COUNTS = (20, 60, 150, 300, 600)
DISCRETE = iia.Discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))


@dataclass(frozen=True)
class ErrorRow:
    """A defect that no order describes: the error after n steps, as published and here."""

    section: str
    name: str
    published: Callable[[int], float]
    here: str
    correct: Callable[[int], float]


def _timesteps(n):
    return iia.grids.discrete(n, DISCRETE, "linspace")


def _karras(n):
    ends = DISCRETE.noise_to_signal(0.0), DISCRETE.noise_to_signal(999.0)
    return iia.grids.karras(n, *ends, schedule=DISCRETE, to_data=False)


def _next_timesteps(n):
    """The timesteps after those that the model is told: what the transfers of the PNDM repository read."""
    stride = 999 // n
    return torch.tensor([*(stride * i + 1.0 for i in reversed(range(n))), 0.0], dtype=torch.float64)


def _uniform(end):
    return lambda n: torch.linspace(1, end, n + 1, dtype=torch.float64)


def torchdiffeq_error(method, n, **options) -> float:
    """The error of a fixed-grid method of torchdiffeq on a grid uniform in log-SNR on EDM."""
    problem, grid = gaussian(), LOG_SNR.grid(EDM, n)
    x = draw(problem, 8, EDM, float(grid[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its iteration did not converge
        final = iia.odeint(problem.ode(EDM), x, grid, f"torchdiffeq:{method}", options=options)[-1]
    exact = problem.flow(x, EDM, float(grid[0]), float(grid[-1]))
    return rms(final - exact) / rms(exact)


def _on(solver, schedule, grid, **options):
    return lambda n: final_error(solver(n) if callable(solver) else solver, schedule, grid(n), **options)


def _log_snr(n):
    return LOG_SNR.grid(EDM, n)


def _nan_at_zero_length(_):
    """The weight of a slope, 1 + (e^-h - 1)/h, on a step of length h = 0."""
    h = np.float64(0.0)
    with np.errstate(invalid="ignore"):
        return float(1 + np.expm1(-h) / h)


def _nan_at_the_data(_):
    """B(h) = -h of UniPC bh1 at h = inf, times a sum of no differences."""
    with np.errstate(invalid="ignore"):
        return float(np.float64(-np.inf) * 0.0)


def _row(section, name, published, here, schedule, grid, *, level=None, exact_start=False):
    """Both solvers on the same grids; only the published one may see its model at another level."""
    return ErrorRow(
        section,
        name,
        _on(published, schedule, grid, level=level, exact_start=exact_start),
        here,
        _on(here, schedule, grid, exact_start=exact_start),
    )


def _against_ab4(method):
    published = partial(torchdiffeq_error, method)
    correct = _on("ab4", EDM, _log_snr, exact_start=True)
    return ErrorRow("weights-of-a-uniform-grid", f"{method} of torchdiffeq", published, "ab4", correct)


def _twice(name, published, here):
    return ErrorRow("a-step-of-length-zero", f"{name}, last level twice", published, here, _on(here, DISCRETE, _karras))


COSINE = iia.Cosine()
UNIFORM_WEIGHTS, FLOAT32, LEVEL = "weights-of-a-uniform-grid", "closed-forms-in-float32", "a-model-at-another-level"
ERRORS = (
    _row("ddim-off-its-grid", "DDIM, linspace", lambda n: DDIMAsInDiffusers(1000 // n), "ddim", DISCRETE, _timesteps),
    _row(
        "a-first-evaluation-that-is-dropped",
        "iPNDM from alpha = 0",
        IPNDMDropsFirstEstimate(),
        "ipndm",
        COSINE,
        _uniform(0),
    ),
    _row(UNIFORM_WEIGHTS, "iPNDM, uniform t to the data", "ipndm", "lms", VP, _uniform(0)),
    _against_ab4("implicit_adams"),
    _against_ab4("explicit_adams"),
    _row(FLOAT32, "DEIS, order 3", ClosedFormDEIS(), "deis_lab3", EDM, _log_snr, exact_start=True),
    _row(FLOAT32, "SA-Solver, orders 3 and 4", StochasticAdams(), "unipc", EDM, _log_snr, exact_start=True),
    _row("sums-in-place-of-integrals", "DEIS, 10,000 points", SummedDEIS(), "deis_tab3", VP, _uniform(1e-3)),
    _row(
        LEVEL, "F-PNDM, one timestep off", "fpndm", "fpndm", DISCRETE, _next_timesteps, level=lambda t: max(t - 1, 0.0)
    ),
    _row(LEVEL, "UniPC-3, rounded timesteps", "unipc", "unipc", DISCRETE, _karras, level=lambda t: float(round(t))),
    _twice("DPM-Solver++(2M)", lambda n: _on("dpmpp_2m", DISCRETE, _karras)(n - 1), "dpmpp_2m"),
    _twice("DPM-Solver++(3M)", _nan_at_zero_length, "expab3"),
    ErrorRow(
        "unipc-bh1-to-the-data", "UniPC-3, bh1", _nan_at_the_data, "unipc_bh1", _on("unipc_bh1", DISCRETE, _timesteps)
    ),
)


# ---- what users see ----------------------------------------------------------------------------------------------------

EVALUATIONS = (6, 10, 15, 20, 30, 50, 100)
PAIRS: tuple[tuple[str, Solver, str], ...] = (
    ("DPM-Solver++(3M)", DPMSolverMultistep(max_order=3), "expab3"),
    ("DPM-Solver-3M", DPMSolverMultistep(form="noise", max_order=3), "deis_lab3"),
    ("iPNDM-v, order 3", IPNDMvAsPublished(max_order=3), "lms3"),
    ("iPNDM-v, order 4", IPNDMvAsPublished(max_order=4), "lms"),
    ("iPNDM, order 4", PNDM(), "lms"),
    ("REAB, order 2", RosenbrockAdams(2, published=True), "expab2"),
    ("REAB, order 3", RosenbrockAdams(3, published=True), "expab3"),
)


def few_evaluations(solver: Solver | str) -> list[float]:
    """RMSE on the mixture of `iia-ode compare` at each of EVALUATIONS, from noise to data on the grids of EDM."""
    ode, x, exact = _mixture_setting()
    plans = (iia.trace(as_solver(solver), EDM, iia.grids.karras(n), consistent=False) for n in EVALUATIONS)
    return [rmse(plan.run(ode, x), exact) for plan in plans]


@cache
def _mixture_setting():
    ode, x = get_setting("mixture").draw(200, seed=1)
    return ode, x, iia.reference.solve(ode, x, 80.0, 0.0, sigma_min=0.002)


# ---- tables and figure -----------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """A table in Markdown; `sides` says l or r for each column."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * w if side == "l" else "-" * (w - 1) + ":" for side, w in zip(sides, widths, strict=True)]
    lines = [
        [v.ljust(w) if side == "l" else v.rjust(w) for v, w, side in zip(row, widths, sides, strict=True)]
        for row in (head, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def link(name: str, section: str) -> str:
    """To a section of docs/errata.md."""
    return f"[{name}](#{section})"


def order_table(tracks: Sequence[Track] = TRACKS) -> str:
    """Claimed and measured orders, and errors after 96 steps."""
    rows = []
    for row in ORDERS:
        pair = row.published_on(LOG_SNR), row.correct
        errors = [_error(final_error(s, EDM, LOG_SNR.grid(EDM, 96), exact_start=True)) for s in pair]
        here = row.here if " " in row.here else f"`{row.here}`"
        rows.append([link(row.name, row.section), row.claimed, *orders(row, tracks), here, *errors])
        if row.section == "ipndm-v":
            errors = [[final_error(s, EDM, uneven(n), exact_start=True) for n in (96, 192, 384)] for s in pair]
            slopes = [local_slopes((192, 384), e[1:])[0] for e in errors]
            name = link(f"{row.name}, steps 2 : 1", row.section)
            rows.append([name, row.claimed, *slopes, here, *(_error(e[0]) for e in errors)])
    cells = [[v if isinstance(v, str) else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    head = ["formula", "claimed", "published", "correct", "here", "error, published", "error, correct"]
    return table(head, cells, "lrrrlrr")


def node_table() -> str:
    """Orders of Runge-Kutta methods with the published nodes and with the correct ones."""
    rows = []
    for name, (rest, wrong, right) in TABLEAUS.items():
        found = tableau_order(*rest, wrong), tableau_order(*rest, wrong, autonomous=True), tableau_order(*rest, right)
        rows.append([name, "4", *(f"{v:.2f}" for v in found)])
    return table(["", "claimed", "published", "published, autonomous", "correct"], rows, "lrrrr")


def name_table() -> str:
    """How far torchdiffeq's fixed-grid rk4 is from methods of this library, after five steps."""
    problem, grid = gaussian(), UNIFORM.grid(VP, 5)
    ode, x = problem.ode(VP), draw(problem, 8, VP, float(grid[0]))
    theirs = iia.sample(ode, x, grid, "torchdiffeq:rk4")
    rows = [[f"`{k}`", _error(rms(iia.sample(ode, x, grid, k) - theirs) / rms(theirs))] for k in ("rk4_38", "rk4")]
    return table(["", "difference"], rows, "lr")


def error_table() -> str:
    """Errors after so many steps, as published and here, and the order between the last two."""
    rows = []
    for row in ERRORS:
        for name, error in ((link(row.name, row.section), row.published), (f"`{row.here}` here", row.correct)):
            errors = [error(n) for n in COUNTS]
            slope = local_slopes(COUNTS, errors)[-1]
            known = math.isfinite(slope) and errors[-2] < 1  # not the way back from overflow
            rows.append([name, *map(_error, errors), f"{slope:.1f}" if known else ""])
    return table(["", *map(str, COUNTS), "order"], rows, "l" + "r" * (len(COUNTS) + 1))


def few_table() -> str:
    """Errors of samples after few evaluations."""
    rows = []
    for name, published, here in PAIRS:
        for label, solver in ((name, published), (f"`{here}` here", here)):
            rows.append([label, *(f"{v:.3f}" for v in few_evaluations(solver))])
    return table(["", *map(str, EVALUATIONS)], rows, "l" + "r" * len(EVALUATIONS))


def _error(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "NaN"


CURVES = (
    ("DPM-Solver++(3M): half of a weight", 2, 3, DPMSolverMultistep(max_order=3), "expab3", EDM, LOG_SNR),
    ("iPNDM-v, order 4: three slips in weights", 2, 4, IPNDMvAsPublished(max_order=4), "lms", VP, UNIFORM),
    ("iPNDM, order 4: weights of a uniform grid", 2, 4, PNDM(), "lms", EDM, LOG_SNR),
    ("REAB, order 3: $\\sigma_t$ for $\\sigma_s$", 1, 3, RosenbrockAdams(3, True), RosenbrockAdams(3), EDM, LOG_SNR),
    ("rk4 of torchdyn: nodes one stage late", 1, 4, ClassicRungeKutta(TORCHDYN_NODES), "rk4", EDM, LOG_SNR),
    ("DEIS, order 3: closed forms in float32", None, 3, ClosedFormDEIS(), "deis_lab3", EDM, LOG_SNR),
)


def draw_figure():
    """Errors against steps, a panel per formula."""
    from matplotlib.figure import Figure

    counts = (24, 48, 96, 192, 384)
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for ax, (title, low, high, published, correct, schedule, track) in zip(axes.flat, CURVES, strict=True):
        for solver, order, label, color, line in (
            (published, low, "published", "#D55E00", "s--"),
            (correct, high, "correct", "#0072B2", "o-"),
        ):
            errors = [final_error(solver, schedule, track.grid(schedule, n), exact_start=True) for n in counts]
            ax.loglog(counts, errors, line, color=color, markersize=4, label=label)
            if order:
                place = {"xytext": (5, 5), "textcoords": "offset points"}
                ax.annotate(f"order {order}", (counts[2], errors[2]), **place, fontsize=8, color=color)
        ax.set_title(title, fontsize=9)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    for ax in axes[-1]:
        ax.set_xlabel("steps")
    return figure


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if "--quick" in arguments:
        for row in ORDERS:
            print(
                f"{row.name:<20} claimed {row.claimed}",
                *(f"{quick_order(s):8.2f}" for s in (row.published_on(LOG_SNR), row.correct)),
            )
        return
    makers = {"orders": order_table, "errors": error_table, "few": few_table, "nodes": node_table, "names": name_table}
    parts = {name: make() for name, make in makers.items()}
    text = "".join(f"<!-- {name} -->\n\n{body}\n\n" for name, body in parts.items())
    TABLES.write_text(f"<!-- made by benchmarks/errata.py -->\n\n{text}<!-- end -->\n")
    print(text)
    from iia_ode.plots import save_figure

    save_figure(draw_figure(), FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
