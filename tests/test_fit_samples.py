"""The samples of a fit: few, repeated, under conditions, and with a given teacher."""

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from fits import QUICK, Labelled
from support import F64, mixture, normal
from torch import nn

import iia_ode as iia
from iia_ode import Teacher, fit
from iia_ode.errors import DuplicateWarning, FingerprintWarning, InputError, MismatchError

EDM = iia.EDM()
NOISE = normal(80, 4)


# ---- draws and conditions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "draws", "few"), [(14, 0, True), (15, 0, False), (12, 64, False)])
def test_a_fit_to_few_draws_says_that_its_choice_is_not_to_be_trusted_far(given, draws, few, caplog):
    caplog.set_level(logging.INFO, "iia_ode")
    fit(mixture().ode(EDM), 1, noise=NOISE[:given], budget=replace(QUICK, draws=draws))
    assert any(f"only {given} draws of noise" in r.message for r in caplog.records) == few


def test_a_draw_that_is_given_twice_counts_once_and_is_reported():
    ode, own, again = mixture().ode(EDM), NOISE[:40], torch.arange(80) % 40
    plain = fit(ode, 1, noise=own, budget=QUICK)
    teacher = Teacher.solve(ode, 80.0 * own[again], 80.0, 0.0, steps=50)
    for options in ({}, {"teacher": teacher}):
        with pytest.warns(DuplicateWarning, match="40 of 80 draws of noise repeat others"):
            found = fit(ode, 1, noise=own[again], budget=QUICK, **options)
        assert found.record.batch == 40 and found.plan.difference(plain.plan) == 0
        tried = [[i.error for i in f.record.search.ingredients] for f in (found, plain)]
        assert tried[0] == tried[1]
    with pytest.warns(DuplicateWarning), pytest.raises(InputError, match="8 different draws"):
        fit(ode, 1, noise=NOISE[:1].expand(64, 4), budget=QUICK)


def test_a_draw_under_two_conditions_is_two_draws():
    ode = iia.ProbabilityFlowODE(Labelled(), EDM, conditioning={"label": torch.arange(24) // 12})
    z = NOISE[:12].repeat(2, 1)
    assert fit(ode, 1, noise=z, budget=QUICK).record.batch == 24
    with pytest.warns(DuplicateWarning, match="12 of 24"):
        found = fit(ode.condition(label=torch.tensor(1)), 1, noise=z, budget=QUICK)
    assert found.record.batch == 12


@pytest.mark.parametrize("index", [torch.arange(24) % 12, torch.arange(24)], ids=["repeated", "distinct"])
def test_conditions_that_do_not_fit_the_noise_are_refused_even_if_they_fit_a_part_of_it(index):
    ode = iia.ProbabilityFlowODE(Labelled(), EDM, conditioning={"label": torch.arange(12)})
    with pytest.raises(InputError, match="'label' has 12 entries for a batch of 24"):
        fit(ode, 2, noise=NOISE[index], budget=replace(QUICK, chunk_size=12))


# ---- a given teacher -------------------------------------------------------------------------------------------------


def test_a_given_teacher_saves_its_cost_and_must_start_from_the_same_states():
    ode = mixture().ode(EDM)
    teacher = Teacher.solve(ode, 80.0 * NOISE, 80.0, 0.0, steps=50)
    given, own = (fit(ode, 1, noise=NOISE, budget=QUICK, teacher=known) for known in (teacher, None))
    assert own.record.sample_evaluations - given.record.sample_evaluations == teacher.sample_evaluations
    assert own.plan.difference(given.plan) == 0
    for options in ({"noise": normal(80, 4, seed=5)}, {"x": 80.0 * NOISE, "sigma_max": 40.0}):
        with pytest.raises(MismatchError):
            fit(ode, 1, **options, budget=QUICK, teacher=teacher)


def test_another_model_s_trajectories_are_warned_of_once():
    class Gained(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(gain, dtype=F64), requires_grad=False)

        def forward(self, x, t):
            return self.gain * mixture().denoise(x, 1.0, t[:, None])

    made, used = (iia.ProbabilityFlowODE(Gained(g), EDM) for g in (1.0, 0.999))
    teacher = Teacher.solve(made, 80.0 * NOISE, 80.0, 0.0, steps=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(used, 1, noise=NOISE, budget=QUICK, teacher=teacher)
    assert [w.category for w in caught] == [FingerprintWarning]
