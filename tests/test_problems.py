"""Closed-form denoisers and flows against brute force: numerical integration, loops and autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EPS, F64, LAMS, close, every_schedule, gaussian, generator, mixture, normal

import iia_ode as iia
from iia_ode.problems import Empirical, Gaussian, Mixture

LEVELS = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 3.0))


def posterior_mean_by_integration(density, x: float, alpha: float, sigma: float) -> float:
    """E[x_0 | x] in one dimension from Bayes' rule, by the trapezoidal rule (which converges exponentially here)."""
    x_0 = np.linspace(-25.0, 25.0, 300_001)  # the posterior reaches 14, and is at most 0.7 wide
    log_likelihood = -0.5 * ((x - alpha * x_0) / sigma) ** 2
    weight = density(x_0) * np.exp(log_likelihood - log_likelihood.max())
    return float((weight * x_0).sum() / weight.sum())


def normal_density(x_0: np.ndarray, mean: float, std: float) -> np.ndarray:
    return np.exp(-0.5 * ((x_0 - mean) / std) ** 2) / std


def images() -> Mixture:
    """Two components in three dimensions of shape, with one width each."""
    return Mixture(
        torch.tensor([1.0, 3.0]), normal(2, 1, 2, 3, seed=5), torch.tensor([0.3, 0.8], dtype=F64).reshape(2, 1, 1, 1)
    )


ALL_PROBLEMS = {
    "gaussian": gaussian(),
    "mixture": mixture(),
    "empirical": Empirical(normal(6, 2, seed=4)),
    "gaussian image": Gaussian(normal(1, 2, 3, seed=6), normal(1, 2, 3, seed=7).square() + 0.1),
    "mixture of images": images(),
    "images": Empirical(normal(5, 1, 2, 3, seed=8)),
}
every_problem = pytest.mark.parametrize("problem", ALL_PROBLEMS.values(), ids=ALL_PROBLEMS.keys())

# ---- denoisers -------------------------------------------------------------------------------------------------------


@given(LEVELS, st.floats(-2.0, 2.0))
def test_the_gaussian_denoiser_is_the_posterior_mean(level, x):
    alpha, sigma = level
    expected = posterior_mean_by_integration(lambda x_0: normal_density(x_0, 0.4, 0.7), x, alpha, sigma)
    denoised = Gaussian(torch.tensor([0.4], dtype=F64), 0.49).denoise(torch.tensor([[x]], dtype=F64), alpha, sigma)
    close(denoised, torch.tensor([[expected]], dtype=F64), rtol=1e-12, atol=1e-13)


@given(LEVELS, st.floats(-2.0, 2.0))
def test_the_denoiser_of_a_mixture_is_the_posterior_mean(level, x):
    alpha, sigma = level
    weights, means, stds = [0.5, 0.3, 0.2], [-1.0, 0.2, 1.5], [0.3, 0.6, 0.4]

    def density(x_0):
        return sum(w * normal_density(x_0, m, s) for w, m, s in zip(weights, means, stds, strict=True))

    columns = torch.tensor([weights, means, stds], dtype=F64)
    problem = Mixture(columns[0], columns[1, :, None], columns[2, :, None])
    expected = posterior_mean_by_integration(density, x, alpha, sigma)
    denoised = problem.denoise(torch.tensor([[x]], dtype=F64), alpha, sigma)
    close(denoised, torch.tensor([[expected]], dtype=F64), rtol=1e-12, atol=1e-13)


@given(LEVELS, st.integers(0, 99))
def test_the_denoiser_of_a_mixture_in_many_dimensions_is_what_loops_over_its_components_give(level, seed):
    (alpha, sigma), problem = level, mixture()
    x = alpha * problem.sample(3, generator(seed)) + sigma * normal(3, 4, seed=seed)
    weights, means, variances = (v.numpy() for v in (problem.log_weights.exp(), problem.means, problem.variances))
    expected = np.zeros((3, 4))
    for b in range(3):
        evidence, answers = [], []
        for w, m, v in zip(weights, means, variances, strict=True):
            total = alpha**2 * v + sigma**2
            residual = x[b].numpy() - alpha * m
            evidence.append(w * math.prod(np.exp(-0.5 * residual**2 / total) / np.sqrt(total)))
            answers.append(m + alpha * v / total * residual)
        expected[b] = sum(e * a for e, a in zip(evidence, answers, strict=True)) / sum(evidence)
    close(problem.denoise(x, alpha, sigma), torch.from_numpy(expected), rtol=1e-12, atol=1e-13)


@given(LEVELS, st.integers(0, 99))
def test_the_denoiser_of_a_data_set_is_the_softmax_average_of_its_points(level, seed):
    alpha, sigma = level
    points, x = normal(6, 2, seed=seed), normal(3, 2, seed=seed + 1)
    logits = -((x[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2)
    # The exponents reach the hundreds, and the weights inherit their rounding.
    close(
        Empirical(points).denoise(x, alpha, sigma),
        logits.softmax(1) @ points,
        atol=8 * EPS * (1 + float(logits.abs().max())),
    )


def test_near_the_data_a_data_set_answers_with_its_nearest_point():
    points = normal(6, 2)
    assert torch.equal(Empirical(points).denoise(points + 1e-4, 1.0, 1e-5), points)


@given(LEVELS, st.integers(0, 99))
def test_a_mixture_of_one_component_is_the_gaussian(level, seed):
    g, x = gaussian(), normal(3, 3, seed=seed)
    one = Mixture(torch.ones(1), g.mean[None], g.variance.sqrt()[None])
    close(one.denoise(x, *level), g.denoise(x, *level), rtol=8 * EPS, atol=8 * EPS)


def test_only_the_ratios_of_the_weights_matter():
    m = mixture()
    heavier = Mixture(7 * m.log_weights.exp(), m.means, m.variances.sqrt())
    close(heavier.denoise(normal(5, 4), 0.7, 0.6), m.denoise(normal(5, 4), 0.7, 0.6), rtol=16 * EPS, atol=EPS)


@every_problem
def test_levels_may_differ_from_sample_to_sample(problem):
    shape = (3, *[1] * len(problem.shape))
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1], dtype=F64), torch.tensor([0.1, 0.8, 2.0], dtype=F64)
    x = normal(3, *problem.shape)
    together = problem.denoise(x, alpha.reshape(shape), sigma.reshape(shape))
    for i in range(3):
        alone = problem.denoise(x[i : i + 1], alpha[i].item(), sigma[i].item())
        close(together[i : i + 1], alone, rtol=32 * EPS, atol=32 * EPS)


@every_problem
def test_a_problem_of_any_shape_is_an_ode_of_that_shape_in_either_dtype(problem):
    ode, x = problem.ode(iia.VP(), "noise"), normal(2, *problem.shape, dtype=torch.float32)
    assert ode.state_shape == tuple(problem.shape)
    narrow, wide = ode.data(x, 0.5), ode.data(x.to(F64), 0.5)
    assert (narrow.dtype, wide.dtype) == (torch.float32, F64)
    assert narrow.shape == wide.shape == x.shape
    # alpha(0.5) = 0.28: what is rounded in the noise comes back divided by it.
    close(narrow.to(F64), wide, atol=8 * torch.finfo(torch.float32).eps / 0.28 * (1 + float(x.abs().max())))


@every_schedule
@settings(max_examples=15)
@given(lam=LAMS)
def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density(schedule, lam):
    problem, t = mixture(), schedule.t_of_lam(lam)
    a, s = schedule.alpha(t), schedule.sigma(t)
    x = problem.noisy(4, schedule, t, generator(1)).requires_grad_()
    variances = a * a * problem.variances + s * s
    parts = torch.distributions.Normal(a * problem.means, variances.sqrt()).log_prob(x[:, None]).sum(-1)
    density = (problem.log_weights + parts).logsumexp(1)
    (gradient,) = torch.autograd.grad(density.sum(), x)
    # score = (alpha D - x) / sigma^2: the rounding of x and D divided by sigma^2.
    size = float((x.detach().abs().max() + a) / s**2)
    close(problem.ode(schedule).score(x.detach(), t), gradient, atol=200 * EPS * size)


# ---- the exact Gaussian flow -----------------------------------------------------------------------------------------


@every_schedule
@settings(max_examples=20)
@given(lams=st.tuples(LAMS, LAMS, LAMS))
def test_the_gaussian_flow_composes_and_inverts_and_stands_still(schedule, lams):
    g, x = gaussian(), normal(4, 3)
    t, u, s = map(schedule.t_of_lam, lams)
    direct = g.flow(x, schedule, t, s)
    stops = [x.abs().max(), g.flow(x, schedule, t, u).abs().max(), direct.abs().max()]
    gain = max(float(a / b) for a in stops for b in stops)  # a detour loses what it shrinks on the way
    close(g.flow(g.flow(x, schedule, t, u), schedule, u, s), direct, atol=32 * EPS * gain * float(direct.abs().max()))
    back = g.flow(direct, schedule, s, t)
    close(back, x, atol=32 * EPS * gain * float(x.abs().max()))
    assert torch.equal(g.flow(x, schedule, t, t), x)


@every_schedule
def test_the_gaussian_flow_reaches_both_ends(schedule):
    g, x, t = gaussian(), normal(4, 3), schedule.t_of_lam(0.5)
    clean = g.flow(x, schedule, t, schedule.t_data)
    close(g.flow(clean, schedule, schedule.t_data, t), x, rtol=32 * EPS, atol=8 * EPS)
    noise = g.flow(x, schedule, t, schedule.t_noise)
    close(g.flow(noise, schedule, schedule.t_noise, t), x, rtol=32 * EPS, atol=1e-12)
    if schedule.alpha(schedule.t_noise) == 0:
        standard = (clean - g.mean) / g.variance.sqrt()
        close(noise, standard, rtol=32 * EPS, atol=8 * EPS)  # the flow whitens the data


@every_schedule
def test_the_gaussian_flow_carries_the_marginal_to_the_marginal(schedule):
    g = gaussian()
    t, s = schedule.t_of_lam(-2.0), schedule.t_of_lam(1.5)
    for times in ((t, s), (s, t)):
        a, b = ((schedule.alpha(v), schedule.sigma(v)) for v in times)
        deviation = (a[0] ** 2 * g.variance + a[1] ** 2).sqrt()  # one standard deviation from the mean stays one
        there = g.flow((a[0] * g.mean + deviation)[None], schedule, *times)
        close(there, (b[0] * g.mean + (b[0] ** 2 * g.variance + b[1] ** 2).sqrt())[None], rtol=64 * EPS, atol=64 * EPS)


def test_the_flow_keeps_the_dtype_of_the_state():
    x = normal(4, 3, dtype=torch.float32)
    there = gaussian().flow(x, iia.VP(), 0.9, 0.1)
    assert there.dtype == torch.float32
    close(there.to(F64), gaussian().flow(x.to(F64), iia.VP(), 0.9, 0.1), rtol=1e-6, atol=1e-6)


# ---- samples ---------------------------------------------------------------------------------------------------------


def _assert_moments(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """The samples' mean and variance lie within five standard errors."""
    fourth = (x - mean).pow(4).mean(0)
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all())
    assert bool(((x.var(0) - variance).abs() < 5 * ((fourth - variance**2) / len(x)).sqrt()).all())


@every_problem
def test_samples_have_the_mean_and_variance_of_the_distribution(problem):
    n = 40_000
    x = problem.sample(n, generator(2))
    assert x.dtype == F64 and x.shape == (n, *problem.shape)
    if isinstance(problem, Gaussian):
        mean, variance = problem.mean, problem.variance
    else:
        w = problem.log_weights.exp().reshape(-1, *[1] * len(problem.shape))
        mean = (w * problem.means).sum(0)
        variance = (w * (problem.variances + problem.means**2)).sum(0) - mean**2
    _assert_moments(x, mean, variance)


def test_a_data_set_is_sampled_from_its_own_points_only():
    points = normal(6, 2, seed=4)
    drawn = Empirical(points).sample(200, generator(0)).unique(dim=0)
    assert torch.equal(drawn, points.unique(dim=0))


@every_schedule
def test_noisy_samples_have_the_marginal_of_their_time(schedule):
    g, n, t = gaussian(), 40_000, schedule.t_of_lam(0.3)
    x = g.noisy(n, schedule, t, generator(3))
    mean, variance = schedule.alpha(t) * g.mean, schedule.alpha(t) ** 2 * g.variance + schedule.sigma(t) ** 2
    assert x.dtype == F64
    _assert_moments(x, mean, variance)


@every_problem
def test_the_same_seed_gives_the_same_samples(problem):
    assert torch.equal(problem.sample(5, generator(1)), problem.sample(5, generator(1)))
    assert not torch.equal(problem.sample(5, generator(1)), problem.sample(5, generator(2)))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan])
def test_a_gaussian_without_positive_variances_is_an_input_error(variance):
    with pytest.raises(iia.errors.InputError, match="positive"):
        Gaussian(torch.zeros(2, dtype=F64), torch.tensor([1.0, variance], dtype=F64))


def test_a_mean_and_variances_of_two_shapes_are_an_input_error():
    with pytest.raises(iia.errors.InputError):
        Gaussian(torch.zeros(2), torch.ones(3))


@pytest.mark.parametrize(
    ("weights", "means"),
    [(torch.ones(3), torch.zeros(2, 4)), (torch.ones(2, 1), torch.zeros(2, 4)), (torch.ones(2), torch.zeros(2))],
    ids=["another number", "weights not 1-d", "means without a shape"],
)
def test_weights_and_means_that_do_not_match_are_an_input_error_that_shows_their_shapes(weights, means):
    with pytest.raises(iia.errors.InputError, match=r"\[K, \*shape\], got \["):
        Mixture(weights, means, 1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_weight_that_is_not_positive_is_an_input_error(bad):
    with pytest.raises(iia.errors.InputError, match="positive weights"):
        Mixture(torch.tensor([1.0, bad]), torch.zeros(2, 4), 1.0)


def test_standard_deviations_of_another_shape_are_an_input_error():
    with pytest.raises(iia.errors.InputError, match=r"stds of shape \[2, 4\]"):
        Mixture(torch.ones(2), torch.zeros(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize("points", [torch.zeros(0, 3), torch.zeros(3)], ids=["none", "numbers"])
def test_a_data_set_without_points_is_an_input_error(points):
    with pytest.raises(iia.errors.InputError, match=r"\[K, \*shape\]"):
        Empirical(points)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_standard_deviations_that_are_none_are_an_input_error(bad):
    with pytest.raises(iia.errors.InputError, match="not negative"):
        Mixture(torch.ones(2), torch.zeros(2, 3), torch.tensor([[1.0], [bad]]))


def test_standard_deviations_broadcast_from_the_right_also_where_components_and_dimensions_are_as_many():
    stds = torch.tensor([1.0, 2.0])
    assert torch.equal(Mixture(torch.ones(2), torch.zeros(2, 2), stds).variances[0], stds.double().square())
    assert torch.equal(Mixture(torch.ones(2), torch.zeros(2, 2), stds[:, None]).variances[:, 0], stds.double().square())
    with pytest.raises(iia.errors.InputError, match=r"\[2, 1\]"):
        Mixture(torch.ones(2), torch.zeros(2, 3), stds)


@pytest.mark.parametrize("make", [lambda: Gaussian("zero", 1.0), lambda: Mixture(None, torch.zeros(2, 3), 1.0)])
def test_parameters_that_are_no_numbers_are_an_input_error(make):
    with pytest.raises(iia.errors.InputError, match="needs"):
        make()


def test_problems_stay_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        problems = Gaussian(0.0, 1.0), Mixture([1.0, 3.0], [[0.0], [1.0]], 0.5), Empirical([[0.0, 1.0]])
        for problem in problems:
            assert problem.noisy(3, iia.VP(), 0.5, generator()).device.type == "cpu"
