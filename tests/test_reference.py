"""Reference solutions against exact flows and against another integrator; the accuracy asked for is delivered."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from support import (
    EPS,
    F64,
    Recorder,
    close,
    every_schedule,
    gaussian,
    generator,
    in_turn,
    mixture,
    normal,
    slope,
)

import iia_ode as iia
from iia_ode import ProbabilityFlowODE, reference
from iia_ode._torchdiffeq import integrate
from iia_ode.forms import PREDICTIONS

G = gaussian()
CLEAN = 4.0  # a half-log-SNR close to the data: sigma/alpha = 0.018


def size(schedule: iia.Schedule, t: float) -> float:
    """The size of a state at time t, which tolerances are relative to."""
    return math.hypot(schedule.alpha(t), schedule.sigma(t))


def times(schedule: iia.Schedule, first: float, last: float, n: int) -> list[float]:
    return [schedule.t_of_lam(v) for v in torch.linspace(first, last, n, dtype=F64).tolist()]


def finals(ode: ProbabilityFlowODE, x: torch.Tensor, t: float, s: float, **options: object) -> list[torch.Tensor]:
    """The end point by both functions."""
    return [reference.solve(ode, x, t, s, **options), reference.trajectory(ode, x, t, s, points=6, **options).final]


both = pytest.mark.parametrize("run", [reference.solve, reference.trajectory], ids=["solve", "trajectory"])

# ---- accuracy --------------------------------------------------------------------------------------------------------


@every_schedule
def test_the_flow_of_gaussian_data_is_followed_from_pure_noise_to_the_data(schedule):
    """A discrete model knows nothing below timestep 0, where the data estimate is the end: an error of the level squared."""
    t, s = schedule.t_noise, schedule.t_data
    x = G.noisy(4, schedule, t, generator(0))
    for end in finals(G.ode(schedule), x, t, s):
        close(end, G.flow(x, schedule, t, s), atol=1e-9 if schedule.known_levels is None else 3 * 0.01**2)
    if schedule.known_levels is not None:
        for end in finals(G.ode(schedule.everywhere()), x, t, s):
            close(end, G.flow(x, schedule, t, s), atol=1e-9)


@every_schedule
def test_a_trajectory_may_end_anywhere(schedule):
    t, s = schedule.t_noise, schedule.t_of_lam(0.7)
    x = G.noisy(4, schedule, t, generator(0))
    for end in finals(G.ode(schedule), x, t, s):
        close(end, G.flow(x, schedule, t, s), atol=1e-9 * size(schedule, s))


@every_schedule
def test_the_data_is_encoded_to_noise_in_the_reversed_direction(schedule):
    t, s = schedule.t_of_lam(CLEAN), schedule.t_noise
    x = G.noisy(4, schedule, t, generator(0))
    for end in finals(G.ode(schedule), x, t, s):
        close(end, G.flow(x, schedule, t, s), atol=2e-9 * size(schedule, s))


@every_schedule
def test_encoding_and_decoding_returns_to_the_start(schedule):
    t, s = schedule.t_of_lam(CLEAN), schedule.t_noise
    ode, x = mixture().ode(schedule), mixture().noisy(2, schedule, t, generator(0))
    there = reference.solve(ode, x, t, s)
    close(reference.solve(ode, there, s, t), x, atol=2e-7)


def test_the_prediction_type_of_the_model_makes_no_difference():
    schedule = iia.VP()
    x = mixture().noisy(2, schedule, 1.0, generator(0))
    expected, *others = (
        reference.solve(mixture().ode(schedule, prediction), x, 1.0, 0.0) for prediction in PREDICTIONS
    )
    for other in others:
        close(other, expected, atol=1e-8)


@in_turn("schedule, reverse", [iia.EDM(), iia.VP(), iia.Cosine(), iia.FlowMatching()], [False, True])
def test_a_mixture_is_solved_as_by_scipy_in_the_schedules_own_time(schedule, reverse):
    ode, ends = mixture().ode(schedule), times(schedule, -3.0, CLEAN, 2)
    t, s = reversed(ends) if reverse else ends
    x = mixture().noisy(2, schedule, t, generator(0))

    def velocity(t, x):
        return ode(float(t), torch.from_numpy(x).reshape(2, 4)).flatten().numpy()

    scale = size(schedule, s)
    other = solve_ivp(velocity, (t, s), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12 * scale)
    expected = torch.from_numpy(other.y[:, -1]).reshape(2, 4)
    for end in finals(ode, x, t, s, rtol=1e-11, atol=1e-11):
        close(end, expected, atol=1e-9 * scale)


def test_smaller_tolerances_give_smaller_errors_at_a_higher_price():
    schedule, ode = iia.FlowMatching(), G.ode(iia.FlowMatching())
    x, errors, prices = normal(4, 3), [], []
    for tolerance in (1e-4, 1e-7, 1e-10):
        with ode.counting() as spent:
            end = reference.solve(ode, x, 1.0, 0.0, rtol=tolerance, atol=tolerance)
        errors.append(float((end - G.flow(x, schedule, 1.0, 0.0)).abs().max()))
        prices.append(spent.evaluations)
        assert errors[-1] < 10 * tolerance
    assert errors == sorted(errors, reverse=True)
    assert prices == sorted(prices)


def test_the_error_of_stopping_before_the_data_is_quadratic_in_sigma_min():
    x, levels = normal(4, 3), [0.1, 0.05, 0.025, 0.0125]
    exact = G.flow(x, iia.FlowMatching(), 1.0, 0.0)
    ends = [
        reference.solve(G.ode(iia.FlowMatching()), x, 1.0, 0.0, sigma_min=v, rtol=1e-11, atol=1e-11) for v in levels
    ]
    assert abs(slope([float((end - exact).abs().max()) for end in ends], levels) - 2) < 0.1


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_other_adaptive_methods_of_torchdiffeq_serve_too(method):
    x = normal(4, 3)
    for end in finals(G.ode(iia.FlowMatching()), x, 1.0, 0.0, method=method, rtol=1e-7, atol=1e-7):
        close(end, G.flow(x, iia.FlowMatching(), 1.0, 0.0), atol=2e-6)


def test_a_hard_sample_among_many_easy_ones_meets_the_tolerance_too():
    two = iia.problems.Mixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), 0.02)  # hard at the border of its modes
    ode, x = two.ode(iia.EDM()), torch.full((400, 1), 60.0, dtype=F64)
    x[0] = 0.3
    exact = reference.solve(ode, x[:1], 80.0, 0.0, sigma_min=0.01)
    for end in finals(ode, x, 80.0, 0.0, sigma_min=0.01, rtol=1e-4, atol=1e-4):
        close(end[:1], exact, atol=1e-3)


# ---- dense output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "reverse"),
    [(iia.EDM(), False), (iia.Cosine(), False), (iia.FlowMatching(), True)],
    ids=["EDM", "Cosine", "FlowMatching reversed"],
)
def test_the_dense_output_soon_is_as_accurate_as_the_integration(schedule, reverse):
    ends = times(schedule, -3.5, CLEAN, 2)
    t, s = reversed(ends) if reverse else ends
    ode, x = G.ode(schedule), G.noisy(4, schedule, t, generator(0))
    between, counts, errors = times(schedule, -3.5, CLEAN, 20), [8, 16, 60], []
    for points in counts:
        dense = reference.trajectory(ode, x, t, s, points=points)
        worst = [(dense(u) - G.flow(x, schedule, t, u)).abs().max() / size(schedule, u) for u in between]
        errors.append(float(max(worst)))
    assert errors[1] < errors[0] / 2**6
    assert errors[-1] < 1e-9


@pytest.mark.parametrize(("points", "reverse"), [(3, False), (20, True), (80, False)])
def test_the_tolerance_holds_at_every_knot_however_many_there_are(points, reverse):
    schedule, ode = iia.FlowMatching(), mixture().ode(iia.FlowMatching())
    ends = times(schedule, -3.0, CLEAN, 2)
    t, s = reversed(ends) if reverse else ends
    x = mixture().noisy(2, schedule, t, generator(0))
    dense = reference.trajectory(ode, x, t, s, points=points, rtol=1e-11, atol=1e-11)
    close(dense.final, reference.solve(ode, x, t, s, rtol=1e-12, atol=1e-12), atol=1e-10)
    middle = (dense.knots[points // 2].sinh() / dense.size).log().item()  # u = asinh(size e^lam)
    between = schedule.t_of_lam(middle)
    close(dense(between), reference.solve(ode, x, t, between, rtol=1e-12, atol=1e-12), atol=1e-10)


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.VP(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_the_dense_output_holds_all_the_way_to_the_data(schedule):
    t, s = schedule.t_noise, schedule.t_data
    x = G.noisy(4, schedule, t, generator(0))
    dense = reference.trajectory(G.ode(schedule), x, t, s)
    for u in times(schedule, -3.9, 16.0, 30):  # sigma_min is at 13.8
        close(dense(u), G.flow(x, schedule, t, u), atol=5e-6 * size(schedule, u))
    assert torch.equal(dense(s), dense.final)
    close(dense(t), x, rtol=4 * EPS, atol=1e-12)


def test_below_sigma_min_the_dense_output_is_a_straight_line_to_the_data():
    x = G.noisy(4, iia.EDM(), 80.0, generator(0))
    dense = reference.trajectory(G.ode(iia.EDM()), x, 80.0, 0.0, points=40, sigma_min=0.01)
    floor = dense(0.01 * (1 - 1e-12))
    close(floor, dense(0.01 * (1 + 1e-12)), atol=1e-12)
    close(dense(0.0025), 0.75 * dense.final + 0.25 * floor, atol=1e-12)


@every_schedule
def test_the_dense_output_passes_through_both_ends_in_the_reversed_direction(schedule):
    t, s = schedule.t_of_lam(CLEAN), schedule.t_noise
    x = G.noisy(4, schedule, t, generator(0))
    dense = reference.trajectory(G.ode(schedule), x, t, s, points=20)
    assert dense.data is None
    close(dense(t), x, atol=1e-12)
    close(dense(s), dense.final, atol=1e-12 * size(schedule, s))


@every_schedule
def test_a_trajectory_knows_no_time_outside_of_it(schedule):
    first, last = times(schedule, -2.0, 2.0, 2)
    x = G.noisy(2, schedule, first, generator(0))
    dense = reference.trajectory(G.ode(schedule), x, first, last, points=5)
    outside = [*times(schedule, -2.01, 2.01, 2), schedule.t_data, schedule.t_noise, math.nan]
    for t in outside:
        with pytest.raises(iia.errors.GridError, match="outside"):
            dense(t)


# ---- how the model is used -------------------------------------------------------------------------------------------


def spied(ode: ProbabilityFlowODE) -> list[torch.Tensor]:
    """The times that the model of an ODE is called at from now on."""
    seen: list[torch.Tensor] = []
    ode.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[1]))
    return seen


@pytest.mark.parametrize("reverse", [False, True])
@both
@every_schedule
def test_the_model_is_called_only_between_the_start_and_the_end(schedule, run, reverse):
    ends = [schedule.t_noise, schedule.t_of_lam(CLEAN)]
    t, s = reversed(ends) if reverse else ends
    ode = G.ode(schedule)
    seen = spied(ode)
    options = {"points": 5} if run is reference.trajectory else {}
    run(ode, G.noisy(2, schedule, t, generator(0)), t, s, rtol=1e-4, atol=1e-4, **options)
    slack = 1e-9 * max(map(abs, ends))
    assert all(min(ends) - slack <= float(u) <= max(ends) + slack for u in torch.cat(seen))


@both
def test_the_model_is_not_called_below_sigma_min(run):
    ode = G.ode(iia.EDM())
    seen = spied(ode)
    run(ode, G.noisy(2, iia.EDM(), 80.0, generator(0)), 80.0, 0.0, sigma_min=0.01)
    close(torch.cat(seen).min(), torch.tensor(0.01, dtype=F64), rtol=1e-12)


@pytest.mark.parametrize("to_data", [False, True])
def test_solutions_carry_no_graph_of_the_network(to_data):
    ode = ProbabilityFlowODE(Recorder(), iia.EDM())
    x, end = 80 * normal(2, 3), 0.0 if to_data else 1.0
    dense = reference.trajectory(ode, x, 80.0, end, points=5)
    for tensor in (dense.final, dense.states, dense.slopes, reference.solve(ode, x, 80.0, end)):
        assert not tensor.requires_grad


def test_what_is_spent_is_told():
    ode = G.ode(iia.EDM())
    dense = reference.trajectory(ode, 80 * normal(2, 3), 80.0, 0.0, points=10)
    assert dense.evaluations == ode.nfe > 0


def test_a_float32_state_is_solved_in_float64():
    x = normal(4, 3, dtype=torch.float32)
    for end in finals(G.ode(iia.FlowMatching()), x, 1.0, 0.0):
        close(end, G.flow(x.to(F64), iia.FlowMatching(), 1.0, 0.0), atol=1e-9)


# ---- errors ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("schedule", "t", "s"),
    [
        (iia.EDM(), 80.0, -1.0),
        (iia.EDM(), math.nan, 0.0),
        (iia.EDM(), math.inf, 0.0),
        (iia.EDM(), 1.0, 1.0),
        (iia.EDM(), 0.0, 80.0),
        (iia.FlowMatching(), 1.5, 0.0),
        (iia.VP(), 1.0, -0.5),
        (iia.Cosine(), 1.2, 0.0),
    ],
    ids=["negative", "nan", "infinite", "standing", "from the data", "alpha < 0", "before the data", "beyond noise"],
)
def test_times_that_are_not_usable_are_a_grid_error(run, schedule, t, s):
    with pytest.raises(iia.errors.GridError):
        run(G.ode(schedule), normal(2, 3), t, s)


@both
@pytest.mark.parametrize("sigma_min", [0.0, -1.0, 80.0, 100.0, math.nan, math.inf])
def test_a_sigma_min_that_is_not_between_the_data_and_the_start_is_a_grid_error(run, sigma_min):
    with pytest.raises(iia.errors.GridError, match="sigma_min"):
        run(G.ode(iia.EDM()), 80 * normal(2, 3), 80.0, 0.0, sigma_min=sigma_min)


@pytest.mark.parametrize("points", [1, 0, -5])
def test_a_trajectory_of_fewer_than_two_points_is_an_input_error(points):
    with pytest.raises(iia.errors.InputError, match=r"points.* must be a whole number, at least 2"):
        reference.trajectory(G.ode(iia.EDM()), 80 * normal(2, 3), 80.0, 0.0, points=points)


@both
@pytest.mark.parametrize("method", ["dopri8", "dopri5"])
def test_a_model_that_answers_nan_is_a_non_finite_error(run, method):
    ode = ProbabilityFlowODE(lambda x, t: x * math.nan, iia.EDM())
    with pytest.raises(iia.errors.NonFiniteError, match=method):
        run(ode, 80 * normal(2, 3), 80.0, 0.0, method=method)


@both
def test_a_model_that_fails_near_the_data_only_is_a_non_finite_error(run):
    ode = ProbabilityFlowODE(lambda x, t: torch.where(t[:, None] < 0.1, math.nan, 0.5 * x), iia.EDM())
    with pytest.raises(iia.errors.NonFiniteError):
        run(ode, 80 * normal(2, 3), 80.0, 0.0)


@both
def test_a_method_that_does_not_control_its_error_is_refused(run):
    for method in ("rk4", "euler", "implicit_adams"):
        with pytest.raises(iia.errors.InputError, match=rf"{method} takes one step .*dopri8"):
            run(G.ode(iia.EDM()), 80 * normal(2, 3), 80.0, 0.0, method=method)
    with pytest.raises(iia.errors.UnknownNameError, match=r"dopri8.*adaptive_heun") as caught:
        run(G.ode(iia.EDM()), 80 * normal(2, 3), 80.0, 0.0, method="dopri6")
    assert "rk4" not in str(caught.value)


@both
def test_what_is_no_ode_or_no_state_of_it_is_an_input_error(run):
    with pytest.raises(iia.errors.InputError, match="expected a ProbabilityFlowODE"):
        run(lambda x, t: x, 80 * normal(2, 3), 80.0, 0.0)
    for state in (normal(2, 4), normal(2, 3).half(), [1.0, 2.0]):
        with pytest.raises(iia.errors.InputError, match="the state must"):
            run(G.ode(iia.EDM()), state, 80.0, 0.0)


@both
def test_the_models_own_assertions_reach_the_caller(run):
    def broken(x, t):
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match="mine"):
        run(ProbabilityFlowODE(broken, iia.EDM()), 80 * normal(2, 3), 80.0, 0.0)


# ---- the integrator underneath ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("size", [0.5, 1.0], ids=["cut at the times", "hitting the times anyway"])
def test_an_adaptive_method_ends_a_step_at_every_time_asked_for(method, size):
    def slope(t, y):  # constant, so that no step is refused and steps of size 1 end on the times by themselves
        seen.append(float(t))
        return torch.ones_like(y)

    for times in (torch.arange(6, dtype=F64), torch.arange(6, dtype=F64).flip(0)):
        seen: list[float] = []
        states = integrate(slope, torch.zeros(1, dtype=F64), times, method, 1e-6, 1e-6, {"first_step": size})
        close(states[:, 0], times - times[0], atol=1e-12)
        assert set(times.tolist()) <= {round(t, 12) for t in seen}
        assert 0.0 <= min(seen) <= max(seen) <= 5.0


@both
def test_inference_mode_and_the_default_device_change_no_bit(run):
    ode, x = G.ode(iia.VP()), normal(2, 3)

    def final():
        found = run(ode, x, 1.0, 0.0, rtol=1e-4, atol=1e-4, **({"points": 3} if run is reference.trajectory else {}))
        return found if run is reference.solve else found.final

    expected = final()
    with torch.inference_mode(), torch.device("meta"):
        assert torch.equal(final(), expected)
