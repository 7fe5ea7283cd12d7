"""One call, and the search for grids behind it: what people who only want a good solver are promised."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from iia_ode.iia.endpoint import Ends, by_robust_error, known_ratio
from iia_ode.iia.initial import fresh_states, more_states
from iia_ode.iia.routes import Route, Start, worth_refining
from iia_ode.iia.variants import SCALARS, variants_of
from support import every_schedule, mixture
from torch import nn

import iia_ode as iia
from iia_ode.autofit import Bench, fit, fold_of, search_grid, search_levels
from iia_ode.autofit.budget import BUDGETS, Budget
from iia_ode.autofit.grids import FreeGrid, LeapGrid, leap_grids
from iia_ode.experiments import get_setting
from iia_ode.iia import IIA, FittedSolver, Teacher, Window
from iia_ode.iia.provenance import Split
from iia_ode.iia.report import table_of_weights
from iia_ode.plan import Bands

F64 = torch.float64
QUICK = Budget(teacher_steps=50, rounds=((0.25, 3), (0.5, 2)), descent=1)
REFINED = Budget(teacher_steps=50, rounds=((0.25, 3),), descent=0, starts=1, iterations=3, probes=2)


def noise(n=80, seed=0):
    return torch.randn((n, 4), dtype=F64, generator=torch.Generator().manual_seed(seed))


def quiet(*args, **options):
    return fit(*args, report=None, **options)


def start_of(fitted, z):
    return fitted.plan.schedule.sigma(fitted.plan.grid[0]) * z


def median_error(ode, solver, x, grid=None):
    exact = Teacher.solve(ode, x, float(grid[0] if grid is not None else solver.grid[0]), ode.schedule.t_data).final
    return float((iia.sample(ode, x, grid, solver) - exact).flatten(1).square().mean(dim=1).sqrt().median())


# ---- one call -----------------------------------------------------------------------------------------------------------


@every_schedule
def test_one_call_gives_a_solver_twice_as_accurate_as_the_best_classic_ones(schedule):
    ode = mixture().ode(schedule)
    found = quiet(ode, 6, noise(), budget=QUICK)
    assert found.nfe == 6
    x = start_of(found, noise(seed=1))
    top = min(schedule.noise_to_signal(found.plan.grid[0]), 80.0) if schedule.alpha(found.plan.grid[0]) else 80.0
    classic = []
    for solver in ("ipndm3", "dpmpp_3m", "unipc", "deis_lab3"):
        for sigma_min in (0.03, 0.2):
            grid = iia.grids.karras(6, sigma_min, top, schedule=schedule)
            grid[0] = found.plan.grid[0]
            try:
                classic.append(median_error(ode, iia.get_solver(solver), x, grid))
            except iia.errors.ScheduleError:  # no data estimate of noise where alpha = 0
                continue
    assert median_error(ode, found, x) < 0.5 * min(classic)


def test_a_bigger_budget_is_better_on_unseen_noise_and_the_report_says_what_it_gained():
    ode, said = mixture().ode(iia.EDM()), []
    plain = quiet(ode, 5, noise(256), budget=QUICK)
    refined = fit(ode, 5, noise(256), budget=replace(QUICK, starts=1, iterations=3), report=said.append)
    small, large = (median_error(ode, f, start_of(f, noise(400, seed=5))) for f in (refined, plain))
    assert small < 0.85 * large
    tried = refined.record.search.ingredients
    assert [i.chosen for i in tried].count(True) == 1
    assert tried[0].name.endswith("not fitted") and tried[0].error > refined.record.endpoint.fit
    assert any("refined" in i.name for i in tried)
    assert refined.record.sample_evaluations > plain.record.sample_evaluations
    assert "sample evaluations" in said[0] and "chosen" in said[-1]
    text = refined.explain()
    assert "held-out samples" in text and f"{tried[0].error:.3g}" in text


def test_what_a_file_shows_is_what_the_fit_shows_and_how_the_fit_was_made(tmp_path):
    ode = mixture().ode(iia.EDM())
    found = quiet(ode, 4, noise(), budget=replace(REFINED, teacher_steps=30))
    assert found.record.search.refinement is not None
    text = iia.iia.describe(found.save(tmp_path / "fit.safetensors"))
    assert text == str(found) and found.table() in text
    chosen = next(i.name for i in found.record.search.ingredients if i.chosen)
    assert f"chosen: {chosen}" in text and "iterations over all weights and times" in text
    assert "steps 30" in text and "steps=60" not in text
    assert ("then on all of them" in text) == found.record.search.fitted_to_all


def test_weights_that_are_maps_are_shown_for_each_group():
    def denoise(x, t):
        return x / (1 + t.reshape(-1, 1, 1, 1) ** 2)

    x = 80 * torch.randn((24, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    ode = iia.ProbabilityFlowODE(denoise, iia.EDM())
    plan = IIA("ddim", terms=Window(bands=2), guard=False).fit(ode, iia.grids.karras(3), x).plan
    table = table_of_weights(plan)
    final = plan.canonical().final.weights[1]
    assert [line for line in table.splitlines() if line in final.projections.names] == list(final.projections.names)
    for value in final.coefficients.tolist():
        assert f"{value:.4f}" in table


def test_memory_of_refinements_is_bounded_where_one_asks():
    ode = mixture().ode(iia.EDM())
    plain, bounded = (quiet(ode, 4, noise(), budget=REFINED, checkpointed=c) for c in (False, True))
    assert plain.plan.difference(bounded.plan) < 1e-9
    assert bounded.record.evaluations > plain.record.evaluations  # those made again on the way back


def test_what_is_said_to_be_spent_is_what_was_spent():
    ode = mixture().ode(iia.EDM())
    with ode.counting() as spent:
        found = quiet(ode, 4, noise(), budget=QUICK, chunk_size=16)
    recipe = found.record.search
    assert found.record.sample_evaluations == spent.samples
    parts = [*recipe.ingredients, recipe.costs["teacher"], recipe.costs["last"]]
    timed = 2 * 16
    assert sum(p.sample_evaluations for p in parts) + timed == spent.samples
    assert recipe.costs["teacher"].sample_evaluations == 51 * 80
    # The fit, then both plans on all of the noise. The new plan's answers are known from its fit, and in the chunks of the
    # first 32 samples, which are cut as before, those at the start and all of the old plan.
    assert recipe.costs["last"].sample_evaluations == (4 * 48 + 3 * 32) + 3 * 48


def test_what_cannot_be_refined_is_listed_with_what_it_cost():
    class Detached(nn.Module):
        def forward(self, x, t):
            return (x / (1 + t.reshape(-1, 1) ** 2)).detach()

    ode = iia.ProbabilityFlowODE(Detached(), iia.EDM())
    with ode.counting() as spent:
        found = quiet(ode, 3, noise(), budget=REFINED, chunk_size=16)
    recipe = found.record.search
    failed = [i for i in recipe.ingredients if i.error is None]
    assert [i.name for i in failed] == ["scalars, refined"] and failed[0].sample_evaluations > 0
    parts = [*recipe.ingredients, recipe.costs["teacher"], recipe.costs["last"]]
    assert sum(p.sample_evaluations for p in parts) + 2 * 16 == spent.samples
    assert f"Chosen from {len(recipe.ingredients) - 1} solvers" in found.explain()
    # What it is compared with is not its base on its grid, and is not called so.
    unfitted = recipe.ingredients[0]
    assert unfitted.name == "ipndm3, not fitted"
    assert f"held-out noise: ipndm3 without a fit {unfitted.error:.3g}, fit" in str(found)


@pytest.mark.parametrize("budget", [QUICK, REFINED])
def test_a_fit_survives_its_file(tmp_path, budget):
    ode = mixture().ode(iia.EDM())
    found = quiet(ode, 4, noise(), budget=budget)
    again = iia.load(found.save(tmp_path / "fit.safetensors"))
    x = start_of(found, noise(8, seed=2))
    assert torch.equal(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=found))
    assert again.record == found.record
    assert again.explain() == found.explain()
    assert isinstance(again, FittedSolver) and found.name in str(again)


def test_the_same_noise_and_seed_give_the_same_fit():
    ode = mixture().ode(iia.EDM())
    a, b = (quiet(ode, 4, noise(), budget=REFINED) for _ in range(2))
    assert a.plan.canonical().difference(b.plan.canonical()) == 0


def test_noise_may_be_given_as_noise_or_as_initial_states_or_as_a_shape():
    ode = mixture().ode(iia.EDM())
    a, b = (quiet(ode, 3, z, budget=QUICK) for z in (noise(), 80.0 * noise()))
    assert a.plan.canonical().difference(b.plan.canonical()) < 1e-9
    assert quiet(ode, 3, shape=(4,), samples=32, budget=QUICK).record.batch == 32
    for bad in ({}, {"noise": noise(), "shape": (4,)}, {"noise": 7.0 * noise()}, {"noise": noise(4)}):
        with pytest.raises(iia.errors.InputError, match="noise"):
            quiet(ode, 3, **bad)


@pytest.mark.parametrize("warm_starts", [False, True])
@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_very_few_evaluations_work_too(nfe, warm_starts):
    ode = mixture().ode(iia.EDM())
    found = quiet(ode, nfe, noise(), budget=replace(REFINED, warm_starts=warm_starts))
    assert found.nfe == nfe
    assert any("warm start" in i.name for i in found.record.search.ingredients) == warm_starts
    x = start_of(found, noise(seed=1))
    assert median_error(ode, found, x) <= 1.02 * median_error(ode, iia.get_solver("ddim"), x, found.grid)


def test_warm_starts_are_tried_per_class_where_there_are_classes():
    class Classes(nn.Module):
        def forward(self, x, t, label):
            centre = torch.tensor([[2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 1.0, 0.0]], dtype=F64)[label]
            s = t[:, None]
            return centre + 0.3 / (0.3 + s * s) * (x - centre) + 0.2 * torch.tanh((x - centre) / (1 + s)) * s / (1 + s)

    label = torch.arange(80) % 2
    ode = iia.ProbabilityFlowODE(Classes(), iia.EDM(), conditioning={"label": label})
    budget = Budget(teacher_steps=50, rounds=((0.25, 3),), descent=0, warm_starts=True)
    found = quiet(ode, 3, noise(), budget=budget)
    names = [i.name for i in found.record.search.ingredients]
    assert any("per label" in name for name in names) and any("affine" in name for name in names)
    other = iia.ProbabilityFlowODE(Classes(), iia.EDM(), conditioning={"label": torch.ones(5, dtype=torch.long)})
    assert iia.sample(other, start_of(found, noise(5, seed=3)), solver=found).shape == (5, 4)


class Labelled(nn.Module):
    """Data at the label, whatever the state; says what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, label):
        self.asked.append((float(t[0]), x.detach().clone(), label.clone()))
        return (label.to(F64)[:, None] + 0.1 * x) / (1 + t[:, None] ** 2)


def test_a_budget_may_add_noise_under_the_same_conditions():
    model, z, said = Labelled(), noise(12), []
    ode = iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"label": torch.arange(12)})
    found = fit(ode, 2, z, budget=replace(QUICK, draws=30), report=said.append, chunk_size=64)
    assert found.record.batch == 30 and found.record.held_out == 15
    assert any("12 draws of noise and 18 more" in line for line in said)
    assert "Of the 30 samples, 12 were asked for" in found.explain()
    whole = [(x, label) for t, x, label in model.asked if len(x) == 30 and t == 80.0]
    assert len(whole) >= 3  # the timing, the teacher and the last fit see all of it
    for states, label in whole:
        assert torch.equal(states, whole[0][0])
        assert set(label[:15].tolist()) == set(range(6)) and set(label[15:].tolist()) == set(range(6, 12))
        own = [int((label == k).nonzero()[0]) for k in range(12)]
        assert torch.equal(states[own], 80 * z)
        assert len(torch.unique(states, dim=0)) == 30
    assert all(len(label) == len(x) for _, x, label in model.asked)


def test_noise_is_added_only_where_there_is_less_than_the_budget_asks_for():
    ode = iia.ProbabilityFlowODE(Labelled(), iia.EDM(), conditioning={"label": torch.arange(12)})
    enough = quiet(ode, 2, noise(12), budget=replace(QUICK, draws=12))
    assert enough.record.batch == 12 and "were asked for" not in enough.explain()
    own, said = Teacher.solve(ode, 80.0 * noise(12), 80.0, 0.0, steps=50), []
    kept = fit(ode, 2, noise(12), budget=replace(QUICK, draws=30), teacher=own, report=said.append)
    assert kept.record.batch == 12 and any("no noise is added" in line for line in said)


@pytest.mark.parametrize(("given", "draws", "few"), [(63, 0, True), (64, 0, False), (16, 64, False)])
def test_a_fit_to_few_draws_says_that_its_choice_is_not_to_be_trusted_far(given, draws, few):
    said, budget = [], replace(QUICK, rounds=((1.0, 1),), descent=0, draws=draws)
    fit(mixture().ode(iia.EDM()), 2, noise(given), budget=budget, report=said.append)
    assert any(f"only {given} draws of noise" in line for line in said) == few


def errors_of(found):
    return {i.name: i.error for i in found.record.search.ingredients}


def test_a_draw_that_is_given_twice_counts_once_and_is_reported():
    ode, own, again = mixture().ode(iia.EDM()), noise(40), torch.arange(80) % 40
    plain = quiet(ode, 4, own, budget=QUICK)
    teacher = Teacher.solve(ode, 80.0 * own[again], 80.0, 0.0, steps=50)
    for options in ({}, {"teacher": teacher}):
        with pytest.warns(iia.errors.DuplicateWarning, match="40 of 80 draws of noise repeat others"):
            found = quiet(ode, 4, own[again], budget=QUICK, **options)
        assert found.record.batch == 40 and found.plan.difference(plain.plan) == 0
        assert errors_of(found) == errors_of(plain)
    with pytest.warns(iia.errors.DuplicateWarning), pytest.raises(iia.errors.InputError, match="8 different draws"):
        quiet(ode, 4, noise(1).expand(64, 4), budget=QUICK)
    with pytest.warns(iia.errors.DuplicateWarning), pytest.raises(iia.errors.MismatchError):
        quiet(ode, 4, noise(40, seed=5)[again], budget=QUICK, teacher=teacher)


def test_a_draw_under_two_conditions_is_two_draws():
    label = torch.arange(24) // 12
    ode = iia.ProbabilityFlowODE(Labelled(), iia.EDM(), conditioning={"label": label})
    assert quiet(ode, 2, noise(12).repeat(2, 1), budget=QUICK).record.batch == 24
    with pytest.warns(iia.errors.DuplicateWarning, match="12 of 24"):
        found = quiet(ode.condition(label=torch.tensor(1)), 2, noise(12).repeat(2, 1), budget=QUICK)
    assert found.record.batch == 12


@pytest.mark.parametrize("index", [torch.arange(24) % 12, torch.arange(24)], ids=["repeated", "distinct"])
def test_conditions_that_do_not_fit_the_noise_are_refused_even_if_they_fit_a_part_of_it(index):
    ode = iia.ProbabilityFlowODE(Labelled(), iia.EDM(), conditioning={"label": torch.arange(12)})
    with pytest.raises(iia.errors.InputError, match="'label' has 12 entries for a batch of 24"):
        quiet(ode, 2, noise(24)[index], budget=QUICK, chunk_size=12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_added_noise_is_standard_normal_new_for_each_seed_and_guided_as_the_rest(dtype):
    x = 3.0 * torch.randn((9, 40), dtype=dtype, generator=torch.Generator().manual_seed(0))
    ode = iia.ProbabilityFlowODE(
        Labelled(),
        iia.EDM(),
        conditioning={"label": torch.arange(9), "all": torch.ones(1)},
        unconditional={"label": -torch.arange(9), "all": torch.ones(1)},
        guidance_scale=2.0,
    )
    t = ode.schedule.t_of_noise_to_signal(3.0)
    more, states = more_states(ode, x, t, 100, 0.3, seed=0)
    label = more.conditioning["label"]
    assert states.dtype == dtype and len(states) == 100
    assert torch.equal(more.unconditional["label"], -label) and torch.equal(more.conditioning["all"], torch.ones(1))
    new = torch.cat([torch.zeros(1, dtype=torch.bool), label[1:] == label[:-1]])
    assert torch.equal(states[~new], x) and torch.equal(label[~new], torch.arange(9))
    assert float(states[new].std()) == pytest.approx(3.0, rel=0.05) and abs(float(states[new].mean())) < 0.2
    again, other = (more_states(ode, x, t, 100, 0.3, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(again, states)
    assert not torch.isclose(other[new], states[new]).all(dim=1).any()


def test_a_model_without_gradients_is_fitted_in_closed_form():
    @torch.no_grad()
    def blind(x, t):
        return mixture().denoise(x, 1.0, t[:, None])

    said = []
    found = fit(iia.ProbabilityFlowODE(blind, iia.EDM()), 4, noise(), budget=REFINED, report=said.append)
    assert found.record.search.refinement is None
    assert any("gradient" in line for line in said)


def test_a_teacher_can_be_used_for_every_number_of_evaluations():
    ode = mixture().ode(iia.EDM())
    teacher = Teacher.solve(ode, 80.0 * noise(), 80.0, 0.0, steps=50)
    with ode.counting() as spent:
        quiet(ode, 4, noise(), budget=QUICK, teacher=teacher)
    with ode.counting() as own:
        quiet(ode, 4, noise(), budget=QUICK)
    assert own.samples - spent.samples == 51 * 80
    with pytest.raises(iia.errors.MismatchError):
        quiet(ode, 4, noise(seed=5), budget=QUICK, teacher=teacher)


def test_bad_arguments_say_what_was_wrong():
    ode = mixture().ode(iia.EDM())
    with pytest.raises(iia.errors.UnknownNameError, match="closed-form"):
        quiet(ode, 4, noise(), budget="huge")
    for bad in (0, 2.5, True):
        with pytest.raises(iia.errors.InputError, match="nfe"):
            quiet(ode, bad, noise())
        with pytest.raises(iia.errors.InputError, match="chunk_size"):
            quiet(ode, 4, noise(), chunk_size=bad)
    for name, bad in (
        ("shape", 4),
        ("shape", ()),
        ("shape", (4.0,)),
        ("samples", 16.0),
        ("samples", -4),
        ("seed", None),
    ):
        with pytest.raises(iia.errors.InputError, match=f"{name} .* got"):
            quiet(ode, 4, **{"shape": (4,), "samples": 16, name: bad})
    with pytest.raises(iia.errors.InputError, match=r"seed .* below"):
        quiet(ode, 4, noise(), seed=2**70)
    with pytest.raises(iia.errors.InputError, match=r"or a Budget\(\.\.\.\)"):
        quiet(ode, 4, noise(), budget=Budget)
    with pytest.raises(iia.errors.GridError, match="sigma_max"):
        quiet(ode, 4, noise(), sigma_max=-1.0)
    with pytest.raises(iia.errors.InputError, match="held_out"):
        quiet(ode, 4, noise(), held_out=1.0)


FINAL = replace(REFINED, warm_starts=True, finals=0.6, teacher_steps=30)


def test_the_last_choice_is_made_on_noise_of_its_own_and_its_errors_are_reported():
    ode, said = mixture().ode(iia.EDM()), []
    with ode.counting() as spent:
        found = fit(ode, 4, noise(), budget=FINAL, report=said.append, chunk_size=16)
    plain = quiet(ode, 4, noise(), budget=replace(FINAL, finals=0.0), chunk_size=16)
    recipe, before = found.record.search, plain.record.search
    assert (recipe.final_draws, before.final_draws) == (48, 0)
    made = recipe.ingredients
    assert recipe.costs["teacher"].sample_evaluations == 31 * (80 + 48)
    # At the start, and where a warm start ends, the first that begins there asks.
    begin = {i.name.removesuffix(", refined") if "warm start" in i.name else "" for i in made}
    assert recipe.costs["finals"].sample_evaluations == 48 * (3 * len(made) + len(begin))
    backward = found.record.sample_evaluations - spent.samples
    parts = [*made, *recipe.costs.values()]
    assert sum(p.sample_evaluations for p in parts) + 2 * 16 == spent.samples + backward
    # Nothing that comes before knows of it.
    assert [(i.name, i.sample_evaluations) for i in made] == [
        (i.name, i.sample_evaluations) for i in before.ingredients
    ]
    _, x = fresh_states(ode, 80.0 * noise(), 80.0, 48, 40, 0)
    x = torch.cat([80.0 * noise()[40:], x])
    end = Teacher.solve(ode, x, 80.0, 0.0, steps=30).final
    unfitted = iia.sample(ode, x, iia.grids.karras(4, 0.02, 80.0), "ipndm3")
    assert made[0].error == pytest.approx(float((unfitted - end).square().mean().sqrt()), rel=1e-6)
    assert "on 88 held-out samples" in found.explain() and "40 more held out and 48 made for the last choice" in str(
        found
    )
    assert "48 for the last choice" in said[0] and any("on 48 draws of noise more" in line for line in said)


@pytest.mark.parametrize("last", [3.0, 1e-6], ids=["poor", "good"])
def test_noise_of_the_last_choice_can_turn_it_and_alone_judges_the_last_fit(monkeypatch, last):
    """On noise that was held out everything stays as it is; on that of the last choice, what was best is made the worst."""
    ode = mixture().ode(iia.EDM())
    made = quiet(ode, 4, noise(), budget=QUICK).record.search.ingredients
    best = next(k for k, i in enumerate(made) if i.chosen)
    errors = [3.0 if k == best else 1e-4 for k in range(len(made))] + [last]
    honest, runs = Ends.errors, []

    def turned(self, plan, samples=None):
        found = honest(self, plan, samples)
        if len(self.x) == 160:
            runs.append(plan)
            found.fill_(errors[len(runs) - 1])
        return found

    monkeypatch.setattr(Ends, "errors", turned)
    found = quiet(ode, 4, noise(), budget=replace(QUICK, finals=2.0))
    recipe = found.record.search
    assert [i.name for i in recipe.ingredients] == [i.name for i in made]
    assert not recipe.ingredients[best].chosen and not found.record.endpoint.fell_back
    assert len(runs) == len(made) + 1
    assert recipe.fitted_to_all == (last < 1e-4)


def test_the_noise_of_the_last_choice_has_conditions_that_nothing_was_fitted_under():
    model = Labelled()
    ode = iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"label": torch.arange(12)})
    _, fresh = fresh_states(ode, 80.0 * noise(12), 80.0, 24, 6, 0)
    quiet(ode, 2, noise(12), budget=replace(QUICK, finals=2.0), chunk_size=64)
    asked = [(t, x, label) for t, x, label in model.asked if len(x) == 24]
    assert all(int(label.min()) == 6 for _, _, label in asked)
    at_start = [bool(torch.isin(fresh, x).all()) for t, x, _ in asked if t == 80.0]
    assert at_start == [True, True]  # the teacher, and the first of what was made
    others = [x for t, x, _ in model.asked if t == 80.0 and len(x) != 24]
    assert not any(torch.isin(fresh, x).any() for x in others)


def test_noise_on_which_nothing_is_finite_does_not_lose_what_was_made(monkeypatch):
    honest = Ends.errors

    def broken(self, plan, samples=None):
        errors = honest(self, plan, samples)
        return errors.fill_(math.nan) if len(self.x) == 160 else errors

    monkeypatch.setattr(Ends, "errors", broken)
    ode, said = mixture().ode(iia.EDM()), []
    found = fit(ode, 3, noise(), budget=replace(QUICK, finals=2.0), report=said.append)
    assert found.record.search.final_draws == 0 and found.record.endpoint.fit is not None
    assert any("the choice is made without them" in line for line in said)


def test_where_a_teacher_is_given_the_last_choice_has_noise_of_its_own_too():
    ode, x = mixture().ode(iia.EDM()), 80.0 * noise()
    budget = replace(QUICK, finals=1.0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=budget.teacher_steps)
    given, own = (quiet(ode, 4, x, budget=budget, teacher=known) for known in (teacher, None))
    assert given.record.search.final_draws == 80 and given.plan.difference(own.plan) < 1e-9
    spent = [f.record.search.costs["teacher"].sample_evaluations for f in (given, own)]
    assert spent == [51 * 80, 51 * 160]


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 5), st.data())
def test_noise_for_the_last_choice_is_new_and_under_the_conditions_that_were_held_out(batch, draws, seed, data):
    first = data.draw(st.integers(0, batch - 1))
    labels = torch.arange(batch)
    ode = iia.ProbabilityFlowODE(lambda x, t, c: x, iia.EDM(), conditioning={"c": labels})
    x = 80.0 * torch.randn((batch, 3), dtype=F64, generator=torch.Generator().manual_seed(seed))
    own, fresh = fresh_states(ode, x, 80.0, draws, first, seed)
    assert fresh.shape == (draws, 3) and fresh.dtype == F64
    assert not torch.isin(fresh, x).any()
    counts = torch.bincount(own.conditioning["c"], minlength=batch)
    assert int(counts[:first].sum()) == 0 and int(counts[first:].max() - counts[first:].min()) <= 1
    _, states = more_states(ode, x, 80.0, batch + draws, 0.5, seed)
    assert not torch.isin(fresh, states).any()


def test_the_budgets_cost_what_their_names_say():
    draws = {name: max(256, budget.draws) for name, budget in BUDGETS.items()}
    costs = [BUDGETS[n].cost(8, 35, draws[n], draws[n] // 2) for n in ("closed-form", "standard", "thorough")]
    assert costs == sorted(costs)
    assert costs[0] < 60_000  # a minute, at a millisecond for an evaluation of a sample


@pytest.mark.parametrize(
    ("budget", "nfe", "draws"), [("closed-form", 4, 256), ("closed-form", 10, 256), ("standard", 5, 128)]
)
def test_what_a_fit_is_said_to_cost_is_about_what_it_costs(budget, nfe, draws):
    ode, x = get_setting("mixture").draw(draws, 0)
    with ode.counting() as spent:
        found = quiet(ode, nfe, x, budget=budget)
    said = BUDGETS[budget].cost(nfe, len(leap_grids(80.0, 1.0)), draws, draws // 2)
    assert 0.8 < said / found.record.sample_evaluations < 1.4
    assert spent.samples <= found.record.sample_evaluations


def test_the_teacher_is_more_accurate_the_more_accurate_the_fit_can_be():
    for budget in BUDGETS.values():
        assert budget.steps(1) == budget.teacher_steps
        assert budget.steps(30) == 120


def test_an_ode_with_an_evaluate_of_its_own_is_refused_and_not_passed_over():
    class Scaled(iia.ProbabilityFlowODE):
        def evaluate(self, x, t, form="data"):
            return super().evaluate(0.9 * x, t, form)

    class Louder(iia.ProbabilityFlowODE):
        def output(self, x, t):
            return 0.9 * super().output(x, t)

    models = (kind(mixture().ode(iia.EDM()).model, iia.EDM()) for kind in (Scaled, Louder))
    with pytest.raises(iia.errors.InputError, match="Scaled has a method evaluate of its own"):
        quiet(next(models), 3, noise(), budget=QUICK)
    assert quiet(next(models), 3, noise(), budget=QUICK).nfe == 3


def test_another_model_s_trajectories_are_warned_of_once():
    class Gained(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(gain, dtype=F64), requires_grad=False)

        def forward(self, x, t):
            return self.gain * mixture().denoise(x, 1.0, t[:, None])

    made, used = (iia.ProbabilityFlowODE(Gained(g), iia.EDM()) for g in (1.0, 0.999))
    teacher = Teacher.solve(made, 80.0 * noise(), 80.0, 0.0, steps=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(used, 3, noise(), budget=QUICK, teacher=teacher)
    assert [w.category for w in caught] == [iia.errors.FingerprintWarning]


# ---- the search ---------------------------------------------------------------------------------------------------------


@every_schedule
@given(
    st.integers(1, 12),
    st.floats(1.0, 20.0),
    st.floats(0.01, 0.5),
    st.floats(1.0, 12.0),
)
def test_a_leap_grid_has_its_levels_where_it_says(schedule, n, sigma_1, sigma_min, rho):
    start = schedule.t_of_noise_to_signal(60.0)
    grid = LeapGrid(sigma_1, sigma_min, rho).times(n, schedule, start)
    assert len(grid) == n + 1 and grid.dtype == F64
    assert float(grid[0]) == start and float(grid[-1]) == schedule.t_data
    if n > 1:
        assert schedule.noise_to_signal(float(grid[1])) == pytest.approx(sigma_1, rel=1e-5)
    if n > 2:
        assert schedule.noise_to_signal(float(grid[-2])) == pytest.approx(sigma_min, rel=1e-5)


def test_candidates_scale_with_the_data_and_stay_below_the_start():
    near, far = leap_grids(80.0, 0.5), leap_grids(80.0, 5.0)
    assert max(g.sigma_1 for g in near) < 80 and max(g.sigma_1 for g in far) < 80
    assert min(g.sigma_1 for g in far) == pytest.approx(10 * min(g.sigma_1 for g in near))
    assert math.isfinite(max(g.sigma_1 for g in leap_grids(math.inf, 0.5)))


def test_the_search_finds_a_better_grid_than_it_was_given():
    setting = get_setting("mixture")
    ode, x = setting.draw(96, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0)
    method = IIA("ddim", terms="window", target="trajectory", history=2, guard=False)

    def closed(ode, grid, x, teacher):
        return method.fit(ode, grid, x, teacher=teacher).plan

    poor = LeapGrid(60.0, 0.003, 7.0)
    found = search_grid(closed, ode, x, teacher, 6, [poor, *leap_grids(80.0, 1.0)[::6]], rounds=((0.25, 4), (1.0, 2)))
    assert found.best != poor
    first = next(t for t in found.trials if t.grid == poor)
    assert min(t.error for t in found.trials if t.grid == found.best) < first.error
    with pytest.raises(iia.errors.InputError, match="grid"):
        search_grid(closed, ode, x, teacher, 6, [])


KINDS = st.sampled_from(["none", "affine", "diagonal", "per class"])


@given(names=st.lists(KINDS, min_size=1, max_size=8), count=st.integers(1, 8))
def test_of_every_kind_of_route_the_best_is_refined_where_there_is_room_and_the_best_of_all_always_is(names, count):
    x = torch.zeros(1, 1)
    starts = {
        n: Start(n, x, None, key="labels" if n == "per class" else None) for n in ("affine", "diagonal", "per class")
    }
    routes = [Route(starts.get(name)) for name in names]
    chosen = worth_refining(routes, count)
    assert len(chosen) == min(count, len(routes)) == len({id(r) for r in chosen})
    assert chosen[0] is routes[0]
    warm = {r.start is not None for r in routes}
    assert {r.start is not None for r in chosen} == warm or count == 1
    assert {r.kind for r in chosen} == {r.kind for r in routes} or count < 3
    for kind in {r.kind for r in routes}:  # of each kind those that come first
        own, taken = ([r for r in found if r.kind == kind] for found in (routes, chosen))
        assert all(a is b for a, b in zip(taken, own, strict=False))


@every_schedule
@given(levels=st.lists(st.floats(0.01, 70.0), min_size=1, max_size=8, unique=True))
def test_a_free_grid_has_the_levels_it_was_given_on_every_schedule(levels, schedule):
    levels = sorted(levels, reverse=True)
    assume(all(a > 1.01 * b for a, b in pairwise(levels)))
    start = schedule.t_of_noise_to_signal(80.0)
    grid = FreeGrid(tuple(levels)).times(len(levels) + 1, schedule, start)
    assert float(grid[0]) == start and float(grid[-1]) == schedule.t_data
    again = FreeGrid.of(grid, schedule)
    assert again.levels == pytest.approx(levels, rel=1e-6)
    with pytest.raises(iia.errors.GridError, match="levels make a grid"):
        again.times(len(levels), schedule, start)


def test_levels_moved_one_by_one_end_nearer_the_truth_than_the_family_they_come_from():
    ode, x = get_setting("mixture").draw(96, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0)
    method = IIA("ddim", terms="window", target="trajectory", history=2, guard=False)

    def closed(ode, grid, x, teacher):
        return method.fit(ode, grid, x, teacher=teacher).plan

    poor = LeapGrid(40.0, 0.01, 7.0)
    said = []
    found = search_levels(closed, ode, x, teacher, 5, poor, passes=3, report=said.append)
    assert len(found.best.levels) == 4 and 1 <= len(said) <= 3
    assert found.trials[0].grid == FreeGrid.of(poor.times(5, ode.schedule, 80.0), ode.schedule)
    assert all(t.samples == len(x) == len(t.errors) for t in found.trials)
    fresh, z = get_setting("mixture").draw(400, 1)
    exact = Teacher.solve(fresh, z, 80.0, 0.0).final
    errors = []
    for grid in (poor, found.best):
        plan = closed(ode, grid.times(5, ode.schedule, 80.0), x, teacher)
        errors.append(float((iia.sample(fresh, z, solver=plan) - exact).square().mean().sqrt()))
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(iia.errors.InputError, match="step"):
        search_levels(closed, ode, x, teacher, 5, poor, step=1.0)


def test_two_levels_close_together_do_not_hold_the_others():
    ode, x = get_setting("mixture").draw(40, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0)

    def plain(ode, grid, x, teacher):
        return iia.plan.trace(iia.get_solver("ddim"), ode.schedule, grid, consistent=False)

    found = search_levels(plain, ode, x, teacher, 5, FreeGrid((40.0, 39.9, 1.0, 0.02)), passes=1)
    moved = {t.grid.levels[3] for t in found.trials}
    assert len(moved) > 1


def test_every_sample_of_a_trial_is_judged_by_a_fit_that_did_not_see_it():
    ode, x = get_setting("mixture").draw(20, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=30)
    seen = []

    def closed(ode, grid, x, teacher):
        seen.append(x)
        return iia.plan.trace(iia.get_solver("ddim"), ode.schedule, grid, consistent=False)

    grid = LeapGrid(10.0, 0.1)
    found = search_grid(closed, ode, x, teacher, 4, [grid], rounds=((1.0, 1),), descent=0)
    assert [len(part) for part in seen] == [10, 10]
    assert torch.equal(torch.cat(seen), x)
    final = iia.sample(ode, x, grid.times(4, ode.schedule, 80.0), "ddim")
    own = (final - teacher.final).square().mean(dim=1).sqrt()
    assert torch.allclose(found.trials[0].errors, own, rtol=1e-12)


@pytest.mark.parametrize("warm", [False, True])
def test_a_route_is_judged_alike_whether_samples_run_along_with_the_fit_or_after_it(warm):
    ode, x = get_setting("mixture").draw(30, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=30)
    route = Route(Start("affine", x, teacher) if warm else None)
    method = IIA("ddim", "window", "trajectory", history=2, ridge=1e-7, guard=False)
    times = LeapGrid(10.0, 0.1).times(4, ode.schedule, 80.0)

    def closed(ode, grid, x, teacher):
        return route.fit(method, grid, ode, x, teacher, 64).whole.plan

    def along(ode, grid, x, teacher, own, other):
        return route.ends(method, grid, ode, x, teacher, own, 64)[other]

    errors = [Bench(fold, ode, x, teacher, 4).judge(times, 20) for fold in (fold_of(closed, 7), along)]
    assert errors[0].shape == (20,) and torch.allclose(errors[0], errors[1], rtol=1e-7)


def test_a_trial_in_which_a_sample_ends_nowhere_is_no_candidate():
    ode, x = get_setting("mixture").draw(8, 0)
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=30)

    def lost(ode, grid, x, teacher, own, other):
        final = teacher.final[other].clone()
        final[0, 0] = math.nan
        return final

    assert torch.isinf(Bench(lost, ode, x, teacher, 4).judge(iia.grids.karras(4), 8)).all()


@pytest.mark.parametrize(("shape", "kinds"), [((5,), 2), ((2, 9), 2), ((1, 8, 8), 4), ((3, 16, 16), 4), ((3, 2, 2), 2)])
def test_bands_are_tried_for_images_only_and_intercepts_for_everything(shape, kinds):
    found = variants_of(shape, intercepts=True)
    assert found[0] is SCALARS and len(found) == kinds
    assert [v.name for v in found if not v.intercept] == [v.name for v in variants_of(shape, intercepts=False)]
    for v in found:
        method = v.of(IIA("ddim", "window", "trajectory", history=2))
        assert method.intercept == v.intercept == v.name.endswith("intercept") and method.history == 2


def test_images_whose_energy_falls_with_frequency_get_weights_per_band_and_survive_their_file(tmp_path):
    """Gaussian images with a spectrum: a weight for each of its bands would be exact, and one for all is not."""
    shape = (3, 8, 8)
    bands = Bands(shape, 4, "luma-chroma")
    spread = torch.tensor([3.0, 1.0, 0.4, 0.2, 1.0, 0.3, 0.1, 0.05], dtype=F64)

    def model(x, t):
        t = torch.as_tensor(t).reshape(-1)[0]
        return bands.apply(x, spread.square() / (spread.square() + t * t))

    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    z = torch.randn((64, *shape), dtype=F64, generator=torch.Generator().manual_seed(0))
    refined = replace(REFINED, iterations=2)
    found = quiet(ode, 3, z, budget=refined)
    tried = {i.name: i.error for i in found.record.search.ingredients}
    best = next(name for name in tried if name.startswith("bands") and "refined" not in name)
    assert tried[best] < 0.1 * tried["scalars"]
    assert any(name.startswith("bands") and "refined" in name for name in tried)
    fresh = torch.randn((32, *shape), dtype=F64, generator=torch.Generator().manual_seed(1))
    again = iia.load(found.save(tmp_path / "fit.safetensors"))
    assert len(found.table().splitlines()) > found.nfe and str(again) == str(found)
    x = start_of(found, fresh)
    assert torch.equal(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=found))


def test_what_is_chosen_is_fitted_once_more_to_all_of_the_noise():
    ode = mixture().ode(iia.EDM())
    found = quiet(ode, 4, noise(), budget=QUICK)
    chosen = next(i for i in found.record.search.ingredients if i.chosen)
    grid, x = found.grid, 80.0 * noise()
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=50)
    method = IIA(
        "ddim", "window", "trajectory", history=2, ridge="auto", guard=False, intercept="intercept" in chosen.name
    )
    whole = method.fit(ode, grid, x, teacher=teacher, held_out=0.2)
    assert found.plan.difference(whole.plan) < 1e-9
    assert found.record.search.steps == Split(80, 16)
    assert "fitted once more, to all 80 samples" in found.explain()


def test_with_little_noise_for_its_weights_the_fit_that_was_judged_stays():
    found = quiet(mixture().ode(iia.EDM()), 8, noise(16), budget=REFINED)
    assert not found.record.search.fitted_to_all and "fitted once more" not in found.explain()


def test_a_fit_of_images_with_warm_starts_can_be_read():
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t.reshape(-1, 1, 1, 1) ** 2) + 0.1 * torch.sin(x), iia.EDM())
    z = torch.randn((24, 3, 4, 4), dtype=F64, generator=torch.Generator().manual_seed(0))
    found = quiet(ode, 2, z, budget=replace(REFINED, warm_starts=True, starts=6, iterations=1))
    names = [i.name for i in found.record.search.ingredients]
    assert any("diagonal" in name for name in names)
    assert not any("diagonal" in name and "bands" in name for name in names)
    assert found.name in str(found)


def test_one_outlier_does_not_decide_between_candidates():
    steady, better = torch.full((50,), 0.1), torch.full((50,), 0.05)
    better[7] = 3.0
    assert by_robust_error([steady, better], lambda e: e)[0] is better
    worse, unlucky = torch.full((256,), 0.02), torch.full((256,), 0.01)
    unlucky[7] = 0.7  # more than all others together
    assert by_robust_error([worse, unlucky], lambda e: e, outliers_too=True)[0] is unlucky
    assert by_robust_error([torch.full((3,), math.inf), steady], lambda e: e)[0] is steady
    broken = torch.full((100,), math.nan)
    for order in ([broken, better, steady], [steady, broken, better], [better, steady, broken]):
        assert [id(e) for e in by_robust_error(order, lambda e: e)] == [id(better), id(steady), id(broken)]
        assert by_robust_error(order, lambda e: e, outliers_too=True)[-1] is broken


def test_many_outliers_do():
    steady, slightly_better = torch.full((400,), 0.1), torch.full((400,), 0.09)
    slightly_better[::20] = 1.0
    assert by_robust_error([slightly_better, steady], lambda e: e, outliers_too=True)[0] is steady


@given(st.floats(0.1, 10.0), st.integers(0, 2**31 - 1))
def test_what_every_sample_agrees_on_is_known(factor, seed):
    errors = torch.rand(50, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.01
    assert known_ratio(factor * errors, errors) == pytest.approx(factor, rel=1e-6)
    once = errors.clone()
    once[3] = 100.0
    assert 1.0 < known_ratio(once, errors) < 0.1 * float((once.square().mean() / errors.square().mean()).sqrt())


def test_the_table_of_a_refined_fit_has_every_weight_of_its_plan():
    found = quiet(mixture().ode(iia.EDM()), 4, noise(), budget=REFINED)
    lines = found.table().splitlines()
    if not found.reports:
        assert len(lines) == 2 + found.nfe
        assert f"{found.plan.canonical().final.weights[1]:.4f}" in lines[-1]


def test_a_run_that_starts_among_the_data_is_fitted_too():
    ode = mixture().ode(iia.EDM())
    x = mixture().noisy(60, iia.EDM(), 1.0, torch.Generator().manual_seed(0))
    found = quiet(ode, 3, x, sigma_max=1.0, budget=QUICK)
    assert found.plan.grid[0] == 1.0 and found.nfe == 3


class Small(nn.Module):
    """A network with parameters, and a count of the largest batch it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
        self.largest, self.times = 0, []

    def forward(self, x, t):
        self.largest = max(self.largest, len(x))
        self.times.append(float(t.detach().min()))
        s = t[:, None]
        return (x + 0.3 * s * torch.tanh(self.layers(x / (1 + s)))) / (1 + s * s)


def test_closed_forms_keep_no_graph_of_a_network_and_respect_the_chunks():
    model = Small()
    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    x = 80.0 * noise().float()
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=30, chunk_size=8)
    method = IIA("ddim", terms="window", target="trajectory", guard=False)

    def closed(ode, grid, x, teacher):
        return method.fit(ode, grid, x, teacher=teacher, chunk_size=8).plan

    found = search_grid(closed, ode, x, teacher, 3, leap_grids(80.0, 1.0)[:3], rounds=((1.0, 1),), chunk_size=8)
    assert not any(t.errors.requires_grad for t in found.trials)
    quiet(ode, 3, noise().float(), budget=REFINED, chunk_size=8)
    assert model.largest == 8


def test_a_budget_or_a_refinement_that_cannot_work_is_refused():
    for bad in (
        {"starts": -1},
        {"probes": 0},
        {"iterations": 0},
        {"teacher_steps": 1},
        {"descent": -1},
        {"levels": -1},
        {"finals": -0.5},
        {"finals": math.nan},
        {"finals": math.inf},
    ):
        with pytest.raises(iia.errors.InputError, match=f"no budget: {next(iter(bad))}"):
            Budget(**bad)
    for bad in ((), ((32, 3),), ((0.0, 3),), ((math.nan, 3),), ((0.5, 0),), ((0.5, 1.5),)):
        with pytest.raises(iia.errors.InputError, match="round"):
            Budget(rounds=bad)
    ode, x = mixture().ode(iia.EDM()), 80.0 * noise(6)
    plan = iia.plan.trace(iia.get_solver("ddim"), iia.EDM(), iia.grids.karras(3))
    for bad in ({"probes": 0}, {"iterations": 0}, {"held_out": 1.0}):
        with pytest.raises(iia.errors.InputError):
            iia.iia.refine(ode, x, plan, x, **bad)


def test_a_schedule_that_ends_just_before_the_data_can_be_fitted_for():
    schedule = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t, t_data=1e-3)
    found = quiet(mixture().ode(schedule, "velocity"), 4, noise(), budget=QUICK)
    assert found.plan.grid[-1] == 1e-3


def test_no_model_of_integer_timesteps_is_asked_below_the_first():
    from support import ALPHAS_CUMPROD

    model = Small()
    ode = iia.ProbabilityFlowODE(model, iia.Discrete(ALPHAS_CUMPROD), "noise")
    found = quiet(ode, 5, noise(), budget=REFINED)
    assert min(model.times) > -1e-4 and min(found.plan.evaluation_times) > -1e-4
