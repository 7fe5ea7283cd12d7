"""Thresholded models: the published formula, after guidance, and everything else as the plain ODE has it."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import EPS, F64, Recorder, close, every_prediction, every_schedule, gaussian, mixture, normal
from torch import nn

import iia_ode as iia
from iia_ode.denoisers import digits, dynamic_thresholding, static_thresholding

C, NULL = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), torch.zeros(1, dtype=F64)
both_kinds = pytest.mark.parametrize("threshold", [dynamic_thresholding, static_thresholding])


class Scale(nn.Module):
    """A data-prediction network that multiplies, so that any estimate can be asked for."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=F64))

    def forward(self, x, t):
        return self.factor.to(x.dtype) * x


def thresholded(data, quantile=0.995, floor=1.0):
    """The threshold of an estimate, through an ODE whose model returns its input."""
    return dynamic_thresholding(iia.ProbabilityFlowODE(Scale(), iia.EDM()), quantile, floor).data(data, 1.0).detach()


def as_published(data, quantile, floor):
    """Saharia et al. [2022, section 2.3], written with torch.quantile."""
    s = torch.quantile(data.abs().flatten(1), quantile, dim=1).clamp(min=floor)
    s = s.reshape(-1, *[1] * (data.ndim - 1))
    return data.clamp(-s, s) / s


# ---- the formula -----------------------------------------------------------------------------------------------------


@given(
    st.floats(0.0, 1.0),
    st.floats(0.05, 3.0),
    st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 7), (2, 3, 4, 5)]),
    st.integers(0, 99),
)
def test_a_dynamic_threshold_is_that_of_the_paper(quantile, floor, shape, seed):
    data = 2 * normal(*shape, seed=seed)
    close(thresholded(data, quantile, floor), as_published(data, quantile, floor), rtol=16 * EPS, atol=16 * EPS)


def test_the_quantile_is_interpolated_linearly_between_elements():
    data = torch.tensor([[0.0, -1.0, 2.0, -3.0, 4.0]], dtype=F64)
    for quantile, s in ((1.0, 4.0), (0.75, 3.0), (0.625, 2.5), (0.5, 2.0)):
        assert torch.equal(thresholded(data, quantile), data.clamp(-s, s) / s)
    assert torch.equal(thresholded(data, 0.1), data.clamp(-1.0, 1.0))  # the floor


def test_every_sample_has_its_own_threshold():
    data = torch.tensor([[0.5, -0.25], [2.0, -8.0]], dtype=F64)
    assert thresholded(data, 1.0).tolist() == [[0.5, -0.25], [0.25, -1.0]]
    both = thresholded(data, 0.9)
    for i in range(2):
        assert torch.equal(both[i : i + 1], thresholded(data[i : i + 1], 0.9))


@given(st.floats(0.0, 1.0), st.integers(0, 99))
def test_thresholded_estimates_are_within_the_range_of_the_data(quantile, seed):
    assert float(thresholded(5 * normal(3, 4, 4, seed=seed), quantile).abs().max()) <= 1.0


@given(st.integers(0, 99))
def test_estimates_within_the_range_are_left_as_they_are(seed):
    data = normal(3, 4, seed=seed).clamp(-1.0, 1.0)
    assert torch.equal(thresholded(data), data)


def test_a_static_threshold_clamps_to_one():
    ode, data = static_thresholding(iia.ProbabilityFlowODE(Scale(), iia.EDM())), 2 * normal(5, 6)
    assert torch.equal(ode.data(data, 1.0), data.clamp(-1.0, 1.0))


def test_samples_of_more_than_16_million_elements_have_a_quantile():
    size = 2**24 + 1  # torch.quantile refuses one more than 2^24
    data = torch.linspace(0.0, 4.0, size).expand(1, size)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(data, 0.995)
    ode = dynamic_thresholding(iia.ProbabilityFlowODE(lambda x, t: x, iia.EDM()), 0.9999)
    found = ode.data(data, 1.0)[0, [0, size // 2, -1]]
    close(found, torch.tensor([0.0, 2 / 3.9996, 1.0]), rtol=1e-6)


def test_an_estimate_that_is_no_number_stays_one():
    data = torch.tensor([[math.nan, 0.5, 3.0], [0.1, 0.2, 0.3]], dtype=F64)
    out = thresholded(data, 0.5)
    assert bool(out[0, 0].isnan())
    assert torch.equal(out[1], data[1])


def test_a_thresholded_model_has_gradients():
    x = (3 * normal(2, 5)).requires_grad_()
    ode = dynamic_thresholding(iia.ProbabilityFlowODE(Scale(), iia.EDM()), 0.8)
    assert torch.autograd.gradcheck(lambda v: ode.data(v, 1.0), (x,))


# ---- what it is a threshold of ---------------------------------------------------------------------------------------


@every_prediction
@every_schedule
def test_the_data_estimate_is_thresholded_whatever_the_model_predicts(schedule, prediction):
    plain = mixture().ode(schedule, prediction)
    ode = dynamic_thresholding(plain, 0.5, 0.1)
    t = schedule.t_of_lam(-1.0)
    x = 3 * normal(6, 4)
    expected = as_published(plain.data(x, t), 0.5, 0.1)
    a, s = schedule.alpha(t), schedule.sigma(t)
    assert ode.prediction == "data"
    close(ode.data(x, t), expected, atol=1e-12)
    close(ode.noise(x, t), (x - a * expected) / s, atol=1e-12)
    close(ode.data(x, torch.full((6,), t, dtype=F64)), expected, atol=1e-12)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_guidance_acts_before_the_threshold(prediction):
    options = {"conditioning": {"c": C}, "unconditional": {"c": NULL}, "guidance_scale": 7.5}
    plain = iia.ProbabilityFlowODE(Recorder(), iia.VP(), prediction, **options)
    ode, x = dynamic_thresholding(plain, 0.7), normal(4, 3)
    assert ode.guidance_scale == 7.5
    close(ode.data(x, 0.4), as_published(plain.data(x, 0.4), 0.7, 1.0), rtol=16 * EPS)


def test_a_solver_takes_thresholded_estimates():
    ode = static_thresholding(iia.ProbabilityFlowODE(Scale(3.0), iia.EDM()))
    grid = iia.grids.karras(4, 0.1, 10.0)
    final = iia.sample(ode, 10 * normal(3, 8), grid, solver="ddim")
    assert float(final.abs().max()) <= 1.0  # DDIM ends on the data estimate of its last evaluation
    assert float(iia.sample(iia.ProbabilityFlowODE(Scale(3.0), iia.EDM()), 10 * normal(3, 8), grid).abs().max()) > 1.0


def test_thresholding_keeps_strong_guidance_of_the_digits_within_their_range():
    labels = torch.arange(3)
    plain = iia.ProbabilityFlowODE(
        digits(),
        iia.EDM(),
        conditioning={"class_labels": labels},
        unconditional={"class_labels": torch.tensor([10])},
        guidance_scale=15.0,
    )
    x, grid = 80 * normal(3, 1, 8, 8, dtype=torch.float32), iia.grids.karras(5)
    assert float(iia.sample(plain, x, grid, solver="ddim").abs().max()) > 1.1
    for ode in (dynamic_thresholding(plain), static_thresholding(plain)):
        assert float(iia.sample(ode, x, grid, solver="ddim").abs().max()) <= 1.0


# ---- everything else is the plain ODE's ------------------------------------------------------------------------------


@both_kinds
def test_an_evaluation_counts_once_and_in_the_ledger_of_the_plain_ode(threshold):
    plain = iia.ProbabilityFlowODE(Recorder(), iia.EDM())
    ode = threshold(plain)
    with ode.counting() as spent:
        ode.velocity(normal(4, 3), 1.0)
    assert (spent.evaluations, spent.samples) == (1, 4)
    assert ode.ledger is plain.ledger and len(plain.model.calls) == 1


@both_kinds
def test_schedule_model_condition_and_shape_are_those_of_the_plain_ode(threshold):
    plain = iia.ProbabilityFlowODE(
        Recorder(), iia.VP(), "v", conditioning={"c": C}, model_dtype=torch.float32, state_shape=(3,)
    )
    ode = threshold(plain)
    assert (ode.schedule, ode.model, ode.state_shape) == (plain.schedule, plain.model, (3,))
    assert ode.data(normal(4, 3), 0.5).dtype == F64 and plain.model.calls[0]["x"].dtype == torch.float32
    assert torch.equal(plain.model.calls[0]["c"], C)
    with pytest.raises(iia.errors.InputError, match=r"\[B, 3\]"):
        iia.sample(ode, normal(4, 2), iia.grids.karras(3, 0.1, 5.0, schedule=iia.VP()))


@both_kinds
def test_views_are_thresholded_too(threshold):
    x = 4 * normal(4, 3)
    plain = iia.ProbabilityFlowODE(Recorder(), iia.VP(), "noise", conditioning={"c": C})
    ode = threshold(plain)
    other = ode.condition(c=-C)
    assert torch.equal(other.data(x, 0.7), threshold(plain.condition(c=-C)).data(x, 0.7))
    assert torch.equal(other.condition(c=C).data(x, 0.7), ode.data(x, 0.7))
    part = ode.subset(slice(1, 3), 4)
    assert torch.equal(part.data(x[1:3], 0.7), ode.data(x, 0.7)[1:3])
    assert other.ledger is part.ledger is plain.ledger
    assert other.fingerprint() == ode.fingerprint()


@both_kinds
def test_the_model_is_registered_once_and_follows_the_ode(threshold):
    plain = iia.ProbabilityFlowODE(Scale(), iia.EDM())
    ode = threshold(plain)
    assert list(ode.state_dict()) == [name for name, _ in ode.named_parameters()] == ["inner.model.factor"]
    assert ode.eval().model.training is False and plain.model.training is False
    twin = copy.deepcopy(ode)
    twin.float()
    assert twin.data(normal(2, 3), 1.0).dtype == F64  # the state keeps its dtype
    assert twin.model.factor.dtype == torch.float32 and ode.model.factor.dtype == F64
    assert "Thresholded" in repr(ode)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@both_kinds
def test_the_state_keeps_its_dtype(threshold, dtype):
    ode = threshold(iia.ProbabilityFlowODE(Scale().to(torch.bfloat16), iia.EDM()))
    assert ode.data(normal(2, 6, dtype=dtype), 1.0).dtype == dtype


def test_fingerprints_name_the_threshold_and_stay_the_same():
    plain = iia.ProbabilityFlowODE(Scale(), iia.EDM())
    odes = [
        plain,
        static_thresholding(plain),
        dynamic_thresholding(plain),
        dynamic_thresholding(plain, 0.99),
        dynamic_thresholding(plain, 0.995, 2.0),
    ]
    prints = [ode.fingerprint() for ode in odes]
    assert len(set(prints)) == len(odes)
    assert all(p.startswith(plain.fingerprint()) for p in prints)
    assert dynamic_thresholding(iia.ProbabilityFlowODE(Scale(), iia.EDM())).fingerprint() == prints[2]
    assert dynamic_thresholding(iia.ProbabilityFlowODE(Scale(2.0), iia.EDM())).fingerprint() != prints[2]
    assert dynamic_thresholding(gaussian().ode(iia.EDM())).fingerprint() != gaussian().ode(iia.EDM()).fingerprint()


def test_a_fit_knows_the_threshold_it_was_made_with(tmp_path):
    plain = mixture().ode(iia.EDM())
    ode, x = dynamic_thresholding(plain, 0.9), 5 * normal(32, 4)
    fit = iia.preset("iia-ddim").fit(ode, x, iia.grids.karras(5, 0.05, 5.0))
    fit = iia.load(fit.save(tmp_path / "fit.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.check(ode)
    for other in (plain, dynamic_thresholding(plain, 0.8)):
        with pytest.warns(iia.errors.FingerprintWarning):
            fit.check(other)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantile": 1.1}, "quantile"),
        ({"quantile": -0.1}, "quantile"),
        ({"quantile": math.nan}, "quantile"),
        ({"quantile": None}, "quantile"),
        ({"quantile": True}, "quantile"),
        ({"floor": 0.0}, "floor"),
        ({"floor": math.inf}, "floor"),
        ({"floor": "1"}, "floor"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_an_input_error_that_names_them(arguments, words):
    with pytest.raises(iia.errors.InputError, match=words):
        dynamic_thresholding(iia.ProbabilityFlowODE(Scale(), iia.EDM()), **arguments)


@both_kinds
def test_what_is_no_plain_ode_is_an_input_error(threshold):
    with pytest.raises(iia.errors.InputError, match="wraps a ProbabilityFlowODE, got Scale"):
        threshold(Scale())
    for first in (static_thresholding, dynamic_thresholding):
        with pytest.raises(iia.errors.InputError, match="one threshold"):
            threshold(first(iia.ProbabilityFlowODE(Scale(), iia.EDM())))
