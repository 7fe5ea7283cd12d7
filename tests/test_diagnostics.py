"""Diagnostics: differences of plans, roots in the complex plane, irregular grids, tableaus, errors by step and component."""

import io
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode import testing
from iia_ode.plan import Past, butcher, gaussian_errors
from iia_ode.testing import conformance
from iia_ode.testing.orders import order_summary

F64 = torch.float64
MEAN, VARIANCE = torch.tensor([0.3, -0.6, 0.1], dtype=F64), torch.tensor([0.5, 0.2, 1.3], dtype=F64)


class Unstable(iia.Solver):
    """x+ = -4 x + 5 x_ + h (4 f + 2 f_): roots 1 and -5 already at h = 0."""

    order = 3

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        h, f = s - t, ode.velocity(x, t)
        if not past.memory:
            return x + h * f, (x, f)
        x1, f1 = past.memory
        return -4 * x + 5 * x1 + h * (4 * f + 2 * f1), (x, f)


class EqualSteps(iia.Solver):
    """Adams-Bashforth 2 with the weights of equal steps."""

    order = 2

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        f = ode.velocity(x, t)
        return x + (s - t) * ((1.5 * f - 0.5 * past.memory[0]) if past.memory else f), (f,)


# ---- differences -----------------------------------------------------------------------------------------------------


def test_the_difference_of_two_plans_is_the_same_both_ways() -> None:
    p, q = (iia.get_solver(n).plan(iia.EDM(), iia.grids.karras(8)) for n in ("ddim", "expab4"))
    assert p.difference(q) == q.difference(p) > 0.5
    again = iia.get_solver("ddim").plan(iia.EDM(), iia.grids.karras(8))
    assert p == again and p.difference(again) == 0.0


@given(
    st.lists(st.sampled_from(["ddim", "euler", "ab2", "ab4", "lms", "expab3"]), min_size=2, max_size=2), st.floats(0, 1)
)
@settings(max_examples=15, deadline=None)
def test_the_difference_is_symmetric_and_zero_for_equal_plans_only(names: list[str], moved: float) -> None:
    grids = iia.grids.karras(5), iia.grids.karras(5) * (1 + moved * 1e-10)
    p, q = (iia.get_solver(n).plan(iia.EDM(), g) for n, g in zip(names, grids, strict=True))
    assert p.difference(q) == q.difference(p)
    assert p.difference(p) == 0.0
    assert (p.difference(q) > 1e-9) == (names[0] != names[1] and set(names) not in ({"ddim", "euler"}, {"ab4", "lms"}))


# ---- stability -------------------------------------------------------------------------------------------------------


def test_a_zero_unstable_method_has_no_stability_interval_and_its_roots_are_found() -> None:
    assert testing.stability_limit(Unstable()) == 0.0
    growth = testing.stability_region(Unstable(), torch.tensor([0.0, -1.0, -6.0]))
    torch.testing.assert_close(growth, torch.tensor([5.0, 8.3589, 27.7477], dtype=F64), rtol=1e-4, atol=0.0)


def test_the_growth_of_a_runge_kutta_method_is_its_stability_function() -> None:
    z = torch.complex(*torch.meshgrid(torch.linspace(-3, 1, 5), torch.linspace(-3, 3, 7), indexing="ij")).to(
        torch.complex128
    )
    exact = (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24).abs()
    torch.testing.assert_close(testing.stability_region("rk4", z), exact, rtol=1e-6, atol=1e-3)
    assert testing.stability_limit("rk4", 1j) == pytest.approx(2 * math.sqrt(2), abs=1e-3)
    assert testing.stability_limit("euler", 1j) == pytest.approx(0.0, abs=5e-3)


def test_a_direction_or_points_that_are_none_are_refused() -> None:
    with pytest.raises(iia.errors.InputError, match="direction"):
        testing.stability_limit("euler", 0)
    with pytest.raises(iia.errors.InputError, match="z must be a tensor of finite numbers"):
        testing.stability_region("euler", 1.0)  # type: ignore[arg-type]


# ---- irregular grids -------------------------------------------------------------------------------------------------


def test_weights_of_equal_steps_fail_on_irregular_grids() -> None:
    with pytest.raises(iia.errors.ConformanceError, match=r"on irregular grids order 1\.00 on VP .*claimed 2"):
        conformance.check_irregular_grids_have_their_order(EqualSteps())


@pytest.mark.parametrize(
    "name", ["ipndm", "spndm", "dpmpp_3s_blocks", "lookahead", "denoise_to_zero", "ab3", "dpmpp_2m"]
)
def test_a_registered_solver_has_the_order_that_it_claims_on_irregular_grids(name: str) -> None:
    assert conformance.check_irregular_grids_have_their_order(iia.get_solver(name)) is None


def test_solvers_that_need_smooth_grids_say_so() -> None:
    assert iia.get_solver("ipndm").irregular_order == 1 < iia.get_solver("ipndm").order
    assert iia.get_solver("dpmpp_3s_blocks").irregular_order == 2
    assert iia.get_solver("denoise_to_zero", base="ipndm").irregular_order == 1
    assert iia.get_solver("lookahead", lam=0.5).irregular_order == 1
    assert iia.get_solver("heun").irregular_order == 2


# ---- certificates ----------------------------------------------------------------------------------------------------


class Claims3(iia.Solver):
    order = 3

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return iia.get_solver("heun").step(ode, x, t, s, past)


def test_a_wrong_claim_is_one_sentence_first() -> None:
    measured = testing.measure_orders(Claims3(), iia.VP())
    sentence = order_summary(measured, 3)
    assert sentence.startswith("order 2.00 on all 6 tracks, claimed 3") or " on all 6 tracks, claimed 3" in sentence
    problem = conformance.order_result(Claims3(), measured).problem
    assert problem is not None and problem.startswith(f"Claims3: {sentence}: ")
    assert order_summary(measured, 2) == ""
    assert order_summary(measured, 1).endswith("claimed 1: the claim is too low")


def test_a_plan_is_verified_on_its_own_grid() -> None:
    out = io.StringIO()
    certificate = testing.verify(
        iia.get_solver("dpmpp_2m").plan(iia.VP(), iia.grids.karras(6, schedule=iia.VP())), file=out
    )
    assert isinstance(certificate, testing.PlanCertificate)
    assert certificate.passed and certificate.consistent
    assert out.getvalue().startswith("dpmpp_2m: passed, consistent, a relative error of 0.")
    assert json.loads(json.dumps(certificate.as_dict(), allow_nan=False))["evaluations"] == [1] * 6
    broken = testing.verify(
        iia.plan.trace(Unstable(), iia.EDM(), iia.grids.uniform(9, 5.0, 0.5), consistent=False), quiet=True
    )
    assert not broken.passed
    assert "FAILED, a disturbance grows" in str(broken).splitlines()[0]


def test_a_fit_is_verified_and_its_steps_are_compared_with_a_teacher() -> None:
    schedule, grid = iia.EDM(), iia.grids.karras(5, 0.02, 20.0)
    problem = iia.problems.Gaussian(MEAN, VARIANCE)
    ode, x = problem.ode(schedule), problem.noisy(32, schedule, 20.0, torch.Generator().manual_seed(0))
    fit = iia.IIA("ddim").fit(ode, x, grid)
    certificate = testing.verify(fit, quiet=True)
    assert certificate.passed and certificate.fitted and "finite" in certificate.diagnosis
    teacher = iia.Teacher.for_grid(ode, x, grid)
    plan = iia.get_solver("expab2").plan(schedule, grid)
    for solver in (plan, fit):
        assert testing.local_errors(ode, x, solver, teacher).shape == (5, 32)
    own = testing.local_errors(ode, x, plan, teacher)
    # By hand: the second step, with the first state and the memory on the exact flow.
    t = grid.tolist()
    first = problem.flow(x, schedule, t[0], t[1])
    solver, memory = iia.get_solver("expab2"), iia.get_solver("expab2").step(ode, x, t[0], t[1], Past())[1]
    y = solver.step(ode, first, t[1], t[2], Past(memory, 1, 3))[0]
    gap = (y - problem.flow(x, schedule, t[0], t[2])).square().mean(1).sqrt()
    torch.testing.assert_close(own[1], gap, rtol=1e-3, atol=1e-6)
    with pytest.raises(iia.errors.InputError, match="plan must be a Plan or a FittedSolver"):
        testing.local_errors(ode, x, "ddim", teacher)  # type: ignore[arg-type]


# ---- canonical forms and errors --------------------------------------------------------------------------------------


def test_a_runge_kutta_plan_has_its_butcher_tableau() -> None:
    tableau = butcher(iia.get_solver("rk4").plan(iia.VP(), iia.grids.karras(4, schedule=iia.VP())), 1)
    torch.testing.assert_close(tableau.b, torch.tensor([1, 2, 2, 1], dtype=F64) / 6)
    torch.testing.assert_close(tableau.a[1:, :3], torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=F64)))
    torch.testing.assert_close(tableau.c, torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=F64))
    torch.testing.assert_close(tableau.keep, torch.ones(5, dtype=F64))
    with pytest.raises(iia.errors.PlanError, match="a multistep method has no Butcher tableau"):
        butcher(iia.get_solver("ab2").plan(iia.VP(), iia.grids.karras(4, schedule=iia.VP())), 2)


@pytest.mark.parametrize("form", ["data", "noise", "velocity", "v", "score"])
def test_canonical_weights_in_every_form_give_the_plans_states(form: str) -> None:
    schedule = iia.VP()
    plan = iia.get_solver("unipc").plan(schedule, iia.grids.karras(5, 0.1, 10.0, schedule=schedule, to_data=False))
    problem = iia.problems.Gaussian(MEAN, VARIANCE)
    ode, x = problem.ode(schedule), problem.noisy(4, schedule, plan.grid[0], torch.Generator().manual_seed(0))
    matrix, vectors = plan.canonical().matrix(form), [x]
    for row, t in zip(matrix[:-1], plan.evaluation_times, strict=True):
        state = sum(w * v for w, v in zip(row.tolist(), vectors, strict=False))
        vectors.append(ode.as_form(state, t, form))
    final = sum(w * v for w, v in zip(matrix[-1].tolist(), vectors, strict=True))
    torch.testing.assert_close(final, plan.run(ode, x), rtol=1e-10, atol=1e-10)


def test_errors_on_gaussian_data_are_known_by_component_and_by_step() -> None:
    schedule = iia.EDM()
    plan = iia.get_solver("dpmpp_2m").plan(schedule, iia.grids.karras(6))
    errors, problem = gaussian_errors(plan, MEAN, VARIANCE), iia.problems.Gaussian(MEAN, VARIANCE)
    assert float(errors.components.square().mean().sqrt()) == pytest.approx(
        plan.on_gaussian(MEAN, VARIANCE).rmse, rel=1e-9
    )
    assert errors.states.shape == errors.steps.shape == (6, 3) and errors.per_step.shape == (6,)
    torch.testing.assert_close(errors.states[0], errors.steps[0])
    x = problem.noisy(40000, schedule, plan.grid[0], torch.Generator().manual_seed(0))
    states = plan.run(problem.ode(schedule), x, trajectory=True)
    for k in (2, 4):
        gap = (states[k] - problem.flow(x, schedule, plan.grid[0], plan.grid[k])).square().mean(0).sqrt()
        torch.testing.assert_close(errors.states[k - 1], gap, rtol=0.03, atol=1e-6)


def test_the_module_of_experiments_is_there_after_the_import_of_the_package() -> None:
    assert iia.experiments.get_setting("mixture")
    with pytest.raises(AttributeError, match="has no attribute 'experiment'"):
        iia.experiment  # noqa: B018
