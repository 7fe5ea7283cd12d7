"""The model of the model along a teacher's trajectories, by which a search ranks grids without evaluations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_SCHEDULES, F64, every_schedule, mixture, normal

import iia_ode as iia
from iia_ode import IIA, Teacher
from iia_ode.autofit import leap_grids, search_grid
from iia_ode.autofit.grid_search import own_errors
from iia_ode.autofit.nearby import Correction, Gains, Nearby, Watched, watched
from iia_ode.iia import Batch

METHOD = IIA("ddim", terms="window", target="trajectory", history=2, guard=False)


def closed(batch, grid):
    return METHOD.fit(batch.ode, batch.x, grid, teacher=batch.teacher).plan


def isotropic(schedule, size, gain=1.0):
    """The data estimate of Gaussian data of a size, times `gain` away from zero."""

    def data(x, t):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return gain * a * size**2 / (a**2 * size**2 + s**2) * x

    return iia.ProbabilityFlowODE(data, schedule, tag="isotropic")


def taught(ode, samples=24, dim=3, top=60.0, steps=60):
    start = ode.schedule.t_of_noise_to_signal(top)
    x = ode.schedule.sigma(start) * normal(samples, dim)
    return Batch(ode, x, Teacher.solve(ode, x, start, ode.schedule.t_data, steps=steps))


@every_schedule
@settings(max_examples=8, deadline=None)
@given(st.floats(0.02, 20.0), st.floats(-0.5, 0.5))
def test_near_gaussian_data_the_prediction_is_the_model(schedule, level, shift):
    ode = isotropic(schedule, 1.0)
    batch = taught(ode)
    near = Nearby.of(batch, Gains(1.0)).batch
    t = schedule.t_of_noise_to_signal(level)
    x = batch.taught.at(t) + shift * schedule.alpha(t) * normal(24, 3, seed=1)
    assert torch.allclose(near.ode.data(x, t), ode.data(x, t), rtol=0, atol=2e-4)
    part = near[torch.tensor([5, 2])]
    assert torch.allclose(part.ode.data(x[[5, 2]], t), near.ode.data(x, t)[[5, 2]], rtol=0, atol=1e-14)


def test_runs_of_the_model_measure_the_gain_of_each_sample():
    schedule = iia.EDM()

    def data(x, t):  # the first half of the samples has twice the gain; both have trajectories
        return torch.where(torch.arange(len(x))[:, None] < len(x) / 2, 2.0, 1.0) * x / (1 + t[:, None] ** 2)

    ode = iia.ProbabilityFlowODE(data, schedule, tag="two gains")
    batch, gains = taught(ode, top=20.0), Gains(1.0)
    for grid in leap_grids(20.0, 1.0)[:3]:
        times = grid.times(5, schedule, 20.0)
        watched(iia.plan.trace(iia.get_solver("ddim"), schedule, times, consistent=False), batch, gains)
    found = gains.at(1.0) / gains.gaussian(1.0)
    assert float(found[:12].min()) > 1.5 and float(found[12:].max()) < 1.1
    assert len(found) == 24 and isinstance(Gains(1.0).at(1.0), float)


def test_errors_of_a_watched_run_are_those_of_the_batch():
    batch = taught(mixture().ode(iia.EDM()), dim=4, top=80.0)
    plan = closed(batch, leap_grids(80.0, 1.0)[0].times(4, batch.ode.schedule, 80.0))
    found = watched(plan, batch, Gains(1.0))
    assert torch.equal(found.errors, batch.errors(plan)) and found.changes.shape == found.errors.shape


def test_a_search_predicts_many_grids_and_evaluates_the_model_for_a_few():
    batch = taught(mixture().ode(iia.EDM()), samples=40, dim=4, top=80.0, steps=30)
    batch.ode.ledger.reset()
    found = search_grid(closed, batch, 4, leap_grids(80.0, 1.0), trials=8)
    assert len(found.trials) == 8
    assert batch.ode.ledger.samples <= 8 * 40 * 4
    z = 80.0 * normal(300, 4, seed=1)
    unseen = Batch(batch.ode, z, Teacher.solve(batch.ode, z, 80.0, 0.0, steps=60))

    def error(grid):
        return float(unseen.errors(closed(batch, grid.times(4, batch.ode.schedule, 80.0))).median())

    assert error(found.best) < 1.2 * min(error(grid) for grid in leap_grids(80.0, 1.0))


def test_a_sample_with_many_components_is_thinned_for_scalar_weights_alone():
    schedule = iia.EDM()
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2), schedule, tag="images")
    x = 20.0 * normal(8, 3, 48, 48)
    batch = Batch(ode, x, Teacher.solve(ode, x, 20.0, 0.0, steps=12))
    thin, whole = Nearby.of(batch, thin=True).batch, Nearby.of(batch).batch
    assert thin.x.shape == (8, 4096) and whole.x.shape == x.shape
    grid = leap_grids(20.0, 1.0)[0]
    few, all_ = (own_errors(closed, own, 4)(grid) for own in (thin, whole))
    assert torch.allclose(few, all_, rtol=0.2)


@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=5))
def test_a_correction_returns_what_it_was_told_and_knows_nothing_far_away(ratios):
    places = [torch.full((3,), 5.0 * k, dtype=F64) for k in range(len(ratios))]
    law = Correction.of(places, ratios)
    mean = sum(ratios) / len(ratios)
    for place, ratio in zip(places, ratios, strict=True):
        assert law(place) == pytest.approx(math.exp(ratio - mean), abs=0.02)
    assert law(torch.full((3,), -50.0, dtype=F64)) == pytest.approx(1.0)
    assert Correction.of([], [])(places[0]) == 1.0


def test_every_schedule_has_predictions_from_its_noisiest_time():
    for schedule in ALL_SCHEDULES:
        ode = isotropic(schedule, 1.0)
        start = schedule.t_noise if schedule.alpha(schedule.t_noise) > 0 or ode.prediction == "data" else None
        if start is None or not schedule.knows(start):
            continue
        x = schedule.sigma(start) * normal(8, 3)
        near = Nearby.of(Batch(ode, x, Teacher.solve(ode, x, start, schedule.t_data, steps=30))).batch
        assert bool(torch.isfinite(near.ode.data(near.x, start)).all())


def test_the_risk_of_a_run_that_is_not_finite_is_infinite():
    one = torch.ones(4, dtype=F64)
    assert Watched(one).risk == 1.0 and Watched(one, one).risk == pytest.approx(2**0.5)
    for lost in (math.nan, math.inf):
        broken = torch.tensor([1.0, lost, 1.0, 1.0], dtype=F64)
        assert Watched(broken, one).risk == Watched(one, broken).risk == math.inf
