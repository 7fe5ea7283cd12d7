"""What every registered solver promises: the conformance suite and exact orders; how steps end; and the registry itself."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support import close, every_schedule, every_solver, gaussian, generator, in_turn, mixture
from torch import Tensor

import iia_ode as iia
from iia_ode import testing
from iia_ode.plan import Past
from iia_ode.solvers import (
    ExponentialStep,
    RhoRungeKutta,
    base,
    ddim_step,
    is_singular,
    lagrange_weights,
    log_snr_fractions,
    phi_functions,
)
from iia_ode.testing.cases import TRACKS
from iia_ode.testing.conformance import check_order_is_the_claimed_one, order_result
from iia_ode.testing.orders import LONG, TOLERANCE, measure_order

# ---- the suite -------------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("check", [c for c in testing.CHECKS if c is not check_order_is_the_claimed_one])
def test_every_solver_keeps_the_promises_of_the_suite(name: str, check: testing.Check) -> None:
    check(name)


UNIFORM_WEIGHTS = {"ipndm3": 3, "ipndm": 4, "plms": 4, "fpndm": 4}
"""Methods of order 2 whose weights are those of a uniform grid in sigma/alpha, and their order on one."""


def expected_order(name: str, found: testing.OrderMeasurement) -> int:
    """The claimed order, or a higher one where an error term is known to vanish."""
    if name == "midpoint" and found.problem == "gaussian" and found.schedule in ("EDM", "FlowMatching"):
        # Where alpha and sigma are linear in t, the slope on Gaussian data is a(t) x with a = t / (v + t^2), and the leading
        # error of the rule, (a'' + 6 a a' + 4 a^3) x h^3 / 24, vanishes identically.
        return 3
    return iia.get_solver(name).order


# Alpha and sigma are linear in t on EDM and in flow matching: each solver is measured on one of them, along one track.
@in_turn("name, linear", iia.solver_names(), (iia.EDM(), iia.FlowMatching()))
def test_the_measured_order_is_the_claimed_one_wherever_no_error_term_is_known_to_vanish(
    name: str, linear: iia.Schedule
) -> None:
    in_t, decoding, encoding = TRACKS
    measured = (
        *measure_order(name, iia.VP(), in_t, finest_at_least=LONG),
        *measure_order(name, iia.VP(), encoding),
        *measure_order(name, linear, decoding),
    )
    wrong = [str(m) for m in measured if abs(m.order - expected_order(name, m)) > TOLERANCE]
    assert not wrong
    assert order_result(iia.get_solver(name), measured).problem is None


@pytest.mark.parametrize("name", UNIFORM_WEIGHTS)
def test_weights_of_a_uniform_grid_have_their_full_order_on_one(name: str) -> None:
    for found in measure_order(name, iia.EDM(), TRACKS[0]):  # there t is sigma/alpha
        assert abs(found.order - UNIFORM_WEIGHTS[name]) <= TOLERANCE, str(found)


# ---- tableaus --------------------------------------------------------------------------------------------------------


TABLEAUS = {
    "ralston": (2, ((2 / 3,),), (1 / 4, 3 / 4), (0.0, 2 / 3)),
    "heun3": (3, ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)),
    "kutta3": (3, ((0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), (0.0, 0.5, 1.0)),
    "three_eighths": (
        4,
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        (0.0, 1 / 3, 2 / 3, 1.0),
    ),
}


def tableau(name: str, order: int, a: Any, b: Any, c: Any) -> type[iia.RungeKutta]:
    return type(name, (iia.RungeKutta,), {"order": order, "a": a, "b": b, "c": c})


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_tableau_of_ones_own_has_its_order(name: str) -> None:
    solver = tableau(name, *TABLEAUS[name])()
    assert all(m.order == pytest.approx(solver.order, abs=0.15) for m in testing.measure_orders(solver, [iia.VP()]))
    plan = solver.plan(iia.VP(), iia.grids.uniform(5, 0.9, 0.1))
    assert plan.nfe == 5 * len(TABLEAUS[name][2])
    assert plan.name == name


BAD_TABLEAUS = {
    "b does not sum to 1": (((0.5,),), (0.0, 0.9), (0.0, 0.5)),
    "a row does not sum to its node": (((0.4,),), (0.0, 1.0), (0.0, 0.5)),
    "first node not 0": (((0.5,),), (0.0, 1.0), (0.1, 0.5)),
    "implicit": (((0.25, 0.25),), (0.0, 1.0), (0.0, 0.5)),
    "row missing": ((), (0.0, 1.0), (0.0, 0.5)),
    "node missing": (((0.5,),), (0.0, 1.0), (0.0,)),
    "no stages": ((), (), ()),
}


@pytest.mark.parametrize("what", BAD_TABLEAUS)
def test_a_bad_tableau_is_refused_when_the_class_is_made(what: str) -> None:
    with pytest.raises(
        iia.errors.PlanError, match=r"the tableau of Mine is (inconsistent|not that of an explicit method)"
    ):
        tableau("Mine", 2, *BAD_TABLEAUS[what])


@pytest.mark.parametrize("name", TABLEAUS)
@pytest.mark.parametrize("square", [False, True])
def test_a_solver_from_numbers_is_that_of_its_class_and_equal_to_its_like(name: str, square: bool) -> None:
    order, rows, b, c = TABLEAUS[name]
    full = [[0.0] * len(b), *([*row, *[0.0] * (len(b) - len(row))] for row in rows)]
    solver = iia.RungeKutta(np.array(full) if square else rows, b, c if square else None, order=order, name="mine")
    twin = tableau(name, *TABLEAUS[name])()
    grid = iia.grids.uniform(4, 0.9, 0.1)
    assert solver.plan(iia.VP(), grid).difference(twin.plan(iia.VP(), grid)) <= (0.0 if square else 1e-14)
    assert (solver.order, solver.name, solver.label) == (order, "mine", "mine")
    again = iia.RungeKutta(rows, b, solver.c, order=order, name="mine")
    assert solver == again == copy.deepcopy(again) and hash(solver) == hash(again)
    assert solver != iia.RungeKutta(rows, b, solver.c, order=order, name="other")
    assert solver not in (twin, RhoRungeKutta(rows, b, solver.c, order=order, name="mine"))


def test_a_solver_from_the_numbers_of_a_registered_one_answers_bit_for_bit_and_has_its_order() -> None:
    ode, x, grid = (
        mixture().ode(iia.VP()),
        mixture().noisy(4, iia.VP(), 0.9, generator()),
        iia.grids.uniform(5, 0.9, 0.1),
    )
    for name, kind in (("heun3", iia.RungeKutta), ("deis_rho_kutta", RhoRungeKutta)):
        theirs: Any = iia.get_solver(name)
        mine = kind(theirs.a, theirs.b, theirs.c, order=3, name="mine")
        assert torch.equal(iia.sample(ode, x, grid, mine), iia.sample(ode, x, grid, name))
        measured = testing.measure_orders(mine, [iia.VP()])
        assert all(abs(m.order - 3) < TOLERANCE for m in measured)


@pytest.mark.parametrize("what", BAD_TABLEAUS)
def test_a_solver_from_bad_numbers_is_refused(what: str) -> None:
    with pytest.raises(
        iia.errors.PlanError, match=r"the tableau of mine is (inconsistent|not that of an explicit method)"
    ):
        iia.RungeKutta(*BAD_TABLEAUS[what], order=2, name="mine")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: iia.RungeKutta(), r"needs a tableau and its order: RungeKutta\(a, b, c, order=2"),
        (lambda: iia.RungeKutta([[0.5]], [0.0, 1.0]), "needs a tableau and its order"),
        (lambda: iia.RungeKutta([[0.5]], [0.0, 1.0], order=0), "order of RungeKutta must be a whole number"),
        (lambda: iia.RungeKutta([[0.5, 0.0], [0.0, 0.5]], [0.0, 1.0], order=2), "zero on and above its diagonal"),
        (lambda: iia.RungeKutta([[math.nan]], [0.5, 0.5], order=2), "inconsistent"),
        (lambda: iia.RungeKutta("ab", "c", order=2), "must be numbers"),
        (lambda: type(iia.get_solver("heun"))([[1.0]], [0.5, 0.5], order=2), "Heun has the tableau of its class"),
        (lambda: type("Mine", (iia.RungeKutta,), {"order": 1, "b": (1.0,)}), "Mine needs a whole tableau"),
        (lambda: type("Mine", (iia.RungeKutta,), {"order": 1})(), "Mine needs a tableau and its order"),
    ],
)
def test_a_tableau_that_is_missing_or_no_tableau_is_refused_with_a_reason(make: Any, words: str) -> None:
    with pytest.raises(iia.errors.PlanError, match=words):
        make()


# ---- the parts of exponential methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-30.0, -2.0, -1e-3, -1e-9, 0.0, 1e-6, 0.3, 4.0])
def test_phi_functions_are_their_series_and_moments_are_theirs(z: float) -> None:
    exact = [sum(Fraction(z) ** j / math.factorial(j + k) for j in range(200)) for k in (1, 2, 3)]
    for found, true in zip(phi_functions(z, 3), exact, strict=True):
        assert found == pytest.approx(float(true), rel=1e-13)
    if z:
        moments = ExponentialStep(1.0, 2.0, -z).moments(3)
        phis = [2 * -z * math.factorial(k) * phi for k, phi in enumerate(phi_functions(z, 3))]
        assert moments == pytest.approx(phis, rel=1e-12)
    with pytest.raises(iia.errors.InputError, match="n must be a whole number"):
        phi_functions(z, 0)


def test_lagrange_weights_are_exact_for_polynomials() -> None:
    weights = lagrange_weights([0.0, -1.0, -2.5], 0.0, 1.0)
    for power in range(3):
        assert sum(w * u**power for w, u in zip(weights, [0.0, -1.0, -2.5], strict=True)) == pytest.approx(
            1 / (power + 1)
        )


def test_a_solver_of_ones_own_from_the_public_parts_is_the_registered_one() -> None:
    class Two(iia.Solver):
        order = 2

        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            data, schedule = ode.data(x, t), ode.schedule
            if not past.memory or is_singular(schedule, t, s):
                return ddim_step(schedule, x, data, t, s), (t, data)
            before, earlier = past.memory
            step = ExponentialStep.of(schedule, "data", t, s)
            w = step.weights([0.0, *log_snr_fractions(schedule, t, s, [before])])
            return step.keep * x + w[0] * data + w[1] * earlier, (t, data)

    for schedule in (iia.EDM(), iia.VP(), iia.Cosine()):
        grid = iia.grids.karras(6, schedule=schedule)
        assert Two().plan(schedule, grid).difference(iia.get_solver("expab2").plan(schedule, grid)) < 1e-14


# ---- ends ------------------------------------------------------------------------------------------------------------


def last_step(name: str, schedule: iia.Schedule) -> tuple[iia.ProbabilityFlowODE, Tensor, float, Tensor]:
    """The ODE, the state before the step to the data, its time, and the state after it."""
    problem, grid = mixture(), iia.grids.karras(4, 0.5, 20.0, schedule=schedule)
    ode = problem.ode(schedule)
    states = iia.odeint(ode, problem.noisy(8, schedule, float(grid[0]), generator(4)), grid, method=name)
    return ode, states[-2], float(grid[-2]), states[-1]


@every_schedule
def test_ddim_ends_on_the_data_estimate(schedule: iia.Schedule) -> None:
    ode, x, t, final = last_step("ddim", schedule)
    close(final, ode.data(x, t), atol=1e-12)


@every_schedule
@pytest.mark.parametrize("name", ["euler", "heun", "rk4"])
def test_euler_heun_and_rk4_end_on_an_euler_step(name: str, schedule: iia.Schedule) -> None:
    ode, x, t, final = last_step(name, schedule)
    close(final, x + (schedule.t_data - t) * ode.velocity(x, t), atol=1e-12)
    if type(schedule) in (iia.EDM, iia.FlowMatching):  # alpha and sigma are linear in t: then that is the data estimate
        close(final, ode.data(x, t), atol=1e-12)


@every_schedule
def test_a_step_of_ones_own_may_end_on_the_data_estimate(schedule: iia.Schedule) -> None:
    class Mine(iia.Solver):
        order = 1

        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            if ode.is_data(s):
                return ode.data(x, t)
            return x + (s - t) * ode.velocity(x, t)

    assert Mine().plan(schedule, iia.grids.karras(5, schedule=schedule)).nfe == 5


# ---- grids asked for -------------------------------------------------------------------------------------------------


@every_solver
def test_a_float32_grid_and_a_list_are_read_as_float64(name: str) -> None:
    times = [16.0, 2.0, 0.25, 0.0]  # exact in float32
    plans = [
        iia.get_solver(name).plan(iia.EDM(), g) for g in (times, torch.tensor(times), torch.tensor(times).double())
    ]
    assert plans[0].grid == plans[1].grid == plans[2].grid == tuple(times)
    assert plans[0].difference(plans[1]) == plans[0].difference(plans[2]) == 0.0


@every_solver
def test_a_grid_for_a_number_of_evaluations_gives_exactly_that_or_says_what_there_is(name: str) -> None:
    solver = iia.get_solver(name)
    counts = [solver.plan(iia.EDM(), iia.grids.karras(n)).nfe for n in range(1, 15)]
    for nfe in (1, 2, 5, 7, 12):
        if nfe in counts:
            grid = solver.grid_for(nfe, iia.grids.karras, iia.EDM())
            assert solver.plan(iia.EDM(), grid).nfe == nfe
            assert torch.equal(grid, iia.grids.karras(counts.index(nfe) + 1))
        else:
            with pytest.raises(iia.errors.GridError, match=f"exactly {nfe} evaluations") as caught:
                solver.grid_for(nfe, iia.grids.karras, iia.EDM())
            nearest = [max((c for c in counts if c < nfe), default=0), min(c for c in counts if c > nfe)]
            assert str([c for c in nearest if c]) in str(caught.value)


# ---- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that forgets what the test adds."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    yield


def shifted_euler(name: str = "shifted", *aliases: str) -> type[iia.Solver]:
    @iia.register(name, *aliases)
    @dataclass(frozen=True)
    class Shifted(iia.Solver):
        """Euler with an option that does nothing but be there."""

        order = 1
        shift: float = 0.5
        kind: str = "plain"

        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            return x + (s - t) * ode.velocity(x, t)

    return Shifted


def test_the_registry_holds_the_classics_and_their_aliases() -> None:
    assert set(iia.solver_names()) >= {"ddim", "euler", "heun", "midpoint", "rk4"}
    assert iia.solver_names() == sorted(set(iia.solver_names()))
    for alias, name in (("edm", "heun"), ("dpm_solver_1", "ddim")):
        assert type(iia.get_solver(alias)) is type(iia.get_solver(name))
        assert iia.get_solver(alias).name == name
        assert alias in iia.get_solver(name).aliases
        assert alias not in iia.solver_names()


@every_solver
def test_a_registered_solver_says_what_it_is_and_plans_bear_its_name(name: str) -> None:
    solver = iia.get_solver(name)
    text = type(solver).__doc__ or ""
    assert "order" in text
    assert "evaluation" in text
    assert solver.label == solver.plan(iia.EDM(), iia.grids.karras(2)).name == name


@pytest.mark.usefixtures("registry")
def test_a_new_solver_is_known_everywhere_by_name_with_its_options() -> None:
    shifted_euler("shifted", "shift")
    assert "shifted" in iia.solver_names()
    solver = iia.get_solver("shift", shift=0.25)
    assert solver.options() == {"shift": 0.25, "kind": "plain"}
    problem = gaussian()
    x, grid = problem.noisy(3, iia.EDM(), 80.0, generator()), iia.grids.karras(4)
    ode = problem.ode(iia.EDM())
    close(iia.sample(ode, x, grid, "shifted"), iia.sample(ode, x, grid, "euler"))
    close(iia.odeint(ode, x, grid, method="shift"), iia.odeint(ode, x, grid, method=solver))


@pytest.mark.parametrize(
    ("name", "nearest"), [("huen", "heun"), ("DDIM", "ddim"), ("euler2", "euler"), ("rk-4", "rk4")]
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(
        iia.errors.UnknownNameError, match=f"unknown solver '{name}'. Did you mean '{nearest}'"
    ) as caught:
        iia.get_solver(name)
    assert all(known in str(caught.value) for known in iia.solver_names())
    assert isinstance(caught.value, LookupError | iia.IIAError)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dpmpp_2m_sde", "dpmpp_2m"),
        ("dpmpp_3m_sde", "dpmpp_3m"),
        ("dpmpp_sde", "dpmpp_2s"),
        ("dpmpp_2s_ancestral", "dpmpp_2s"),
        ("euler_ancestral", "euler"),
        ("euler_a", "euler"),
        ("k_dpm_2_a", "dpm2"),
        ("sample_dpm_2_ancestral", "dpm2"),
        ("EulerAncestralDiscreteScheduler", "euler"),
        ("heun_churn", "heun"),
        ("ddpm", "ddim"),
        ("lcm", "ddim"),
    ],
)
def test_a_stochastic_sampler_is_answered_with_the_nearest_solver(name: str, nearest: str) -> None:
    for ask in (iia.get_solver, lambda n: iia.sample(gaussian().ode(iia.EDM()), torch.ones(1, 3), [5.0, 1.0], n)):
        with pytest.raises(
            iia.errors.UnknownNameError, match=f"injects noise.*deterministic.*nearest solver is '{nearest}'"
        ):
            ask(name)


@pytest.mark.parametrize("name", ["dopri5", "torchdiffeq:rk4"])
def test_a_method_of_torchdiffeq_is_answered_with_the_calls_that_take_it(name: str) -> None:
    with pytest.raises(
        iia.errors.UnknownNameError, match=rf"of torchdiffeq.*sample\(ode, x, grid, '{name}'\).*method='{name}'"
    ):
        iia.get_solver(name)


@pytest.mark.usefixtures("registry")
def test_an_unknown_option_is_answered_with_those_there_are() -> None:
    shifted_euler()
    with pytest.raises(
        iia.errors.UnknownNameError, match=r"option of shifted 'shfit'. Did you mean 'shift'\? Known: shift, kind"
    ):
        iia.get_solver("shifted", shfit=1.0)
    with pytest.raises(iia.errors.UnknownNameError, match=r"option of heun 'order'. Known: \(none\)"):
        iia.get_solver("heun", order=3)


@pytest.mark.usefixtures("registry")
def test_a_taken_name_is_refused_and_a_cell_may_be_run_again() -> None:
    first = shifted_euler()
    second = shifted_euler()
    assert first is not second
    assert type(iia.get_solver("shifted")) is second
    for name in ("heun", "edm"):
        with pytest.raises(iia.errors.InputError, match=rf"'{name}' is taken by iia_ode\.solvers\.runge_kutta\.Heun"):
            shifted_euler("another", name)
    assert "another" not in iia.solver_names()
    assert type(iia.get_solver("heun")).__name__ == "Heun"


@pytest.mark.usefixtures("registry")
def test_what_is_no_solver_with_an_order_cannot_be_registered() -> None:
    class NoOrder(iia.Solver):
        def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
            return x

    with pytest.raises(iia.errors.PlanError, match="attribute `order` of NoOrder must be a whole number, at least 1"):
        iia.register("no_order")(NoOrder)
    for thing in (lambda ode, x, t, s, past: x, int, NoOrder()):
        with pytest.raises(iia.errors.PlanError, match=r"takes a class that derives from iia_ode\.Solver"):
            iia.register("no_solver")(thing)  # type: ignore[type-var]
    assert not {"no_order", "no_solver"} & set(iia.solver_names())


def test_a_solver_without_a_step_cannot_be_made() -> None:
    class NoStep(iia.Solver):
        order = 1

    with pytest.raises(TypeError, match="step"):
        NoStep()
