"""Ingredients of budget "thorough": added draws, warm starts, and fresh draws for the last choice."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from fits import QUICK, REFINED, Labelled, start_of
from hypothesis import given
from hypothesis import strategies as st
from support import F64, mixture, normal
from torch import nn

import iia_ode as iia
from iia_ode import Teacher, fit
from iia_ode.autofit.stages import Context, choose, closed_form, last_fit, rival
from iia_ode.autofit.thorough import ends_of, fresh_states, judged, more_states
from iia_ode.iia import Batch
from iia_ode.ode import Wrapped
from iia_ode.sizes import size_of_data

EDM = iia.EDM()
NOISE = normal(80, 4)


@pytest.fixture
def said(caplog):
    """The findings of a fit, as the logger `iia_ode` has them at level INFO."""
    caplog.set_level(logging.INFO, "iia_ode")
    return lambda: [r.message for r in caplog.records if r.name.startswith("iia_ode")]


# ---- added draws -----------------------------------------------------------------------------------------------------


def test_a_budget_may_add_noise_under_the_same_conditions(said):
    model, z = Labelled(), NOISE[:12]
    ode = iia.ProbabilityFlowODE(model, EDM, conditioning={"label": torch.arange(12)})
    found = fit(ode, 1, noise=z, budget=replace(QUICK, draws=30, chunk_size=64))
    assert found.record.batch == 30 and found.record.held_out == 8
    assert any("12 draws of noise and 18 more" in line for line in said())
    assert "Of the 30 samples, 12 were asked for" in found.explain()
    whole = [(x, label) for t, x, label in model.asked if len(x) == 30 and t == 80.0]
    assert whole  # the teacher sees all of it
    for states, label in whole:
        assert torch.equal(states, whole[0][0]) and len(torch.unique(states, dim=0)) == 30
        assert set(label[:15].tolist()) == set(range(6)) and set(label[15:].tolist()) == set(range(6, 12))
        own = [int((label == k).nonzero()[0]) for k in range(12)]
        assert torch.equal(states[own], 80 * z)
    assert all(len(label) == len(x) for _, x, label in model.asked)


def test_noise_is_added_only_where_there_is_less_than_the_budget_asks_for_and_no_teacher(said):
    ode, z = iia.ProbabilityFlowODE(Labelled(), EDM, conditioning={"label": torch.arange(12)}), NOISE[:12]
    enough = fit(ode, 1, noise=z, budget=replace(QUICK, draws=12))
    assert enough.record.batch == 12 and "were asked for" not in enough.explain()
    own = Teacher.solve(ode, 80.0 * z, 80.0, 0.0, steps=50)
    kept = fit(ode, 1, noise=z, budget=replace(QUICK, draws=30), teacher=own)
    assert kept.record.batch == 12 and any("the budget's 30 draws are not made" in line for line in said())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_added_noise_is_standard_normal_new_for_each_seed_and_guided_as_the_rest(dtype):
    x = 3.0 * normal(9, 40, dtype=dtype)
    ode = iia.ProbabilityFlowODE(
        Labelled(),
        EDM,
        conditioning={"label": torch.arange(9), "all": torch.ones(1)},
        unconditional={"label": -torch.arange(9), "all": torch.ones(1)},
        guidance_scale=2.0,
    )
    more, again, other = (more_states(Batch(ode, x, chunk_size=7), 3.0, 100, 0.3, seed) for seed in (0, 0, 1))
    label = more.ode.conditioning["label"]
    assert more.x.dtype == dtype and len(more) == 100 and more.chunk_size == 7
    assert torch.equal(more.ode.unconditional["label"], -label)
    assert torch.equal(more.ode.conditioning["all"], torch.ones(1))
    new = torch.cat([torch.zeros(1, dtype=torch.bool), label[1:] == label[:-1]])
    assert torch.equal(more.x[~new], x) and torch.equal(label[~new], torch.arange(9))
    assert float(more.x[new].std()) == pytest.approx(3.0, rel=0.05) and abs(float(more.x[new].mean())) < 0.2
    assert torch.equal(again.x, more.x)
    assert not torch.isclose(other.x[new], more.x[new]).all(dim=1).any()


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 5), st.data())
def test_fresh_noise_is_new_and_under_the_conditions_that_were_held_out(size, draws, seed, data):
    first = data.draw(st.integers(0, size - 1))
    ode = iia.ProbabilityFlowODE(lambda x, t, c: x, EDM, conditioning={"c": torch.arange(size)})
    batch = Batch(ode, 80.0 * normal(size, 3, seed=seed))
    fresh = fresh_states(batch, 80.0, draws, first, seed)
    assert fresh.x.shape == (draws, 3) and fresh.x.dtype == F64 and fresh.teacher is None
    assert not torch.isin(fresh.x, batch.x).any()
    counts = torch.bincount(fresh.ode.conditioning["c"], minlength=size)
    assert int(counts[:first].sum()) == 0 and int(counts[first:].max() - counts[first:].min()) <= 1
    assert not torch.isin(fresh.x, more_states(batch, 80.0, size + draws, 0.5, seed).x).any()


def test_true_final_states_are_those_of_a_teacher_in_any_chunks():
    ode, x = mixture().ode(EDM), 80.0 * NOISE[:9]
    for size in (4, None):
        levels = {"sigma_min": 0.002, "data_size": 0.9}
        ended = ends_of(Batch(ode, x, chunk_size=size), 80.0, 20, False, **levels)
        assert torch.allclose(ended, Teacher.solve(ode, x, 80.0, 0.0, steps=20, **levels).final, rtol=1e-12)


# ---- fresh draws for the last choice ---------------------------------------------------------------------------------

FINAL = replace(QUICK, finals=0.6, teacher_steps=30, chunk_size=16, held_out=0.5)


def test_the_last_choice_is_made_on_fresh_draws_too_and_its_errors_are_reported(said):
    ode = mixture().ode(EDM)
    found, plain = (fit(ode, 1, noise=NOISE, budget=b) for b in (FINAL, replace(FINAL, finals=0.0)))
    search, before = found.record.search, plain.record.search
    made = search.ingredients
    assert (search.final_draws, before.final_draws) == (48, 0)
    assert search.costs["teacher"].sample_evaluations == 31 * (80 + 48) + 2 * 46
    # At most an evaluation of each fresh sample for each solver; the first one of all is memoized.
    assert 48 <= search.costs["finals"].sample_evaluations <= 48 * len(made)
    # No stage before the last choice depends on it.
    assert [(i.name, i.sample_evaluations) for i in made] == [
        (i.name, i.sample_evaluations) for i in before.ingredients
    ]
    fresh = fresh_states(Batch(ode, 80.0 * NOISE), 80.0, 48, 40, 0).x
    x = torch.cat([80.0 * NOISE[40:], fresh])
    teacher, size = found.record.teacher, size_of_data(ode, 80.0 * NOISE, 80.0)
    end = Teacher.solve(ode, x, 80.0, 0.0, steps=30, sigma_min=teacher.sigma_min, data_size=size).final
    unfitted = iia.sample(ode, x, torch.tensor([80.0, 0.0], dtype=F64), "ddim")
    assert made[0].name == "ipndm3, not fitted"  # whose first step is that of ddim
    assert made[0].error == pytest.approx(float((unfitted - end).square().mean().sqrt()), rel=1e-6)
    assert "on 88 held-out samples" in found.explain()
    assert "40 more held out and 48 made for the last choice" in str(found)
    assert "48 for the last choice" in said()[0] and any(line.endswith("with 48 fresh draws") for line in said())


@pytest.fixture(scope="module")
def searched():
    """A search for one evaluation up to its last choice: the context and the contenders, best first, by held-out samples."""
    ode, x = mixture().ode(EDM), 80.0 * NOISE
    batch = Batch(ode, x, Teacher.solve(ode, x, 80.0, 0.0, steps=30))
    context = Context(batch, held_out=40, nfe=1, budget=QUICK, seed=0, progress=False, leads=True)
    made = [*rival(context), *closed_form(context, None, [])]
    return context, sorted(made, key=lambda c: c.error)


def fresh_for(context, plan):
    """Fresh samples whose true final states are said to be those of a plan."""
    fresh = fresh_states(context.batch, 80.0, 160, 40, 0)
    return replace(fresh, final=plan.run(fresh.ode, fresh.x))


def test_fresh_draws_can_turn_the_choice(searched, said):
    context, made = searched
    assert choose(context, made) is made[0]
    last = replace(context, budget=replace(context.budget, finals=1.0))
    for contender in made:
        found = judged(context, made, fresh_for(context, contender.plan))
        assert [len(c.errors) for c in found] == [200] * len(made)
        assert choose(last, found).name == contender.name
    assert sum("with 160 fresh draws" in line for line in said()) == len(made) ** 2


def test_fresh_draws_alone_judge_the_last_fit(searched):
    context, (best, *_) = searched
    whole = best.pipeline.fit(context.batch).plan
    assert whole.difference(best.plan) > 0
    for plan in (whole, best.plan):
        fresh = fresh_for(context, plan)
        last = last_fit(context, best.judged(fresh.errors(best.plan)), fresh)
        assert last.plan.difference(plan) == 0
    kept = last_fit(context, best, None).plan  # without fresh draws, all samples judge
    errors = {plan: float(context.batch.errors(plan).square().mean()) for plan in (whole, best.plan)}
    assert kept.difference(min(errors, key=errors.get)) == 0


class Breaks(Wrapped):
    """An ODE that breaks at the fresh initial states once their teacher has evaluated them."""

    def __init__(self, inner, fresh):
        super().__init__(inner)
        self.fresh, self.seen = fresh, []  # views share the list

    def output(self, x, t):
        found = super().output(x, t)
        if float(t) == 80.0 and bool(torch.isin(x, self.fresh).all()):
            self.seen.append(x)
            if len(self.seen) > 1:
                found = found * math.nan
        return found


def test_a_fit_is_not_lost_where_nothing_is_finite_on_fresh_draws(said):
    inner = mixture().ode(EDM)
    fresh = fresh_states(Batch(inner, 80.0 * NOISE), 80.0, 80, 40, 0).x
    found = fit(Breaks(inner, fresh), 1, noise=NOISE, budget=replace(QUICK, finals=1.0, chunk_size=80))
    assert found.record.search.final_draws == 0 and found.record.endpoint.fit is not None
    assert any("the choice is made without them" in line for line in said())


def test_fresh_draws_have_conditions_that_nothing_was_fitted_under():
    model = Labelled()
    ode = iia.ProbabilityFlowODE(model, EDM, conditioning={"label": torch.arange(12)})
    fresh = fresh_states(Batch(ode, 80.0 * NOISE[:12]), 80.0, 24, 9, 0).x
    fit(ode, 1, noise=NOISE[:12], budget=replace(QUICK, finals=2.0))
    asked = [(x, label) for t, x, label in model.asked if t == 80.0]
    own = [(x, label) for x, label in asked if torch.isin(fresh, x).any()]
    assert own and all(torch.equal(x, fresh) and int(label.min()) == 9 for x, label in own)


def test_where_a_teacher_is_given_the_last_choice_has_fresh_draws_too():
    ode = mixture().ode(EDM)
    teacher = Teacher.solve(ode, 80.0 * NOISE, 80.0, 0.0, steps=50)
    given, own = (fit(ode, 1, noise=NOISE, budget=replace(QUICK, finals=1.0), teacher=k) for k in (teacher, None))
    assert given.record.search.final_draws == 80 and given.plan.difference(own.plan) == 0
    assert [f.record.search.costs["teacher"].sample_evaluations for f in (given, own)] == [
        51 * 80,
        51 * 160 + 2 * 76,
    ]


# ---- warm starts -----------------------------------------------------------------------------------------------------


class Classes(nn.Module):
    """Two classes with a mean each, and a little that is not linear."""

    def forward(self, x, t, label):
        centre = torch.tensor([[2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 1.0, 0.0]], dtype=F64)[label]
        s = t[:, None]
        return centre + 0.3 / (0.3 + s * s) * (x - centre) + 0.2 * torch.tanh((x - centre) / (1 + s)) * s / (1 + s)


def test_warm_starts_are_tried_per_class_where_there_are_classes(tmp_path):
    ode = iia.ProbabilityFlowODE(Classes(), EDM, conditioning={"label": torch.arange(80) % 2})
    found = fit(ode, 1, noise=NOISE, budget=replace(QUICK, warm_starts=True))
    assert "per label" in found.record.search.chosen.name  # the means of the classes are all that one evaluation lacks
    assert any("affine" in i.name for i in found.record.search.ingredients)
    other = ode.condition(label=torch.ones(5, dtype=torch.long))
    x = start_of(found, normal(5, 4, seed=3))
    ends = iia.sample(other, x, solver=found)
    assert ends.shape == (5, 4)
    again = iia.load(found.save(tmp_path / "fit.safetensors"))
    assert torch.equal(iia.sample(other, x, solver=again), ends) and str(again) == str(found)


def test_a_fit_of_images_with_warm_starts_can_be_read():
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2) + 0.1 * torch.sin(x), EDM)
    budget = replace(REFINED, warm_starts=True, starts=2, iterations=1, teacher_steps=30)
    found = fit(ode, 1, noise=normal(24, 3, 4, 4), budget=budget)
    names = [i.name for i in found.record.search.ingredients]
    assert any("diagonal" in name for name in names)
    assert not any("diagonal" in name and "bands" in name for name in names)
    assert found.name in str(found)
