"""Conditioning, guidance and the views of an ODE: what reaches the model, and how often it is called."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import EPS, F64, Recorder, close, every_prediction, gaussian, normal
from torch import nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE

C, NULL = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), torch.zeros(1, dtype=F64)


def guided(scale: float, model: nn.Module | None = None, **extra: object) -> ProbabilityFlowODE:
    """A guided ODE on four samples; `extra` goes to both branches."""
    return ProbabilityFlowODE(
        model or Recorder(),
        iia.EDM(),
        conditioning={"c": C, **extra},
        unconditional={"c": NULL, **extra},
        guidance_scale=scale,
    )


# ---- conditioning ----------------------------------------------------------------------------------------------------


def test_conditioning_reaches_the_model_one_entry_per_sample():
    model, x = Recorder(), normal(4, 3)
    out = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C, "mode": "fast"}).data(x, 1.0)
    assert torch.equal(model.calls[0]["c"], C)
    assert model.calls[0]["mode"] == "fast"  # what is no tensor is handed on as it is
    assert torch.equal(out, 0.5 * x + C[:, None])


@pytest.mark.parametrize("shape", [(), (1,), (1, 3)], ids=str)
def test_one_condition_serves_every_sample(shape):
    model = Recorder()
    out = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": torch.full(shape, 7.0, dtype=F64)}).data(
        normal(4, 3), 1.0
    )
    assert model.calls[0]["c"].shape == (4, *shape[1:])
    assert torch.equal(out, 0.5 * normal(4, 3) + 7.0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_conditions_for_another_number_of_samples_are_an_input_error(scale):
    with pytest.raises(iia.errors.InputError, match="'c' has 4 entries for a batch of 3"):
        guided(scale).data(normal(3, 3), 1.0)


def test_another_condition_is_a_view_that_shares_model_and_ledger():
    ode = guided(2.0)
    view = ode.condition(c=2 * C)
    x = normal(4, 3)
    close(view.data(x, 1.0), 0.5 * x + 4 * C[:, None], rtol=4 * EPS)
    close(ode.data(x, 1.0), 0.5 * x + 2 * C[:, None], rtol=4 * EPS)
    assert view.model is ode.model
    assert ode.nfe == view.nfe == 2


# ---- guidance --------------------------------------------------------------------------------------------------------


@given(st.floats(-2.0, 15.0))
def test_guidance_is_the_null_branch_plus_w_times_the_difference(w):
    x = normal(4, 3)
    conditioned, null = 0.5 * x + C[:, None], 0.5 * x
    close(guided(w).data(x, 1.0), null + w * (conditioned - null), atol=8 * EPS * (1 + 4 * abs(w)))


@every_prediction
def test_guidance_acts_on_what_the_model_predicts_and_so_on_every_form(prediction):
    w, t, x = 3.0, 0.7, normal(4, 3)
    options = {"conditioning": {"c": C}, "unconditional": {"c": NULL}}
    both = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, guidance_scale=w, **options).evaluate(x, t)
    one = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, conditioning={"c": C}).evaluate(x, t)
    other = ProbabilityFlowODE(Recorder(), iia.VP(), prediction, conditioning={"c": NULL}).evaluate(x, t)
    for form in ("data", "noise", "score", "v", "velocity"):
        expected = other.as_form(form) + w * (one.as_form(form) - other.as_form(form))
        close(both.as_form(form), expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


def test_guidance_is_one_call_on_a_doubled_batch_and_scale_one_a_single_plain_call():
    ode, x = guided(2.0), normal(4, 3)
    ode.data(x, 1.0)
    (call,) = ode.model.calls
    assert torch.equal(call["x"], torch.cat([x, x]))
    assert call["c"].tolist() == [*C.tolist(), 0.0, 0.0, 0.0, 0.0]
    assert call["t"].tolist() == [1.0] * 8
    plain = guided(1.0)
    assert torch.equal(plain.data(x, 1.0), 0.5 * x + C[:, None])
    (call,) = plain.model.calls
    assert call["x"].shape == (4, 3)
    assert (ode.ledger.evaluations, ode.ledger.samples) == (1, 4)
    assert (plain.ledger.evaluations, plain.ledger.samples) == (1, 4)


def test_guidance_hands_on_what_is_no_tensor():
    ode, x = guided(2.0, mode="fast"), normal(4, 3)
    close(ode.data(x, 1.0), 0.5 * x + 2 * C[:, None], rtol=4 * EPS)
    assert ode.model.calls[0]["mode"] == "fast"


def test_a_half_precision_model_is_guided_in_the_precision_of_the_state():
    x = normal(4, 3, dtype=torch.float32)
    model = Recorder(torch.bfloat16)
    branches = [ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": c}).data(x, 1.0) for c in (C, NULL.expand(4))]
    expected = branches[1] + 7.5 * (branches[0] - branches[1])
    close(guided(7.5, model).data(x, 1.0), expected, rtol=8 * torch.finfo(torch.float32).eps, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"conditioning": {"c": C}},
        {"unconditional": {"c": NULL}},
        {"conditioning": {"c": C}, "unconditional": {"label": NULL}},
        {},
    ],
    ids=["no null", "no condition", "other keywords", "neither"],
)
def test_guidance_without_a_matching_null_condition_is_an_input_error(options):
    with pytest.raises(iia.errors.InputError, match="unconditional="):
        ProbabilityFlowODE(Recorder(), iia.EDM(), guidance_scale=2.0, **options)


# ---- subsets ---------------------------------------------------------------------------------------------------------

PICKS = [slice(1, 3), torch.tensor([3, 0]), torch.tensor([False, True, True, False])]


@pytest.mark.parametrize("index", PICKS, ids=["slice", "indices", "mask"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_subset_takes_its_conditions_along(index, scale):
    ode, x = guided(scale), normal(4, 3)
    close(ode.subset(index, 4).data(x[index], 1.0), ode.data(x, 1.0)[index], rtol=4 * EPS)


@pytest.mark.parametrize("index", PICKS, ids=["slice", "indices", "mask"])
def test_a_subset_takes_the_null_conditions_along_where_every_sample_has_its_own(index):
    ode = ProbabilityFlowODE(Recorder(), iia.EDM(), conditioning={"c": C}, unconditional={"c": -C}, guidance_scale=2.0)
    x = normal(4, 3)
    close(ode.subset(index, 4).data(x[index], 1.0), ode.data(x, 1.0)[index], rtol=4 * EPS)


def test_a_subset_keeps_the_condition_that_serves_every_sample():
    one = torch.full((1,), 7.0, dtype=F64)
    ode = ProbabilityFlowODE(Recorder(), iia.EDM(), conditioning={"c": one, "mode": "fast"})
    view, x = ode.subset(slice(2, 4), 4), normal(2, 3)
    assert torch.equal(view.data(x, 1.0), 0.5 * x + 7.0)
    assert ode.model.calls[0]["mode"] == "fast"
    assert ode.nfe == 1


# ---- views and the model's own state ---------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, c=None):
        return self.dropout(x)


@pytest.mark.parametrize("training", [False, True])
def test_making_an_ode_or_a_view_leaves_the_model_in_the_mode_it_was_in(training):
    model = Dropping().train(training)
    ode = ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": C})
    for view in (ode, ode.condition(c=2 * C), ode.subset(slice(0, 2), 4)):
        assert model.training is training
        assert model.dropout.training is training
        if not training:
            n = 2 if view.conditioning["c"].numel() == 2 else 4
            assert torch.equal(view.data(normal(n, 3), 1.0), normal(n, 3))


def test_an_ode_is_a_module_that_moves_and_counts_with_its_model():
    ode = ProbabilityFlowODE(Recorder(torch.float32), iia.EDM())
    assert [name for name, _ in ode.named_parameters()] == ["model.scale"]
    ode.to(F64)
    ode.data(normal(2, 3), 1.0)
    assert ode.model.calls[0]["x"].dtype == F64


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 3))


def fingerprint(model: object) -> str:
    return ProbabilityFlowODE(model, iia.EDM()).fingerprint()


def test_equal_weights_have_equal_fingerprints_and_others_have_others():
    prints = [fingerprint(network(seed)) for seed in (0, 1, 2)]
    assert all(a != b for a, b in pairwise([*prints, prints[0]]))
    assert fingerprint(network(0)) == prints[0]
    copy = network(1)
    copy.load_state_dict(network(0).state_dict())
    assert fingerprint(copy) == prints[0]


def test_a_step_of_training_changes_the_fingerprint():
    model = network(0)
    before = fingerprint(model)
    model(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert fingerprint(model) != before


def test_the_fingerprint_does_not_depend_on_the_schedule_or_the_condition():
    model = network(0)
    other = ProbabilityFlowODE(model, iia.VP(), "noise", conditioning={"c": C})
    assert other.fingerprint() == other.condition(c=2 * C).fingerprint() == fingerprint(model)


def test_two_problems_have_two_fingerprints():
    ode = gaussian().ode(iia.EDM())
    other = iia.problems.Gaussian(2 * gaussian().mean, gaussian().variance).ode(iia.EDM())
    assert ode.fingerprint() == gaussian().ode(iia.EDM()).fingerprint() != other.fingerprint()
