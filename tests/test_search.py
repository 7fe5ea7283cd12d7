"""Searches: coordinate descent on any objective, and the search for grids by cross-validated fits."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import ALL_SCHEDULES, F64, every_schedule, generator, mixture, normal

import iia_ode as iia
from iia_ode import IIA, Teacher
from iia_ode.autofit import (
    FreeGrid,
    LeapGrid,
    coordinate_descent,
    leap_grids,
    search_grid,
    two_fold,
)
from iia_ode.autofit.grid_search import own_errors
from iia_ode.errors import GridError, InputError
from iia_ode.iia import Batch

# ---- searches of any objective ---------------------------------------------------------------------------------------


class Quadratic:
    """Errors around the distance of a point (a, b), in logarithms, from a best one, with a little noise per sample."""

    def __init__(self, a=3.0, b=0.2):
        self.best, self.asked = (a, b), []
        self.noise = 1 + 0.01 * torch.randn(64, dtype=F64, generator=generator())

    def __call__(self, point):
        self.asked.append(point)
        distance = sum(math.log(p / q) ** 2 for p, q in zip(point, self.best, strict=True))
        return (0.01 + distance) * self.noise


def scaled(k):
    return lambda point, factor: (*point[:k], point[k] * factor, *point[k + 1 :])


@settings(max_examples=10)
@given(a=st.floats(1.0, 4.0), b=st.floats(0.1, 0.4))
def test_coordinate_descent_comes_as_near_the_minimum_of_a_quadratic_as_its_steps_allow(a, b):
    objective = Quadratic(a, b)
    best, tried = coordinate_descent(objective, (2.0, 0.2), [scaled(0), scaled(1)], passes=6, step=1.5)
    assert all(abs(math.log(p / q)) <= 0.501 * math.log(1.5) for p, q in zip(best, (a, b), strict=True))
    assert float(tried[best].mean()) == min(float(errors.mean()) for errors in tried.values())
    assert len(objective.asked) == len(set(objective.asked))  # no candidate is tried twice


def test_coordinate_descent_keeps_the_start_where_nothing_is_better_or_allowed():
    moves = [scaled(0), scaled(1)]
    for passes, allowed in ((0, moves), (3, [lambda point, factor: None]), (3, moves)):
        best, tried = coordinate_descent(Quadratic(), (3.0, 0.2), allowed, passes=passes, step=1.4)
        assert best == (3.0, 0.2)
    assert len(tried) == 5  # it ends after a pass that changes nothing
    for options in ({"step": 1.0, "passes": 1}, {"step": math.nan, "passes": 1}, {"step": 1.4, "passes": -1}):
        with pytest.raises(InputError, match=r"step|passes"):
            coordinate_descent(Quadratic(), (3.0, 0.2), moves, **options)


# ---- grids -----------------------------------------------------------------------------------------------------------


@every_schedule
@settings(max_examples=15)
@given(st.integers(1, 12), st.floats(1.0, 20.0), st.floats(0.02, 0.5), st.floats(1.0, 12.0))
def test_a_leap_grid_has_its_levels_where_it_says(schedule, n, sigma_1, sigma_min, rho):
    start = schedule.t_of_noise_to_signal(60.0)
    grid = LeapGrid(sigma_1, sigma_min, rho).times(n, schedule, start)
    assert len(grid) == n + 1 and grid.dtype == F64
    assert float(grid[0]) == start and float(grid[-1]) == schedule.t_data
    if n > 1:
        assert schedule.noise_to_signal(float(grid[1])) == pytest.approx(sigma_1, rel=1e-5)
    if n > 2:
        assert schedule.noise_to_signal(float(grid[-2])) == pytest.approx(sigma_min, rel=1e-5)


@every_schedule
@settings(max_examples=10)
@given(levels=st.lists(st.floats(0.02, 70.0), min_size=1, max_size=8, unique=True))
def test_a_free_grid_has_the_levels_it_was_given_on_every_schedule(levels, schedule):
    levels = sorted(levels, reverse=True)
    assume(all(a > 1.01 * b for a, b in pairwise(levels)))
    start = schedule.t_of_noise_to_signal(80.0)
    grid = FreeGrid(tuple(levels)).times(len(levels) + 1, schedule, start)
    assert float(grid[0]) == start and float(grid[-1]) == schedule.t_data
    again = FreeGrid.of(grid, schedule)
    assert again.levels == pytest.approx(levels, rel=1e-6)
    with pytest.raises(GridError, match="levels make a grid"):
        again.times(len(levels), schedule, start)


def test_a_grid_without_evaluations_is_refused():
    with pytest.raises(GridError, match="at least one evaluation"):
        LeapGrid(1.0, 0.1).times(0, ALL_SCHEDULES[0], 80.0)


def test_candidates_scale_with_the_data_and_stay_below_the_start():
    near, far = leap_grids(80.0, 0.5), leap_grids(80.0, 5.0)
    assert max(g.sigma_1 for g in near) < 80 and max(g.sigma_1 for g in far) < 80
    assert min(g.sigma_1 for g in far) == pytest.approx(10 * min(g.sigma_1 for g in near))
    assert math.isfinite(max(g.sigma_1 for g in leap_grids(math.inf, 0.5)))


# ---- searches of grids -----------------------------------------------------------------------------------------------

METHOD = IIA("ddim", terms="window", target="trajectory", history=2, guard=False)


def taught(samples, steps=30):
    """Samples of the mixture with their teacher."""
    ode, x = mixture().ode(iia.EDM()), 80.0 * normal(samples, 4)
    return Batch(ode, x, Teacher.solve(ode, x, 80.0, 0.0, steps=steps))


def closed(batch, grid):
    """A fit in closed form."""
    return METHOD.fit(batch.ode, batch.x, grid, teacher=batch.teacher).plan


def plain(batch, grid):
    """DDIM, whatever the samples."""
    return iia.plan.trace(iia.get_solver("ddim"), batch.ode.schedule, grid, consistent=False)


def test_the_search_finds_a_better_grid_than_it_was_given():
    poor = LeapGrid(60.0, 0.003, 7.0)
    candidates = [poor, *leap_grids(80.0, 1.0)[::8]]
    found = search_grid(closed, taught(40), 4, candidates, trials=6)
    assert found.best != poor
    first = own_errors(closed, taught(40), 4)(poor)
    assert float(found.trials[found.best].errors.square().mean()) < float(first.square().mean())
    with pytest.raises(InputError, match="no candidate"):
        search_grid(closed, taught(8, 10), 4, [])


def test_trials_go_on_to_higher_first_levels_while_that_lowers_the_risk():
    """Predictions do not know of samples that end in another mode."""
    found = search_grid(closed, taught(40), 4, leap_grids(80.0, 1.0), trials=8)
    grids = list(found.trials)
    climbed = [g.times(4, iia.EDM(), 80.0)[1] for g in grids[:2]]
    assert climbed[1] >= 1.6 * climbed[0]
    assert found.best == min(grids, key=lambda g: found.trials[g].risk) and found.ranking != grids
    for trial in found.trials.values():
        assert trial.risk >= float(trial.errors.square().mean().sqrt()) and trial.changes.shape == trial.errors.shape


def test_every_sample_is_judged_by_a_fit_that_did_not_see_it():
    batch, seen = taught(21), []

    def noted(part, grid):
        seen.append(part.x)
        return plain(part, grid)

    grid = LeapGrid(10.0, 0.1)
    for samples in (20, 21):
        seen.clear()
        errors = two_fold(noted, batch[:samples], 4)(grid)
        assert torch.equal(torch.cat(seen), batch.x[:samples]) and len(seen) == 2 == 2 + abs(len(seen[0]) - 10)
        final = iia.sample(batch.ode, batch.x[:samples], grid.times(4, batch.ode.schedule, 80.0), "ddim")
        own = (final - batch.target[:samples]).square().mean(dim=1).sqrt()
        assert torch.allclose(errors, own, rtol=1e-12)
    assert two_fold(plain, batch[:1], 4)(grid).shape == (1,)


def test_a_grid_on_which_a_sample_is_lost_or_that_is_none_is_no_candidate():
    batch = taught(8, 10)
    target = batch.target.clone()
    target[0, 0] = math.nan
    for bad, grid in ((replace(batch, final=target), LeapGrid(10.0, 0.1)), (batch, LeapGrid(0.1, 10.0))):
        assert torch.isinf(two_fold(plain, bad, 4)(grid)).all()


def test_a_search_keeps_no_graph_of_a_network():
    model = torch.nn.Linear(4, 4).double()
    ode = iia.ProbabilityFlowODE(lambda x, t: model(x) / (1 + t[:, None] ** 2), iia.EDM())
    x = 80.0 * torch.randn((16, 4), dtype=F64, generator=generator())
    batch = Batch(ode, x, Teacher.solve(ode, x, 80.0, 0.0, steps=10))
    found = search_grid(closed, batch, 3, leap_grids(80.0, 1.0)[:2], trials=2)
    assert not any(t.errors.requires_grad for t in found.trials.values())


def test_a_search_after_a_warm_start_works_for_samples_of_many_components():
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2), iia.EDM(), tag="images")
    x = 80.0 * normal(12, 3, 40, 40)
    found = iia.fit(ode, 2, x=x, budget=iia.Budget(teacher_steps=12, trials=2, warm_starts=True))
    assert any("warm start" in i.name for i in found.record.search.ingredients)
