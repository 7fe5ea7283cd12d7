"""Warm starts: exact on Gaussian data, and worth having on a trained network."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_SCHEDULES, F64, close, every_schedule, in_turn, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.denoisers import digits
from iia_ode.plan import Bands, LinearMap, PerCondition, Principal
from iia_ode.warm_starts.moments import Moments, estimate_moments, exact_moments
from iia_ode.warm_starts.warm_start import WarmStart

D = 6
RATIOS = st.floats(0.05, 60.0)


def covariance(d: int = D, seed: int = 0) -> Tensor:
    """One with a wide spectrum, and no axis among its eigenvectors."""
    q = torch.linalg.qr(normal(d, d, seed=seed))[0]
    return q @ torch.diag(torch.logspace(-2, 1, d, dtype=F64)) @ q.T


def exact_flow(x: Tensor, mean: Tensor, cov: Tensor, schedule: iia.Schedule, t: float, s: float) -> Tensor:
    """By square roots of the marginal covariances themselves, which commute."""
    eye = torch.eye(len(cov), dtype=F64)

    def root(u: float, power: float) -> Tensor:
        values, q = torch.linalg.eigh(schedule.alpha(u) ** 2 * cov + schedule.sigma(u) ** 2 * eye)
        return q @ torch.diag(values**power) @ q.T

    return schedule.alpha(s) * mean + (x - schedule.alpha(t) * mean) @ root(t, -0.5) @ root(s, 0.5)


def times(schedule: iia.Schedule, *ratios: float) -> list[float]:
    return [schedule.t_of_noise_to_signal(r) for r in ratios]


def gaussian_ode(mean: Tensor, cov: Tensor, schedule: iia.Schedule) -> iia.ProbabilityFlowODE:
    """The exact ODE of N(mean, cov), not diagonal."""
    eye = torch.eye(len(cov), dtype=F64)

    def data(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(float(t[0])), schedule.sigma(float(t[0]))
        return mean + (x - a * mean) @ torch.linalg.solve(a * a * cov + s * s * eye, a * cov)

    return iia.ProbabilityFlowODE(data, schedule)


# ---- the Gaussian map ------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.sampled_from(ALL_SCHEDULES), RATIOS, RATIOS, st.integers(0, 9))
def test_with_the_true_moments_the_map_is_the_exact_flow_on_every_schedule(
    schedule: iia.Schedule, r: float, q: float, seed: int
) -> None:
    t, s = times(schedule, max(r, q) * 1.01, min(r, q))
    mean, cov, x = normal(D, seed=seed), covariance(seed=seed), normal(3, D, seed=seed + 1) * schedule.sigma(t)
    warm = WarmStart.gaussian(schedule, t, s, mean=mean, covariance=cov)
    close(warm.apply(x), exact_flow(x, mean, cov, schedule, t, s), atol=1e-12 * max(1.0, float(x.abs().max())))


@every_schedule
def test_to_where_it_starts_a_warm_start_is_the_identity(schedule: iia.Schedule) -> None:
    (t,) = times(schedule, 20.0)
    warm = WarmStart.gaussian(schedule, t, t, mean=normal(D), covariance=covariance())
    x = normal(3, D)
    close(warm.apply(x), x)
    close(LinearMap(warm.weight.projections, warm.weight.coefficients)(x) + warm.constant, x, atol=1e-13)
    plan = iia.get_solver("ddim").plan(schedule, torch.tensor(times(schedule, 20.0, 1.0), dtype=F64))
    assert warm.then(plan) is plan


@settings(max_examples=10)
@given(st.integers(0, 9), st.integers(0, D))
def test_low_rank_and_remainder_are_the_dense_flow_where_nothing_is_left_out(seed: int, rank: int) -> None:
    q = torch.linalg.qr(normal(D, D, seed=seed))[0]
    variances = torch.cat([torch.linspace(3, 2, rank, dtype=F64), torch.full((D - rank,), 0.3, dtype=F64)])
    cov, mean, x = q @ torch.diag(variances) @ q.T, normal(D, seed=seed), 80 * normal(3, D)
    warm = WarmStart.gaussian(iia.EDM(), 80.0, 3.0, mean=mean, covariance=cov, rank=rank)
    assert warm.weight.projections.count == rank + 1
    close(warm.apply(x), exact_flow(x, mean, cov, iia.EDM(), 80.0, 3.0), atol=1e-11)


def test_variances_and_one_number_are_covariances_too() -> None:
    x, mean, v = 80 * normal(3, 2, 3), normal(2, 3), normal(2, 3).square() + 0.1
    for cov, full in ((v, torch.diag(v.flatten())), (torch.tensor(0.4, dtype=F64), 0.4 * torch.eye(6, dtype=F64))):
        warm = WarmStart.gaussian(iia.EDM(), 80.0, 3.0, mean=mean, covariance=cov)
        flow = exact_flow(x.reshape(3, 6), mean.flatten(), full, iia.EDM(), 80.0, 3.0)
        close(warm.apply(x), flow.reshape(3, 2, 3), atol=1e-11)


@every_schedule
def test_two_maps_in_a_row_are_the_map_over_both_intervals(schedule: iia.Schedule) -> None:
    t, u, s = times(schedule, 50.0, 10.0, 2.0)
    moments, x = exact_moments(normal(D), covariance()), normal(3, D)
    first, second, whole = (WarmStart.of_moments(moments, schedule, *pair) for pair in ((t, u), (u, s), (t, s)))
    close(second.apply(first.apply(x)), whole.apply(x), atol=1e-12)


@in_turn("schedule, solver", ALL_SCHEDULES, ["ddim", "heun", "ipndm3"])
def test_a_warm_started_plan_is_the_map_and_then_the_plan(schedule: iia.Schedule, solver: str) -> None:
    t, s = times(schedule, 50.0, 8.0)
    mean, cov = normal(D), covariance()
    warm = WarmStart.gaussian(schedule, t, s, mean=mean, covariance=cov)
    ode, x = gaussian_ode(mean, cov, schedule), schedule.sigma(t) * normal(5, D)
    exact = exact_flow(x, mean, cov, schedule, t, schedule.t_data)
    errors = []
    for n in (8, 40):
        plan = iia.get_solver(solver).plan(schedule, iia.grids.karras(n, 0.02, 8.0, schedule=schedule))
        plan = replace(plan, grid=(s, *plan.grid[1:]))  # the same but for rounding
        started = warm.then(plan)
        assert started.nfe == plan.nfe and started.grid == (t, *plan.grid)
        y = iia.sample(ode, x, solver=started)
        close(y, plan.run(ode, warm.apply(x)), atol=1e-12 * float(x.abs().max()))
        assert iia.odeint(ode, x, method=started).shape == (len(plan.grid) + 1, 5, D)
        errors.append(float((y - exact).square().mean().sqrt()))
    assert errors[1] < errors[0] / 5 and errors[1] < 0.1


def test_a_warm_start_that_does_not_fit_is_refused() -> None:
    warm = WarmStart.gaussian(iia.EDM(), 80.0, 8.0, mean=normal(D), covariance=covariance())
    euler = iia.get_solver("euler")
    with pytest.raises(iia.errors.MismatchError, match=r"ends at t = 8.*starts at 7"):
        warm.then(euler.plan(iia.EDM(), torch.tensor([7.0, 1.0], dtype=F64)))
    with pytest.raises(iia.errors.MismatchError, match="for"):
        warm.then(euler.plan(iia.VE(), torch.tensor([64.0, 1.0], dtype=F64)))
    with pytest.raises(iia.errors.GridError, match="less noise"):
        WarmStart.gaussian(iia.EDM(), 8.0, 80.0, mean=normal(D), covariance=covariance())
    with pytest.raises(iia.errors.PlanError, match="not finite"):
        WarmStart(iia.EDM(), 80.0, 8.0, math.nan)
    for options in ({}, {"mean": normal(D)}, {"mean": normal(D), "covariance": covariance(), "samples": normal(9, D)}):
        with pytest.raises(iia.errors.InputError, match="mean and covariance, or samples"):
            WarmStart.gaussian(iia.EDM(), 80.0, 8.0, **options)
    for cov in (torch.eye(3), -covariance(), normal(D, D)):
        with pytest.raises(iia.errors.InputError):
            exact_moments(normal(D), cov)


# ---- moments from samples --------------------------------------------------------------------------------------------


def smooth_images(n: int, seed: int = 0) -> Tensor:
    """RGB images with a power-law spectrum, more of it in the luma."""
    p = Bands((3, 8, 8), 4, "luma-chroma")
    return LinearMap(p, torch.tensor([4.0, 1.0, 0.3, 0.1, 1.0, 0.2, 0.05, 0.02], dtype=F64))(
        normal(n, 3, 8, 8, seed=seed)
    )


def test_with_many_samples_the_estimate_is_the_truth() -> None:
    samples = normal(4000, D) @ torch.linalg.cholesky(covariance()).T + 2.0
    moments = estimate_moments(samples, level=1.0)
    x = 80 * normal(50, D, seed=3)
    got = WarmStart.of_moments(moments, iia.EDM(), 80.0, 3.0).apply(x)
    exact = exact_flow(x, torch.full((D,), 2.0, dtype=F64), covariance(), iia.EDM(), 80.0, 3.0)
    close(got, exact, atol=0.15)


def test_with_few_images_the_choice_is_a_spectrum_and_no_worse_than_any_other() -> None:
    samples, others = smooth_images(60), smooth_images(100, seed=9)
    kinds = ("auto", "dct", "ledoit-wolf", 0.1, 1.0)
    found = {k: estimate_moments(samples, shrink=k, level=1.0) for k in kinds}
    scores = {k: m.log_likelihood(others, 1.0) for k, m in found.items()}
    assert found["auto"].about["covariance"] == "dct" == found["dct"].about["covariance"]
    assert max(scores, key=scores.__getitem__) in ("auto", "dct")
    assert scores["dct"] > scores["ledoit-wolf"] > scores[1.0]


def test_the_likelihood_is_that_of_the_gaussian() -> None:
    cov, r = covariance(), normal(20, D)
    exact = torch.distributions.MultivariateNormal(torch.zeros(D, dtype=F64), cov).log_prob(r).mean() / D
    assert exact_moments(torch.zeros(D, dtype=F64), cov).log_likelihood(r, 0.0) == pytest.approx(float(exact))


@pytest.mark.parametrize("rank", [0, 3, None])
def test_the_rank_bounds_the_directions(rank: int | None) -> None:
    moments = estimate_moments(normal(5, 3, 4), rank=rank, shrink=0.2)
    assert isinstance(moments.projections, Principal)
    assert moments.projections.count == (6 if rank is None else rank + 1)
    total = float((moments.variances * moments.projections.sizes).sum())
    r = normal(5, 3, 4) - normal(5, 3, 4).mean(0)
    assert total == pytest.approx(float(r.square().sum()) / 4)  # shrinking keeps the trace


@pytest.mark.parametrize(
    "options",
    [
        {"samples": normal(1, 4)},
        {"samples": normal(9, 4) / 0},
        {"samples": normal(9, 4), "shrink": "oas"},
        {"samples": normal(9, 4), "shrink": 1.5},
        {"samples": normal(9, 4), "labels": torch.zeros(9)},
        {"samples": normal(9, 4), "labels": torch.zeros(8), "key": "c"},
        {"samples": normal(2, 4), "labels": torch.arange(2), "key": "c"},
        {"samples": normal(9, 4), "rank": -1},
    ],
)
def test_samples_that_do_not_do_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(iia.errors.InputError):
        estimate_moments(**options)
    with pytest.raises(iia.errors.InputError):
        Moments(normal(4), Bands((5,), "all"), torch.ones(5))


# ---- per condition ---------------------------------------------------------------------------------------------------


@every_schedule
def test_a_mean_for_each_class_makes_the_map_exact_for_each_class(schedule: iia.Schedule) -> None:
    t, s = times(schedule, 40.0, 4.0)
    labels = torch.tensor([3, 1, 3, 8, 1, 8, 8, 3] * 5)
    centres = {1: normal(D, seed=1), 3: normal(D, seed=3), 8: normal(D, seed=8)}
    samples = torch.stack([centres[int(c)] for c in labels]) + 0.5 * normal(len(labels), D)
    warm = WarmStart.gaussian(schedule, t, s, samples=samples, labels=labels, per="c", shrink=0.1)
    assert isinstance(warm.constant, PerCondition) and warm.constant.values == (1, 3, 8)
    x = schedule.sigma(t) * normal(3, D)
    ode = iia.ProbabilityFlowODE(lambda x, t, c: x, schedule, conditioning={"c": torch.tensor([8, 1, 3])})
    moments = estimate_moments(samples, labels=labels, key="c", shrink=0.1)
    for i, c in enumerate((8, 1, 3)):
        own = Moments(samples[labels == c].mean(0), moments.projections, moments.variances)
        close(warm.apply(x, ode)[i], WarmStart.of_moments(own, schedule, t, s).apply(x)[i], atol=1e-12)
    plan = iia.get_solver("euler").plan(schedule, torch.tensor(times(schedule, 4.0, 1.0), dtype=F64))
    close(warm.then(plan).run(ode, x), plan.run(ode, warm.apply(x, ode)), atol=1e-12)
    with pytest.raises(iia.errors.MismatchError, match="'c'"):
        warm.apply(x)


# ---- from pairs of states --------------------------------------------------------------------------------------------


def test_pairs_on_a_line_are_fitted_exactly() -> None:
    x, c = 80 * normal(9, 2, 3), normal(2, 3, seed=1)
    warm = WarmStart.affine(iia.EDM(), 80.0, 8.0, x, 0.1 * x + c)
    assert warm.weight == pytest.approx(0.1)
    close(warm.apply(x), 0.1 * x + c, atol=1e-12)
    labels = torch.tensor([0, 1, 1] * 3)
    shift = torch.stack([c, -2 * c])
    per = WarmStart.affine(iia.EDM(), 80.0, 8.0, x, 0.1 * x + shift[labels], labels=labels, per="c")
    ode = iia.ProbabilityFlowODE(lambda x, t, c: x, iia.EDM(), conditioning={"c": labels})
    close(per.apply(x, ode), 0.1 * x + shift[labels], atol=1e-12)
    with pytest.raises(iia.errors.InputError, match="pairs"):
        WarmStart.affine(iia.EDM(), 80.0, 8.0, x, x[:4])


@pytest.mark.parametrize("prior", ["auto", 0.0])
def test_a_gain_per_coefficient_finds_those_of_a_diagonal_map(prior: Any) -> None:
    p = Bands((1, 8, 8), 3)
    true = LinearMap(p, torch.tensor([0.3, 0.1, 0.12], dtype=F64))
    x = 80 * normal(20, 1, 8, 8)
    warm = WarmStart.affine(iia.EDM(), 80.0, 8.0, x, true(x) + 1.0, over=p, prior=prior)
    close(warm.weight.coefficients, true.coefficients, atol=1e-6)


def test_gains_from_pairs_are_shrunk_to_those_of_the_gaussian() -> None:
    moments = exact_moments(torch.zeros(D), covariance())
    exact = WarmStart.of_moments(moments, iia.EDM(), 80.0, 3.0)
    x = 80 * normal(8, D)
    y = exact.apply(x) + normal(8, D, seed=5)  # pairs that are not quite of this Gaussian
    fits = {k: WarmStart.affine(iia.EDM(), 80.0, 3.0, x, y, over=moments, prior=k) for k in (0.0, 10.0, math.inf)}
    gaps = [float((fits[k].weight.coefficients - exact.weight.coefficients)[:-1].abs().max()) for k in fits]
    assert gaps[0] > gaps[1] > gaps[2] == 0.0
    with pytest.raises(iia.errors.InputError, match="prior"):
        WarmStart.affine(iia.EDM(), 80.0, 3.0, x, y, over=moments, prior="some")


# ---- on a trained network --------------------------------------------------------------------------------------------


def test_on_digits_a_warm_start_makes_six_evaluations_better_on_unseen_noise() -> None:
    ode = iia.ProbabilityFlowODE(digits(), iia.EDM())
    noise = 80 * normal(48 + 12, 1, 8, 8, dtype=torch.float32)
    ends = iia.sample(ode, noise, iia.grids.karras(7, 0.1), "heun")
    x, exact = noise[48:], ends[48:]

    def error(warm: WarmStart | None) -> float:
        start = 80.0 if warm is None else warm.t_1
        plan = iia.get_solver("ipndm3").plan(iia.EDM(), iia.grids.karras(6, 0.2, start))
        plan = plan if warm is None else warm.then(plan)
        assert plan.nfe == 6
        return float((iia.sample(ode, x, solver=plan) - exact).square().mean().sqrt())

    warm = [WarmStart.gaussian(iia.EDM(), 80.0, s, samples=ends[:48]) for s in (5.0, 10.0)]
    assert min(map(error, warm)) < 0.75 * error(None)
