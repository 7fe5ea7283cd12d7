"""Every schedule is what its formulas say: exact at the ends, invertible, differentiable, checked when built."""

import copy
import dataclasses
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ALPHAS_CUMPROD, EPS, F64, LAMS, close, every_schedule, gaussian, generator, normal

import iia_ode as iia
from iia_ode.schedules import base, schedule_from_config

UNIT = st.floats(0.0, 1.0)
INSIDE_UNIT = st.floats(1e-6, 1 - 1e-6)
DISCRETE = iia.Discrete(ALPHAS_CUMPROD)
FLOW_LIKE = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)
BACKWARDS = iia.Schedule.from_functions(lambda t: t, lambda t: 1 - t, t_data=1.0, t_noise=0.0)

# The last time; the largest term in the derivatives, whose rounding is absolute; alpha', sigma', f, g^2 by hand.
DERIVATIVES = {
    "EDM": (iia.EDM(), 80.0, 0.0, lambda t: (0.0, 1.0, 0.0, 2 * t)),
    "VE": (iia.VE(), 6400.0, 0.0, lambda t: (0.0, 0.5 / math.sqrt(t), 0.0, 1.0)),
    "VP": (iia.VP(), 1.0, 10.0, lambda t: _vp_derivatives(t)),
    "Cosine": (iia.Cosine(), 1.0, math.pi / 2, lambda t: _cosine_derivatives(t)),
    "FlowMatching": (iia.FlowMatching(), 1.0, 0.0, lambda t: (-1.0, 1.0, -1 / (1 - t), 2 * t / (1 - t))),
    "from_functions": (FLOW_LIKE, 1.0, 0.0, lambda t: (-1.0, 1.0, -1 / (1 - t), 2 * t / (1 - t))),
    "Discrete": (DISCRETE, 999.0, 0.01, lambda t: _discrete_derivatives(t)),
}


def _vp_exact(t: float, beta_0: float = 0.1, beta_1: float = 20.0) -> tuple[Decimal, Decimal]:
    """Alpha and sigma from exp(-1/2 integral of beta), in 50 digits."""
    with localcontext(prec=50):
        t_, low, high = Decimal(t), Decimal(beta_0), Decimal(beta_1)
        alpha = (-(low * t_ + (high - low) * t_ * t_ / 2) / 2).exp()
        return alpha, (1 - alpha * alpha).sqrt()


def _vp_derivatives(t: float) -> tuple[float, float, float, float]:
    alpha, sigma = map(float, _vp_exact(t))
    beta = 0.1 + 19.9 * t
    return -beta / 2 * alpha, beta * alpha**2 / (2 * sigma), -beta / 2, beta


def _cosine_derivatives(t: float) -> tuple[float, float, float, float]:
    c, s = math.sin(math.pi / 2 * (1 - t)), math.sin(math.pi / 2 * t)
    return -math.pi / 2 * s, math.pi / 2 * c, -math.pi / 2 * s / c, math.pi * s / c


def _discrete_log_alpha(t: float) -> tuple[Decimal, Decimal]:
    """Log alpha and its slope, linear between the logarithms of the table's square roots, in 50 digits."""
    with localcontext(prec=50):
        k = min(math.floor(t), len(ALPHAS_CUMPROD) - 2)
        left, right = (Decimal(1) if i < 0 else Decimal(float(ALPHAS_CUMPROD[i])) for i in (k, k + 1))
        a, b = left.ln() / 2, right.ln() / 2
        return a + (Decimal(t) - k) * (b - a), b - a


def _discrete_derivatives(t: float) -> tuple[float, float, float, float]:
    log_alpha, rate = _discrete_log_alpha(t)
    with localcontext(prec=50):
        alpha = log_alpha.exp()
        sigma = (1 - alpha * alpha).sqrt()
        return tuple(map(float, (rate * alpha, -rate * alpha**2 / sigma, rate, -2 * rate)))


# ---- alpha and sigma -------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1e4))
def test_edm_time_is_the_noise_level_and_ve_time_is_its_square(t):
    assert (iia.EDM().alpha(t), iia.EDM().sigma(t)) == (1.0, t)
    assert iia.VE().alpha(t) == 1.0
    # torch's square root may be off by the last bit: that of 4598.699491071336 is, with MKL.
    assert math.isclose(iia.VE().sigma(t), math.sqrt(t), rel_tol=2**-52)


@every_schedule
def test_a_number_is_what_a_tensor_of_it_gives_however_often_one_asks(schedule):
    inner = schedule.t_data + (schedule.t_noise - schedule.t_data) * torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for name in ("alpha", "sigma", "alpha_prime", "sigma_prime", "lam", "f", "g2", "noise_to_signal"):
        of = getattr(schedule, name)
        for _ in range(2):
            assert [of(float(t)) for t in inner] == [float(of(t)) for t in inner], name
    levels = schedule.lam(inner)
    assert [schedule.t_of_lam(float(v)) for v in levels] == [float(schedule.t_of_lam(v)) for v in levels]


def test_a_schedule_of_ones_own_with_parameters_that_change_is_asked_anew():
    class Scaled(iia.EDM):
        scale = 1.0

        def _sigma(self, t):
            return self.scale * t

    schedule = Scaled()
    assert schedule.sigma(2.0) == 2.0
    Scaled.scale = 3.0
    assert schedule.sigma(2.0) == 6.0


@every_schedule
def test_the_two_zeros_are_told_apart_whichever_is_asked_for_first(schedule):
    for first, second in ((0.0, -0.0), (-0.0, 0.0)):
        for name in ("sigma", "sigma_prime"):
            of = getattr(schedule, name)
            of(first)
            assert repr(of(second)) == repr(float(of(torch.tensor(second, dtype=torch.float64))))


def test_copies_of_a_schedule_hold_nothing_that_was_remembered():
    schedule = iia.VP()
    values = [schedule.sigma(k / 100) for k in range(1, 100)]
    for twin in (copy.copy(schedule), copy.deepcopy(schedule)):
        assert vars(twin) == vars(iia.VP())
        assert twin == schedule
        assert [twin.sigma(k / 100) for k in range(1, 100)] == values


def test_what_a_schedule_remembers_is_bounded(monkeypatch):
    monkeypatch.setattr(base, "_NUMBERS", 16)
    schedule = iia.VP()
    for k in range(1, 100):
        schedule.sigma(k / 100)
        assert len(vars(schedule)["_numbers"]) <= 16
    assert schedule == iia.VP()
    assert schedule.config() == iia.VP().config()


@given(UNIT)
def test_flow_matching_is_the_straight_line_from_data_to_noise(t):
    assert (iia.FlowMatching().alpha(t), iia.FlowMatching().sigma(t)) == (1 - t, t)


@given(UNIT)
def test_cosine_is_the_quarter_circle(t):
    close(iia.Cosine().alpha(t), math.cos(math.pi / 2 * t), atol=2 * EPS)
    close(iia.Cosine().sigma(t), math.sin(math.pi / 2 * t), rtol=2 * EPS)


@given(st.floats(1e-12, 1.0))
def test_vp_is_the_exponential_of_the_integrated_beta_and_loses_no_digit_near_the_data(t):
    alpha, sigma = map(float, _vp_exact(t))
    close(iia.VP().alpha(t), alpha, rtol=16 * EPS)  # the exponent reaches 5, and is rounded thrice
    close(iia.VP().sigma(t), sigma, rtol=4 * EPS)


@given(st.floats(0.01, 1.0), st.floats(1.5, 40.0), INSIDE_UNIT)
def test_vp_takes_any_pair_of_betas(beta_0, beta_1, t):
    alpha, sigma = map(float, _vp_exact(t, beta_0, beta_1))
    close(iia.VP(beta_0, beta_1).alpha(t), alpha, rtol=32 * EPS)
    close(iia.VP(beta_0, beta_1).sigma(t), sigma, rtol=4 * EPS)


def test_discrete_hits_every_entry_of_its_table_at_the_integer_timesteps():
    steps = torch.arange(1000)
    close(DISCRETE.alpha(steps) ** 2, ALPHAS_CUMPROD, rtol=20 * EPS)  # exp(log(.)/2)^2, and log reaches -10
    close(DISCRETE.sigma(steps) ** 2, 1 - ALPHAS_CUMPROD, rtol=1e-12)  # 1 - 0.9999 has lost four digits


@given(st.floats(-1 + 1e-6, 999.0))
def test_discrete_is_linear_in_log_alpha_between_timesteps_and_on_to_the_data_at_minus_one(t):
    log_alpha, _ = _discrete_log_alpha(t)
    with localcontext(prec=50):
        alpha = float(log_alpha.exp())
        sigma = float((1 - (2 * log_alpha).exp()).sqrt())
    close(DISCRETE.alpha(t), alpha, rtol=16 * EPS)
    close(DISCRETE.sigma(t), sigma, rtol=16 * EPS)


@every_schedule
@given(data=st.data())
def test_sigma_over_alpha_increases_with_noise_for_every_schedule(schedule, data):
    times = st.floats(0.0, 1.0).map(lambda r: schedule.t_data + r * (schedule.t_noise - schedule.t_data))
    t, s = sorted((data.draw(times), data.draw(times)))
    gap = 1e-9 * (schedule.t_noise - schedule.t_data)
    if s - t > gap:
        assert schedule.noise_to_signal(s) > schedule.noise_to_signal(t)
        assert schedule.lam(s) < schedule.lam(t)


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
@every_schedule
def test_the_data_end_is_exact(schedule, backwards):
    schedule = BACKWARDS if backwards else schedule
    assert schedule.sigma(schedule.t_data) == 0.0
    assert schedule.alpha(schedule.t_data) == 1.0
    assert schedule.lam(schedule.t_data) == math.inf
    assert schedule.noise_to_signal(schedule.t_data) == 0.0
    assert schedule.t_of_noise_to_signal(0) == schedule.t_data
    assert schedule.t_of_lam(math.inf) == schedule.t_data


@pytest.mark.parametrize(
    "schedule", [iia.Cosine(), iia.FlowMatching(), FLOW_LIKE, BACKWARDS], ids=lambda s: s.config()["type"]
)
def test_pure_noise_is_exact_where_a_schedule_has_it(schedule):
    assert schedule.alpha(schedule.t_noise) == 0.0
    assert schedule.sigma(schedule.t_noise) == 1.0
    assert schedule.lam(schedule.t_noise) == -math.inf
    assert schedule.noise_to_signal(schedule.t_noise) == math.inf
    assert schedule.t_of_lam(-math.inf) == schedule.t_noise
    assert schedule.t_of_noise_to_signal(math.inf) == schedule.t_noise


# ---- half-log-SNR and its inverse ------------------------------------------------------------------------------------


@every_schedule
@given(lam=LAMS)
def test_lam_of_t_of_lam_returns_what_the_rounding_of_t_allows(schedule, lam):
    t = schedule.t_of_lam(lam)
    one_bit = abs(schedule.lam(math.nextafter(t, math.inf)) - schedule.lam(math.nextafter(t, -math.inf)))
    close(schedule.lam(t), lam, atol=4 * one_bit + 8 * EPS * (1 + abs(lam)))


@every_schedule
@given(lam=LAMS)
def test_t_of_lam_of_t_returns_what_the_rounding_of_lam_allows(schedule, lam):
    t = schedule.t_of_lam(lam)
    there = schedule.lam(t)
    error = 4 * EPS * (1 + abs(there))
    slack = abs(schedule.t_of_lam(there + error) - schedule.t_of_lam(there - error))
    close(schedule.t_of_lam(there), t, atol=slack + 2 * EPS * abs(t))


@every_schedule
@given(lam=LAMS)
def test_lam_is_the_logarithm_of_alpha_over_sigma(schedule, lam):
    t = schedule.t_of_lam(lam)
    close(schedule.lam(t), math.log(schedule.alpha(t) / schedule.sigma(t)), atol=8 * EPS * (1 + abs(lam)))


@given(st.floats(-20.0, 20.0) | st.floats(-300.0, 300.0))
def test_lam_is_inverted_far_beyond_the_range_that_models_are_trained_on(lam):
    for schedule in (iia.EDM(), iia.VE(), iia.VP()):
        close(schedule.lam(schedule.t_of_lam(lam)), lam, atol=4 * EPS * (1 + abs(lam)))


@given(st.floats(1e-3, 1e3))
def test_the_time_of_a_noise_level_has_that_noise_level(level):
    for schedule in (iia.EDM(), iia.VE(), iia.VP(), iia.Cosine(), iia.FlowMatching(), FLOW_LIKE):
        # 1 - t carries the level near pure noise, so t's last bit is worth level * EPS of it.
        close(schedule.noise_to_signal(schedule.t_of_noise_to_signal(level)), level, rtol=(32 + 4 * level) * EPS)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DERIVATIVES)
@given(unit=INSIDE_UNIT)
def test_derivatives_and_ode_coefficients_are_those_of_the_formulas(name, unit):
    schedule, t_last, term, exact = DERIVATIVES[name]
    t = unit * t_last
    alpha_prime, sigma_prime, f, g2 = exact(t)
    close(schedule.alpha_prime(t), alpha_prime, rtol=1e-13, atol=2 * EPS * term)
    close(schedule.sigma_prime(t), sigma_prime, rtol=1e-13, atol=2 * EPS * term)
    close(schedule.f(t), f, rtol=1e-13, atol=2 * EPS * term)
    close(schedule.g2(t), g2, rtol=1e-13, atol=4 * EPS * term)


@every_schedule
@given(lam=LAMS)
def test_g2_is_minus_two_sigma_squared_times_the_slope_of_lam(schedule, lam):
    t = schedule.t_of_lam(lam)
    lam_prime = schedule.alpha_prime(t) / schedule.alpha(t) - schedule.sigma_prime(t) / schedule.sigma(t)
    close(schedule.g2(t), -2 * schedule.sigma(t) ** 2 * lam_prime, rtol=64 * EPS)


@pytest.mark.parametrize(
    ("schedule", "f", "g2"),
    [
        (iia.EDM(), 0.0, 0.0),
        (iia.VE(), 0.0, 1.0),
        (iia.VP(), -0.05, 0.1),
        (iia.Cosine(), 0.0, 0.0),
        (iia.FlowMatching(), -1.0, 0.0),
        (DISCRETE, 0.5 * math.log(1 - 1e-4), -math.log(1 - 1e-4)),
        (BACKWARDS, 1.0, 0.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, iia.Schedule) else None,
)
def test_the_ode_coefficients_are_finite_and_right_at_the_data(schedule, f, g2):
    close(schedule.f(schedule.t_data), f, rtol=1e-12, atol=EPS)  # cos(pi/2) is 6e-17
    close(schedule.g2(schedule.t_data), g2, rtol=1e-12)


@every_schedule
def test_alpha_and_sigma_carry_gradients_to_a_time_that_is_being_learned(schedule):
    t = schedule.t_of_lam(torch.tensor([-1.0, 0.5, 2.0], dtype=F64)).requires_grad_()
    for function, slope in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
        (gradient,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
        close(gradient, slope(t.detach()), rtol=16 * EPS)


# ---- numbers and tensors ---------------------------------------------------------------------------------------------

METHODS = ["alpha", "sigma", "alpha_prime", "sigma_prime", "lam", "f", "g2", "noise_to_signal", "t_of_lam"]


@pytest.mark.parametrize("method", METHODS)
@every_schedule
def test_a_number_gives_a_float_and_a_tensor_a_float64_tensor_of_its_shape(schedule, method):
    function = getattr(schedule, method)
    t = schedule.t_of_lam(0.25) if method != "t_of_lam" else 0.25
    assert type(function(t)) is float
    for dtype in (torch.float32, F64):
        times = torch.full((2, 1, 3), t, dtype=dtype)
        values = function(times)
        assert values.dtype == F64 and values.shape == (2, 1, 3) and not values.requires_grad
        close(values, torch.full((2, 1, 3), function(times[0, 0, 0].item()), dtype=F64), rtol=2 * EPS)


@every_schedule
def test_nan_goes_through_as_nan(schedule):
    for method in ("sigma", "lam", "t_of_lam"):
        assert math.isnan(getattr(schedule, method)(math.nan))


def test_an_integer_timestep_is_as_good_as_a_float():
    assert DISCRETE.alpha(10) == DISCRETE.alpha(10.0) == DISCRETE.alpha(torch.tensor(10)).item()


# ---- schedules from functions ----------------------------------------------------------------------------------------


@given(INSIDE_UNIT, LAMS)
def test_from_functions_equals_the_built_in_schedule_that_it_imitates(t, lam):
    for built_in in (iia.FlowMatching(), iia.VP(), iia.Cosine()):
        made = iia.Schedule.from_functions(built_in.alpha, built_in.sigma)
        for method in ("alpha", "sigma", "alpha_prime", "sigma_prime", "f", "g2", "lam"):
            close(getattr(made, method)(t), getattr(built_in, method)(t), rtol=1e-13, atol=8 * EPS)
        close(made.t_of_lam(lam), built_in.t_of_lam(lam), rtol=8 * EPS, atol=4 * EPS)


@given(INSIDE_UNIT, LAMS)
def test_time_may_run_the_other_way(t, lam):
    flow = iia.FlowMatching()
    assert (BACKWARDS.alpha(t), BACKWARDS.sigma(t)) == (t, 1 - t)
    close(BACKWARDS.t_of_lam(lam), 1 - flow.t_of_lam(lam), atol=4 * EPS)
    assert BACKWARDS.f(t) == 1 / t  # positive: alpha grows towards the data


BAD_FUNCTIONS = {
    "not monotone": (lambda t: 1 - t, lambda t: (4 * t * (1 - t)).sqrt(), 0.0, 1.0),
    "constant": (lambda t: torch.ones_like(t), lambda t: torch.ones_like(t), 0.0, 1.0),
    "increasing towards the data": (lambda t: 1 - t, lambda t: t, 1.0, 0.0),
    "negative": (lambda t: 1 - t, lambda t: t, 0.0, 1.5),
    "nan": (lambda t: 1 - t, lambda t: (t - 0.1).sqrt(), 0.0, 1.0),
    "infinite": (lambda t: torch.ones_like(t), lambda t: t / (1 - t), 0.0, 1.0),
    "both zero": (lambda t: t, lambda t: t, 0.0, 1.0),
    "endless": (lambda t: torch.ones_like(t), lambda t: t, 0.0, math.inf),
    "another shape": (lambda t: torch.ones(1, dtype=F64), lambda t: t, 0.0, 1.0),
    "another dtype": (lambda t: 1 - t.float(), lambda t: t, 0.0, 1.0),
    "a number": (lambda t: 1.0, lambda t: t, 0.0, 1.0),
    "no functions": (1, 2, 0.0, 1.0),
    "of the math module": (lambda t: math.cos(t), lambda t: t, 0.0, 1.0),
    "of numpy": (lambda t: torch.from_numpy(np.cos(t.numpy())), lambda t: t, 0.0, 1.0),
    "cut off from t": (lambda t: 1 - t.detach(), lambda t: t, 0.0, 1.0),
}


@pytest.mark.parametrize("case", BAD_FUNCTIONS)
def test_functions_that_are_no_schedule_are_a_schedule_error(case):
    alpha, sigma, t_data, t_noise = BAD_FUNCTIONS[case]
    with pytest.raises(iia.errors.ScheduleError):
        iia.Schedule.from_functions(alpha, sigma, t_data, t_noise)


# ---- bad parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "betas",
    [(0.0, 20.0), (-0.1, 20.0), (20.0, 0.1), (0.1, math.inf), (math.nan, 1.0), ("low", 20.0), (None, 1.0)],
)
def test_impossible_betas_are_a_schedule_error_that_names_them(betas):
    with pytest.raises(iia.errors.ScheduleError, match=r"beta_0.*beta_1"):
        iia.VP(*betas)


@given(beta=st.floats(0.1, 20.0), lam=st.floats(-3.0, 3.0))
def test_a_constant_beta_is_the_limit_of_a_linear_one(beta, lam):
    constant, nearly = iia.VP(beta, beta), iia.VP(beta, beta * (1 + 1e-9))
    t = constant.t_of_lam(lam)
    close(constant.alpha(t), math.exp(-beta * t / 2), rtol=4 * EPS)
    close(constant.lam(t), lam, atol=1e-13)
    close(nearly.t_of_lam(lam), t, rtol=1e-6)
    assert schedule_from_config(constant.config()) == constant


@pytest.mark.parametrize(
    "table",
    [
        [0.9],
        [],
        [[0.9, 0.5]],
        [0.5, 0.9],
        [0.9, 0.9],
        [1.0, 0.5],
        [0.9, 0.0],
        [0.9, -0.1],
        [0.9, math.nan],
        [1.5, 0.5],
        None,
        0.5,
        "x",
    ],
    ids=str,
)
def test_an_impossible_table_is_a_schedule_error_that_says_what_is_needed(table):
    with pytest.raises(iia.errors.ScheduleError, match="alphas_cumprod"):
        iia.Discrete(table)


def zero_terminal_snr():
    """Stable Diffusion's table, rescaled to end in 0 [Lin et al. 2024, algorithm 1]."""
    alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2).cumprod(0).sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()


def test_the_advice_for_a_table_that_ends_in_0_costs_nothing_and_dropping_its_last_entry_does():
    table, problem, x = zero_terminal_snr(), gaussian(), normal(500, 3)
    assert table[-1] == 0
    with pytest.raises(iia.errors.ScheduleError, match=r"alphas_cumprod\[-1\] = 1e-16"):
        iia.Discrete(table)
    y, timesteps = x, list(range(999, -1, -100))  # DDIM by hand, with alpha = 0 at the first timestep
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, b = (1.0 if k is None else float(table[k]) ** 0.5 for k in (t, s))
        sigma, after = math.sqrt(1 - a * a), math.sqrt(1 - b * b)
        y = after / sigma * y + (b - a * after / sigma) * problem.denoise(y, a, sigma)
    tiny = table.clone()
    tiny[-1] = 1e-16
    found = []
    for schedule in (iia.Discrete(tiny), iia.Discrete(table[:-1])):
        grid = torch.tensor([schedule.t_noise, *timesteps[1:], -1.0], dtype=F64)
        found.append(float((iia.sample(problem.ode(schedule, "v"), x, grid, "ddim") - y).abs().max()))
    assert found[0] < 1e-7 and found[1] > 1e-4


# ---- identity --------------------------------------------------------------------------------------------------------


def test_a_schedule_is_rebuilt_from_its_description():
    for schedule in (iia.EDM(), iia.VE(), iia.VP(), iia.VP(0.2, 12.0), iia.Cosine(), iia.FlowMatching()):
        assert schedule_from_config(schedule.config()) == schedule
    assert schedule_from_config(DISCRETE.config(), ALPHAS_CUMPROD) == DISCRETE


def test_a_description_that_cannot_be_rebuilt_is_a_schedule_error():
    for config in (FLOW_LIKE.config(), DISCRETE.config(), {"type": "Karras"}, {}):
        with pytest.raises(iia.errors.ScheduleError, match="pass schedule="):
            schedule_from_config(config)


@pytest.mark.parametrize(
    ("config", "table"),
    [({"type": "VP", "beta_2": 3.0}, None), ({"type": ["VP"]}, None), (DISCRETE.config(), ALPHAS_CUMPROD[:500])],
    ids=["unknown parameter", "no name", "another table"],
)
def test_a_description_that_does_not_fit_is_a_schedule_error(config, table):
    with pytest.raises(iia.errors.ScheduleError):
        schedule_from_config(config, table)


def test_equal_parameters_make_equal_schedules_and_others_do_not():
    makers = [
        iia.EDM,
        iia.VE,
        iia.VP,
        lambda: iia.VP(0.1, 19.0),
        iia.Cosine,
        iia.FlowMatching,
        lambda: iia.Discrete(ALPHAS_CUMPROD),
        lambda: iia.Discrete(ALPHAS_CUMPROD[:500]),
    ]
    for i, make in enumerate(makers):
        for j, other in enumerate(makers):
            assert (make() == other()) == (i == j)
            assert (make().config() == other().config()) == (i == j)
        assert hash(make()) == hash(make())
    assert len({make() for make in makers * 2}) == len(makers)


class Doubled(iia.VP):
    """A schedule that is no dataclass of its own, with a parameter that its parent's fields do not hold."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        object.__setattr__(self, "speed", speed)

    def _log_alpha(self, t):
        return super()._log_alpha(self.speed * t)


@dataclasses.dataclass(frozen=True)
class Scaled(iia.EDM):
    """A schedule with a parameter that is no number."""

    scale: torch.Tensor

    def _lam(self, t):
        return -(self.scale * t).log()


def test_no_parameter_is_dropped_from_a_description():
    for number in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        assert iia.VP(number, 12).config() == iia.VP(0.25, 12.0).config() != iia.VP(0.5, 12.0).config()
    assert Doubled(1.5).config() == Doubled(1.5).config() != Doubled(1.25).config()
    one, two = (Scaled(torch.tensor(v, dtype=F64)) for v in (1.0, 2.0))
    assert one.config() == Scaled(torch.tensor(1.0, dtype=F64)).config() != two.config()


def test_the_description_of_functions_tells_two_schedules_apart():
    assert FLOW_LIKE.config() == iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t).config()
    assert FLOW_LIKE.config() != iia.Schedule.from_functions(lambda t: 1 - t, lambda t: 0.5 * t).config()


def test_a_schedule_does_not_change_with_the_table_it_was_made_from():
    table = ALPHAS_CUMPROD.clone()
    schedule = iia.Discrete(table)
    table.mul_(0.5)
    assert schedule == DISCRETE


@every_schedule
def test_schedules_are_immutable(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.t_data = 0.5


# ---- surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "ddim"])
@every_schedule
def test_inference_mode_changes_no_bit(schedule, solver):
    grid = iia.grids.karras(4, 0.01, 40.0, schedule=schedule)
    ode, x = gaussian().ode(schedule), gaussian().noisy(2, schedule, float(grid[0]), generator())
    expected = iia.sample(ode, x, grid, solver)
    with torch.inference_mode():
        assert torch.equal(iia.sample(ode, x, grid, solver), expected)
        for name in ("alpha_prime", "sigma_prime", "f", "g2"):
            inside = getattr(schedule, name)(grid[:-1].clone())
            assert torch.equal(inside, getattr(schedule, name)(grid[:-1]))
    assert torch.equal(getattr(schedule, name)(grid[:-1]), inside)


@every_schedule
def test_derivatives_carry_gradients_to_a_time_that_is_being_learned(schedule):
    t, h = schedule.t_of_lam(0.3), 1e-5 * schedule.t_noise
    for function in (schedule.alpha_prime, schedule.g2):
        learned = torch.tensor(t, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(learned) + 0 * learned, learned)
        difference = (function(t + h) - function(t - h)) / (2 * h)
        close(gradient, difference, rtol=1e-6, atol=1e-6 * abs(function(t)) / t)
    with torch.no_grad():
        assert not schedule.g2(learned).requires_grad


@every_schedule
def test_numbers_stay_on_the_host_whatever_the_default_device(schedule):
    expected = [getattr(schedule, m)(schedule.t_of_lam(0.25)) for m in METHODS[:-1]], schedule.config()
    with torch.device("meta"):
        found = [getattr(schedule, m)(schedule.t_of_lam(0.25)) for m in METHODS[:-1]], schedule.config()
        assert iia.Discrete(ALPHAS_CUMPROD.tolist()) == DISCRETE
        assert iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t).config() == FLOW_LIKE.config()
    assert found == expected


def test_a_table_read_in_inference_mode_serves_gradients_later():
    with torch.inference_mode():
        schedule = iia.Discrete(ALPHAS_CUMPROD.clone())
    t = torch.tensor(10.5, dtype=F64, requires_grad=True)
    schedule.sigma(t).backward()
    close(t.grad, schedule.sigma_prime(10.5), rtol=16 * EPS)


def test_a_negative_noise_level_is_a_schedule_error():
    with pytest.raises(iia.errors.ScheduleError, match="negative"):
        iia.VP().t_of_noise_to_signal(-1.0)


@every_schedule
def test_size_is_the_root_mean_square_of_unit_data_with_noise_for_numbers_and_tensors(schedule):
    times = torch.linspace(schedule.t_data, schedule.t_noise, 9, dtype=F64)
    assert torch.equal(schedule.size(times), torch.hypot(schedule.alpha(times), schedule.sigma(times)))
    for t in times.tolist():
        assert schedule.size(t) == math.hypot(schedule.alpha(t), schedule.sigma(t))
