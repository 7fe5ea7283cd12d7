"""Fits for several numbers of evaluations in one call."""

import math

import numpy as np
import pytest
from fits import QUICK, exact_end, median_error, start_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mixture, normal

import iia_ode as iia
from iia_ode import fit
from iia_ode.autofit import BUDGETS, LeapGrid
from iia_ode.autofit.grids import Levels
from iia_ode.autofit.pipeline import SCALARS, Hint
from iia_ode.errors import InputError

EDM = iia.EDM()
NOISE = normal(80, 4)
NUMBERS = (4, 8, 6, 10, 5)


@pytest.fixture(scope="module")
def several():
    """An ODE, its solvers with several numbers of evaluations, and the sample evaluations of the call."""
    ode = mixture().ode(EDM)
    with ode.counting() as spent:
        found = fit(ode, NUMBERS, noise=NOISE, budget="closed-form")
    return ode, found, spent.samples


def test_several_numbers_of_evaluations_give_a_solver_each_in_their_order(several):
    _, found, _ = several
    assert tuple(found) == NUMBERS
    for nfe, one in found.items():
        assert one.nfe == nfe == one.plan.nfe
        assert one.record.teacher == found[10].record.teacher


def test_several_solvers_cost_at_most_twice_as_much_as_one(several):
    ode, _, spent = several
    one = fit(ode, 8, noise=NOISE, budget="closed-form")
    assert spent <= 2 * one.record.sample_evaluations


def test_the_records_of_several_solvers_add_up_to_the_whole_cost(several):
    _, found, spent = several
    assert sum(one.record.sample_evaluations for one in found.values()) == spent
    assert found[10].record.search.costs["teacher"].sample_evaluations > 0
    assert all(found[n].record.search.costs["teacher"].sample_evaluations == 0 for n in (4, 5, 6, 8))


def test_each_of_several_solvers_is_nearly_as_accurate_as_a_fit_of_its_own(several):
    ode, found, _ = several
    for nfe in (4, 6):
        own = fit(ode, nfe, noise=NOISE, budget="closed-form")
        x = start_of(own, normal(400, 4, seed=1))
        exact = exact_end(ode, x, own.grid[0])
        assert median_error(ode, found[nfe], x, exact) < 1.5 * median_error(ode, own, x, exact)


def test_the_expected_cost_of_several_solvers_is_known_before(several):
    ode, _, spent = several
    assert iia.fit_cost(ode, NUMBERS, "closed-form", samples=80, shape=(4,)).sample_evaluations == pytest.approx(
        spent, rel=0.2
    )


def test_one_number_in_a_sequence_gives_a_dict_and_the_fit_of_that_number():
    ode = mixture().ode(EDM)
    (pair,) = fit(ode, [2], noise=NOISE, budget=QUICK).items()
    one = fit(ode, 2, noise=NOISE, budget=QUICK)
    assert pair[0] == 2 and pair[1].plan.difference(one.plan) == 0


def test_a_whole_number_of_any_type_gives_one_solver():
    found = fit(mixture().ode(EDM), np.int64(2), noise=NOISE, budget=QUICK)
    assert isinstance(found, iia.FittedSolver) and found.nfe == 2


def test_numbers_of_evaluations_that_are_none_or_twice_the_same_are_refused():
    ode = mixture().ode(EDM)
    for bad in ((), (4, 4), (4, 0), (4, 2.5), "48"):
        with pytest.raises(InputError, match="nfe"):
            fit(ode, bad, noise=NOISE, budget=QUICK)
        with pytest.raises(InputError, match="nfe"):
            iia.fit_cost(ode, bad)


@given(st.floats(0.3, 60.0), st.floats(2.0, 300.0), st.floats(1.0, 12.0))
@settings(max_examples=20)
def test_a_hint_is_the_grid_itself_and_grids_near_it_inside_the_levels(sigma_1, ratio, rho):
    grid = LeapGrid(sigma_1, sigma_1 / ratio, rho)
    levels = Levels(highest=2.0 * sigma_1, lowest=0.9 * grid.sigma_min)
    near = Hint(grid, SCALARS).near(levels)
    assert near[0] == grid and len(set(near)) == len(near)
    for other in near:
        assert other.fits(levels)
        assert abs(math.log(other.sigma_1 / sigma_1)) < 0.7 and abs(math.log(other.sigma_min / grid.sigma_min)) < 0.7


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_shares_of_a_budget_for_several_solvers_are_smaller_and_never_empty(name):
    budget = BUDGETS[name]
    first, other = budget.shared(first=True), budget.shared(first=False)
    assert 1 <= other.trials <= first.trials <= budget.trials
    assert 1 <= other.iterations <= first.iterations <= budget.iterations
