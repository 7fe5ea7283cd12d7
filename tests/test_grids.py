"""Grids: the levels asked for, exact at the ends, in float64, from noise to data."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALPHAS_CUMPROD, EPS, F64, close, every_schedule, gaussian, normal

import iia_ode as iia
from iia_ode import grids

DISCRETE = iia.Discrete(ALPHAS_CUMPROD)
COUNTS = st.integers(1, 20)
LOW, HIGH = st.floats(1e-3, 0.05), st.floats(1.0, 100.0)
KNOWN = st.floats(0.0101, 0.05)  # levels above that of the first timestep too
every_level_grid = pytest.mark.parametrize("make", grids.GRIDS.values(), ids=grids.GRIDS)

every_spacing = pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "beta"])


def small_discrete(total: int) -> iia.Discrete:
    return iia.Discrete(torch.linspace(0.99, 0.01, total, dtype=F64))


# ---- noise levels ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), LOW, HIGH, st.floats(0.5, 20.0))
def test_karras_is_equation_5_of_the_paper(n, low, high, rho):
    i = np.arange(n)
    levels = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    expected = torch.tensor([*levels, 0.0], dtype=F64)
    # A rounding of sigma^(1/rho) counts rho-fold, and against high^(1/rho), the largest term of the sum.
    rtol = 4 * EPS * (1 + rho) * (high / low) ** (1 / rho)
    close(grids.karras(n, low, high, rho), expected, rtol=rtol)


@given(st.integers(3, 40), LOW, HIGH)
def test_log_snr_levels_are_a_constant_factor_apart(n, low, high):
    levels = grids.log_snr(n, low, high)[:-1]
    factor = (low / high) ** (1 / (n - 1))
    close(levels[1:] / levels[:-1], torch.full((n - 1,), factor, dtype=F64), rtol=32 * EPS)


@every_schedule
@given(n=st.integers(3, 20), low=KNOWN, high=HIGH)
def test_log_snr_is_equidistant_in_lam_on_every_schedule(schedule, n, low, high):
    lams = schedule.lam(grids.log_snr(n, low, high, schedule=schedule, to_data=False))
    step = (math.log(high) - math.log(low)) / (n - 1)
    close(lams.diff(), torch.full((n - 1,), step, dtype=F64), atol=1e-12)


@every_level_grid
@every_schedule
@given(n=COUNTS, low=KNOWN, high=HIGH)
@settings(max_examples=8)
def test_every_schedule_visits_the_same_noise_levels(schedule, make, n, low, high):
    times = make(n, low, high, schedule=schedule)
    assert times.dtype == F64 and times.shape == (n + 1,)
    levels = schedule.noise_to_signal(times)
    close(levels, make(n, low, high), rtol=1e-12)
    close(levels[0], torch.tensor(high, dtype=F64), rtol=1e-12)
    if n > 1:
        close(levels[-2], torch.tensor(low, dtype=F64), rtol=1e-12)
    assert bool((levels.diff() < 0).all())
    assert times[-1] == schedule.t_data


@every_level_grid
@given(n=COUNTS, low=LOW, high=HIGH)
def test_both_ends_are_exactly_the_levels_asked_for_where_time_is_the_level(make, n, low, high):
    grid = make(n, low, high)
    assert grid[0] == high
    assert n == 1 or grid[-2] == low
    assert grid[-1] == 0.0


def test_the_default_grid_runs_from_80_over_one_five_hundredth_to_0():
    for make in grids.GRIDS.values():
        assert make(10)[[0, -2, -1]].tolist() == [80.0, 0.002, 0.0]


@every_level_grid
@every_schedule
def test_one_level_is_the_highest_and_the_data_is_left_out_on_request(schedule, make):
    with_data, without = make(7, schedule=schedule), make(7, schedule=schedule, to_data=False)
    assert torch.equal(with_data[:-1], without)
    (single,) = make(1, schedule=schedule, to_data=False).tolist()
    close(schedule.noise_to_signal(single), 80.0, rtol=1e-12)


def test_a_larger_rho_puts_more_levels_near_the_data_and_in_the_limit_gives_log_snr():
    assert bool((grids.karras(9, rho=7.0)[1:-2] < grids.karras(9, rho=3.0)[1:-2]).all())
    close(grids.karras(9, rho=1e6), grids.log_snr(9), rtol=1e-4)


# Levels of k-diffusion's get_sigmas_polyexponential and of diffusers' use_beta_sigmas, in numpy and scipy.


@given(st.integers(2, 40), LOW, HIGH, st.floats(0.2, 5.0))
def test_polyexponential_is_that_of_k_diffusion(n, low, high, rho):
    ramp = np.linspace(1, 0, n) ** rho
    levels = np.exp(ramp * (np.log(high) - np.log(low)) + np.log(low))
    close(grids.polyexponential(n, low, high, rho), torch.tensor([*levels, 0.0], dtype=F64), rtol=1e-13)


@given(st.integers(2, 40), LOW, HIGH)
def test_polyexponential_with_rho_1_is_log_snr(n, low, high):
    close(grids.polyexponential(n, low, high), grids.log_snr(n, low, high), rtol=64 * EPS)


@given(st.integers(2, 40), LOW, HIGH, st.floats(0.3, 3.0), st.floats(0.3, 3.0))
def test_beta_is_that_of_diffusers(n, low, high, a, b):
    levels = [low + scipy.stats.beta.ppf(u, a, b) * (high - low) for u in 1 - np.linspace(0, 1, n)]
    # Two libraries for the quantile, and a level near the data is a small difference of the two ends.
    close(grids.beta(n, low, high, a, b), torch.tensor([*levels, 0.0], dtype=F64), rtol=1e-9, atol=1e-12 * high)


@given(st.integers(2, 40), LOW, HIGH)
def test_a_flat_beta_a_karras_rho_of_1_and_a_low_crossover_are_linear_in_sigma(n, low, high):
    linear = torch.linspace(high, low, n, dtype=F64)
    for grid in (grids.beta(n, low, high, 1, 1), grids.karras(n, low, high, 1), grids.linear_log(n, low, high, low)):
        close(grid[:-1], linear, rtol=1e-12, atol=8 * EPS * high)


@given(st.integers(2, 40), LOW, HIGH, st.floats(1.0, 10.0))
def test_a_high_crossover_makes_linear_log_log_snr(n, low, high, beyond):
    close(grids.linear_log(n, low, high, beyond * high), grids.log_snr(n, low, high), rtol=64 * EPS)


@given(st.integers(4, 60), LOW, HIGH, st.floats(0.1, 0.9))
def test_linear_log_is_linear_above_its_crossover_and_logarithmic_below(n, low, high, place):
    c = low**place * high ** (1 - place)
    levels = grids.linear_log(n, low, high, c)[:-1]
    u = torch.where(levels > c, levels / c - 1, (levels / c).log())
    interval = (high / c - 1 + math.log(c / low)) / (n - 1)
    close(u.diff(), torch.full((n - 1,), -interval, dtype=F64), atol=64 * EPS * high / c)


@given(st.integers(1, 20), LOW, HIGH)
def test_linear_log_gives_each_part_half_of_the_intervals(half, low, high):
    levels = grids.linear_log(2 * half + 1, low, high)[:-1]
    upper, lower = levels[: half + 1], levels[half:]  # the level in the middle is the crossover
    close(upper.diff(), torch.full((half,), float(lower[0] - high) / half, dtype=F64), rtol=1e-9)
    close(lower.log().diff(), torch.full((half,), math.log(low / float(lower[0])) / half, dtype=F64), rtol=1e-9)
    # and there the two spacings have one slope: a step down by c (u), against a factor of exp(-u)
    close(float(high - lower[0]) / float(lower[0]), math.log(float(lower[0]) / low), rtol=1e-9)


def test_a_level_that_the_schedule_does_not_reach_is_a_grid_error():
    short = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t, t_noise=0.9)  # sigma/alpha ends at 9
    with pytest.raises(iia.errors.GridError, match="80"):
        grids.karras(5, sigma_max=80.0, schedule=short)
    with pytest.raises(iia.errors.GridError, match="between"):
        grids.karras(5, 0.02, 1000.0, schedule=DISCRETE)  # beyond timestep T - 1
    with pytest.raises(iia.errors.GridError, match="between"):
        grids.log_snr(5, 0.01, 80.0, schedule=iia.Schedule.from_functions(lambda t: 1 - t, lambda t: 0.1 + 0.9 * t))


def test_without_levels_a_grid_stays_within_the_reach_of_its_schedule():
    short = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: 0.01 + 0.9 * t, t_noise=0.9)
    grid = grids.karras(5, schedule=short, to_data=False)
    close(short.noise_to_signal(grid[[0, -1]]), torch.tensor([8.2, 0.01], dtype=F64), rtol=1e-12)


@pytest.mark.parametrize("schedule", [DISCRETE, iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t, t_noise=0.9)])
def test_the_noisiest_level_of_a_schedule_is_within_its_reach(schedule):
    grid = grids.karras(5, 0.01, schedule.noise_to_signal(schedule.t_noise), schedule=schedule)
    close(grid[0], torch.tensor(schedule.t_noise, dtype=F64), rtol=1e-9)
    assert schedule.covers(grid)


def test_a_schedule_that_does_not_reach_the_data_needs_grids_without_it():
    noisy = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: 0.1 + 0.9 * t)
    with pytest.raises(iia.errors.GridError, match="to_data=False"):
        grids.karras(5, 0.2, 5.0, schedule=noisy)
    assert len(grids.karras(5, 0.2, 5.0, schedule=noisy, to_data=False)) == 5


# ---- times -----------------------------------------------------------------------------------------------------------


@given(COUNTS, st.floats(0.0, 10.0), st.floats(20.0, 1000.0))
def test_uniform_has_equal_intervals_in_either_direction(n, low, high):
    for start, end in ((high, low), (low, high)):
        grid = grids.uniform(n, start, end)
        assert grid.dtype == F64 and grid.shape == (n + 1,)
        assert (grid[0], grid[-1]) == (start, end)
        close(grid.diff(), torch.full((n,), (end - start) / n, dtype=F64), atol=2 * EPS * high)


@given(COUNTS, st.floats(0.0, 10.0), st.floats(20.0, 1000.0))
def test_quadratic_has_equal_intervals_in_the_square_root_of_time(n, low, high):
    for start, end in ((high, low), (low, high)):
        grid = grids.quadratic(n, start, end)
        assert grid.dtype == F64 and grid.shape == (n + 1,)
        assert (grid[0], grid[-1]) == (start, end)
        interval = (math.sqrt(end) - math.sqrt(start)) / n
        # A square root near 0 magnifies the rounding of the time, which is relative to it: no atol on the times needed.
        close(grid.sqrt().diff(), torch.full((n,), interval, dtype=F64), atol=4 * EPS * math.sqrt(high))


def test_quadratic_times_are_squares():
    close(grids.quadratic(4, 16.0, 0.0), torch.tensor([16.0, 9.0, 4.0, 1.0, 0.0], dtype=F64))


# ---- integer timesteps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "n", "expected"),
    [
        ("leading", 10, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("trailing", 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("linspace", 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("leading", 3, [666, 333, 0]),
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 3, [999, 500, 0]),
        ("leading", 1, [0]),
        ("trailing", 1, [999]),
        ("linspace", 1, [999]),
    ],
)
def test_discrete_spacings_are_those_of_table_2_of_lin_et_al(spacing, n, expected):
    grid = grids.discrete(n, DISCRETE, spacing)
    assert grid.dtype == F64
    assert grid.tolist() == [*expected, -1]
    assert grids.discrete(n, DISCRETE, spacing, to_data=False).tolist() == expected


@every_spacing
@given(data=st.data())
def test_discrete_timesteps_are_distinct_integers_of_the_table_in_decreasing_order(spacing, data):
    total = data.draw(st.integers(2, 120))
    n = data.draw(st.integers(1, total))
    grid = grids.discrete(n, small_discrete(total), spacing, to_data=False)
    assert len(grid) == n
    assert torch.equal(grid, grid.round())
    assert bool((grid.diff() < 0).all())
    assert grid[-1] >= 0 and grid[0] <= total - 1


@every_spacing
def test_as_many_timesteps_as_the_table_has_are_all_of_them(spacing):
    assert grids.discrete(50, small_discrete(50), spacing).tolist() == list(range(49, -2, -1))


def test_beta_timesteps_are_rounded_quantiles():
    expected = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, 20, endpoint=False), 0.6, 0.6) * 999)
    assert grids.discrete(20, DISCRETE, "beta", to_data=False).tolist() == expected.tolist()
    assert grids.discrete(10, DISCRETE, "beta").tolist() == [999, 959, 876, 765, 637, 500, 362, 234, 123, 40, -1]


# ---- grids with any end, and parts of grids --------------------------------------------------------------------------


@every_level_grid
@every_schedule
def test_a_grid_from_an_interior_level_denoises_a_partly_noised_state(schedule, make):
    """x_t = alpha x_0 + sigma eps at the grid's first time, and from there the ODE: here to the exact solution."""
    problem, level = gaussian(), 1.5
    grid = make(40, 0.01, level, schedule=schedule, to_data=False)
    close(schedule.noise_to_signal(float(grid[0])), level, rtol=1e-9)
    t, s = float(grid[0]), float(grid[-1])
    x_t = schedule.alpha(t) * normal(5, 3) + schedule.sigma(t) * normal(5, 3, seed=1)
    found = iia.sample(problem.ode(schedule), x_t, grid, solver="heun")
    close(found, problem.flow(x_t, schedule, t, s), atol=5e-3)


def test_any_monotone_times_are_a_grid():
    ode, x = gaussian().ode(iia.EDM()), normal(4, 3)
    for grid in (torch.tensor([3.0, 1.0, 0.25], dtype=F64), [3.0, 1.0, 0.25], torch.tensor([0.25, 1.0, 3.0])):
        assert iia.sample(ode, x, grid, solver="heun").shape == x.shape


@given(st.integers(2, 30), st.floats(0.0, 0.95), st.floats(0.05, 1.0))
def test_a_part_of_a_grid_has_the_ends_asked_for_and_the_grids_own_points_between(n, a, b):
    grid = grids.karras(n)
    start, end = float(grid[0] * (1 - a)), float(grid[0] * (1 - a) * (1 - b))
    for whole, first, last in ((grid, start, end), (grid.flip(0), end, start)):
        part = grids.cut(whole, first, last)
        assert part.dtype == F64
        assert (part[0], part[-1]) == (first, last)
        assert set(part[1:-1].tolist()) <= set(whole.tolist())
        assert len(part) - 2 == int(((grid < start * (1 - 1e-9)) & (grid > end * (1 + 1e-9))).sum())
        assert bool((part.diff() < 0).all() or (part.diff() > 0).all())


def test_a_cut_at_the_grids_own_points_is_a_slice():
    grid = grids.discrete(10, DISCRETE)
    assert torch.equal(grids.cut(grid), grid)
    assert torch.equal(grids.cut(grid, 699.0), grid[3:])
    assert torch.equal(grids.cut(grid, 699.0, 199.0), grid[3:9])
    level = DISCRETE.noise_to_signal(699.0)
    assert len(grids.cut(grid, DISCRETE.t_of_noise_to_signal(level))) == len(grid[3:])  # equal but for rounding


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((grids.karras(5), 90.0), "within it"),
        ((grids.karras(5), 1.0, 2.0), "within it"),
        ((grids.karras(5), 1.0, 1.0), "within it"),
        ((grids.karras(5), math.nan), "start must be a finite number"),
        ((grids.karras(5), 1.0, -1.0), "within it"),
        ((grids.karras(5), "noise"), "start must be a finite number"),
        (("karras",), "got str"),
        ((torch.ones(3),), "strictly monotone"),
        ((torch.ones(1),), "at least two"),
        ((torch.eye(2),), "1-d"),
        ((torch.tensor([1.0, math.nan]),), "monotone"),
    ],
)
def test_parts_that_a_grid_does_not_have_are_a_grid_error(arguments, words):
    with pytest.raises(iia.errors.GridError, match=words):
        grids.cut(*arguments)


# ---- errors ----------------------------------------------------------------------------------------------------------


@every_level_grid
@pytest.mark.parametrize("n", [0, -3, 2.5, None, True, "5"])
def test_a_grid_without_levels_is_a_grid_error(make, n):
    with pytest.raises(iia.errors.GridError, match="number of levels of a grid, must be a whole number, at least 1"):
        make(n)


@every_level_grid
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (80.0, 0.002), (1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)]
)
def test_levels_out_of_order_are_a_grid_error_that_shows_them(make, low, high):
    with pytest.raises(iia.errors.GridError, match=r"sigma_m(in|ax)") as caught:
        make(5, low, high)
    assert str(low) in str(caught.value) or str(high) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (grids.karras, "rho"),
        (grids.polyexponential, "rho"),
        (grids.linear_log, "crossover"),
        (grids.beta, "a"),
        (grids.beta, "b"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -7.0, math.inf, math.nan, "seven"])
def test_a_parameter_that_is_not_positive_is_a_grid_error_that_names_it(make, name, value):
    with pytest.raises(iia.errors.GridError, match=rf"^{name} must be"):
        make(5, **{name: value})


@pytest.mark.parametrize(
    "make", [lambda: grids.beta(9, a=0.01, b=0.01), lambda: grids.polyexponential(200, rho=500.0)], ids=["beta", "poly"]
)
def test_levels_too_near_to_tell_apart_are_a_grid_error(make):
    with pytest.raises(iia.errors.GridError, match="coincide"):
        make()


@pytest.mark.parametrize("make", [grids.uniform, grids.quadratic])
def test_impossible_times_are_a_grid_error(make):
    with pytest.raises(iia.errors.GridError, match="number of intervals of a grid, must be a whole number, at least 1"):
        make(0, 1.0, 0.0)
    for ends, words in (
        ((1.0, 1.0), "different ends"),
        ((math.inf, 0.0), "t_start must"),
        ((1.0, math.nan), "t_end must"),
    ):
        with pytest.raises(iia.errors.GridError, match=words):
            make(5, *ends)


def test_a_quadratic_grid_through_negative_times_is_a_grid_error():
    with pytest.raises(iia.errors.GridError, match="not negative"):
        grids.quadratic(5, 999.0, -1.0)
    assert grids.uniform(4, 1.0, -1.0).tolist() == [1.0, 0.5, 0.0, -0.5, -1.0]


@pytest.mark.parametrize("n", [0, 1001, 2.0, True])
def test_more_timesteps_than_the_table_has_are_a_grid_error(n):
    with pytest.raises(iia.errors.GridError, match="1 to 1000"):
        grids.discrete(n, DISCRETE)


def test_an_unknown_spacing_is_a_grid_error_that_lists_the_known_ones():
    with pytest.raises(iia.errors.GridError, match=r"'squared'.*'leading', 'trailing', 'linspace' or 'beta'"):
        grids.discrete(10, DISCRETE, "squared")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "VP"}, "schedule must be a Schedule"),
        ({"sigma_min": "a"}, "sigma_min must be a finite positive number"),
        ({"sigma_max": [80.0]}, "sigma_max must be a finite positive number"),
        ({"rho": "seven"}, "rho must be a finite positive number"),
        ({"rho": True}, "rho must be a finite positive number"),
        ({"rho": 1e-5}, "too small"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_a_grid_error_that_names_them(arguments, words):
    with pytest.raises(iia.errors.GridError, match=words):
        grids.karras(5, **arguments)


def test_timesteps_of_a_schedule_without_any_are_a_grid_error():
    with pytest.raises(iia.errors.GridError, match="Discrete"):
        grids.discrete(4, iia.EDM())


def test_counts_may_be_numpy_integers():
    n = np.int64(4)
    for make in (
        lambda k: grids.karras(k),
        lambda k: grids.discrete(k, DISCRETE),
        lambda k: grids.uniform(k, 1.0, 0.0),
    ):
        assert torch.equal(make(n), make(4))


@every_schedule
def test_grids_stay_on_the_host_whatever_the_default_device(schedule):
    expected = grids.karras(5, 0.01, 40.0, schedule=schedule)
    with torch.device("meta"):
        assert torch.equal(grids.karras(5, 0.01, 40.0, schedule=schedule), expected)
