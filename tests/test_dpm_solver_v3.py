"""DPM-Solver-v3: which solvers it contains, the paper's algorithm, its order, and what statistics make of it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import F64, close, gaussian, generator, mixture, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import ModelStatistics, reference
from iia_ode.plan import Combine, Past
from iia_ode.solvers import DPMSolverV3
from iia_ode.solvers.dpm_solver_v3 import polynomial_coefficients
from iia_ode.solvers.transfer import ExponentialStep
from iia_ode.statistics import Curve
from iia_ode.testing.cases import Track
from iia_ode.testing.orders import measure_order, order_misses

SCHEDULES = [iia.EDM(), iia.VP(), iia.FlowMatching()]
smooth_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
orders = pytest.mark.parametrize("order", [1, 2, 3])

NOISE = ModelStatistics.constant(l=0.0, s=-1.0, b=0.0)


def levels(n: int, schedule: iia.Schedule, high: float = 20.0, low: float = 0.05) -> Tensor:
    """n steps between two noise levels."""
    return iia.grids.karras(n + 1, low, high, schedule=schedule, to_data=False)


def wavy(shape: Sequence[int] = (), points: int = 61) -> ModelStatistics:
    """Smooth coefficients that belong to no model."""
    lam = torch.linspace(-3.2, 3.2, points, dtype=F64)
    phase = normal(*shape, seed=3)
    u = lam.reshape(-1, *[1] * len(shape)) + phase
    return ModelStatistics(lam, 0.5 - 0.4 * torch.tanh(u), 0.4 * torch.sin(u) - 0.5, 0.3 * torch.cos(u))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---- what it contains ------------------------------------------------------------------------------------------------


@smooth_schedules
@orders
def test_without_statistics_the_predictor_is_exponential_adams_on_the_data(order: int, schedule: iia.Schedule) -> None:
    for grid in (iia.grids.karras(8, schedule=schedule), levels(7, schedule), levels(7, schedule).flip(0)):
        plan = DPMSolverV3(max_order=order, corrector=False).plan(schedule, grid)
        assert plan.difference(iia.get_solver("ddim" if order == 1 else f"expab{order}").plan(schedule, grid)) < 1e-12


@smooth_schedules
@orders
def test_with_the_coefficients_of_noise_prediction_it_is_exponential_adams_on_the_noise(
    order: int, schedule: iia.Schedule
) -> None:
    for grid in (iia.grids.karras(8, 0.01, 20.0, schedule=schedule), levels(7, schedule).flip(0)):
        plan = DPMSolverV3(NOISE, max_order=order, corrector=False).plan(schedule, grid)
        assert plan.difference(iia.get_solver(f"deis_lab{order}").plan(schedule, grid)) < 1e-12


@dataclass(frozen=True)
class Pece(iia.Solver):
    """Exponential Adams, exact weights: order p + 1, one evaluation a step; the last step is not corrected."""

    order = 4
    max_order: int = 3
    form: str = "data"

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        lam = ode.schedule.lam
        history = past.memory[: self.max_order] or ((t, ode.evaluate(x, t).as_form(self.form)),)
        interval = ExponentialStep.of(ode.schedule, self.form, t, s)

        def combine(outputs: Any) -> Any:
            weights = interval.weights([(lam(u) - lam(t)) / (lam(s) - lam(t)) for u, _ in outputs])
            return interval.keep * x + sum(w * m for w, (_, m) in zip(weights, outputs, strict=True))

        y = combine(history)
        if past.remaining == 0:
            return y
        new = (s, ode.evaluate(y, s).as_form(self.form))
        return combine((*history, new)), (new, *history)


@smooth_schedules
@orders
@pytest.mark.parametrize("form", ["data", "noise"])
def test_with_the_coefficients_of_a_form_the_corrector_is_that_of_exponential_adams(
    form: str, order: int, schedule: iia.Schedule
) -> None:
    grid = levels(8, schedule)
    plan = DPMSolverV3(None if form == "data" else NOISE, max_order=order).plan(schedule, grid)
    assert plan.nfe == 8
    assert plan.difference(Pece(order, form).plan(schedule, grid)) < 1e-12


@smooth_schedules
def test_past_its_start_up_it_is_unipc(schedule: iia.Schedule) -> None:
    # Only the start-up of UniPC has its published 1/2 in the place of an exact weight.
    grid = levels(9, schedule)
    ours, theirs = (iia.get_solver(name).plan(schedule, grid) for name in ("dpm_solver_v3", "unipc"))
    assert ours.evaluation_times == theirs.evaluation_times
    later = [ins for ins in zip(ours.code, theirs.code, strict=True) if isinstance(ins[0], Combine)][4:]
    assert len(later) == 13
    for a, b in later:
        assert isinstance(a, Combine)
        assert isinstance(b, Combine)
        x, y = dict(a.terms), dict(b.terms)
        assert a.step == b.step
        assert all(abs(x.get(k, 0.0) - y.get(k, 0.0)) < 1e-12 for k in {*x, *y})


# ---- the paper's algorithm -------------------------------------------------------------------------------------------


def published(
    st: ModelStatistics, ode: iia.ProbabilityFlowODE, x: Tensor, grid: Tensor, n: int, p_pseudo: bool, c_pseudo: bool
) -> Tensor:
    """Algorithm 2 of the paper as it stands: eps cached and corrected, integrals by the trapezoidal rule on a fine table."""
    schedule = ode.schedule
    lam = np.array([schedule.lam(t) for t in grid.tolist()])
    fine = np.linspace(lam[0], lam[-1], 40001)
    l, s, b = (curve(fine) for curve in st.curves)  # noqa: E741
    step = (fine[1] - fine[0]).reshape((1,) * l.ndim)

    def cumulative(f: Any) -> Any:
        return np.concatenate([0 * f[:1], np.cumsum((f[1:] + f[:-1]) / 2 * step, axis=0)])

    L, S = cumulative(l), cumulative(s)
    B = cumulative(np.exp(-S) * b)
    row = [int(np.abs(fine - v).argmin()) for v in lam]
    alpha, sigma = ([f(t) for t in grid.tolist()] for f in (schedule.alpha, schedule.sigma))

    def g(i: int, start: int, xs: list[Any], eps: list[Any]) -> Any:
        f = (sigma[i] * eps[i] - l[row[i]] * xs[i]) / alpha[i]
        a, c = row[start], row[i]
        return np.exp(S[a] - S[c]) * f - np.exp(S[a]) * (B[c] - B[a])

    def update(start: int, others: list[int], end: int, xs: list[Any], eps: list[Any], pseudo: bool) -> Any:
        a, c = row[start], row[end]
        inside = slice(a, c + 1)
        E = np.exp(L[inside] + S[inside] - L[a] - S[a])
        shift = (fine[inside] - fine[a]).reshape(-1, *[1] * (l.ndim - 1))
        g0, delta = g(start, start, xs, eps), np.array([lam[i] - lam[start] for i in others])
        values = np.stack([g(i, start, xs, eps) - g0 for i in others]) if others else np.zeros((0, *g0.shape))
        derivatives = [g0]
        for k in range(1, len(others) + 1):
            m = k if pseudo else len(others)
            matrix = np.stack([delta[:m] ** j for j in range(1, m + 1)], axis=1)
            derivatives.append(np.tensordot(np.linalg.inv(matrix)[k - 1], values[:m], axes=1) * math.factorial(k))
        total = cumulative(E * np.exp(S[a]) * (B[inside] - B[a]))[-1]
        for k, d in enumerate(derivatives):
            total = total + cumulative(E * shift**k / math.factorial(k))[-1] * d
        return alpha[end] * np.exp(L[a] - L[c]) * (xs[start] / alpha[start] - total)

    def noise(y: Any, i: int) -> Any:
        return ode.noise(torch.from_numpy(y), float(grid[i])).numpy()

    xs: list[Any] = [x.numpy()]
    eps: list[Any] = [noise(xs[0], 0)]
    last = len(grid) - 1
    for m in range(1, last + 1):
        used = min(n, m)
        others = list(range(m - 2, m - used - 1, -1))
        xs.append(update(m - 1, others, m, xs, eps, p_pseudo))
        if m == last:
            break
        eps.append(noise(xs[m], m))
        corrector = [m, *others][: used - 1 + c_pseudo]
        if corrector:
            better = update(m - 1, corrector, m, xs, eps, c_pseudo)
            eps[m] = eps[m] + l[row[m]] * (better - xs[m]) / sigma[m]
            xs[m] = better
    return torch.from_numpy(xs[-1])


@smooth_schedules
@pytest.mark.parametrize(
    ("order", "p_pseudo", "c_pseudo"),
    [(3, False, False), (2, False, False), (1, False, True), (2, False, True), (3, False, True), (3, True, False)],
)
def test_it_takes_the_steps_of_the_published_algorithm(
    order: int, p_pseudo: bool, c_pseudo: bool, schedule: iia.Schedule
) -> None:
    problem, statistics = mixture(), wavy((4,))
    # Grid points on the rows of the trapezoidal rule.
    grid = iia.grids.log_snr(6, 0.1, 8.0, schedule=schedule, to_data=False)
    ode = problem.ode(schedule)
    x = problem.noisy(3, schedule, float(grid[0]), generator(4))
    solver = DPMSolverV3(statistics, order, drop_oldest=not c_pseudo, p_pseudo=p_pseudo, c_pseudo=c_pseudo)
    expected = published(statistics, ode, x, grid, order, p_pseudo, c_pseudo)
    close(iia.sample(ode, x, grid, solver), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("u", [[0.0], [0.0, -1.1], [0.0, -0.8, -2.5], [0.0, 1.0, -0.7, -1.9]])
def test_the_polynomial_is_interpolation_and_its_pseudo_order_variant_is_that_of_the_paper(u: list[float]) -> None:
    values = np.random.default_rng(0).normal(size=len(u))
    exact = values @ polynomial_coefficients(u, pseudo=False)
    assert np.allclose([np.polyval(exact[::-1], node) for node in u], values)
    pseudo = values @ polynomial_coefficients(u, pseudo=True)
    for k in range(len(u)):  # the k-th derivative is that of the interpolant through the first k + 1 values [eq. 15]
        assert pseudo[k] == pytest.approx(np.polyfit(u[: k + 1], values[: k + 1], k)[0], rel=1e-9)
    assert len(u) > 2 or np.allclose(pseudo, exact)


# ---- order -----------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {"max_order": 1, "corrector": False}),
    (2, {"max_order": 2, "corrector": False}),
    (3, {"max_order": 3, "corrector": False}),
    (1, {"max_order": 1, "drop_oldest": True}),
    (2, {"max_order": 1}),
    (3, {"max_order": 2}),
    (4, {"max_order": 3}),
    (3, {"max_order": 3, "drop_oldest": True}),
    (2, {"max_order": 2, "drop_oldest": True}),
    (2, {"p_pseudo": True, "corrector": False}),
    (3, {"p_pseudo": True}),
    (2, {"c_pseudo": True}),
]


# Each on one schedule, in turn.
TURNS = ((iia.EDM(), Track("log-SNR", 5.0, 0.3)), (iia.VP(), Track("t", 2.0, 0.5)))


@pytest.mark.parametrize(
    ("order", "options", "schedule", "track"),
    [(*option, *TURNS[i % 2]) for i, option in enumerate(OPTIONS)],
    ids=lambda v: type(v).__name__ if isinstance(v, iia.Schedule) else str(v),
)
def test_with_any_smooth_coefficients_the_order_is_the_claimed_one(
    order: int, options: dict[str, Any], schedule: iia.Schedule, track: Track
) -> None:
    solver = DPMSolverV3(wavy(), **options)
    assert solver.order == order
    assert not order_misses(measure_order(solver, schedule, track), order)


def test_a_table_of_any_density_is_integrated_to_rounding() -> None:
    # l = 1 - tanh, s = -1/2, b = e^(-lambda / 2): every integral is known.
    lam = torch.linspace(-4, 4, 4001, dtype=F64)
    rows = torch.stack([1 - torch.tanh(lam), 0 * lam - 0.5, torch.exp(-lam / 2)])
    own = ModelStatistics(lam, *rows).integrals(-1.0, 1.5, [-2.0, 1.5], 1)
    assert own.keep == pytest.approx(math.exp(-2.5) * math.cosh(1.5) / math.cosh(1.0), rel=1e-12)
    # e^(-int s) b = e^((r + 1) / 2) e^(-r / 2) = e^(1/2), so that B grows linearly.
    assert own.offsets[0] == pytest.approx(-math.exp(0.5), rel=1e-12)
    assert own.offsets[1] == pytest.approx(2.5 * math.exp(0.5), rel=1e-12)
    assert own.scales[0] == pytest.approx(math.exp(-0.5), rel=1e-12)
    flat = ModelStatistics.constant(l=0.3, s=-0.9, b=2.0).integrals(0.0, 2.0, [], 2)
    # E = e^(0.3 (lambda - 2) - 0.9 lambda), B = 2 (e^(0.9 lambda) - 1) / 0.9
    assert flat.moments[0] == pytest.approx(math.exp(-0.6) * (1 - math.exp(-1.2)) / 0.6, rel=1e-13)
    first = (1 - math.exp(-1.2)) / 0.36 - 2 * math.exp(-1.2) / 0.6
    assert flat.moments[1] == pytest.approx(math.exp(-0.6) * first / 2, rel=1e-13)
    inner = 2 / 0.9 * ((math.exp(0.6) - 1) / 0.3 - (1 - math.exp(-1.2)) / 0.6)
    assert flat.bias == pytest.approx(math.exp(-0.6) * inner, rel=1e-13)


def test_coefficients_are_constant_beyond_the_ends_of_their_table() -> None:
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([1.0, 4.0, 3.0]))
    assert curve(-2.0) == 1.0
    assert curve(np.array([1.0, 7.0])).tolist() == [3.0, 3.0]
    assert curve.integral(-2.0) == pytest.approx(-2.0)
    assert curve.integral(2.0) - curve.integral(1.0) == pytest.approx(3.0)


# ---- on Gaussian data ------------------------------------------------------------------------------------------------


def gaussian_coefficients(lam: Tensor) -> tuple[Tensor, Tensor]:
    """l and b on Gaussian data. There f = -l m, so that s may be anything; s = 0 is chosen, and b = f' = 2 l (1 - l) m."""
    problem = gaussian()
    l = 1 / (1 + problem.variance * torch.exp(2 * lam)[:, None])  # noqa: E741
    return l, 2 * l * (1 - l) * problem.mean


def gaussian_statistics(points: int, low: float = 0.05, high: float = 20.0) -> ModelStatistics:
    lam = torch.linspace(-math.log(high), -math.log(low), points, dtype=F64)
    l, b = gaussian_coefficients(lam)  # noqa: E741
    return ModelStatistics(lam, l, torch.zeros_like(l), b)


@pytest.mark.parametrize(
    ("schedule", "prediction", "mode"),
    [
        (iia.EDM(), "data", "forward"),
        (iia.VP(), "noise", "reverse"),
        (iia.Cosine(), "v", "forward"),
        (iia.VE(), "score", "reverse"),
        (iia.FlowMatching(), "velocity", "forward"),
        (iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t), "velocity", "reverse"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_on_gaussian_data_the_estimates_are_the_closed_forms(
    schedule: iia.Schedule, prediction: str, mode: str
) -> None:
    problem, grid = gaussian(), levels(3, schedule)
    x = problem.noisy(8, schedule, float(grid[0]), generator(5))
    found = ModelStatistics.estimate(problem.ode(schedule, prediction), x, grid, points=60, mode=mode)
    l, b = gaussian_coefficients(found.lam)  # noqa: E741
    assert float(found.lam[0]) == pytest.approx(-math.log(20.0), rel=1e-9)
    assert float(found.lam[-1]) == pytest.approx(-math.log(0.05), rel=1e-9)
    close(found.l, l, atol=1e-12)
    close(found.s, torch.zeros_like(l))
    close(found.b, b, atol=2e-4)  # through the slope of the table of l
    assert found.about["mode"] == mode
    assert found.schedule == schedule.config()


@smooth_schedules
@orders
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_on_gaussian_data_a_step_of_any_length_is_exact_up_to_the_table(
    steps: int, order: int, schedule: iia.Schedule
) -> None:
    problem, grid = gaussian(), levels(steps, schedule)

    def error(statistics: ModelStatistics | None) -> float:
        plan = DPMSolverV3(statistics, order).plan(schedule, grid)
        return plan.on_gaussian(problem.mean, problem.variance).rmse

    coarse, fine = error(gaussian_statistics(150)), error(gaussian_statistics(600))
    assert coarse < 2e-6
    assert fine < 2e-8
    assert error(None) > 1000 * coarse


# ---- on other data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_the_mixture() -> ModelStatistics:
    """From 512 samples, between the levels 20 and 0.05."""
    return estimated(mixture(), iia.EDM())


def estimated(problem: Any, schedule: iia.Schedule, n: int = 512, **options: Any) -> ModelStatistics:
    grid = levels(1, schedule)
    x = problem.noisy(n, schedule, float(grid[0]), generator(6))
    return ModelStatistics.estimate(problem.ode(schedule), x, grid, **{"points": 60, **options})


def test_on_a_mixture_the_estimates_are_means_and_a_regression_along_trajectories(
    of_the_mixture: ModelStatistics,
) -> None:
    problem, schedule, row = mixture(), iia.EDM(), 25
    ode = problem.ode(schedule)
    x = problem.noisy(512, schedule, 20.0, generator(6))
    flow = reference.trajectory(ode, x, 20.0, 0.05, rtol=1e-10, atol=1e-10)
    lam = float(of_the_mixture.lam[row])
    curve = of_the_mixture.curves[0]

    def f(u: float) -> Tensor:
        t = schedule.t_of_lam(u)
        y = flow(t)
        return (1 - torch.from_numpy(curve(u))) * y / schedule.alpha(t) - ode.data(y, t)

    h = 1e-3
    value, slope = f(lam), (f(lam + h) - f(lam - h)) / (2 * h)
    a, c = value - value.mean(0), slope - slope.mean(0)
    s = (a * c).mean(0) / a.square().mean(0)
    close(of_the_mixture.s[row], s, atol=1e-4)
    close(of_the_mixture.b[row], slope.mean(0) - s * value.mean(0), atol=1e-4)
    t = schedule.t_of_lam(lam)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: ode.data(v[None], t)[0]))(flow(t))
    diagonal = 1 - schedule.alpha(t) * jacobian.diagonal(dim1=1, dim2=2).mean(0)
    close(of_the_mixture.l[row], diagonal, atol=5 * 0.3 / math.sqrt(512))


def test_more_probes_bring_l_nearer_to_the_mean_of_the_jacobian() -> None:
    few, some, many = (estimated(mixture(), iia.EDM(), n=128, probes=k, points=8).curves[0] for k in (1, 8, 64))
    lam = np.linspace(-2, 2, 9)
    assert np.abs(some(lam) - many(lam)).mean() < 0.6 * np.abs(few(lam) - many(lam)).mean()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_statistics_lower_the_error_of_few_steps_on_a_mixture(schedule: iia.Schedule) -> None:
    problem = mixture()
    own = estimated(problem, schedule, n=128, points=30)
    ode = problem.ode(schedule)
    x = problem.noisy(64, schedule, float(levels(1, schedule)[0]), generator(7))
    exact = reference.solve(ode, x, float(levels(1, schedule)[0]), float(levels(1, schedule)[1]))
    for steps in (5, 8, 12):
        grid = levels(steps, schedule)
        for order in (1, 2, 3):
            errors = [rms(iia.sample(ode, x, grid, DPMSolverV3(st, order)) - exact) for st in (own, None)]
            assert errors[0] < 0.7 * errors[1], (steps, order, errors)


@pytest.mark.parametrize("points", [20, 120])
def test_estimated_tables_are_smooth_enough_for_the_order(points: int) -> None:
    # With probes drawn anew at each node the order here would fall below 2, the more so the denser the table.
    problem, schedule = mixture(), iia.EDM()
    x = problem.noisy(48, schedule, 5.0, generator(8))
    ode = problem.ode(schedule)
    own = ModelStatistics.estimate(ode, x, [5.0, 0.3], points=points)
    y, counts = x[:8], (48, 96)
    exact = reference.solve(ode, y, 5.0, 0.3, rtol=1e-12, atol=1e-12)
    errors = [
        rms(
            iia.sample(ode, y, iia.grids.log_snr(n + 1, 0.3, 5.0, to_data=False), DPMSolverV3(own, 2, corrector=False))
            - exact
        )
        for n in counts
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_it_goes_from_pure_noise_to_the_data() -> None:
    problem, schedule = mixture(), iia.FlowMatching()
    ode, grid = problem.ode(schedule), iia.grids.uniform(12, 1.0, 0.0)
    own = ModelStatistics.estimate(ode, problem.noisy(256, schedule, 1.0, generator(9)), grid, points=40)
    x = problem.noisy(16, schedule, 1.0, generator(10))
    assert [float(v) for v in own.lam[[0, -1]]] == pytest.approx([schedule.lam(11 / 12), schedule.lam(1 / 12)])
    exact = reference.solve(ode, x, 1.0, 0.0)
    for solver in (DPMSolverV3(own), DPMSolverV3()):
        states = iia.odeint(ode, x, grid, method=solver)
        close(states[1], iia.odeint(ode, x, grid, method="ddim")[1], atol=1e-12)
        assert rms(states[-1] - exact) < 0.05
        assert solver.plan(schedule, grid).nfe == 12


def test_the_step_to_the_data_is_ddim_with_the_output_moved_to_the_corrected_state() -> None:
    problem, schedule = gaussian(), iia.EDM()
    grid = torch.cat([levels(4, schedule), torch.zeros(1, dtype=F64)])
    x = problem.noisy(4, schedule, 20.0, generator(11))
    ode = problem.ode(schedule)
    states = iia.odeint(ode, x, grid, method=DPMSolverV3(gaussian_statistics(600)))
    # With l of the model itself, that output is the model's own at the corrected state.
    close(states[-1], ode.data(states[-2], 0.05), atol=1e-7)


# ---- shapes, batches, models -----------------------------------------------------------------------------------------


def test_shared_dimensions_have_one_coefficient_by_the_pooled_least_squares() -> None:
    problem = iia.problems.Mixture(torch.ones(3), normal(3, 2, 2, 3, seed=12), 0.4)
    x = problem.noisy(32, iia.EDM(), 20.0, generator(13))
    ode, grid = problem.ode(iia.EDM()), [20.0, 0.05]
    shapes = {
        (): (2, 2, 3),
        (-2, -1): (2, 1, 1),
        (0,): (1, 2, 3),
        "all": (),
    }
    found = {k: ModelStatistics.estimate(ode, x, grid, points=16, shared=k) for k in shapes}
    assert {k: st.shape for k, st in found.items()} == shapes
    close(found["all"].l, found[()].l.mean((1, 2, 3)), atol=1e-12)
    close(found[(-2, -1)].l, found[()].l.mean((2, 3), keepdim=True), atol=1e-12)
    exact = reference.solve(ode, x, 20.0, 0.05)
    errors = {k: rms(iia.sample(ode, x, levels(6, iia.EDM()), DPMSolverV3(st, 2)) - exact) for k, st in found.items()}
    none = rms(iia.sample(ode, x, levels(6, iia.EDM()), DPMSolverV3(None, 2)) - exact)
    assert all(error < none for error in errors.values())
    weights = [
        w
        for ins in DPMSolverV3(found["all"]).plan(iia.EDM(), levels(6, iia.EDM())).code
        if isinstance(ins, Combine)
        for _, w in ins.terms
    ]
    assert all(isinstance(w, float) for w in weights)


class Labelled(nn.Module):
    """A float32 network of two layers that is told a class; its Jacobian is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 16)
        for k, p in enumerate(self.parameters()):
            p.data = 0.4 * normal(*p.shape, seed=20 + k, dtype=torch.float32)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        z = self.inner(x / (1 + t[:, None] ** 2).sqrt()) + label[:, None]
        return torch.tanh(z) @ self.inner.weight + x / (1 + t[:, None] ** 2)


def labelled(n: int) -> tuple[iia.ProbabilityFlowODE, Tensor]:
    label = normal(n, seed=30, dtype=torch.float32)
    ode = iia.ProbabilityFlowODE(Labelled(), iia.EDM(), "data", conditioning={"label": label})
    return ode, 20.0 * normal(n, 4, seed=31, dtype=torch.float32)


def test_samples_may_be_treated_a_few_at_a_time() -> None:
    ode, x = labelled(10)
    whole = ModelStatistics.estimate(ode, x, [20.0, 0.05], points=20, probes=2)
    parts = ModelStatistics.estimate(ode, x, [20.0, 0.05], points=20, probes=2, batch_size=4)
    for a, b in ((whole.l, parts.l), (whole.s, parts.s), (whole.b, parts.b)):
        close(a, b, atol=2e-4)  # the model computes in float32
    assert whole.about["samples"] == parts.about["samples"] == 10
    assert parts.about["evaluations"] == 3 * whole.about["evaluations"]


def test_both_modes_of_differentiation_agree_on_a_float32_network() -> None:
    ode, x = labelled(64)
    forward, reverse = (
        ModelStatistics.estimate(ode, x, [20.0, 0.05], points=20, mode=m) for m in ("forward", "reverse")
    )
    close(reverse.l, forward.l, atol=1e-6)
    close(reverse.s, forward.s, atol=2e-3)
    close(reverse.b, forward.b, atol=2e-3)


class _Opaque(torch.autograd.Function):
    """Twice x, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_a_model_without_forward_differentiation_is_differentiated_in_reverse() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return _Opaque.apply(x) / (2 * (1 + t[:, None] ** 2))  # type: ignore[no-untyped-call, no-any-return]

    ode = iia.ProbabilityFlowODE(model, iia.EDM(), "data")
    found = ModelStatistics.estimate(ode, 10 * normal(4, 3), [10.0, 0.1], points=10)
    assert found.about["mode"] == "reverse"
    t = torch.exp(-found.lam)[:, None]
    close(found.l, (t**2 / (1 + t**2)).expand(-1, 3), atol=1e-12)


def test_a_run_keeps_the_dtype_of_its_state_and_needs_statistics_of_its_shape() -> None:
    problem, own = mixture(), wavy((4,))
    ode, grid = problem.ode(iia.EDM()), levels(5, iia.EDM(), 8.0, 0.1)
    x = problem.noisy(4, iia.EDM(), 8.0, generator(14))
    exact = iia.sample(ode, x, grid, DPMSolverV3(own))
    rounded = iia.sample(ode, x.float(), grid, DPMSolverV3(own))
    assert rounded.dtype == torch.float32
    close(rounded.double(), exact, atol=1e-4)
    with pytest.raises(iia.errors.InputError, match=r"weight of shape \[3\]"):
        iia.sample(ode, x, grid, DPMSolverV3(wavy((3,))))


def test_a_plan_holds_one_vector_for_each_output_it_looks_back_on() -> None:
    plan = DPMSolverV3(wavy((4,))).plan(iia.EDM(), levels(12, iia.EDM(), 8.0, 0.1))
    assert plan.nfe == 12
    assert plan.peak_vectors <= 8
    assert max(len(ins.terms) for ins in plan.code if isinstance(ins, Combine)) <= 5


# ---- the object, its file, the registry ------------------------------------------------------------------------------


def test_statistics_survive_their_file(tmp_path: Path, of_the_mixture: ModelStatistics) -> None:
    path = of_the_mixture.save(tmp_path / "mixture.safetensors")
    again = iia.load(path)
    assert again == of_the_mixture
    assert hash(again) == hash(of_the_mixture)
    assert again.about == of_the_mixture.about
    assert again.schedule == iia.EDM().config()
    grid = levels(4, iia.EDM())
    plans = [DPMSolverV3(st).plan(iia.EDM(), grid) for st in (again, of_the_mixture)]
    assert plans[0].difference(plans[1]) == 0.0


def test_a_file_of_another_kind_is_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(iia.errors.FileFormatError, match="no file"):
        iia.load(tmp_path / "none.safetensors")
    path = iia.files.write_tensors(tmp_path / "odd.safetensors", "model statistics", {"lam": torch.zeros(1)}, {})
    with pytest.raises(iia.errors.FileFormatError, match=r"is damaged.*`schedule`"):
        iia.load(path)


def test_statistics_of_another_schedule_are_refused(of_the_mixture: ModelStatistics) -> None:
    grid = levels(4, iia.VP())
    with pytest.raises(iia.errors.MismatchError, match=r"were estimated on the schedule EDM, and this one is VP \("):
        DPMSolverV3(of_the_mixture).plan(iia.VP(), grid)
    free = replace(of_the_mixture, schedule=None)
    assert DPMSolverV3(free).plan(iia.VP(), grid).nfe == 4


def test_options_name_the_statistics_and_cannot_stand_for_them(of_the_mixture: ModelStatistics) -> None:
    solver = iia.get_solver("dpm_solver_v3", statistics=of_the_mixture, max_order=2)
    options = json.loads(json.dumps(solver.options()))
    assert options["statistics"] == f"ModelStatistics {of_the_mixture.digest}, 60 x [4]"
    assert of_the_mixture.digest in solver.label
    with pytest.raises(iia.errors.InputError, match=r"iia_ode\.load"):
        iia.get_solver("dpm_solver_v3", **options)
    assert iia.get_solver("dpm_solver_v3", **{**options, "statistics": of_the_mixture}) == solver
    assert iia.get_solver("dpm_solver_v3").options()["statistics"] is None
    assert iia.get_solver("dpm_solver_v3").label == "dpm_solver_v3"


def test_solvers_are_equal_if_their_statistics_are(of_the_mixture: ModelStatistics) -> None:
    copy = ModelStatistics(
        of_the_mixture.lam, of_the_mixture.l, of_the_mixture.s, of_the_mixture.b, of_the_mixture.schedule
    )
    assert len({DPMSolverV3(copy), DPMSolverV3(of_the_mixture), DPMSolverV3()}) == 2
    assert DPMSolverV3(replace(copy, s=0 * copy.s)) != DPMSolverV3(copy)


def test_other_solvers_may_wrap_it(of_the_mixture: ModelStatistics) -> None:
    wrapped = iia.get_solver("lower_order_final", base=DPMSolverV3(of_the_mixture, drop_oldest=True))
    grid = levels(6, iia.EDM())
    assert wrapped.plan(iia.EDM(), grid).nfe == 6


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (([0.0, 1.0], [[1.0]] * 2, [[1.0]] * 2, [[1.0, 1.0]] * 2), "one shape"),
        (([0.0, 1.0], [1.0] * 3, [1.0] * 3, [1.0] * 3), "a row for each of the 2 values"),
        (([1.0, 0.0], [1.0] * 2, [1.0] * 2, [1.0] * 2), "strictly increasing"),
        (([0.0, 1.0], [1.0, math.nan], [1.0] * 2, [1.0] * 2), "table l .* finite"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tables: Any, message: str) -> None:
    with pytest.raises(iia.errors.InputError, match=message):
        ModelStatistics(*map(torch.tensor, tables))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 1}, "points must be a whole number, at least 2"),
        ({"probes": 0}, "probes must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"shared": "channels"}, "shared must be 'all' or dimensions"),
        ({"shared": (1,)}, "which has 1"),
        ({"grid": [20.0, 0.0]}, "a range of noise levels"),
        ({"grid": [0.1, 1.0, 0.5]}, "monotone"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    ode = gaussian().ode(iia.EDM())
    with pytest.raises(iia.errors.InputError, match=message):
        ModelStatistics.estimate(ode, 20 * normal(4, 3), **{"grid": [20.0, 0.1], **change})
    with pytest.raises(iia.errors.UnknownNameError, match="forward"):
        ModelStatistics.estimate(ode, 20 * normal(4, 3), [20.0, 0.1], mode="backward")


def test_a_model_that_is_not_finite_is_reported() -> None:
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (t[:, None] > 1), iia.EDM(), "data")
    with pytest.raises(iia.errors.NonFiniteError):
        ModelStatistics.estimate(ode, 20 * normal(4, 3), [20.0, 0.1], points=10)
