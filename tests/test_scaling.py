"""The same problem in other units has the same answer: data, states and noise levels times c, for c from 1e-4 to 1e4."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import F64, generator

import iia_ode as iia
from iia_ode import ModelStatistics, Teacher
from iia_ode.iia import IIA, refine
from iia_ode.problems import Gaussian, Mixture, Problem
from iia_ode.sizes import few, size_of_data, smallest_level
from iia_ode.warm_starts import WarmStart

UNITS = st.floats(-4, 4).map(lambda power: 10.0**power)
MEANS = torch.tensor([[0.4, -0.2, 0.3, 0.9], [-0.5, 0.8, 0.1, -0.4], [0.1, 0.2, -0.9, 0.2]], dtype=F64)
BUDGET = iia.Budget(teacher_steps=24, trials=2)
EDM, FLOW = iia.EDM(), iia.FlowMatching()

a_few_units = settings(max_examples=2, deadline=None)


def problem(c: float = 1.0) -> Problem:
    """A mixture of three Gaussians in units of c."""
    return Mixture(torch.tensor([0.5, 0.3, 0.2]), c * MEANS, c * torch.tensor([[0.3], [0.5], [0.4]], dtype=F64))


def states(n: int, c: float = 1.0, level: float = 80.0, seed: int = 0) -> torch.Tensor:
    """States of EDM at a noise level, in units of c."""
    return c * problem().noisy(n, EDM, level, generator(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-6) -> None:
    """Assert that two tensors differ by little beside the size of the whole."""
    assert float((actual - expected).abs().max()) <= rtol * float(expected.abs().max())


def same_plan(actual: iia.Plan, expected: iia.Plan, c: float) -> None:
    """Assert that two plans of EDM are equal in units of c."""
    close(torch.tensor(actual.grid, dtype=F64) / c, torch.tensor(expected.grid, dtype=F64))
    ours, theirs = actual.canonical(), expected.canonical()
    for a, b in zip((*ours.states, ours.final), (*theirs.states, theirs.final), strict=True):
        assert a.weights.keys() == b.weights.keys()
        for j in a.weights:
            assert float(a.weights[j]) == pytest.approx(float(b.weights[j]), rel=1e-5, abs=1e-6)


# ---- the size of the data --------------------------------------------------------------------------------------------


@given(UNITS)
@a_few_units
def test_the_size_of_the_data_has_the_unit_of_the_data(c):
    assert size_of_data(problem(c).ode(EDM), states(32, c), 80 * c) / c == pytest.approx(
        size_of_data(problem().ode(EDM), states(32), 80.0), rel=1e-9
    )
    noise = torch.randn(32, 4, generator=generator(1), dtype=F64)
    assert size_of_data(problem(c).ode(FLOW), noise, 1.0) / c == pytest.approx(
        size_of_data(problem().ode(FLOW), noise, 1.0), rel=1e-5
    )


def test_the_size_is_about_the_root_mean_square_of_the_data_wherever_the_states_are():
    data = problem().sample(4000, generator(0)).square().mean().sqrt().item()
    for t in (80.0, 5.0, 0.01):
        assert size_of_data(problem().ode(EDM), states(2000, level=t), t) == pytest.approx(data, rel=0.5)
    assert size_of_data(problem().ode(FLOW), problem().sample(2000, generator(1)), 0.0) == pytest.approx(data, rel=0.5)


def test_the_order_of_the_batch_does_not_change_the_size():
    x, order = states(40), torch.randperm(40, generator=generator(3))
    assert torch.equal(x[few(x)], x[order][few(x[order])])
    assert [len(few(states(n))) for n in (1, 40, 100, 600)] == [1, 2, 3, 8]


@pytest.mark.parametrize("answer", [0.0, float("nan")])
def test_a_model_without_data_has_a_size_too(answer):
    ode = iia.ProbabilityFlowODE(lambda x, t: 0 * x + answer, EDM)
    assert size_of_data(ode, states(8), 80.0) == 0.5


def test_no_level_outside_of_the_integration_is_evaluated_for_the_size():
    seen: list[float] = []

    def model(x, t):
        seen.append(float(t[0]))
        return problem().denoise(x, 1.0, t[:, None])

    ode = iia.ProbabilityFlowODE(model, EDM)
    for start, end in ((80.0, 3.0), (3.0, 80.0), (3.0, 0.0)):
        seen.clear()
        Teacher.solve(ode, states(8, level=start), start, end, steps=8, sigma_min=0.5 if end == 0 else None)
        assert min(seen) >= min(start, end or 0.5) * (1 - 1e-12) and max(seen) <= max(start, end) * (1 + 1e-12)


# ---- the law ---------------------------------------------------------------------------------------------------------


@given(UNITS)
@a_few_units
def test_a_teacher_is_the_same_in_every_unit(c):
    for schedule, start, given_states in (
        (EDM, 80.0, states(16)),
        (FLOW, 1.0, torch.randn(16, 4, generator=generator(0), dtype=F64)),
    ):
        unit = c if schedule is EDM else 1.0
        one = Teacher.solve(problem().ode(schedule), given_states, start, 0.0, steps=20)
        other = Teacher.solve(problem(c).ode(schedule), unit * given_states, unit * start, 0.0, steps=20)
        close(other.final / c, one.final)
        assert other.record.error / c == pytest.approx(one.record.error, rel=1e-3)
        assert other.sigma_min / c == pytest.approx(one.sigma_min, rel=1e-6)
        for level in (30.0, 2.0, 0.1):
            t, s = (schedule.t_of_noise_to_signal(level * v) for v in (c, 1.0))
            # The states of a level, in units of the data.
            close(other.at(t) / schedule.alpha(t) / c, one.at(s) / schedule.alpha(s))


@given(UNITS)
@a_few_units
def test_references_are_the_same_in_every_unit(c):
    x = states(4)
    one = iia.reference.solve(problem().ode(EDM), x, 80.0, 0.0, rtol=1e-4, atol=1e-4)
    close(iia.reference.solve(problem(c).ode(EDM), c * x, 80 * c, 0.0, rtol=1e-4, atol=1e-4) / c, one)
    dense, other = (
        iia.reference.trajectory(problem(v).ode(EDM), v * x, 80 * v, 0.0, points=6, rtol=1e-4, atol=1e-4)
        for v in (1.0, c)
    )
    close(other(3 * c) / c, dense(3.0))


@given(UNITS)
@a_few_units
def test_a_fit_and_its_guard_are_the_same_in_every_unit(c):
    x, grid = states(32), iia.grids.karras(3, 0.05, 80.0)
    for target in ("trajectory", iia.iia.targets.Local(1e-3)):
        method = IIA("ddim", terms="window", target=target, ridge="auto", intercept=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = (method.fit(problem(v).ode(EDM), v * x, v * grid) for v in (1.0, c))
        same_plan(other.plan, one.plan, c)
        ours, theirs = one.record.endpoint, other.record.endpoint
        assert theirs.fell_back == ours.fell_back
        assert theirs.fit / c == pytest.approx(ours.fit, rel=1e-6)
        assert theirs.base / c == pytest.approx(ours.base, rel=1e-6)


@pytest.mark.parametrize("c", [1e-4, 300.0])
def test_one_call_is_the_same_in_every_unit(c):
    x = states(32)
    for schedule, nfe, starts in ((EDM, 2, 1), (FLOW, 2, 0)):
        unit = c if schedule is EDM else 1.0
        budget = iia.Budget(**(vars(BUDGET) | {"starts": starts, "iterations": 2}))
        z = x if schedule is EDM else x / 80
        start = 80.0 if schedule is EDM else None
        one = iia.fit(problem().ode(schedule), nfe, x=z, budget=budget, sigma_max=start)
        other = iia.fit(problem(c).ode(schedule), nfe, x=unit * z, budget=budget, sigma_max=start and c * start)
        for a, b in zip(one.grid[1:-1].tolist(), other.grid[1:-1].tolist(), strict=True):
            assert schedule.noise_to_signal(b) / c == pytest.approx(schedule.noise_to_signal(a), rel=1e-6)
        assert other.record.endpoint.fit / c == pytest.approx(one.record.endpoint.fit, rel=1e-6)
        assert [i.error / c for i in other.record.search.ingredients] == pytest.approx(
            [i.error for i in one.record.search.ingredients], rel=1e-6
        )


def test_a_noise_prediction_from_alpha_0_starts_at_a_level_of_the_unit_of_the_data():
    noise = torch.randn(24, 4, generator=generator(0), dtype=F64)
    found = [iia.fit(problem(c).ode(FLOW, "noise"), 2, noise=noise, budget=BUDGET) for c in (1.0, 1e3)]
    levels = [FLOW.noise_to_signal(float(f.grid[0])) for f in found]
    assert levels[1] / 1e3 == pytest.approx(levels[0], rel=1e-4)
    assert found[1].record.endpoint.fit / 1e3 == pytest.approx(found[0].record.endpoint.fit, rel=1e-4)


@pytest.mark.parametrize("method", ["gauss-newton", "adam"])
def test_a_refinement_is_the_same_in_every_unit(method):
    x, grid = states(24), iia.grids.karras(3, 0.1, 80.0)
    plan = iia.get_solver("ddim").plan(EDM, grid)
    target = Teacher.solve(problem().ode(EDM), x, 80.0, 0.0, steps=20).final
    one = refine(problem().ode(EDM), x, plan, target, method=method, iterations=3)
    for c in (1e-4, 1e3):
        scaled = iia.get_solver("ddim").plan(EDM, c * grid)
        other = refine(problem(c).ode(EDM), c * x, scaled, c * target, method=method, iterations=3)
        assert other.gain == pytest.approx(one.gain, rel=1e-6)
        same_plan(other.plan, one.plan, c)


@given(UNITS)
@a_few_units
def test_warm_starts_are_the_same_in_every_unit(c):
    samples, x = problem().sample(200, generator(0)), states(8)
    one = WarmStart.gaussian(EDM, 80.0, 2.0, samples=samples)
    other = WarmStart.gaussian(EDM, 80 * c, 2 * c, samples=c * samples)
    close(other.apply(c * x) / c, one.apply(x))
    assert other.about["covariance"] == one.about["covariance"]


def test_statistics_are_the_same_in_every_unit():
    x = torch.randn(64, 4, generator=generator(0), dtype=F64)
    grids = [
        torch.tensor([1.0, *(FLOW.t_of_noise_to_signal(c * v) for v in (9.0, 1.0, 0.1))], dtype=F64) for c in (1.0, 1e4)
    ]
    one, other = (
        ModelStatistics.estimate(problem(c).ode(FLOW), x, grid, points=12)
        for c, grid in zip((1.0, 1e4), grids, strict=True)
    )
    close(other.l, one.l, 1e-4)
    close(other.s, one.s, 1e-3)


# ---- the report that it came from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 64.0, 1000.0, 1e-4])
def test_pixels_from_0_to_255_are_taught_and_fitted_as_well_as_data_of_size_1(c):
    mean, std = (c * torch.tensor(v, dtype=F64) for v in ([0.1, -0.2, 0.3, 0.5], [0.5, 1.0, 1.5, 2.0]))
    g = Gaussian(mean, std**2)
    ode, top, low = g.ode(EDM), 80 * c, 0.002 * c
    x = g.noisy(128, EDM, top, generator(0))
    exact = g.flow(x, EDM, top, 0.0)

    def relative(y):
        return float((y - exact).square().mean().sqrt() / exact.std())

    assert relative(Teacher.solve(ode, x, top, 0.0, sigma_min=low).final) < 1.2e-5
    fit = IIA("ddim", terms="window", target="trajectory").fit(ode, x, iia.grids.karras(7, low, top))
    said = fit.record.endpoint.fit / float(exact.std())
    assert said == pytest.approx(relative(iia.sample(ode, x, solver=fit)), rel=0.1)
    # Flow matching with default options starts where alpha is 0.
    flow, z = g.ode(FLOW), torch.randn(32, 4, generator=generator(1), dtype=F64)
    end = g.flow(z, FLOW, 1.0, 0.0)
    taught = Teacher.solve(flow, z, 1.0, 0.0)
    assert float((taught.final - end).square().mean().sqrt() / end.std()) < 5e-5


def test_the_default_smallest_level_is_edms_for_data_of_size_one_half():
    assert smallest_level(EDM, 0.5) == 0.002
    assert smallest_level(EDM, 50.0) == 0.2
