"""Rivals of the library's own fits: published learned solvers, written from their papers."""

from itertools import combinations

import pytest
import torch

import iia_ode as iia
from iia_ode.evidence.rivals import (
    NonStationary,
    Pairs,
    align,
    best_path,
    bns,
    bound_costs,
    gits,
    local_costs,
    squared_differences,
)
from iia_ode.grids import karras, log_snr

GAUSSIAN = iia.problems.Gaussian(torch.linspace(-0.5, 0.5, 6), torch.logspace(-2, 0, 6))
LOW, HIGH = 0.01, 20.0


def pairs_of(samples=24, seed=0):
    ode = GAUSSIAN.ode(iia.EDM())
    x = GAUSSIAN.noisy(samples, iia.EDM(), HIGH, torch.Generator().manual_seed(seed))
    return Pairs(ode, x, GAUSSIAN.flow(x, iia.EDM(), HIGH, 0.0), LOW, HIGH, sample_evaluations=100)


def base_of(start, family):
    """The generic solver on equal steps of flow matching, on EDM's states."""
    schedule, steps = iia.FlowMatching(), family.nfe if start == "ddim" else family.nfe // 2
    first = schedule.t_of_noise_to_signal(HIGH)
    grid = torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)
    return iia.get_solver("ddim" if start == "ddim" else "midpoint").plan(schedule, grid).on(iia.EDM())


@pytest.mark.parametrize(("start", "base"), [("euler", "ddim"), ("midpoint", "midpoint")])
def test_bns_starts_as_the_solver_that_it_is_named_after(start, base):
    pairs, family = pairs_of(), NonStationary(6, HIGH)
    plan = family.plan(pairs.ode, family.initial(start))
    torch.testing.assert_close(plan.run(pairs.ode, pairs.x), base_of(base, family).run(pairs.ode, pairs.x))
    assert plan.nfe == 6


def test_the_differentiable_run_of_bns_is_its_plan():
    pairs, family = pairs_of(), NonStationary(5, HIGH)
    theta = family.initial() + 0.05 * torch.randn(25, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    final = family.run(pairs.ode, pairs.x, theta)
    torch.testing.assert_close(family.plan(pairs.ode, theta).run(pairs.ode, pairs.x), final)


def test_bns_ends_nearer_on_new_noise_than_it_started():
    pairs, other, family = pairs_of(), pairs_of(seed=1), NonStationary(4, HIGH)
    learned = bns(pairs, 4, evaluations=6_000)
    before, after = (
        (plan.run(other.ode, other.x) - other.final).square().mean()
        for plan in (family.plan(pairs.ode, family.initial()), learned.plan)
    )
    assert after < 0.25 * before
    assert 0.9 * 6_000 < learned.sample_evaluations <= 6_000


def test_the_cheapest_path_is_the_best_of_all_paths():
    costs = torch.rand(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for steps in range(1, 8):
        for coefficient in (1.0, 1.15):

            def total(path, factor=coefficient):
                value = 0.0
                for i, j in reversed(list(zip(path, path[1:], strict=False))):
                    value = float(costs[i, j]) + factor * value
                return value

            paths = [(0, *inner, 7) for inner in combinations(range(1, 7), steps - 1)]
            assert total(best_path(costs, steps, coefficient)) == pytest.approx(min(map(total, paths)))


@pytest.mark.parametrize("metric", ["deviation", "distance"])
def test_gits_is_its_base_on_levels_of_the_teacher(metric):
    pairs = pairs_of()
    learned = gits(pairs, 4, solver="ipndm", metric=metric, levels=20)
    assert learned.plan == iia.get_solver("ipndm").plan(iia.EDM(), torch.tensor(learned.plan.grid, dtype=torch.float64))
    assert set(learned.plan.grid) <= set(karras(20, LOW, HIGH).tolist())
    assert bool(torch.isfinite(learned.plan.run(pairs.ode, pairs.x)).all())


def test_the_costs_of_gits_are_the_errors_of_euler_steps():
    pairs, grid = pairs_of(), karras(20, LOW, HIGH)
    costs = local_costs(pairs.ode, pairs.x, grid)["distance"]
    states = GAUSSIAN.flow(pairs.x, iia.EDM(), HIGH, float(grid[4]))
    step = iia.get_solver("euler").plan(iia.EDM(), grid[[4, 9]]).run(pairs.ode, states)
    exact = (step - GAUSSIAN.flow(states, iia.EDM(), float(grid[4]), float(grid[9]))).norm(dim=1).mean()
    assert float(costs[4, 9]) == pytest.approx(float(exact), rel=0.05)


def test_ays_lowers_the_bound_of_the_grid_it_starts_from():
    pairs, levels = pairs_of(), log_snr(40, LOW, HIGH, to_data=False)
    differences = squared_differences(pairs.ode, pairs.final, levels)
    costs = bound_costs(differences, levels)
    learned = align(pairs, 4, levels=40, differences=differences)
    assert learned.plan == iia.get_solver("dpmpp_2m").plan(
        iia.EDM(), torch.tensor(learned.plan.grid, dtype=torch.float64)
    )

    def bound(times):
        places = [int((levels - t).abs().argmin()) for t in times] + [39]
        return sum(float(costs[i, j]) for i, j in zip(places, places[1:], strict=False))

    assert bound(learned.plan.grid[:-1]) < bound([*karras(4, LOW, HIGH).tolist()[:-2], 2 * LOW])


def test_ays_estimates_the_bound_of_a_gaussian():
    v, t, s = 0.25, 0.5, 1.0
    problem = iia.problems.Gaussian(torch.zeros(2000), torch.full((2000,), v))
    data = problem.sample(8, torch.Generator().manual_seed(3))
    found = squared_differences(problem.ode(iia.EDM()), data, torch.tensor([s, t], dtype=torch.float64))
    exact = 2000 * (v * v / (v + t * t) - v * v / (v + s * s))  # the estimates are a martingale
    assert float(found[0, 1]) == pytest.approx(exact, rel=0.05)


def test_rivals_refuse_other_schedules():
    x = GAUSSIAN.noisy(4, iia.VP(), 1.0)
    with pytest.raises(iia.errors.InputError, match="schedule EDM"):
        Pairs(GAUSSIAN.ode(iia.VP()), x, x, LOW, HIGH)
