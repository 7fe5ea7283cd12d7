"""Endpoint refinement: a plan as a differentiable function of its weights and times, and its minimizers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_SCHEDULES, every_schedule, gaussian, in_turn, mixture, normal
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import iia_ode as iia
from iia_ode.errors import InputError
from iia_ode.forms import PREDICTIONS
from iia_ode.iia import (
    IIA,
    Adam,
    Batch,
    EndpointError,
    GaussNewton,
    IncrementalGaussNewton,
    Parameters,
    Status,
    Window,
    refine,
)
from iia_ode.iia.ranking import cauchy_mean
from iia_ode.plan import Bands, Combine, Evaluate, LinearMap, Plan, Principal
from iia_ode.teacher import Teacher

F64 = torch.float64


def levels(schedule, *sigmas):
    times = [schedule.t_of_noise_to_signal(s) for s in sigmas]
    return torch.tensor([*times, schedule.t_data], dtype=F64)


def plan_of(solver="ddim", schedule=None, sigmas=(40.0, 6.0, 1.5, 0.3)):
    schedule = schedule or iia.EDM()
    return iia.plan.trace(iia.get_solver(solver), schedule, levels(schedule, *sigmas))


def states(n, schedule, sigma=40.0, problem=None):
    t = schedule.t_of_noise_to_signal(sigma)
    return (problem or mixture()).noisy(n, schedule, t, torch.Generator().manual_seed(1))


def truth(ode, x, sigma=40.0):
    schedule = ode.schedule
    return Teacher.solve(ode, x, schedule.t_of_noise_to_signal(sigma), schedule.t_data, steps=60).final


# ---- the parameters -----------------------------------------------------------------------------------------------------


@in_turn("schedule, solver", ALL_SCHEDULES, ["ddim", "heun", "ipndm3", "dpmpp_2m", "dpm2", "unipc"])
def test_a_plan_made_of_its_own_parameters_is_the_same_algorithm(solver, schedule):
    plan = plan_of(solver, schedule)
    parameters = Parameters(plan)
    again = parameters.plan(parameters.initial)
    assert plan.canonical().difference(again.canonical()) < 1e-11
    assert again.nfe == plan.nfe
    x, ode = states(4, schedule), mixture().ode(schedule)
    torch.testing.assert_close(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=plan), rtol=1e-9, atol=1e-9)


@in_turn("schedule, prediction", ALL_SCHEDULES, PREDICTIONS)
def test_the_differentiable_run_ends_where_the_plan_does(schedule, prediction):
    plan, ode, x = plan_of("ipndm3", schedule), mixture().ode(schedule, prediction), states(3, schedule)
    parameters = Parameters(plan)
    final, _ = parameters.run(ode, x, parameters.initial)
    torch.testing.assert_close(final.detach(), iia.sample(ode, x, solver=plan), rtol=1e-8, atol=1e-8)


@every_schedule
def test_gradients_per_sample_are_those_of_finite_differences(schedule):
    ode, x = mixture().ode(schedule, "noise"), states(3, schedule)
    parameters = Parameters(plan_of("ipndm2", schedule, (40.0, 3.0, 0.5)))
    theta = parameters.initial
    final, leaf = parameters.run(ode, x, theta)
    probe = torch.randn(final.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(final, leaf, probe)

    def value(theta):
        return (parameters.plan(theta).run(ode, x) * probe).flatten(1).sum(dim=1)

    for p in range(len(theta)):
        step = torch.zeros_like(theta)
        step[p] = 1e-5
        expected = (value(theta + step) - value(theta - step)) / 2e-5
        torch.testing.assert_close(found[:, p], expected, rtol=2e-5, atol=2e-6)


def structured(schedule, seed=0):
    """A plan whose weights are maps: a fit of one weight per band."""
    shape = (2, 4, 4)
    window = Window(2, torch.eye(2, dtype=F64), shape)
    ode = iia.ProbabilityFlowODE(lambda x, t: 0.4 * torch.tanh(x.cumsum(-1)), schedule)
    t = schedule.t_of_noise_to_signal(40.0)
    z = torch.randn((12, *shape), dtype=F64, generator=torch.Generator().manual_seed(seed))
    x = math.hypot(schedule.alpha(t), schedule.sigma(t)) * z
    method = IIA("ddim", terms=window, target="local", ridge=1e-3, guard=False, intercept=True)
    return method.fit(ode, x, levels(schedule, 40.0, 4.0, 0.5)).plan, ode, x


def test_weights_that_are_maps_are_parameters_too():
    plan, ode, x = structured(iia.VP())
    parameters = Parameters(plan)
    theta = parameters.initial
    again = parameters.plan(theta)
    torch.testing.assert_close(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=plan), rtol=1e-9, atol=1e-9)
    final, leaf = parameters.run(ode, x, theta)
    torch.testing.assert_close(final.detach(), iia.sample(ode, x, solver=plan), rtol=1e-8, atol=1e-8)
    probe = torch.randn(final.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(final, leaf, probe)
    for p in range(len(theta)):
        step = torch.zeros_like(theta)
        step[p] = 1e-5
        ends = [(parameters.plan(theta + s).run(ode, x) * probe).flatten(1).sum(dim=1) for s in (step, -step)]
        torch.testing.assert_close(found[:, p], (ends[0] - ends[1]) / 2e-5, rtol=2e-5, atol=2e-6)


def test_a_plan_of_maps_is_refined_and_its_bands_differ_as_before():
    plan, ode, x = structured(iia.EDM())
    found = refine(ode, x, plan, truth(ode, x), held_out=0.0, probes=8, outliers=math.inf)
    assert found.gain < 0.5
    spread = []
    for p in (plan, found.plan):
        weights = p.canonical().final.weights
        spread.append(
            [w.coefficients - w.coefficients.mean() for _, w in sorted(weights.items()) if isinstance(w, LinearMap)]
        )
    assert len(spread[0]) == len(spread[1]) > 0
    for before, after in zip(*spread, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def test_maps_over_two_decompositions_are_refused():
    shape = (1, 4, 4)
    axis = torch.eye(16, dtype=F64)[:1]
    a, b = (LinearMap(p, torch.tensor([0.1, 0.2], dtype=F64)) for p in (Bands(shape, 2), Principal(axis, shape)))
    code = (Combine(((0, a),), step=1), Evaluate(1, 1.0, "data"), Combine(((2, b),), step=2))
    with pytest.raises(iia.IIAError, match="decomposition"):
        Parameters(Plan(iia.EDM(), (40.0, 1.0, 0.0), code, "mixed"))


class Remembered(nn.Module):
    """A denoiser that counts how many of its evaluations still have their inside in memory."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.kept, self.most = [], 0

    def forward(self, x, t):
        inside = torch.tanh(
            self.scale * x / (1 + t.reshape(-1, 1))
        )  # kept for the way back, as its derivative needs it
        self.kept.append(StorageWeakRef(inside.untyped_storage()))
        self.most = max(self.most, sum(not ref.expired() for ref in self.kept))
        return inside.clone() * 1.0


def test_checkpointing_holds_the_inside_of_one_evaluation_instead_of_all():
    x = 40 * normal(8, 3)
    held, gains = {}, {}
    for checkpointed in (False, True):
        model = Remembered()
        ode = iia.ProbabilityFlowODE(model, iia.EDM())
        exact = Teacher.solve(ode, x, 40.0, 0.0, steps=10).final
        model.most = 0
        found = refine(ode, x, plan_of(), exact, iterations=1, checkpointed=checkpointed)
        held[checkpointed], gains[checkpointed] = model.most, found.gain
    assert held[False] >= plan_of().nfe
    assert held[True] <= 2
    assert gains[True] == pytest.approx(gains[False], rel=1e-9)


@pytest.mark.parametrize("method", ["gauss-newton", "adam"])
def test_no_time_moves_below_the_smallest_level_of_the_model(method):
    ode, x = mixture().ode(iia.EDM()), states(24, iia.EDM())
    exact = truth(ode, x)
    plan = plan_of(sigmas=(40.0, 6.0, 1.5, 1.0))  # the last time would move down to 0.4 or so
    found = [refine(ode, x, plan, exact, method=method, sigma_min=s, iterations=8).plan for s in (0.0, 0.9)]
    ends = [min(plan.evaluation_times) for plan in found]
    assert ends[0] < 0.9 and ends[1] >= 0.9 * (1 - 1e-12)


def test_a_refinement_that_meets_numbers_that_are_not_finite_says_so():
    def broken(x, t):
        return x / (1 + t.reshape(-1, 1)) / torch.zeros(())

    ode, x = iia.ProbabilityFlowODE(broken, iia.EDM()), states(8, iia.EDM())
    for method in ("gauss-newton", "adam"):
        found = refine(ode, x, plan_of(), torch.zeros_like(x), method=method)
        assert found.best == 0 and found.status is Status.NOT_FINITE and "not finite" in found.status.value


def test_checkpointing_changes_nothing_but_memory():
    ode, x, parameters = mixture().ode(iia.EDM()), states(5, iia.EDM()), Parameters(plan_of())
    gradients = []
    for checkpointed in (False, True):
        final, leaf = parameters.run(ode, x, parameters.initial, checkpointed=checkpointed)
        gradients.append(torch.autograd.grad(final.square().sum(), leaf)[0])
    assert torch.equal(*gradients)


@settings(max_examples=15)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_times_that_cross_or_leave_the_grid_are_not_valid(moves):
    parameters = Parameters(plan_of())
    theta = parameters.initial.clone()
    theta[parameters.weights :] += torch.tensor(moves, dtype=F64)
    times = [40.0, *theta[parameters.weights :].exp().tolist()]
    assert parameters.valid(theta) == all(a > b for a, b in zip(times, times[1:], strict=False))


def test_stage_evaluations_at_one_time_move_together():
    plan = plan_of("heun")
    parameters = Parameters(plan)
    theta = parameters.initial.clone()
    theta[parameters.weights :] += 0.1
    moved = parameters.plan(theta).evaluation_times
    same = [a == b for a, b in zip(plan.evaluation_times, plan.evaluation_times[1:], strict=False)]
    assert [a == b for a, b in zip(moved, moved[1:], strict=False)] == same
    assert any(same)


# ---- the minimizers -----------------------------------------------------------------------------------------------------


class Quadratic:
    """Half the squared distance of A theta to b, in units of its size."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(9, 4, dtype=F64, generator=generator) * torch.tensor([1e-3, 1.0, 1e2, 1.0], dtype=F64)
        self.b = torch.randn(9, dtype=F64, generator=generator)

    def loss(self, theta):
        return float((self.a @ theta - self.b).norm())

    def derivatives(self, theta):
        return self.a.T @ (self.a @ theta - self.b), self.a.T @ self.a


def test_gauss_newton_finds_the_minimum_of_a_quadratic_in_a_few_steps():
    objective = Quadratic()
    search = GaussNewton(objective, torch.zeros(4, dtype=F64), tolerance=1e-14)
    losses = [search.loss]
    while search.step():
        losses.append(search.loss)
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False)) and len(losses) < 12
    torch.testing.assert_close(search.theta, torch.linalg.lstsq(objective.a, objective.b[:, None]).solution[:, 0])
    assert search.status in (Status.TOLERANCE, Status.STALLED) and not search.step()


class Rows:
    """Squared residuals of the rows of a linear system; a sample is a row."""

    def __init__(self, a, b):
        self.a, self.b, self.seen, self.asked = a, b, math.nan, []

    def __len__(self):
        return len(self.b)

    def part(self, first, count):
        index = (first + torch.arange(count)) % len(self)
        self.asked.append(count)
        return Rows(self.a[index], self.b[index])

    def loss(self, theta):
        return float((self.a @ theta - self.b).square().mean().sqrt())

    def derivatives(self, theta):
        self.seen = self.loss(theta)
        return self.a.T @ (self.a @ theta - self.b), self.a.T @ self.a


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.1]))
def test_steps_on_few_samples_each_come_near_the_minimum_over_all(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(60, 6, dtype=F64, generator=generator)
    b = a @ torch.randn(6, dtype=F64, generator=generator) + noise * torch.randn(60, dtype=F64, generator=generator)
    rows = Rows(a, b)
    search = IncrementalGaussNewton(rows, torch.zeros(6, dtype=F64), minibatch=8, together=3, decay=0.9)
    for _ in range(8):
        assert search.step()
    least = rows.loss(torch.linalg.lstsq(a, b[:, None]).solution[:, 0])
    assert rows.loss(search.theta) < 1.25 * least + 1e-3 * rows.loss(torch.zeros(6, dtype=F64))
    assert rows.asked == [8] * 24  # no step saw more


def test_steps_on_few_samples_end_where_a_derivative_is_not_finite():
    rows = Rows(torch.full((8, 2), math.nan, dtype=F64), torch.zeros(8, dtype=F64))
    search = IncrementalGaussNewton(rows, torch.zeros(2, dtype=F64), minibatch=4)
    assert not search.step() and search.status is Status.NOT_FINITE and rows.asked == [4]
    assert torch.equal(search.theta, torch.zeros(2, dtype=F64))


def test_a_refinement_on_few_samples_per_step_gains_most_of_the_gain_at_less_cost():
    ode, x = mixture().ode(iia.EDM()), states(120, iia.EDM())
    target, plan = truth(ode, x), plan_of("ipndm3")
    full = refine(ode, x, plan, target, iterations=5, probes=1)
    few = refine(ode, x, plan, target, iterations=5, probes=1, minibatch=12)
    assert few.gain < 0.7 and full.gain > 0.5 * few.gain
    assert few.sample_evaluations < 0.6 * full.sample_evaluations
    with pytest.raises(InputError, match="minibatch is for method='gauss-newton'"):
        refine(ode, x, plan, target, method="adam", minibatch=12)
    with pytest.raises(InputError, match="minibatch"):
        refine(ode, x, plan, target, minibatch=0)


def test_gauss_newton_takes_shorter_steps_where_the_loss_is_infinite_and_gives_up_in_the_end():
    class Walled(Quadratic):
        def loss(self, theta):
            return super().loss(theta) if float((self.a @ theta).norm()) < self.wall else math.inf

    near, shut = Walled(), Walled()
    near.wall, shut.wall = 0.2, 1e-9
    search = GaussNewton(near, torch.zeros(4, dtype=F64))
    assert search.step() and search.damping > 1e-3 and search.loss < near.loss(torch.zeros(4, dtype=F64))
    search = GaussNewton(shut, torch.zeros(4, dtype=F64))
    assert not search.step() and search.status is Status.STALLED and search.loss == shut.loss(torch.zeros(4, dtype=F64))


def test_adam_finds_the_minimum_of_a_quadratic_at_any_first_rates():
    objective = Quadratic()
    exact = torch.linalg.lstsq(objective.a, objective.b[:, None]).solution[:, 0]
    own = objective.a.norm(dim=0).reciprocal()
    for rates in (0.1 * own, 1e3 * own):
        search, losses = Adam(objective, torch.zeros(4, dtype=F64), rates=rates), []
        while search.step():
            losses.append(search.loss)
        assert search.status is Status.STALLED and not search.step() and search.damping == 0
        assert search.loss == min(losses) < 1.02 * objective.loss(exact)


def test_adam_does_not_depend_on_the_scale_of_the_loss():
    class Scaled(Quadratic):
        def derivatives(self, theta):
            return tuple(1e-12 * v for v in super().derivatives(theta))

    found = [Adam(objective, torch.zeros(4, dtype=F64)) for objective in (Quadratic(), Scaled())]
    assert all([search.step() for search in found for _ in range(5)])
    torch.testing.assert_close(found[0].theta, found[1].theta, rtol=1e-9, atol=0)


@pytest.mark.parametrize("minimizer", [GaussNewton, Adam])
def test_a_limit_bounds_every_step(minimizer):
    bounded = minimizer(
        Quadratic(), torch.zeros(4, dtype=F64), limit=lambda at, to: at + (to - at).clamp(-0.001, 0.001)
    )
    steps = []
    while len(steps) < 20 and bounded.status is None:
        before = bounded.theta
        bounded.step()
        steps.append(float((bounded.theta - before).abs().max()))
    assert steps[0] > 0 and max(steps) <= 0.001 * (1 + 1e-12)


# ---- the refinement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.VP(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_refinement_takes_a_third_off_the_error_on_noise_it_has_not_seen(schedule):
    ode, x = mixture().ode(schedule), states(80, schedule)
    exact = truth(ode, x)
    plan = plan_of("ipndm3", schedule)
    found = refine(ode, x[:48], plan, exact[:48])
    before, after = (
        (iia.sample(ode, x[48:], solver=p) - exact[48:]).flatten(1).square().mean(dim=1).sqrt().median()
        for p in (plan, found.plan)
    )
    assert after < 0.67 * before
    assert found.plan.nfe == plan.nfe


@pytest.mark.parametrize("method", ["gauss-newton", "adam"])
def test_the_result_is_never_worse_on_held_out_noise_than_the_start(method):
    ode, x = mixture().ode(iia.EDM()), states(16, iia.EDM())
    found = refine(ode, x, plan_of(), truth(ode, x), method=method, iterations=3)
    assert found.iterations[found.best].held_out <= found.iterations[0].held_out
    assert found.gain <= 1
    nothing = refine(ode, x, plan_of(), iia.sample(ode, x, solver=plan_of()), method=method, iterations=2)
    # Only rounding is left to gain.
    assert nothing.gain <= 1 and nothing.plan.difference(plan_of()) < 1e-9


@pytest.mark.parametrize(("dim", "probes", "tolerance"), [(1, 1, 1e-12), (2, 1, 1e-12), (4, 400, 0.03)])
def test_the_gauss_newton_matrix_is_exact_in_two_dimensions_and_on_average_in_more(dim, probes, tolerance):
    problem = iia.problems.Gaussian(torch.zeros(dim, dtype=F64), torch.linspace(0.3, 1.5, dim, dtype=F64))
    ode, schedule, parameters = problem.ode(iia.EDM()), iia.EDM(), Parameters(plan_of())
    x = states(12, schedule, problem=problem)
    batch = Batch(ode, x, final=problem.flow(x, schedule, 40.0, 0.0))
    gradient, square = EndpointError(parameters, batch, probes=probes).derivatives(parameters.initial)
    final, leaf = parameters.run(ode, x, parameters.initial)
    rows = [torch.autograd.grad(final[:, k].sum(), leaf, retain_graph=True)[0] for k in range(dim)]  # [B, P] each
    exact = sum(row.T @ row for row in rows)
    assert float((square - exact).norm()) <= tolerance * float(exact.norm())
    residual = final.detach() - batch.target
    assert torch.allclose(gradient, sum(residual[:, k] @ row for k, row in enumerate(rows)), rtol=1e-9)


def test_steps_on_few_samples_without_held_out_samples_keep_the_iteration_that_is_best_on_all():
    ode, x = mixture().ode(iia.EDM()), states(40, iia.EDM())
    found = refine(ode, x, plan_of("ipndm3"), truth(ode, x), held_out=0.0, iterations=4, minibatch=12)
    errors = [i.train for i in found.iterations]
    assert found.best == errors.index(min(errors)) > 0 and found.gain < 0.8


def test_adam_brings_down_rates_that_are_far_too_large_for_a_plan():
    ode, x, parameters = mixture().ode(iia.EDM()), states(16, iia.EDM()), Parameters(plan_of("ipndm2"))
    objective = EndpointError(parameters, Batch(ode, x, final=truth(ode, x)), probes=0)
    search = Adam(objective, parameters.initial, rates=0.3, limit=parameters.clipped)
    losses = [search.loss, *(search.loss for _ in range(40) if search.step())]
    assert losses[1] > 2 * losses[0] and min(losses) < 0.6 * losses[0]


def test_on_gaussian_data_two_evaluations_can_be_made_nearly_exact_per_variance():
    # Two variances, and weights of three evaluations: more parameters than a linear map of two numbers needs.
    problem = iia.problems.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.3, 1.5], dtype=F64))
    ode, schedule = problem.ode(iia.EDM()), iia.EDM()
    x = states(24, schedule, problem=problem)
    exact = problem.flow(x, schedule, 40.0, 0.0)
    plan = plan_of(sigmas=(40.0, 3.0, 0.5))
    found = refine(ode, x, plan, exact, iterations=60, tolerance=1e-9, outliers=math.inf)
    assert found.gain < 1e-5


def test_a_refinement_is_repeatable_and_its_chunks_do_not_matter():
    ode, x = mixture().ode(iia.EDM()), states(20, iia.EDM())
    exact = truth(ode, x)
    a, b = (refine(ode, x, plan_of(), exact, iterations=2) for _ in range(2))
    assert [i.train for i in a.iterations] == [i.train for i in b.iterations]
    c, d = (
        EndpointError(Parameters(plan_of()), Batch(ode, x, chunk_size=size, final=exact), probes=0) for size in (7, 20)
    )
    theta = c.parameters.initial
    assert c.loss(theta) == pytest.approx(d.loss(theta), rel=1e-12)
    torch.testing.assert_close(c.derivatives(theta)[0], d.derivatives(theta)[0], rtol=1e-9, atol=1e-9)


def test_the_grid_stays_where_it_is_if_asked():
    ode, x = mixture().ode(iia.EDM()), states(16, iia.EDM())
    found = refine(ode, x, plan_of(), truth(ode, x), learn_grid=False, iterations=2)
    assert found.plan.grid == pytest.approx(plan_of().grid, rel=1e-12)
    assert found.best > 0


def test_conditions_and_guidance_belong_to_their_samples():
    class Shifted(nn.Module):
        def forward(self, x, t, shift):
            return gaussian().denoise(x, 1.0, t[:, None]) + torch.tanh(x / (1 + t[:, None])) * shift[:, None]

    shift = torch.linspace(0, 1, 16, dtype=F64)
    ode = iia.ProbabilityFlowODE(
        Shifted(),
        iia.EDM(),
        conditioning={"shift": shift},
        unconditional={"shift": torch.zeros(1, dtype=F64)},
        guidance_scale=1.5,
    )
    x = states(16, iia.EDM(), problem=gaussian())
    exact = truth(ode, x)
    found = refine(ode, x, plan_of(), exact, chunk_size=5, iterations=5)
    assert found.gain < 0.7


def test_what_cannot_be_refined_says_so():
    ode, x = mixture().ode(iia.EDM()), states(6, iia.EDM())
    for options in ({"iterations": 0}, {"probes": 1.5}, {"patience": 0}, {"chunk_size": True}, {"held_out": 1.0}):
        with pytest.raises(iia.errors.InputError, match=next(iter(options))):
            refine(ode, x, plan_of(), x, **options)
    with pytest.raises(iia.errors.UnknownNameError, match="gauss-newton"):
        refine(ode, x, plan_of(), x, method="newton")
    with pytest.raises(iia.errors.InputError, match="shape"):
        refine(ode, x, plan_of(), x[:3])

    def blind(x, t):
        with torch.no_grad():
            return mixture().denoise(x, 1.0, t[:, None])

    with pytest.raises(iia.errors.InputError, match="gradient"):
        refine(iia.ProbabilityFlowODE(blind, iia.EDM()), x, plan_of(), x)


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_the_cauchy_mean_is_below_the_plain_one_and_near_it_without_outliers(errors, scale):
    errors = torch.tensor(errors, dtype=F64)
    plain = float(errors.square().mean().sqrt())
    assert cauchy_mean(errors, math.inf) == pytest.approx(plain)
    assert cauchy_mean(errors, scale) <= plain * (1 + 1e-12)
    assert cauchy_mean(errors, 1e3 * max(plain, 1e-6)) == pytest.approx(plain, rel=1e-4, abs=1e-12)
