"""The promises of `iia_ode.fit`: arguments, silence, accuracy, and the account of a fit."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from fits import QUICK, REFINED, Labelled, Small, exact_end, median_error, start_of
from support import ALL_SCHEDULES, ALPHAS_CUMPROD, generator, mixture, normal
from torch import nn

import iia_ode as iia
from iia_ode import IIA, Budget, FittedSolver, Teacher, fit
from iia_ode.errors import (
    GridError,
    InputError,
    ScheduleError,
    UnknownNameError,
)

EDM = iia.EDM()
NOISE = normal(80, 4)


def messages(caplog):
    return [r.message for r in caplog.records if r.name.startswith("iia_ode")]


@pytest.fixture
def said(caplog):
    """The findings of a fit, as the logger `iia_ode` has them at level INFO."""
    caplog.set_level(logging.INFO, "iia_ode")
    return lambda: messages(caplog)


class Made:
    """A fit with its log and its ledger."""

    def __init__(self, budget, caplog, weights="auto"):
        self.ode = mixture().ode(EDM)
        with caplog.at_level(logging.INFO, "iia_ode"), self.ode.counting() as self.spent:
            self.fit = fit(self.ode, 2, noise=NOISE, budget=budget, weights=weights)
        self.said = messages(caplog)
        self.search = self.fit.record.search


@pytest.fixture(scope="module")
def made():
    """Fits by budget, each made once."""
    return {}


@pytest.fixture
def plain(made, caplog):
    if "plain" not in made:
        made["plain"] = Made(replace(QUICK, chunk_size=16), caplog)
    return made["plain"]


@pytest.fixture
def refined(made, caplog):
    if "refined" not in made:
        made["refined"] = Made(REFINED, caplog, "scalars")
    return made["refined"]


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_a_fit_starts_from_noise_or_from_states_or_from_a_shape():
    ode = mixture().ode(EDM)
    a, b = fit(ode, 1, noise=NOISE, budget=QUICK), fit(ode, 1, x=80.0 * NOISE, budget=QUICK)
    assert a.plan.difference(b.plan) == 0
    drawn = [fit(ode, 1, shape=(4,), samples=32, seed=seed, budget=QUICK) for seed in (0, 0, 1)]
    assert drawn[0].record.batch == 32 and drawn[0].record.seed == 0
    assert drawn[0].plan.difference(drawn[1].plan) == 0 < drawn[0].plan.difference(drawn[2].plan)


def test_a_fit_takes_exactly_one_of_noise_and_states_and_shape():
    ode = mixture().ode(EDM)
    for bad in ({}, {"noise": NOISE, "x": NOISE}, {"noise": NOISE, "shape": (4,)}, {"x": NOISE, "shape": (4,)}):
        with pytest.raises(InputError, match=r"one of noise= .* x= .* shape= .* or images="):
            fit(ode, 3, **bad)
    with pytest.raises(InputError, match=r"root mean square is 6\.9: pass initial states as x="):
        fit(ode, 3, noise=7.0 * NOISE)
    with pytest.raises(InputError, match="at least 8 different draws of noise, better 152, got 4"):
        fit(ode, 3, noise=NOISE[:4])
    for bad in (NOISE[0, 0], NOISE.long(), [0.0] * 8):
        with pytest.raises(InputError, match=r"noise must be a float tensor \[B, ...\]"):
            fit(ode, 3, noise=bad)


def test_states_of_the_size_of_standard_noise_are_taken_as_they_are():
    ode = mixture().ode(EDM)
    x = mixture().noisy(60, EDM, 1.0, generator())
    teacher = Teacher.solve(ode, x, 1.0, 0.0, steps=30)  # refused if the fit started anywhere else
    found = fit(ode, 2, x=x, sigma_max=1.0, teacher=teacher, budget=QUICK)
    assert found.plan.grid[0] == 1.0 and found.nfe == 2


def test_bad_arguments_say_what_was_wrong():
    ode = mixture().ode(EDM)
    with pytest.raises(UnknownNameError, match="closed-form"):
        fit(ode, 4, noise=NOISE, budget="huge")
    with pytest.raises(InputError, match=r"or a Budget\(\.\.\.\)"):
        fit(ode, 4, noise=NOISE, budget=Budget)
    for bad in (0, 2.5, True):
        with pytest.raises(InputError, match="nfe"):
            fit(ode, bad, noise=NOISE)
    for name, bad in (
        ("shape", 4),
        ("shape", ()),
        ("shape", (4.0,)),
        ("samples", 16.0),
        ("samples", -4),
        ("seed", None),
    ):
        with pytest.raises(InputError, match=f"{name} .* got"):
            fit(ode, 4, **{"shape": (4,), "samples": 16, name: bad})
    with pytest.raises(InputError, match=r"seed .* below"):
        fit(ode, 4, noise=NOISE, seed=2**70)
    with pytest.raises(GridError, match="sigma_max"):
        fit(ode, 4, noise=NOISE, sigma_max=-1.0)


def test_a_budget_that_cannot_work_is_refused():
    least = {"starts": -1, "probes": 0, "iterations": 0, "teacher_steps": 1, "trials": 0, "judges": 1, "draws": -1}
    for name, bad in (*least.items(), ("finals", -0.5), ("finals", float("nan")), ("finals", float("inf"))):
        with pytest.raises(InputError, match=f"no budget: {name}"):
            Budget(**{name: bad})
    for name, bad in (
        ("held_out", 1.0),
        ("held_out", True),
        ("chunk_size", 0),
        ("chunk_size", 2.5),
        ("minibatch", 0),
        ("most", 7),
        ("chunk_size", True),
    ):
        with pytest.raises(InputError, match=f"{name} must be"):
            Budget(**{name: bad})
    for name in ("warm_starts", "checkpointed"):
        with pytest.raises(InputError, match=name):
            Budget(**{name: 1})


def test_an_ode_with_an_evaluate_of_its_own_is_refused_and_not_passed_over():
    class Scaled(iia.ProbabilityFlowODE):
        def evaluate(self, x, t, form="data"):
            return super().evaluate(0.9 * x, t, form)

    class Louder(iia.ProbabilityFlowODE):
        def output(self, x, t):
            return 0.9 * super().output(x, t)

    with pytest.raises(InputError, match="Scaled overrides evaluate"):
        fit(Scaled(mixture().ode(EDM).model, EDM), 1, noise=NOISE, budget=QUICK)
    plain, louder = (
        fit(kind(mixture().ode(EDM).model, EDM), 1, noise=NOISE, budget=QUICK)
        for kind in (iia.ProbabilityFlowODE, Louder)
    )
    assert plain.plan.difference(louder.plan) > 0.01  # the output that it overrides is what is fitted to


# ---- what a fit says -------------------------------------------------------------------------------------------------


def test_a_fit_is_silent_unless_asked_for_progress(capfd, caplog):
    ode = mixture().ode(EDM)
    fit(ode, 1, noise=NOISE, budget=QUICK)
    assert capfd.readouterr() == ("", "") and not messages(caplog)
    fit(ode, 1, noise=NOISE, budget=QUICK, progress=True)
    out, err = capfd.readouterr()
    assert not out and "teacher" in err and "100%" in err


def test_the_log_has_the_expected_cost_first_and_the_choice_last(plain, refined):
    for one in (plain, refined):
        assert "80 draws of noise" in one.said[0] and one.said[-1].startswith(
            f"chosen: {one.search.chosen.name}, error"
        )
        for tried in one.search.ingredients:
            assert any(line.startswith(f"{tried.name}: error {tried.error:.4g}") for line in one.said)


def test_the_cost_that_is_announced_is_about_what_is_spent(said):
    found = fit(mixture().ode(EDM), 3, noise=NOISE[:64], budget="closed-form")
    announced = int(re.search(r"about (\d+) sample evaluations", said()[0])[1])
    assert 1 / 1.2 < announced / found.record.sample_evaluations < 1.2


def test_everything_that_is_spent_is_in_the_record(plain, refined):
    for one in (plain, refined):
        parts = [*one.search.ingredients, *one.search.costs.values()]
        own = sum(p.sample_evaluations for p in parts)
        # The rest told the size of the data, or timed the model.
        assert 0 <= one.fit.record.sample_evaluations - own < 0.03 * own
        assert one.search.costs["teacher"].sample_evaluations == 51 * 80 + 2 * 76  # the last: its error
        assert one.fit.record.evaluations == one.spent.evaluations
    assert plain.fit.record.sample_evaluations == plain.spent.samples
    assert refined.fit.record.sample_evaluations > refined.spent.samples  # backward passes count as two evaluations


@pytest.mark.parametrize(
    ("name", "most"), [("quick", (1500, 1500)), ("closed-form", (6000, 9000)), ("standard", (20_000, 30_000))]
)
def test_the_budgets_cost_what_their_names_say(name, most):
    for nfe, limit in zip((5, 8), most, strict=True):
        found = iia.fit_cost(mixture().ode(EDM), nfe, name, samples=256, shape=(3, 16, 16))
        assert 0.5 * limit < found.sample_evaluations < limit


@pytest.mark.parametrize("name", ["quick", "closed-form", "standard"])
@pytest.mark.parametrize("nfe", [3, 6])
def test_the_cost_before_a_fit_is_within_a_fifth_of_its_cost(name, nfe):
    ode = mixture().ode(EDM)
    expected = iia.fit_cost(ode, nfe, name, samples=160).sample_evaluations
    assert (
        expected / 1.2 < fit(ode, nfe, shape=(4,), samples=160, budget=name).record.sample_evaluations < 1.2 * expected
    )


def test_a_teacher_is_more_accurate_the_more_accurate_the_fit_can_be():
    for budget in iia.autofit.BUDGETS.values():
        assert budget.steps(1) == budget.teacher_steps < budget.steps(30) == 120


def test_of_more_draws_than_a_budget_uses_a_random_part_with_all_conditions_is_used():
    model, label, budget = Labelled(), torch.arange(64) % 4, replace(QUICK, most=32)
    ode = iia.ProbabilityFlowODE(model, EDM, conditioning={"label": label})
    found = fit(ode, 2, noise=NOISE[:64], budget=budget)
    assert found.record.batch == 32 and found.record.search.given == 64
    _, states, labels = max(model.asked, key=lambda call: len(call[1]))
    assert len(states) == 32 and labels.unique().tolist() == [0, 1, 2, 3]
    assert fit(ode, 2, noise=NOISE[:64], budget=budget, seed=1).plan.difference(found.plan) > 0


def test_the_account_lists_every_solver_with_its_error_and_marks_one(refined):
    tried = refined.search.ingredients
    assert [i.name for i in tried if i.chosen] == [refined.search.chosen.name]
    assert tried[0].name == "ipndm3, not fitted" and tried[0].error == refined.fit.record.endpoint.base
    assert refined.search.chosen.error == refined.fit.record.endpoint.fit < tried[0].error
    assert any("refined" in i.name for i in tried)
    text = refined.fit.explain()
    assert "on 40 held-out samples" in text and all(f"{i.error:.3g}" in text for i in tried)
    assert "iterations over all weights and times" in str(refined.fit) and "steps 50" in str(refined.fit)


def test_the_table_of_a_refined_fit_has_every_weight_of_its_plan(refined):
    lines = refined.fit.table().splitlines()
    assert not refined.fit.reports and len(lines) == 2 + refined.fit.nfe
    for line, row in zip(lines[1:], (*(form := refined.fit.plan.canonical()).states, form.final), strict=True):
        assert all(f"{w:.4f}" in line for w in row.weights.values())


@pytest.mark.parametrize("name", ["plain", "refined"])
def test_a_fit_survives_its_file(tmp_path, name, request):
    found = request.getfixturevalue(name).fit
    path = found.save(tmp_path / "fit.safetensors")
    again = iia.load(path)
    ode, x = mixture().ode(EDM), start_of(found, normal(8, 4, seed=2))
    assert torch.equal(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=found))
    assert isinstance(again, FittedSolver) and again.record == found.record
    assert again.explain() == found.explain() and str(again) == str(found) == iia.iia.describe(path)
    assert found.name in str(again) and found.table() in str(again)


# ---- how good a fit is -----------------------------------------------------------------------------------------------

# As the last of all schedules, but it ends before the data.
ENDS_EARLY = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t, t_data=1e-3)


@pytest.mark.parametrize("schedule", [*ALL_SCHEDULES[:-1], ENDS_EARLY], ids=lambda s: type(s).__name__)
def test_one_call_gives_a_solver_twice_as_accurate_as_the_best_classic_ones(schedule):
    ode = mixture().ode(schedule, "velocity" if schedule is ENDS_EARLY else "data")
    found = fit(ode, 2, noise=NOISE, budget=replace(QUICK, trials=2))
    assert found.nfe == 2 and found.plan.grid[-1] == schedule.t_data
    x = start_of(found, normal(80, 4, seed=1))
    exact = exact_end(ode, x, found.grid[0])
    top = min(schedule.noise_to_signal(found.plan.grid[0]), 80.0)
    classic = []
    for solver in ("ipndm3", "dpmpp_3m", "unipc", "deis_lab3"):
        for sigma_min in (0.03, 0.2):
            grid = iia.grids.karras(2, sigma_min, top, schedule=schedule, to_data=False)
            grid = torch.cat([found.grid[:1], grid[1:], found.grid[-1:]])
            try:
                classic.append(median_error(ode, iia.get_solver(solver), x, exact, grid))
            except ScheduleError:  # no data estimate of noise where alpha = 0
                continue
    assert median_error(ode, found, x, exact) < 0.5 * min(classic)


def test_a_bigger_budget_is_better_on_unseen_noise(plain, refined):
    x = start_of(plain.fit, normal(400, 4, seed=5))
    exact = exact_end(plain.ode, x, plain.fit.grid[0])
    small, large = (median_error(one.ode, one.fit, x, exact) for one in (refined, plain))
    assert small < 0.85 * large
    assert refined.fit.record.sample_evaluations > plain.fit.record.sample_evaluations


@pytest.mark.parametrize(("nfe", "warm_starts"), [(1, False), (1, True), (2, True)])
def test_very_few_evaluations_work_too(nfe, warm_starts):
    ode = mixture().ode(EDM)
    found = fit(ode, nfe, noise=NOISE, budget=replace(REFINED, warm_starts=warm_starts))
    assert found.nfe == nfe
    assert any("warm start" in i.name for i in found.record.search.ingredients) == warm_starts
    x = start_of(found, normal(80, 4, seed=1))
    exact = exact_end(ode, x, found.grid[0])
    assert median_error(ode, found, x, exact) <= 1.02 * median_error(ode, iia.get_solver("ddim"), x, exact, found.grid)


def test_the_same_noise_and_seed_give_the_same_fit(refined):
    again = fit(mixture().ode(EDM), 2, noise=NOISE, budget=REFINED, weights="scalars")
    assert again.plan.difference(refined.fit.plan) == 0


def test_memory_of_refinements_is_bounded_where_one_asks(refined):
    bounded = fit(mixture().ode(EDM), 2, noise=NOISE, budget=replace(REFINED, checkpointed=True), weights="scalars")
    assert refined.fit.plan.difference(bounded.plan) < 1e-9
    assert bounded.record.evaluations > refined.fit.record.evaluations  # those made again on the way back


def test_the_chosen_solver_is_fitted_once_more_to_all_of_the_noise(plain):
    chosen, x = plain.search.chosen, 80.0 * NOISE
    assert plain.search.fitted_to_all and "fitted once more, to all 80 samples" in plain.fit.explain()
    assert ", then on all of them" in str(plain.fit)
    teacher = Teacher.solve(plain.ode, x, 80.0, 0.0, steps=50)
    method = IIA(
        "ddim", "window", "trajectory", history=2, ridge="auto", guard=False, intercept="intercept" in chosen.name
    )
    whole = method.fit(plain.ode, x, plain.fit.grid, teacher=teacher, held_out=0.2)
    assert plain.fit.plan.difference(whole.plan) < 1e-9
    assert (plain.search.steps.batch, plain.search.steps.held_out) == (80, 16)


def test_with_little_noise_for_its_weights_the_fit_that_was_judged_stays():
    found = fit(mixture().ode(EDM), 2, noise=NOISE[:16], budget=REFINED)
    assert not found.record.search.fitted_to_all and "fitted once more" not in found.explain()


def test_a_model_without_gradients_is_fitted_in_closed_form_and_the_attempt_is_listed_with_its_cost(said):
    class Detached(nn.Module):
        def forward(self, x, t):
            return (x / (1 + t.reshape(-1, 1) ** 2)).detach()

    found = fit(iia.ProbabilityFlowODE(Detached(), EDM), 2, noise=NOISE, budget=REFINED)
    tried, end = found.record.search.ingredients, found.record.endpoint
    failed = [i for i in tried if i.error is None]
    assert found.record.search.refinement is None and any("gradient" in line for line in said())
    assert len(failed) == 1 and failed[0].name.endswith(", refined") and failed[0].sample_evaluations > 0
    assert f"Chosen from {len(tried) - 1} solvers" in found.explain()
    # The rival is not the base of the fit on its grid, and the reports do not call it so.
    assert tried[0].name == "ipndm3, not fitted"
    assert f"held-out noise: ipndm3 without a fit {end.base:.3g}, fit {end.fit:.3g}" in str(found)


def test_a_fit_keeps_the_dtype_of_its_states_and_respects_the_chunks():
    model = Small()
    found = fit(iia.ProbabilityFlowODE(model, EDM), 2, noise=NOISE.float(), budget=replace(REFINED, chunk_size=8))
    assert model.largest == 8 and found.record.origin.state_dtype == "float32"
    assert iia.sample(iia.ProbabilityFlowODE(model, EDM), 80.0 * NOISE.float(), solver=found).dtype == torch.float32


def test_no_model_of_integer_timesteps_is_asked_below_the_first():
    model = Small()
    found = fit(iia.ProbabilityFlowODE(model, iia.Discrete(ALPHAS_CUMPROD), "noise"), 3, noise=NOISE, budget=REFINED)
    assert min(model.times) > -1e-4 and min(found.plan.evaluation_times) > -1e-4
