"""Paired comparison of solvers: rankings that one outlier does not decide, and the verdict of the guard."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t
from support import F64, generator, normal

from iia_ode.iia.ranking import Range, cauchy_mean, ranked, samples_against, shrunk_ratio, too_few, verdict

EPS = 1e-12


def alike(n, value):
    return torch.full((n,), value, dtype=F64)


# ---- rankings --------------------------------------------------------------------------------------------------------


def names(errors, **options):
    return ranked(list(errors), list(errors.values()), **options)


def test_one_outlier_does_not_decide_between_candidates():
    better, unlucky = alike(50, 0.05), alike(256, 0.01)
    better[7] = 3.0
    assert names({"steady": alike(50, 0.1), "better": better}) == ["better", "steady"]
    unlucky[7] = 0.7  # more than all others together
    assert names({"worse": alike(256, 0.02), "unlucky": unlucky}, outliers_too=True) == ["unlucky", "worse"]


def test_many_outliers_do():
    slightly_better = alike(400, 0.09)
    slightly_better[::20] = 1.0
    assert names({"lossy": slightly_better, "steady": alike(400, 0.1)}, outliers_too=True) == ["steady", "lossy"]


@pytest.mark.parametrize("outliers_too", [False, True])
def test_what_is_not_finite_comes_last_in_any_order(outliers_too):
    errors = {"better": alike(100, 0.05), "steady": alike(100, 0.1), "broken": alike(100, math.nan)}
    for order in (("broken", "better", "steady"), ("steady", "broken", "better"), ("better", "steady", "broken")):
        assert names({k: errors[k] for k in order}, outliers_too=outliers_too) == ["better", "steady", "broken"]
    assert names({"lost": alike(3, math.inf), "steady": alike(3, 0.1)})[0] == "steady"
    assert ranked([], []) == []


@settings(max_examples=15)
@given(st.floats(1e-6, 1e6), st.integers(0, 99))
def test_the_ranking_does_not_depend_on_units(unit, seed):
    errors = {k: normal(60, seed=3 * seed + k).abs() for k in range(3)}
    for outliers_too in (False, True):
        found = names(errors, outliers_too=outliers_too)
        assert names({k: unit * e for k, e in errors.items()}, outliers_too=outliers_too) == found


@given(st.floats(0.1, 10.0), st.integers(0, 2**31 - 1))
def test_a_ratio_on_which_all_samples_agree_is_kept_and_that_of_one_sample_is_shrunk(factor, seed):
    errors = torch.rand(50, dtype=F64, generator=generator(seed)) + 0.01
    assert shrunk_ratio(factor * errors, errors) == pytest.approx(factor, rel=1e-6)
    once = errors.clone()
    once[3] = 100.0
    assert 1.0 < shrunk_ratio(once, errors) < 0.1 * float((once.square().mean() / errors.square().mean()).sqrt())


def test_the_ratio_of_errors_that_are_zero_is_one_or_none():
    zero, some = alike(5, 0.0), alike(5, 1.0)
    assert shrunk_ratio(zero, zero) == 1.0 and shrunk_ratio(zero, some) == 0.0 and shrunk_ratio(some, zero) == math.inf


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_the_cauchy_mean_is_below_the_root_mean_square_and_equal_to_it_for_an_infinite_scale(errors, scale):
    values = torch.tensor(errors, dtype=F64)
    plain = float(values.square().mean().sqrt())
    assert cauchy_mean(values, scale) <= plain * (1 + 1e-12)
    assert cauchy_mean(values, math.inf) == pytest.approx(plain)
    assert cauchy_mean(values, 1e6 * (1 + plain)) == pytest.approx(plain, rel=1e-6)
    assert cauchy_mean(torch.cat([values, alike(1, math.nan)]), scale) == math.inf


# ---- the verdict of the guard ----------------------------------------------------------------------------------------


def squares(base, fit):
    """Squared errors of samples whose true final states have unit size."""
    base, fit = (torch.as_tensor(v, dtype=F64) for v in (base, fit))
    return torch.stack([base, fit, torch.ones_like(base)], dim=1)


def errors(n, seed=0):
    """Squared errors of a base, spread over a decade without outliers."""
    return normal(n, seed=seed).mul(0.5).clamp(-1, 1).exp() * 1e-2


def kept(base, fit, held_out=None):
    table = squares(base, fit)
    return verdict(table, len(table) // 4 if held_out is None else held_out, EPS).kept


@given(st.integers(24, 200), st.floats(0.05, 0.5), st.integers(0, 99))
def test_a_fit_that_is_better_on_every_sample_alike_is_kept_and_the_base_in_its_place_is_not(n, factor, seed):
    base = errors(n, seed)
    assert kept(base, factor * base)
    assert not kept(factor * base, base)


@given(st.integers(8, 100), st.integers(0, 99), st.floats(1e-6, 1e6), st.floats(0.1, 1.2))
def test_the_verdict_depends_neither_on_units_nor_on_the_order_within_the_two_parts(n, seed, unit, factor):
    held = n // 4
    base, fit = errors(n, seed), errors(n, seed + 1) * factor
    found = kept(base, fit)
    source = generator(seed)
    order = torch.cat([torch.randperm(n - held, generator=source), n - held + torch.randperm(held, generator=source)])
    assert kept(base[order], fit[order]) == found
    assert verdict(unit * squares(base, fit), held, EPS).kept == found


def test_an_equal_fit_is_not_kept():
    assert not kept(errors(100), errors(100))


@pytest.mark.parametrize(
    "astray", [(1.0, 1.0), (1.0, 0.99), (0.99, 1.0)], ids=["both", "more the base", "more the fit"]
)
def test_a_fit_is_refused_where_three_lost_samples_more_would_make_it_the_worse(astray):
    """One sample of 400 goes astray. The other samples gain, but by less than three times its square."""
    base = errors(400)
    fit = 0.2 * base
    assert kept(base, fit)
    for times, outcome in ((3.1, True), (2.9, False)):
        lost = float((base - fit).sum()) / times
        b, f = base.clone(), fit.clone()
        b[7], f[7] = lost * astray[0], lost * astray[1]
        gaps = b - f
        assert float(gaps.mean() / gaps.std()) * 20 > 10  # by the mean alone it would stay
        found = verdict(squares(b, f), 100, EPS)
        assert found.kept is outcome
        more = torch.full((3,), max(float(b[7]), float(f[7])), dtype=F64)  # astray with the fit only
        assert (float(f.sum() + more.sum()) < float(b.sum())) is outcome


def test_a_fit_is_refused_that_gains_in_the_mean_but_on_no_more_samples_than_chance():
    """A few samples gain much and the others lose a little: the mean contradicts the majority."""
    n = 64
    needed = next(k for k in range(n) if binomtest(k, n, alternative="greater").pvalue <= 0.02275)
    for nearer, outcome in ((needed - 1, False), (needed, True)):
        base = alike(n, 0.01)
        fit = 1.01 * base
        fit[:nearer] = 0.2 * base[:nearer]
        mixed = torch.randperm(n, generator=generator())
        found = verdict(squares(base[mixed], fit[mixed]), 16, EPS)
        assert found.kept is outcome
        assert f"of 64 samples {nearer} end nearer (at least {needed} needed)" in found.why


def test_samples_that_end_as_far_as_before_do_not_count_as_nearer():
    base = alike(100, 0.01)
    fit = base.clone()
    fit[::2] *= 0.2
    assert not kept(base, fit)
    fit[1:24:2] *= 0.2
    assert kept(base, fit)


@pytest.mark.parametrize(("n", "few", "enough"), [(100, 6, 12), (12, 6, 7)])
def test_a_fit_is_refused_whose_gain_in_the_mean_may_be_chance_and_few_samples_ask_for_more(n, few, enough):
    """Some samples have nearly all of the gain; the others gain next to nothing."""
    for many, outcome in ((few, False), (enough, True)):
        base = alike(n, 0.01)
        fit = 0.9999 * base
        fit[:many] *= 1e-6
        gaps = base - fit
        sure = float(gaps.mean() / gaps.std()) * n**0.5
        assert (sure > float(student_t.isf(norm.sf(3), n - 1))) is outcome
        assert sure > 3 or n == 100  # of twelve, three standard errors are not enough
        assert kept(base, fit) is outcome


def test_a_fit_is_refused_that_is_worse_on_held_out_samples_by_more_than_rounding():
    base = errors(100)
    fit = 0.2 * base
    assert kept(base, fit, 10)
    fit[-10:] = 1.1 * base[-10:]
    assert not kept(base, fit, 10)
    base[-10:] = 0.25 * EPS**2
    fit[-10:] = 2 * base[-10:]
    assert kept(base, fit, 10)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_samples_say_nothing(n):
    found = verdict(squares([1.0] * n, [1e-4] * n), 1, EPS)
    assert not found.kept
    assert f"{n} sample{'s' * (n > 1)} cannot tell a gain from chance, which takes at least six" in found.why
    assert not too_few(n).kept and too_few(n).why == found.why


def test_six_samples_are_enough_for_a_gain_that_all_share():
    assert kept([1.0] * 6, [1e-4] * 6, 2)


def test_a_fit_whose_error_is_rounding_is_kept_whatever_its_base():
    assert kept([1e-26] * 4, [2e-26] * 4, 1)
    assert not kept([1e-26] * 4, [2e-26] * 3 + [1e-22], 1)
    assert kept([1e-26] * 100, [2e-26] * 99 + [2e-24], 1)  # in the mean


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_left_for_a_fit_that_is_and_is_nearer_on_half_of_the_samples(broken):
    assert kept([broken, broken, 1.0, 1.0], [9.0] * 4, 1)
    assert not kept([broken, 1.0, 1.0, 1.0], [9.0] * 4, 1)
    assert not kept([broken] * 4, [broken] * 4, 1)
    found = verdict(squares([1.0] * 20, [1e-3] * 19 + [broken]), 1, EPS)
    assert not found.kept and found.why == "not all errors are finite"


# ---- what the samples do not hold ------------------------------------------------------------------------------------


@given(st.floats(1e-8, 1e8), st.floats(1.0, 1e6), st.floats(1.0, 100.0))
def test_so_many_samples_show_any_failure_that_would_undo_the_gain(gain, ratio, more):
    needed = samples_against(gain, gain * ratio)
    rate = min(1.0, more / ratio)  # the lowest rate that undoes the gain, or a higher one
    assert (1 - rate) ** needed <= 0.05
    if ratio >= 10:  # and far fewer samples do not
        assert (1 - 1 / ratio) ** (needed // 3) > 0.3


def test_no_number_of_samples_is_named_where_there_is_no_gain():
    assert samples_against(0.0, 1.0) is samples_against(-1.0, 1.0) is samples_against(math.nan, 1.0) is None
    assert samples_against(1.0, math.inf) is samples_against(math.inf, 1.0) is None


@pytest.mark.parametrize("spread", [1.5, 2.0, 3.0])
def test_a_gain_that_is_not_clear_is_clear_on_so_many_samples_of_the_same_kind(spread):
    generator = torch.Generator().manual_seed(0)
    base = (spread * torch.randn(20, generator=generator, dtype=torch.float64)).exp()
    table = squares(base.tolist(), (base * 0.6 ** (1 + torch.arange(20) % 3)).tolist())
    found = verdict(table, 20, EPS)
    assert not found.kept and found.needed > 20
    assert verdict(table.repeat(math.ceil(1.2 * found.needed / 20), 1), 20, EPS).kept
    assert not verdict(table.repeat(max(1, found.needed // 40), 1), 20, EPS).kept


def test_no_number_of_samples_makes_a_worse_fit_clear():
    assert verdict(squares([1.0] * 20, [1.0] * 15 + [50.0] * 5), 20, EPS).needed is None
    assert verdict(squares([1.0] * 20, [2.0] * 20), 20, EPS).needed is None
    assert verdict(squares([1.0] * 20, [0.1] * 20), 20, EPS).needed is None  # it is clear already


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(1e-4, 1e4), st.sampled_from([(), (3,), (2, 2)]))
def test_the_range_of_final_states_scales_with_them_and_counts_those_far_from_the_judged_ones(seed, unit, shape):
    ends = torch.randn(40, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends[:3] += 50
    found = Range.of(unit * ends, 10)
    assert 3 <= found.strays == Range.of(ends, 10).strays <= 6
    pairs = (ends[:, None] - ends).reshape(40, 40, -1).square().mean(2)
    assert pairs.max() / 4 <= found.reach / unit**2 <= pairs.max() * (1 + 1e-12)
    assert Range.of(ends, 40).strays == 0  # every sample judged
