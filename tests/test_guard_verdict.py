"""What the guard asks of a fit: from the squared errors of fit and base on the same samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from support import normal

from iia_ode.iia.guard import verdict

F64 = torch.float64
EPS = 1e-12


def squares(base, fit):
    """Of samples whose true ends have unit size."""
    base, fit = (torch.as_tensor(v, dtype=F64) for v in (base, fit))
    return torch.stack([base, fit, torch.ones_like(base)], dim=1)


def errors(n, seed=0):
    """Squared errors of a base that scatter over a decade, none far from the others."""
    return normal(n, seed=seed).mul(0.5).clamp(-1, 1).exp() * 1e-2


def kept(base, fit, held_out=None):
    table = squares(base, fit)
    return verdict(table, len(table) // 4 if held_out is None else held_out, EPS).kept


@given(st.integers(12, 200), st.floats(0.05, 0.8), st.integers(0, 99))
def test_a_fit_that_is_better_on_every_sample_alike_is_kept_and_the_base_in_its_place_is_not(n, factor, seed):
    base = errors(n, seed)
    assert kept(base, factor * base)
    assert not kept(factor * base, base)


@given(st.integers(2, 100), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_the_verdict_depends_neither_on_units_nor_on_the_order_within_the_two_parts(n, seed, unit):
    base, fit = errors(n, seed), errors(n, seed + 1) * 0.5
    found = kept(base, fit)
    order = torch.randperm(n - n // 4, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order, torch.arange(n - n // 4, n)])
    assert kept(base[order], fit[order], n // 4) == found
    assert verdict(unit * squares(base, fit), n // 4, EPS).kept == found


def test_an_equal_fit_is_not_kept():
    assert not kept(errors(100), errors(100))


def test_a_fit_is_refused_where_one_lost_sample_more_would_turn_the_outcome():
    """Both send one sample of 400 astray. All others gain, surely; but not as much as that one weighs."""
    base = errors(400)
    fit = 0.2 * base
    assert kept(base, fit)
    lost = float(1.05 * (base - fit).sum())
    base[7], fit[7] = lost, lost
    found = verdict(squares(base, fit), 100, EPS)
    gaps = base - fit
    assert float(gaps.mean() / gaps.std()) * 20 > 5  # by the mean alone it would stay
    assert not found.kept
    assert "its sum by 0.951 times the largest square of one (1)" in found.why
    base[7], fit[7] = 0.9 * lost, 0.9 * lost
    assert kept(base, fit)


def test_a_fit_is_refused_that_gains_in_the_mean_but_on_no_more_samples_than_chance():
    """A few samples gain much and the others lose a little; a sample in a mode of its own could be one of the others."""
    n = 64
    needed = next(k for k in range(n) if binomtest(k, n, alternative="greater").pvalue <= 0.02275)
    for nearer, outcome in ((needed - 1, False), (needed, True)):
        base = torch.full((n,), 0.01, dtype=F64)
        fit = 1.01 * base
        fit[:nearer] = 0.2 * base[:nearer]
        mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        found = verdict(squares(base[mixed], fit[mixed]), 16, EPS)
        assert found.kept is outcome
        assert f"of 64 samples {nearer} end nearer ({needed} are asked for)" in found.why


def test_a_fit_is_refused_whose_gain_in_the_mean_may_be_chance():
    base = torch.full((100,), 0.01, dtype=F64)
    fit = 0.99 * base
    fit[:6] = 1e-4
    gaps = base - fit
    assert float(gaps.sum()) > 0.01 and 2 < float(gaps.mean() / gaps.std()) * 10 < 3
    assert not kept(base, fit)


def test_a_fit_is_refused_that_is_worse_on_held_out_samples():
    base = errors(100)
    fit = 0.2 * base
    assert kept(base, fit, 10)
    fit[-10:] = 1.1 * base[-10:]
    assert not kept(base, fit, 10)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_samples_say_nothing(n):
    found = verdict(squares([1.0] * n, [1e-4] * n), 1, EPS)
    assert not found.kept
    assert "even all would not say what is chance" in found.why


def test_six_samples_are_enough_for_a_gain_that_all_share():
    assert kept([1.0] * 6, [1e-4] * 6, 2)


def test_errors_that_are_rounding_are_kept_and_a_base_that_is_not_finite_is_left_for_a_fit_that_is():
    tiny = [1e-26] * 4
    assert kept(tiny, [2e-26] * 4, 1)
    assert kept([math.nan, 1.0, 1.0, 1.0], [9.0] * 4, 1)
    assert kept([math.inf, 1.0, 1.0, 1.0], [9.0] * 4, 1)
    assert not kept([1.0] * 20, [1e-3] * 19 + [math.nan], 1)
    assert not kept([math.nan] * 4, [math.nan] * 4, 1)
