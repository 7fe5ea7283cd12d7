"""Which solvers a plan accepts: those that converge, whatever they keep exactly; and in what words it refuses the others."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode.plan import Past
from iia_ode.plan.consistency import consistency_error

F64 = torch.float64
TABLE = iia.schedules.Discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
SCHEDULES = [iia.VP(), iia.FlowMatching(), TABLE]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def times(schedule: iia.Schedule, lams: list[float]) -> torch.Tensor:
    return torch.tensor([schedule.t_of_lam(lam) for lam in lams], dtype=F64)


def grids(schedule: iia.Schedule) -> dict[str, torch.Tensor]:
    """Grids of every kind: to the data and not, of few and many steps, irregular, and encoding."""
    inner = iia.grids.karras(7, 0.05, 20.0, schedule=schedule, to_data=False)
    return {
        "two steps": iia.grids.karras(2, 0.05, 20.0, schedule=schedule),
        "to the data": iia.grids.karras(20, schedule=schedule),
        "encoding": inner.flip(0),
        "irregular": times(schedule, [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]),
    }


class Lawson(iia.Solver):
    """An integrating-factor Runge-Kutta method: d(x/sigma)/dlam = exp(lam) D."""

    order, a, b, c, weight = 1, (), (1.0,), (0.0,), 1.0

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        schedule = ode.schedule
        start, end, data = schedule.lam(t), schedule.lam(s), ode.data(x, t)
        if not (math.isfinite(start) and math.isfinite(end)):
            ratio = schedule.sigma(s) / schedule.sigma(t)
            return ratio * x + (schedule.alpha(s) - ratio * schedule.alpha(t)) * data
        h, y, k = end - start, x / schedule.sigma(t), [math.exp(start) * data]
        for row, node in zip(self.a, self.c[1:], strict=True):
            lam = start + node * h
            u = s if node == 1 else schedule.t_of_lam(lam)
            stage = y + sum(h * w * slope for w, slope in zip(row, k, strict=True))
            k.append(math.exp(lam) * ode.data(schedule.sigma(u) * stage, u))
        total = sum(w * slope for w, slope in zip(self.b, k, strict=True))
        return schedule.sigma(s) * (y + self.weight * h * total)


class Lawson2(Lawson):
    order, a, b, c = 2, ((1.0,),), (0.5, 0.5), (0.0, 1.0)


class Lawson4(Lawson):
    order, b, c = 4, (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
    a = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))


class LawsonWithWrongWeight(Lawson):
    weight = 0.99


class Linearized(iia.Solver):
    """Rosenbrock-like: the step is (e^(h J) - 1) / J with a guess J of the derivative, nonlinear in h."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        schedule = ode.schedule
        if ode.is_data(s) or schedule.alpha(t) == 0:
            return iia.get_solver("ddim").step(ode, x, t, s, past)
        j = schedule.sigma(t) * schedule.sigma_prime(t) / (schedule.sigma(t) ** 2 + 1)
        return x + math.expm1((s - t) * j) / j * ode.velocity(x, t)


class ByUnitSize(iia.Solver):
    """Euler on x / sqrt(alpha^2 + sigma^2)."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        schedule = ode.schedule
        if ode.is_data(s) or schedule.alpha(t) == 0:
            return iia.get_solver("ddim").step(ode, x, t, s, past)
        a, sigma, size = schedule.alpha(t), schedule.sigma(t), schedule.size(t)
        grown = (a * schedule.alpha_prime(t) + sigma * schedule.sigma_prime(t)) / size**2
        return schedule.size(s) / size * (x + (s - t) * (ode.velocity(x, t) - grown * x))


class Leapfrog(iia.Solver):
    """Roots 1 and -1: zero-stable, though a disturbance stays in every other state."""

    order = 2

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        slope = ode.velocity(x, t)
        if not past.memory:
            return x + (s - t) * slope, (x, t)
        before, u = past.memory
        return before + (s - u) * slope, (x, t)


RIGHT = [Lawson(), Lawson2(), Linearized(), ByUnitSize(), Leapfrog()]


@every_schedule
@pytest.mark.parametrize("solver", RIGHT, ids=lambda s: s.name)
def test_a_solver_that_converges_has_a_plan_whatever_solution_it_keeps(
    solver: iia.Solver, schedule: iia.Schedule
) -> None:
    for name, grid in grids(schedule).items():
        assert solver.plan(schedule, grid).steps == len(grid) - 1, name


def test_lawsons_method_has_a_plan_with_few_steps_and_with_many() -> None:
    schedule = iia.FlowMatching()
    for n in (5, 20):
        assert Lawson4().plan(schedule, iia.grids.karras(n, schedule=schedule)).nfe == 4 * (n - 1) + 1


@pytest.mark.parametrize("base", ["heun", "euler", "midpoint", "rk4"])
def test_an_end_on_the_data_estimate_is_consistent_for_every_number_of_timesteps(base: str) -> None:
    solver = iia.get_solver("denoise_to_zero", base=base)
    for n in range(2, 26, 3 if base == "euler" else 8):
        assert solver.plan(TABLE, iia.grids.discrete(n, TABLE)).steps >= n - 1


@pytest.mark.parametrize("solver", [Lawson2(), Lawson4()], ids=lambda s: s.name)
def test_a_kink_at_the_end_of_a_table_is_no_inconsistency(solver: iia.Solver) -> None:
    assert solver.plan(TABLE, iia.grids.discrete(3, TABLE)).steps == 3


def test_rounding_is_no_inconsistency() -> None:
    plan = iia.get_solver("deis_rho_kutta").plan(iia.VP(), iia.grids.karras(2, schedule=iia.VP()))
    assert 0 < consistency_error(plan) < 1e-8


class Written(iia.Solver):
    """A step written as an expression of x, the step h, the velocity v, DDIM's result d, and the memory of x, h and v."""

    order = 1

    def __init__(self, result: str) -> None:
        self.result = result

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        v, h, d = ode.velocity(x, t), s - t, iia.get_solver("ddim").step(ode, x, t, s, past)
        ratio = ode.schedule.sigma(s) / ode.schedule.sigma(t)
        names = {"x": x, "h": h, "v": v, "d": d, "ratio": ratio, "data": ode.data(x, t), "sqrt": math.sqrt}
        names |= dict(zip(("x1", "h1", "v1"), past.memory or (x, h, v), strict=True))
        names["end"] = 0.99 if ode.is_data(s) else 1.0
        return (x + h * v if self.result != "end * d" and past.index == 0 else eval(self.result, names)), (x, h, v)


@pytest.mark.parametrize("name", ["to the data", "encoding", "irregular"])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("x + 0.99 * h * v", "not a consistent solver.*weights of the step"),
        ("0.999 * x + h * v", "not a consistent solver.*weights of the step"),
        ("ratio * x + (1 - ratio) * data", "not a consistent solver"),  # a wrong alpha
        ("ratio * x", "not a consistent solver"),  # ignores its evaluation
        ("-4 * x + 5 * x1 + h * (4 * v + 2 * v1)", "is zero-unstable.*weights of the earlier states"),
        ("-0.1 * x + 1.1 * x1 + (h + 1.1 * h1) * v", "is zero-unstable"),
    ],
)
def test_a_solver_that_does_not_converge_is_refused_in_words_that_say_why_and_what_to_do(
    result: str, words: str, name: str
) -> None:
    with pytest.raises(iia.errors.PlanError, match=words) as caught:
        Written(result).plan(iia.VP(), grids(iia.VP())[name])
    assert "consistent = False" in str(caught.value)


def test_a_wrong_step_to_the_data_is_named() -> None:
    with pytest.raises(iia.errors.PlanError, match=r"close to sigma = 0 its error stays at 0\.01"):
        Written("end * d").plan(iia.VP(), grids(iia.VP())["to the data"])


@pytest.mark.parametrize("schedule", [iia.EDM(), TABLE], ids=lambda s: type(s).__name__)
def test_a_small_error_of_a_weight_is_seen_in_a_method_that_keeps_nothing_exactly(schedule: iia.Schedule) -> None:
    with pytest.raises(iia.errors.PlanError, match="not a consistent solver"):
        LawsonWithWrongWeight().plan(schedule, grids(schedule)["to the data"])


def test_a_method_for_equal_steps_has_plans_on_equal_steps_and_is_told_so_on_others() -> None:
    solver = Written("x + (h / abs(h)) * sqrt(h * h1) * v")
    assert solver.plan(iia.EDM(), iia.grids.uniform(10, 5.0, 0.5)).nfe == 10
    with pytest.raises(iia.errors.PlanError, match="converges on grids of equal steps only"):
        solver.plan(iia.EDM(), grids(iia.EDM())["irregular"])


def test_a_zero_unstable_method_is_refused_on_a_grid_where_it_is_exact() -> None:
    unstable = Written("-4 * x + 5 * x1 + h * (4 * v + 2 * v1)")
    with pytest.raises(iia.errors.PlanError, match="is zero-unstable"):
        unstable.plan(iia.EDM(), iia.grids.uniform(3, 5.0, 0.5))


class Hidden(iia.Solver):
    """Roots 1 and -1.5 of the earlier states, which steps to half the level damp for data that does not move."""

    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        f = ode.velocity(x, t)
        if not past.memory:
            return x + (s - t) * f, (x, f, t)
        x1, f1, t1 = past.memory
        own, last = s + 0.5 * t - 1.5 * t1 - 6 * (s - t), 6 * (s - t)  # straight lines are kept
        return -0.5 * x + 1.5 * x1 + own * f + last * f1, (x, f, t)


def test_a_zero_unstable_method_is_refused_on_coarse_grids_that_damp_its_growth() -> None:
    with pytest.raises(iia.errors.PlanError, match="is zero-unstable"):
        Hidden().plan(iia.EDM(), 8.0 * 0.5 ** torch.arange(6, dtype=F64))
    assert iia.testing.stability_limit(Hidden()) == 0.0


def test_a_double_root_at_one_leaves_no_region_of_stability() -> None:
    double = Written("2 * x - x1 + h * (v - v1)")
    assert iia.testing.stability_limit(double) == 0.0
    assert iia.testing.stability_limit("ab2") == pytest.approx(1.0, abs=1e-2)


def test_a_step_that_cannot_be_traced_on_a_finer_grid_is_refused_with_its_own_error() -> None:
    class Tailored(iia.Solver):
        order = 1

        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            return x + (1.0, 1.01)[past.index] * (s - t) * ode.velocity(x, t)

    with pytest.raises(iia.errors.PlanError, match=r"cannot be seen: on a finer grid its step fails with IndexError"):
        Tailored().plan(iia.EDM(), [3.0, 2.0, 1.0])


@given(st.floats(-4, 4), st.lists(st.floats(0.05, 2.0), min_size=2, max_size=6), st.booleans())
@settings(max_examples=4, deadline=None)
def test_the_verdict_does_not_depend_on_the_grid_or_on_units(top: float, steps: list[float], to_data: bool) -> None:
    lams = torch.tensor([0.0, *steps], dtype=F64).cumsum(0) - top * math.log(10)
    grid = iia.EDM().t_of_lam(lams)
    grid = torch.cat([grid, torch.zeros(1, dtype=F64)]) if to_data else grid
    assert Lawson2().plan(iia.EDM(), grid).steps == len(grid) - 1
    with pytest.raises(iia.errors.PlanError, match="not a consistent solver"):
        LawsonWithWrongWeight().plan(iia.EDM(), grid)


def test_the_error_of_registered_solvers_is_rounding() -> None:
    for name in ("ddim", "heun", "ab4", "unipc", "deis_tab3", "dpmpp_2s_blocks"):
        assert consistency_error(iia.get_solver(name).plan(iia.VP(), grids(iia.VP())["to the data"])) < 1e-9
