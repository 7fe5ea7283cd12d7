"""Each published formula of :mod:`.published` beside the corrected formula, and the measurements that tell the two apart.

``ORDERS`` lists defects that lower the order, ``TABLEAUS`` Runge-Kutta methods with wrong nodes, and ``ERRORS`` defects that
show in the error only. docs/errata.md describes them; benchmarks/errata.py makes the tables and the figure of that page.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import iia_ode as iia
from iia_ode.forms import conversion
from iia_ode.plan import Combine, run_code
from iia_ode.solvers import Solver, UniPC, as_solver
from iia_ode.testing.cases import SCHEDULES, TRACKS, Track, draw, gaussian, model_of, rms
from iia_ode.testing.orders import local_slopes

from .published import (
    ClassicRungeKutta,
    ClosedFormDEIS,
    HeunPlusPlus,
    RosenbrockAdams,
    SolvedUniPC,
    StochasticAdams,
    SummedDEIS,
)
from .upstream import DDIMAsInDiffusers, IPNDMDropsFirstEstimate, IPNDMvAsPublished

EDM, VP = iia.EDM(), iia.VP()
UNIFORM, LOG_SNR, _ = TRACKS


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


def final_error(solver, schedule, grid, *, exact_start=False, level=None) -> float:
    """RMS error of the final state on Gaussian data, relative to its size.

    Parameters
    ----------
    solver, schedule, grid : what is run.
    exact_start : overwrite the states of the first quarter of the grid by the exact ones.
    level : the time of the noise level that the model is evaluated at, by the solver's time.
    """
    problem, n = gaussian(), len(grid) - 1
    plan = iia.plan.trace(as_solver(solver), schedule, grid, consistent=False)
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
        final = iia.odeint(problem.ode(EDM), x, grid, method=f"torchdiffeq:{method}", options=options)[-1]
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
