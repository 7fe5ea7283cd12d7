"""IIA: what a fit promises."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import in_turn, mixture

import iia_ode as iia
from iia_ode.experiments import get_setting
from iia_ode.iia import PRESETS
from iia_ode.metrics import rmse
from iia_ode.plan import Past
from iia_ode.plan.tracer import take_step

F64 = torch.float64
GRID = iia.grids.karras(6)
SCHEDULES = [iia.EDM(), iia.VP(), iia.FlowMatching(), iia.Cosine()]
presets = st.sampled_from(sorted(PRESETS))


def states(n=24, seed=0, schedule=None, sigma=80.0):
    schedule = schedule or iia.EDM()
    generator = torch.Generator().manual_seed(seed)
    return mixture().noisy(n, schedule, schedule.t_of_noise_to_signal(sigma), generator)


def edm():
    return mixture().ode(iia.EDM())


# ---- the paper's formulas, by hand -----------------------------------------------------------------------------------


def paper_biia_edm(ode, x, fit):
    """Equations 11-14: z + sum_k gamma_k h Delta_{i-k} with Heun's mean slopes."""
    slopes, coefficients = [], {r.index: dict(zip(r.symbols, r.values, strict=True)) for r in fit.reports}
    times = fit.plan.grid
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        d = (x - ode.data(x, t)) / t
        guess = x + (s - t) * d
        if s == 0:
            return guess
        slopes.insert(0, (d + (guess - ode.data(guess, s)) / s) / 2)
        c = coefficients[i]
        x = x + (s - t) * sum(c[f"gamma_{k}"] * v for k, v in enumerate(slopes[: len(c)]))
    return x


def paper_iia_edm(ode, x, fit):
    """Equations 15-19: beta on the two halves of Heun, gamma on earlier fitted updates without their own history."""
    earlier, coefficients = [], {r.index: dict(zip(r.symbols, r.values, strict=True)) for r in fit.reports}
    times = fit.plan.grid
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        data = ode.data(x, t)
        guess = x + (s - t) * (x - data) / t
        if s == 0:
            return guess
        c = coefficients[i]
        own = c["beta_0"] * (x - data) - c["beta_1"] / (2 * s) * (ode.data(guess, s) - data)
        x = x + (s - t) * (own + sum(c[f"gamma_{k}"] * v for k, v in enumerate(earlier, 1) if f"gamma_{k}" in c))
        earlier.insert(0, own)
    return x


def paper_differences(ode, x, fit):
    """Equations 20-23 and appendix C: Phi + phi_0 (x^_i - x^_{i-1}) + phi_1 (eps_i - eps_{i-1}), Phi the base's own step."""
    coefficients = {r.index: dict(zip(r.symbols, r.values, strict=True)) for r in fit.reports}
    base, times, earlier, memory = iia.preset(fit.name).base_solver, fit.plan.grid, [], ()
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        evaluation = ode.evaluate(x, t)
        earlier.insert(0, (evaluation.data, evaluation.noise))
        x, memory = take_step(base, ode, x, t, s, Past(memory, i, len(times) - 2 - i))
        for k, ((data, noise), (data_before, noise_before)) in enumerate(pairwise(earlier)):
            if f"phi_{2 * k}" in coefficients.get(i, {}):
                c = coefficients[i]
                x = x + c[f"phi_{2 * k}"] * (data - data_before) + c[f"phi_{2 * k + 1}"] * (noise - noise_before)
    return x


PAPER = {
    "biia-edm": paper_biia_edm,
    "iia-edm": paper_iia_edm,
    **dict.fromkeys(["iia-ddim", "iia-spndm", "iia-ipndm", "iia-dpmpp_2m"], paper_differences),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_fit_runs_the_papers_formula_with_the_coefficients_it_reports(name):
    fit = iia.preset(name, history=2).fit(edm(), states(), GRID)
    x = states(seed=1)
    by_hand = PAPER[name](edm(), x, fit)
    assert torch.allclose(iia.sample(edm(), x, solver=fit), by_hand, rtol=0, atol=1e-12 * float(x.abs().max()))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_base_values_of_the_coefficients_give_the_base(name):
    fit = iia.preset(name).fit(edm(), states(), GRID)
    base = iia.FittedSolver(fit.plan, tuple(_with_base_values(r) for r in fit.reports), fit.record)
    x = states(seed=1)
    expected = iia.sample(edm(), x, GRID, iia.preset(name).base_solver)
    assert torch.allclose(PAPER[name](edm(), x, base), expected, rtol=0, atol=1e-12 * float(x.abs().max()))


def _with_base_values(report):
    return type(report)(**{**report.__dict__, "values": report.base_values})


@in_turn("name, schedule", sorted(PRESETS), SCHEDULES)
def test_zero_corrections_are_the_base_exactly(name, schedule):
    grid = iia.grids.karras(6, schedule=schedule)
    method = iia.preset(name, ridge=1e300)
    fit = method.fit(mixture().ode(schedule), states(schedule=schedule), grid)
    assert fit.plan.difference(method.base_solver.plan(schedule, grid)) < 1e-13


# ---- properties of every fit -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    presets, st.integers(0, 10_000), st.integers(0, 2), st.integers(1, 4), st.sampled_from(SCHEDULES), st.integers(2, 8)
)
def test_no_fitted_step_is_farther_from_its_target_than_the_base(name, seed, history, substeps, schedule, n):
    grid = iia.grids.karras(n, schedule=schedule)
    x = states(n=6, seed=seed, schedule=schedule)
    fit = iia.preset(name, history=history, substeps=substeps).fit(mixture().ode(schedule), x, grid)
    assert all(r.after <= r.before for r in fit.reports)
    assert all(math.isfinite(v) for r in fit.reports for v in r.values)


@settings(max_examples=8)
@given(presets, st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(SCHEDULES))
def test_the_coefficients_do_not_depend_on_the_chunk_size(name, seed, chunk_size, schedule):
    grid = iia.grids.karras(4, schedule=schedule)
    ode, x = mixture().ode(schedule), states(12, seed, schedule)
    whole = iia.preset(name).fit(ode, x, grid)
    parts = iia.preset(name).fit(ode, x, grid, chunk_size=chunk_size)
    assert whole.plan.difference(parts.plan) < 1e-10
    for a, b in zip(whole.reports, parts.reports, strict=True):
        assert a.rank == b.rank
        assert torch.allclose(torch.tensor(a.corrections), torch.tensor(b.corrections), rtol=1e-10, atol=1e-10)


@in_turn("name, n", sorted(PRESETS), [2, 5, 9])
def test_a_fitted_solver_costs_what_its_base_costs(name, n):
    grid = iia.grids.karras(n)
    method = iia.preset(name)
    assert method.fit(edm(), states(n=4), grid).nfe == method.base_solver.plan(iia.EDM(), grid).nfe


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_reported_residuals_are_those_of_the_fitted_trajectory(name):
    """Fitting is sequential: a step starts where the fitted steps before it end, and aims at M base steps from there."""
    method, x = iia.preset(name), states()
    fit = method.fit(edm(), x, GRID)
    path = iia.odeint(edm(), x, method=fit)
    for r in fit.reports:
        start, end = path[r.index], path[r.index + 1]
        target = iia.sample(edm(), start, torch.linspace(r.t, r.s, 4, dtype=F64), method.base_solver)
        if method.base in ("heun", "ddim"):  # of one step, which needs no history
            base = iia.sample(edm(), start, torch.tensor([r.t, r.s], dtype=F64), method.base_solver)
            assert r.before == pytest.approx(float((target - base).square().mean().sqrt()), rel=1e-8)
        assert r.after == pytest.approx(float((target - end).square().mean().sqrt()), rel=1e-6, abs=1e-12)


@pytest.fixture(scope="module")
def unseen():
    """Initial states that no fit has seen, and the final states of the reference."""
    x = states(n=32, seed=9)
    return x, iia.reference.solve(edm(), x, 80.0, 0.0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_fit_cuts_the_error_of_its_base_on_unseen_noise(name, unseen):
    """Where the base is of high order, sub-steps of it without its history are no better, and the trajectory is."""
    one_step = iia.preset(name).base in ("heun", "ddim")
    method, (x, exact) = iia.preset(name, target="substeps" if one_step else "trajectory"), unseen
    for n in (3, 8):
        grid = iia.grids.karras(n)
        fit = method.fit(edm(), states(n=48), grid)
        base = iia.sample(edm(), x, grid, method.base_solver)
        assert (iia.sample(edm(), x, solver=fit) - exact).norm() < (base - exact).norm()


def test_the_local_target_is_the_flow_itself():
    x = states(8)
    fit = iia.preset("iia-edm", target=iia.iia.Local(rtol=1e-9)).fit(edm(), x, iia.grids.karras(3))
    path = iia.odeint(edm(), x, method=fit)
    for r in fit.reports:
        target = iia.reference.solve(edm(), path[r.index], r.t, r.s)
        assert r.after == pytest.approx(float((target - path[r.index + 1]).square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("name", ["biia-edm", "iia-edm"])
def test_the_step_to_the_data_is_not_fitted_over_heun_as_in_algorithm_1_and_every_other_is(name):
    to_data = iia.preset(name).fit(edm(), states(), iia.grids.karras(5))
    above = iia.preset(name).fit(edm(), states(), iia.grids.karras(5, to_data=False))
    assert [r.index for r in to_data.reports] == [0, 1, 2, 3]
    assert [r.index for r in above.reports] == [0, 1, 2, 3]
    assert above.grid.tolist()[-1] == 0.002


@pytest.mark.parametrize("name", ["iia-ddim", "iia-spndm", "iia-ipndm", "iia-dpmpp_2m"])
def test_the_differences_fit_the_step_to_the_data_too_unless_told_to_leave_it(name, tmp_path):
    fit, left = (iia.preset(name, last_step=v).fit(edm(), states(), GRID) for v in (True, False))
    assert [r.index for r in fit.reports] == [1, 2, 3, 4, 5]
    assert left.reports == fit.reports[:-1]
    assert (fit.record.last_step, left.record.last_step) == (True, False)
    assert "step to the data left" in str(iia.load(left.save(tmp_path / "left.safetensors")))
    assert "left" not in str(fit)


def test_other_terms_may_leave_the_step_to_the_data_too():
    fits = [iia.IIA("ddim", "window", guard=False, last_step=v).fit(edm(), states(), GRID) for v in (True, False)]
    assert [len(f.reports) for f in fits] == [6, 5]


def test_a_fitted_last_step_lowers_the_error_on_vp_and_changes_nothing_on_edm():
    setting, vp = get_setting("mixture"), iia.VP()
    ode = setting.problem.ode(vp)
    x, y = (setting.problem.noisy(n, vp, 1.0, torch.Generator().manual_seed(n)) for n in (200, 500))
    exact = iia.Teacher.solve(ode, y, 1.0, 0.0).final
    grid = torch.linspace(1, 0, 5, dtype=F64)
    left, fitted = (
        rmse(iia.sample(ode, y, solver=iia.preset("iia-ddim", last_step=v).fit(ode, x, grid)), exact)
        for v in (False, True)
    )
    assert fitted < 0.95 * left
    own, z = setting.draw(200, 0)
    both = [iia.preset("iia-ddim", last_step=v).fit(own, z, iia.grids.karras(8)) for v in (False, True)]
    a, b = (iia.sample(own, z, solver=fit) for fit in both)
    assert rmse(a, b) < 1e-4 * rmse(a, 0 * a)


def test_the_settings_of_table_1_go_by_name():
    assert iia.preset("biia-edm", settings="ffhq") == iia.preset("biia-edm", history=0)
    assert iia.preset("iia-edm", settings="ffhq") == iia.preset("iia-edm")
    for name in PRESETS:
        assert iia.preset(name, settings="usual") == iia.preset(name) == PRESETS[name]
        assert (iia.preset(name).substeps, iia.preset(name).history) == (3, 1)
    assert iia.preset("biia-edm", settings="ffhq", history=2).history == 2


def test_history_is_cut_short_where_the_run_starts():
    fit = iia.preset("biia-edm", history=2).fit(edm(), states(), GRID)
    assert [r.symbols for r in fit.reports[:4]] == [
        ("gamma_0",),
        ("gamma_0", "gamma_1"),
        ("gamma_0", "gamma_1", "gamma_2"),
        ("gamma_0", "gamma_1", "gamma_2"),
    ]
    assert [r.index for r in iia.preset("iia-ddim").fit(edm(), states(), GRID).reports] == [1, 2, 3, 4, 5]
    assert iia.preset("iia-ddim", history=0).fit(edm(), states(), GRID).reports == ()


def test_after_an_unfitted_ddim_step_the_two_directions_are_one():
    """D_1 - D_0 = -sigma_1 (eps_1 - eps_0): the system has rank one, and the correction is the smallest that fits."""
    reports = iia.preset("iia-ddim").fit(edm(), states(), GRID).reports
    assert [r.rank for r in reports] == [1, 2, 2, 2, 2]
    in_float32 = iia.preset("iia-ddim").fit(edm(), states().float(), GRID).reports
    assert in_float32[0].rank == 1
    assert in_float32[0].values == pytest.approx(reports[0].values, rel=1e-3)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("case", ["one sample", "equal samples", "constant model"])
def test_poor_batches_give_finite_coefficients(name, case):
    x = states(n=1) if case == "one sample" else states(n=1).expand(8, -1).clone()
    ode = edm()
    if case == "constant model":
        ode = iia.ProbabilityFlowODE(lambda x, t: torch.full_like(x, 0.3), iia.EDM())
    fit = iia.preset(name).fit(ode, x, GRID)
    assert all(math.isfinite(v) for r in fit.reports for v in r.values)
    assert all(r.after <= r.before for r in fit.reports)
    assert bool(torch.isfinite(iia.sample(ode, x, solver=fit)).all())


def test_states_keep_their_dtype_and_are_not_changed():
    x = states().float()
    before = x.clone()
    fit = iia.preset("iia-edm").fit(edm(), x, GRID)
    assert iia.sample(edm(), x, solver=fit).dtype == torch.float32
    assert torch.equal(x, before)


def test_a_fit_reports_what_it_spent():
    ode = edm()
    fit = iia.preset("iia-edm").fit(ode, states(), GRID, chunk_size=10)
    assert fit.record.evaluations == ode.nfe
    # 5 fitted steps of 2 + 3 * 2 evaluations less the shared one, and the last Euler step; three chunks
    assert ode.nfe == 3 * (5 * 7 + 1)
    assert fit.record.sample_evaluations == 24 * (5 * 7 + 1)


def test_any_base_and_any_directions_can_be_combined():
    def slopes(step, earlier):
        """The first model output of this step and of the one before; UniPC's last step makes none of its own."""
        made = [record.evaluations[0].data for record in (step, *earlier) if record.evaluations]
        return tuple(iia.iia.Term(f"a_{k}", output) for k, output in enumerate(made))

    for base in iia.solver_names():
        fit = iia.IIA(base, slopes, guard=False, substeps=2).fit(edm(), states(8), iia.grids.karras(3))
        assert fit.name == f"iia({base})"
        assert fit.record.terms == "slopes"
        assert all(r.after < r.before for r in fit.reports)


def test_conditions_travel_with_their_samples():
    def shifted(x, t, shift):
        return mixture().denoise(x - shift[:, None], 1.0, t[:, None]) + shift[:, None]

    shift, x, grid = torch.linspace(-2, 2, 6, dtype=F64), states(6), iia.grids.karras(3)
    ode = iia.ProbabilityFlowODE(shifted, iia.EDM(), conditioning={"shift": shift})
    whole, parts = (iia.preset("iia-edm").fit(ode, x, grid, chunk_size=c) for c in (6, 2))
    assert whole.plan.difference(parts.plan) < 1e-10
    other = iia.preset("iia-edm").fit(ode.condition(shift=shift.flip(0)), x, grid)
    assert other.reports[0].before != pytest.approx(whole.reports[0].before, rel=1e-3)


def test_paper_terms_are_those_of_the_base():
    x = states()
    bases = {"heun": "iia-edm", **{b: f"iia-{b}" for b in ("ddim", "spndm", "ipndm", "dpmpp_2m")}}
    for base, name in bases.items():
        fit = iia.IIA(base, guard=False).fit(edm(), x, GRID)
        assert fit.plan.difference(iia.preset(name).fit(edm(), x, GRID).plan) == 0
    for order in (1, 2, 3):
        assert iia.IIA(f"ipndm{order}", guard=False).fit(edm(), x, GRID).record.terms == "iia-ddim"
    with pytest.raises(
        iia.errors.InputError, match=r"no terms for base 'midpoint'.*terms='window' or terms='biia-edm'"
    ):
        iia.IIA("midpoint")


def test_iia_edm_is_refused_on_a_base_that_is_not_heun_even_with_two_evaluations():
    with pytest.raises(iia.errors.InputError, match="no such step"):
        iia.IIA("midpoint", "iia-edm").fit(edm(), states(), GRID)


def test_a_model_that_is_not_finite_is_named_while_fitting():
    ode = iia.ProbabilityFlowODE(lambda x, t: x * float("nan"), iia.EDM())
    with pytest.raises(iia.errors.NonFiniteError, match="not finite on this batch"):
        iia.preset("iia-edm").fit(ode, states(), GRID)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: iia.preset("iia-edn"), iia.errors.UnknownNameError, "Did you mean 'iia-edm'"),
        (lambda: iia.preset("iia-edm", histroy=2), iia.errors.UnknownNameError, "Did you mean 'history'"),
        (lambda: iia.IIA("huen", "iia-edm"), iia.errors.UnknownNameError, "Did you mean 'heun'"),
        (lambda: iia.preset("iia-ddim", settings="ffhq"), iia.errors.UnknownNameError, "settings of iia-ddim 'ffhq'"),
        (lambda: iia.preset("iia-edm", settings="fhq"), iia.errors.UnknownNameError, "Did you mean 'ffhq'"),
        (lambda: iia.IIA("ddim", last_step=0), iia.errors.InputError, "last_step must be True or False, got 0"),
        (lambda: iia.IIA("heun", "edm"), iia.errors.UnknownNameError, "set of terms 'edm'"),
        (lambda: iia.IIA("heun", "iia-edm", target="lokal"), iia.errors.UnknownNameError, "Did you mean 'local'"),
        (
            lambda: iia.IIA("heun", "iia-edm", history=-1),
            iia.errors.InputError,
            "history must be a whole number, at least 0",
        ),
        (
            lambda: iia.IIA("heun", "iia-edm", substeps=0),
            iia.errors.InputError,
            "substeps must be a whole number, at least 1",
        ),
        (lambda: iia.IIA(3, "iia-edm"), iia.errors.InputError, "expected the name of a registered solver"),
        (lambda: iia.IIA("heun", history=1.5), iia.errors.InputError, "history must be a whole number"),
        (lambda: iia.IIA("heun", substeps="3"), iia.errors.InputError, "substeps must be a whole number"),
        (lambda: iia.IIA("heun", ridge=float("nan")), iia.errors.InputError, "ridge.* must be a number.*got nan"),
        (lambda: iia.IIA("heun", ridge="best"), iia.errors.InputError, "'auto'.*got 'best'"),
        (lambda: iia.IIA("heun", ridge=None), iia.errors.InputError, "'auto'.*got None"),
        (
            lambda: iia.IIA("heun", ridge=torch.tensor(1e-6)),
            iia.errors.InputError,
            "ridge.* must be a number.*got tensor",
        ),
        (lambda: iia.IIA("heun", history=True), iia.errors.InputError, "history must be a whole number"),
        (lambda: iia.IIA("heun", guard="no"), iia.errors.InputError, "guard must be True or False, got 'no'"),
        (lambda: iia.IIA("heun", intercept=1), iia.errors.InputError, "intercept must be True or False, got 1"),
        (
            lambda: iia.IIA("ddim", terms=lambda step, earlier: None).fit(edm(), states(), GRID),
            iia.errors.InputError,
            "terms must be a function that returns a tuple",
        ),
        (
            lambda: iia.IIA("heun").fit(edm(), states(), GRID, held_out=1.0),
            iia.errors.InputError,
            "held_out.* must be .*got 1.0",
        ),
        (
            lambda: iia.IIA("heun").fit(edm(), states(), GRID, teacher="dopri8"),
            iia.errors.InputError,
            "teacher must be a Teacher",
        ),
        (
            lambda: iia.IIA("heun", lambda step, earlier: (step.x,)).fit(edm(), states(), GRID),
            iia.errors.InputError,
            "tuple of",
        ),
        (lambda: iia.preset("iia-edm").fit(lambda t, x: x, states(), GRID), iia.errors.InputError, "expected a Prob"),
        (
            lambda: iia.IIA("ddim", "iia-edm").fit(edm(), states(), GRID),
            iia.errors.InputError,
            "two halves of Heun's step",
        ),
        (lambda: iia.preset("iia-edm").fit(edm(), states().half(), GRID), iia.errors.InputError, "float32 or float64"),
        (lambda: iia.preset("iia-edm").fit(edm(), states(), GRID, chunk_size=0), iia.errors.InputError, "chunk_size"),
        (lambda: iia.preset("iia-edm").fit(edm(), states(), GRID.flip(0)), iia.errors.GridError, "at the data"),
        (lambda: iia.preset("iia-edm").fit(edm(), states()[:, :2], GRID), iia.errors.InputError, "must have shape"),
    ],
)
def test_misuse_says_what_to_write_instead(make, error, text):
    with pytest.raises(error, match=text):
        make()
