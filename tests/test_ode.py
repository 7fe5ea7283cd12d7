"""The ODE says the same in every prediction type, calls its model as promised, and counts what it spends."""

import inspect
import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ALL_SCHEDULES,
    EPS,
    F64,
    LAMS,
    Recorder,
    close,
    every_prediction,
    every_schedule,
    gaussian,
    generator,
    in_turn,
    mixture,
    normal,
)
from torch import Tensor

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.forms import PREDICTIONS, conversion


def forms(schedule: iia.Schedule, x: Tensor, t: float, data: Tensor) -> dict[str, Tensor]:
    """What a denoiser's answer `data` at (x, t) is in every form, from the definitions."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    eps = (x - a * data) / s
    velocity = schedule.alpha_prime(t) * data + schedule.sigma_prime(t) * eps
    return {"data": data, "noise": eps, "score": -eps / s, "v": a * eps - s * data, "velocity": velocity}


# ---- the five forms --------------------------------------------------------------------------------------------------


@every_prediction
@every_schedule
@settings(max_examples=4)  # times 35
@given(lam=LAMS, seed=st.integers(0, 99))
def test_a_model_of_any_prediction_type_gives_the_same_forms(schedule, prediction, lam, seed):
    t = schedule.t_of_lam(lam)
    a, s = schedule.alpha(t), schedule.sigma(t)
    x = a * normal(3, 4, seed=seed) + s * normal(3, 4, seed=seed + 100)
    evaluation = mixture().ode(schedule, prediction).evaluate(x, t)
    expected = forms(schedule, x, t, mixture().denoise(x, a, s))
    # One of the parts of x is divided by the small one of alpha and sigma. Measured: at most 80 roundings of that size,
    # from the exponents of the mixture's responsibilities.
    lost = 200 * EPS * (1 + a / s + s / a)
    for form in PREDICTIONS:
        close(evaluation.as_form(form), expected[form], atol=lost * float(expected[form].abs().max()))
        assert torch.equal(getattr(evaluation, form), evaluation.as_form(form))


@every_schedule
@given(lam=LAMS, prediction=st.sampled_from(PREDICTIONS), target=st.sampled_from(PREDICTIONS))
def test_converting_there_and_back_is_the_identity(schedule, lam, prediction, target):
    t = schedule.t_of_lam(lam)
    p, q = conversion(schedule, t, prediction, target)
    r, u = conversion(schedule, t, target, prediction)
    # source = r x + u (p x + q source)
    close(u * q, 1.0, rtol=1e-12)
    close(r + u * p, 0.0, atol=1e-12 * (abs(r) + abs(u * p)) + EPS)


@every_prediction
@every_schedule
def test_at_either_end_a_conversion_is_finite_or_a_schedule_error(schedule, prediction):
    for t in (schedule.t_data, schedule.t_noise):
        for target in PREDICTIONS:
            try:
                factors = conversion(schedule, t, prediction, target)
            except iia.errors.ScheduleError:
                continue
            assert all(math.isfinite(v) for v in factors), (t, target, factors)


@every_schedule
def test_noise_does_not_determine_the_data_where_alpha_is_zero(schedule):
    if schedule.alpha(schedule.t_noise) != 0:  # elsewhere the noisiest state still holds some data
        x = normal(2, 3)
        assert bool(torch.isfinite(gaussian().ode(schedule, "noise").data(x, schedule.t_noise)).all())
        return
    ode = ProbabilityFlowODE(lambda x, t: x, schedule, "noise")
    with pytest.raises(iia.errors.ScheduleError, match="another prediction type"):
        ode.data(normal(2, 3), schedule.t_noise)


@pytest.mark.parametrize("schedule", [iia.Cosine(), iia.FlowMatching()], ids=["Cosine", "FlowMatching"])
@pytest.mark.parametrize("prediction", ["data", "v", "velocity"])
def test_pure_noise_has_a_velocity_in_every_form_that_determines_it(schedule, prediction):
    x = normal(5, 3)
    evaluation = gaussian().ode(schedule, prediction).evaluate(x, 1.0)
    mean = gaussian().mean.expand(5, 3)
    close(evaluation.data, mean, atol=4 * EPS)  # nothing is known of x_0 but its mean
    close(evaluation.noise, x, atol=4 * EPS)
    close(evaluation.velocity, schedule.alpha_prime(1.0) * mean + schedule.sigma_prime(1.0) * x, atol=8 * EPS)


# ---- dx/dt -----------------------------------------------------------------------------------------------------------


@every_prediction
@every_schedule
@settings(max_examples=4)
@given(lam=LAMS)
def test_the_velocity_is_f_x_plus_g2_over_two_sigma_times_the_noise(schedule, prediction, lam):
    t, x = schedule.t_of_lam(lam), normal(3, 4)
    evaluation = mixture().ode(schedule, prediction).evaluate(x, t)
    drift, diffusion = schedule.f(t) * x, schedule.g2(t) / (2 * schedule.sigma(t)) * evaluation.noise
    # Where alpha is small both terms are large, and their sum is not.
    close(evaluation.velocity, drift + diffusion, atol=1e-11 * float((drift.abs() + diffusion.abs()).max()))


@every_schedule
@settings(max_examples=20)
@given(lam=st.floats(-3.5, 4.5))
def test_the_velocity_of_gaussian_data_is_the_derivative_of_the_exact_flow(schedule, lam):
    t, x = schedule.t_of_lam(lam), normal(4, 3)
    if isinstance(schedule, iia.Discrete):
        t = math.floor(t) + 0.5  # away from the kinks
    rate = schedule.g2(t) / (2 * schedule.sigma(t) ** 2)  # of lam: the flow's own time scale
    h = 1e-3 / rate
    f = {k: gaussian().flow(x, schedule, t, t + k * h) for k in (-2, -1, 1, 2)}
    difference = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    # h^4 and a rounding divided by h.
    close(gaussian().ode(schedule)(t, x), difference, atol=1e-11 * rate * float(x.abs().max()))


@in_turn("schedule, prediction", ALL_SCHEDULES, PREDICTIONS)
def test_torchdiffeq_takes_the_ode_as_it_is_and_finds_the_exact_gaussian_flow(schedule, prediction):
    discrete = isinstance(schedule, iia.Discrete)
    t, s = schedule.t_of_lam(1.0 if discrete else -1.0), schedule.t_of_lam(1.5)
    # dx/dt of a discrete schedule jumps at every timestep, which torchdiffeq wants to be told.
    options = {"jump_t": torch.arange(math.floor(t), math.floor(s), -1, dtype=F64)} if discrete else None
    x = gaussian().noisy(4, schedule, t, generator(3))
    ode, times = gaussian().ode(schedule, prediction), torch.tensor([t, s], dtype=F64)
    with torch.no_grad():
        end = torchdiffeq.odeint(ode, x, times, rtol=1e-9, atol=1e-10, method="dopri5", options=options)[-1]
    close(end, gaussian().flow(x, schedule, t, s), atol=1e-8)


def test_the_adjoint_of_torchdiffeq_gives_the_gradient_of_the_exact_flow():
    flow, ode = iia.FlowMatching(), gaussian().ode(iia.FlowMatching())
    x = normal(2, 3).requires_grad_()
    times = torch.tensor([0.9, 0.1], dtype=F64)
    end = torchdiffeq.odeint_adjoint(ode, x, times, rtol=1e-10, atol=1e-11, adjoint_params=())[-1]
    (gradient,) = torch.autograd.grad(end.sum(), x)
    (expected,) = torch.autograd.grad(gaussian().flow(x, flow, 0.9, 0.1).sum(), x)
    close(gradient, expected, atol=1e-8)


@every_prediction
@every_schedule
def test_times_may_be_a_number_a_scalar_tensor_or_one_per_sample(schedule, prediction):
    lams = torch.tensor([-1.5, 0.3, 2.0], dtype=F64)
    x, times = normal(3, 4), schedule.t_of_lam(lams)
    ode = mixture().ode(schedule, prediction)
    together = ode(times, x)
    for i in range(3):
        close(together[i : i + 1], ode(times[i].item(), x[i : i + 1]), rtol=1e-12)
        close(together[i : i + 1], ode(times[i], x[i : i + 1]), rtol=1e-12)


# ---- what is spent ---------------------------------------------------------------------------------------------------


def test_the_ledger_counts_calls_and_samples():
    ode = gaussian().ode(iia.EDM())
    assert (ode.nfe, ode.ledger.samples) == (0, 0)
    evaluation = ode.evaluate(normal(5, 3), 1.0)
    assert evaluation.data.shape == evaluation.noise.shape == evaluation.velocity.shape  # reading forms is free
    ode.velocity(normal(2, 3), 0.5)
    assert (ode.nfe, ode.ledger.samples) == (2, 7)
    ode.ledger.reset()
    assert (ode.nfe, ode.ledger.samples) == (0, 0)


def test_counting_tells_what_was_spent_inside_also_when_it_fails():
    ode = gaussian().ode(iia.EDM())
    ode.data(normal(5, 3), 1.0)
    with ode.counting() as outer:
        ode.data(normal(4, 3), 1.0)
        with pytest.raises(KeyError), ode.counting() as inner:
            ode.data(normal(3, 3), 1.0)
            raise KeyError
    assert (inner.evaluations, inner.samples) == (1, 3)
    assert (outer.evaluations, outer.samples) == (2, 7)
    assert (ode.nfe, ode.ledger.samples) == (3, 12)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_the_model_computes_in_its_own_dtype_and_the_state_keeps_its_own(weights, state):
    model = Recorder(weights)
    x = normal(3, 4, dtype=state)
    for t in (2.0, torch.tensor(2.0, dtype=F64), torch.full((3,), 2.0, dtype=F64)):
        evaluation = ProbabilityFlowODE(model, iia.EDM()).evaluate(x, t)
        assert model.calls[-1]["x"].dtype == weights
        assert model.calls[-1]["t"].dtype == (F64 if weights == F64 else torch.float32)
        assert model.calls[-1]["t"].tolist() == [2.0, 2.0, 2.0]
        assert all(evaluation.as_form(form).dtype == state for form in PREDICTIONS)
        assert torch.equal(evaluation.data, (0.5 * x.to(weights)).to(state))


def test_the_dtype_of_a_function_is_that_of_the_state_unless_it_is_named():
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype))
        return x

    for dtype in (torch.float32, F64):
        assert ProbabilityFlowODE(model, iia.EDM())(1.0, normal(2, 3, dtype=dtype)).dtype == dtype
    assert ProbabilityFlowODE(model, iia.EDM(), model_dtype=torch.bfloat16)(1.0, normal(2, 3)).dtype == F64
    assert seen == [(torch.float32, torch.float32), (F64, F64), (torch.bfloat16, torch.float32)]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_prediction_type_is_an_error_that_lists_the_known_ones():
    with pytest.raises(iia.errors.UnknownNameError, match=r"'velocty'.*Did you mean 'velocity'") as raised:
        ProbabilityFlowODE(lambda x, t: x, iia.EDM(), "velocty")
    assert all(name in str(raised.value) for name in PREDICTIONS)
    with pytest.raises(iia.errors.UnknownNameError, match="epsilon"):
        gaussian().ode(iia.EDM()).evaluate(normal(2, 3), 1.0).as_form("epsilon")


def test_what_is_no_model_or_no_schedule_is_an_input_error():
    with pytest.raises(iia.errors.InputError, match="callable"):
        ProbabilityFlowODE("unet", iia.EDM())
    with pytest.raises(iia.errors.InputError, match="EDM"):
        ProbabilityFlowODE(lambda x, t: x, "edm")


@pytest.mark.parametrize(
    ("answer", "described"),
    [
        (lambda x: x[:, :1], r"\[4, 1\]"),
        (lambda x: x[:1], r"\[1, 3\]"),
        (lambda x: x.sum(), r"\[\]"),
        (lambda x: (x,), "tuple"),
        (lambda x: None, "NoneType"),
    ],
    ids=["narrower", "one sample", "scalar", "tuple", "None"],
)
@pytest.mark.parametrize("guided", [False, True])
def test_a_model_that_returns_anything_but_a_tensor_like_the_state_is_an_input_error(answer, described, guided):
    condition = {"conditioning": {"c": torch.ones(1)}, "unconditional": {"c": torch.zeros(1)}, "guidance_scale": 2.0}
    ode = ProbabilityFlowODE(lambda x, t, c=None: answer(x), iia.EDM(), **(condition if guided else {}))
    with pytest.raises(iia.errors.InputError, match=f"returned {'' if guided else described}"):
        ode.data(normal(4, 3), 1.0)


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_may_change_its_input_without_changing_the_state(inference):
    def careless(x, t):
        return x.mul_(0.5)

    x = 80 * normal(4, 3)
    with torch.inference_mode(inference):
        tidy, careless_run = (
            iia.sample(ProbabilityFlowODE(model, iia.EDM()), x, iia.grids.karras(4), "heun")
            for model in (lambda x, t: 0.5 * x, careless)
        )
    assert torch.equal(tidy, careless_run)
    assert torch.equal(x, 80 * normal(4, 3))


def test_a_state_of_another_shape_than_the_models_is_an_input_error():
    ode = gaussian().ode(iia.EDM())
    ode.check_state_shape(normal(7, 3))
    with pytest.raises(iia.errors.InputError, match=r"\[B, 3\], got \[7, 4\]"):
        ode.check_state_shape(normal(7, 4))
    ProbabilityFlowODE(lambda x, t: x, iia.EDM()).check_state_shape(normal(7, 4))  # nothing is known of its shape


def test_the_settings_of_an_ode_are_all_that_it_was_given_beside_its_model():
    options = {
        "schedule": iia.VP(),
        "prediction": "noise",
        "conditioning": {"label": torch.arange(3)},
        "unconditional": {"label": torch.full((3,), 9)},
        "guidance_scale": 2.5,
        "guidance_rescale": 0.7,
        "batched_guidance": False,
        "time": "1000 sigma",
        "time_rounding": "floor",
        "model_dtype": torch.float32,
        "state_shape": (4,),
    }
    ode = iia.ProbabilityFlowODE(lambda x, t, label: x, **options)
    assert ode.settings == options
    assert {"model", "tag", *options} == set(inspect.signature(iia.ProbabilityFlowODE).parameters)


def test_the_data_is_where_sigma_is_zero():
    for schedule in ALL_SCHEDULES:
        ode = gaussian().ode(schedule)
        assert ode.is_data(schedule.t_data)
        assert not ode.is_data(schedule.t_of_lam(5.0))
