"""Plans: what a step may write, what a plan promises about itself, and that running it is running the steps."""

import copy
import math
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ALL_SCHEDULES,
    F64,
    close,
    every_prediction,
    every_schedule,
    every_solver_on_a_schedule,
    gaussian,
    generator,
    mixture,
    slope,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.bounded import Bounded
from iia_ode.forms import conversion
from iia_ode.plan import Combine, Evaluate, Past, Plan, Tracer, Vector, trace, traced
from iia_ode.plan.exact import exact_key
from iia_ode.plan.instructions import run_code
from iia_ode.plan.tracer import take_step

NUMBERS = st.floats(-8, 8).map(lambda v: round(v, 3))
TENSORS = st.lists(NUMBERS, min_size=2, max_size=2).map(lambda v: torch.tensor(v, dtype=F64))
INTEGERS, FRACTIONS = st.integers(-8, 8), st.fractions(-8, 8, max_denominator=9)
SCALARS = st.one_of(NUMBERS, INTEGERS, FRACTIONS, NUMBERS.map(np.float64), NUMBERS.map(torch.tensor), TENSORS)
WEIGHTS = st.dictionaries(st.integers(0, 3), st.one_of(NUMBERS, TENSORS), max_size=4)
VECTORS = st.builds(Vector, WEIGHTS, st.one_of(st.none(), TENSORS))
BASIS = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25], [2.0, 1.0]], dtype=F64)


class Written(iia.Solver):
    """A solver whose step is the given function."""

    order = 1

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return self._step(ode, x, t, s, past)


def written(step: Callable[..., Any], schedule: iia.Schedule | None = None, n: int = 4, to_data: bool = False) -> Plan:
    schedule = schedule or iia.EDM()
    return Written(step).plan(schedule, iia.grids.karras(n, schedule=schedule, to_data=to_data))


def value(v: Vector) -> Tensor:
    """What v stands for when the vectors are the rows of BASIS."""
    total = torch.zeros(2, dtype=F64) if v.constant is None else v.constant
    return total + sum(w * BASIS[i] for i, w in v.weights.items())


def _number(k: Any) -> Any:
    return float(k) if isinstance(k, Fraction) else k


def plan_of(name: str, schedule: iia.Schedule, n: int = 6) -> Plan:
    return iia.get_solver(name).plan(schedule, iia.grids.karras(n, schedule=schedule))


# ---- vectors ---------------------------------------------------------------------------------------------------------


@given(VECTORS, VECTORS, SCALARS)
def test_arithmetic_on_vectors_is_arithmetic_on_what_they_stand_for(u: Vector, v: Vector, k: Any) -> None:
    close(value(u + v), value(u) + value(v), atol=1e-12)
    close(value(u - v), value(u) - value(v), atol=1e-12)
    close(value(-u), -value(u))
    close(value(u * k), _number(k) * value(u), atol=1e-11)
    close(value(k * u), _number(k) * value(u), atol=1e-11)
    close(value(sum([u, v, u])), 2 * value(u) + value(v), atol=1e-12)


@given(VECTORS, SCALARS.filter(lambda k: bool((torch.as_tensor(_number(k)).abs() > 0.1).all())))
def test_dividing_undoes_multiplying(u: Vector, k: Any) -> None:
    close(value(u * k / k), value(u), atol=1e-12)
    close(value(u / k), value(u) / _number(k), atol=1e-11)


@given(VECTORS, TENSORS)
def test_a_tensor_that_is_added_becomes_a_constant(u: Vector, c: Tensor) -> None:
    close(value(u + c), value(u) + c, atol=1e-12)
    close(value(c + u), value(u) + c, atol=1e-12)
    close(value(u - c), value(u) - c, atol=1e-12)
    close(value(c - u), c - value(u), atol=1e-12)


@given(VECTORS)
def test_vectors_form_a_linear_space_with_a_neutral_zero(u: Vector) -> None:
    close(value(u + 0), value(u))
    close(value(0 + u), value(u))
    close(value(0 - u), -value(u))
    close(value(u - 0), value(u))
    close(value(+u), value(u))
    close(value(u - u), 0 * value(u))


X = Vector({0: 1.0})
NONLINEAR = """x * x; x / x; x + 1; x - 1; 1 - x; 1j * x; 1 / x; x ** 2; abs(x); x > 0; bool(x); float(x);
    x[0]; torch.exp(x); torch.ones(2) / x; x / 0"""


@pytest.mark.parametrize("expression", [e.strip() for e in NONLINEAR.split(";")])
def test_what_is_not_linear_is_refused_with_a_reason(expression: str) -> None:
    with pytest.raises(iia.errors.PlanError, match="a step"):
        eval(expression, {"x": X, "np": np, "torch": torch})


@pytest.mark.parametrize("attribute", ["shape", "dtype", "clamp", "mean", "norm", "detach"])
def test_a_step_that_asks_for_the_data_is_told_that_there_are_none_yet(attribute: str) -> None:
    with pytest.raises(iia.errors.PlanError, match=f"a symbolic vector has no '{attribute}'.*numbers that depend on"):
        written(lambda ode, x, t, s, past: x + getattr(x, attribute))


def test_vectors_and_plans_are_immutable() -> None:
    plan = plan_of("heun", iia.EDM())
    fields = ((X, "weights"), (plan, "code"), (plan.code[0], "t"), (plan.code[1], "terms"), (Past(), "index"))
    for thing, field in fields:
        with pytest.raises(FrozenInstanceError):
            setattr(thing, field, None)


# ---- a plan validates and describes itself ---------------------------------------------------------------------------

GOOD = (Evaluate(0, 2.0, "velocity"), Combine(((0, 1.0), (1, -1.0)), step=1))
NAN = float("nan")
INVALID = {
    "forward reference": ((Evaluate(1, 2.0, "data"), GOOD[1]), "does not exist yet"),
    "negative reference": ((GOOD[0], Combine(((-1, 1.0),), step=1)), "does not exist yet"),
    "weight NaN": ((GOOD[0], Combine(((0, NAN), (1, 1.0)), step=1)), "not finite.*limit"),
    "weight infinite": ((GOOD[0], Combine(((0, math.inf),), step=1)), "not finite"),
    "tensor weight NaN": ((GOOD[0], Combine(((0, torch.tensor([1.0, NAN])),), step=1)), "not finite"),
    "time NaN": ((Evaluate(0, NAN, "data"), GOOD[1]), "no valid evaluation"),
    "unknown form": ((Evaluate(0, 2.0, "image"), GOOD[1]), "no valid evaluation"),
    "no grid state": ((GOOD[0], Combine(((0, 1.0),))), "each of its 1 later grid points"),
    "a grid state too many": ((Combine(((0, 1.0),), step=1), Combine(((0, 1.0),), step=2)), "grid points"),
    "ends in something else": ((*GOOD, Combine(((0, 1.0),))), "grid points"),
    "empty": ((), "grid points"),
}


@pytest.mark.parametrize("what", INVALID)
def test_a_plan_that_could_not_run_cannot_be_made(what: str) -> None:
    code, message = INVALID[what]
    assert Plan(iia.EDM(), (2.0, 1.0), GOOD).steps == 1
    with pytest.raises(iia.errors.PlanError, match=message):
        Plan(iia.EDM(), (2.0, 1.0), code)


def test_a_plan_reads_like_a_program() -> None:
    plan = iia.get_solver("heun").plan(iia.EDM(), torch.tensor([2.0, 1.0, 0.0], dtype=F64))
    assert str(plan).splitlines() == [
        "heun on EDM: 2 steps from t = 2 to 0, 3 evaluations, at most 4 vectors at once",
        "  v1 = velocity(v0, t = 2)",
        "  v2 = v0 - v1",
        "  v3 = velocity(v2, t = 1)",
        "  v4 = v0 - 0.5 v1 - 0.5 v3        # state 1, t = 1",
        "  v5 = velocity(v4, t = 1)",
        "  v6 = v4 - v5        # state 2, t = 0",
    ]
    assert plan.evaluation_times == (2.0, 1.0, 1.0)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Evaluate | Combine, ...]:
    code: list[Evaluate | Combine] = []
    for k in range(draw(st.integers(1, 12))):
        earlier = st.integers(0, k)
        if draw(st.booleans()):
            code.append(Evaluate(draw(earlier), 1.5, "data"))
        else:
            code.append(Combine(tuple((j, 0.5) for j in draw(st.sets(earlier, min_size=1, max_size=3)))))
    return (*code, Combine(((draw(st.integers(0, len(code))), 1.0),), step=1))


@given(programs())
def test_peak_vectors_is_the_most_that_a_run_ever_holds(code: tuple[Evaluate | Combine, ...]) -> None:
    plan = Plan(iia.EDM(), (2.0, 1.0), code)
    needed = [
        1 + sum(any(j in later.reads for later in code[k - 1 :]) for j in range(k)) for k in range(1, len(code) + 1)
    ]
    values = {0: torch.ones(1, dtype=F64)}
    held = [len(values) for _ in run_code(code, values, lambda x, t, form: 2 * x, last_use=plan.last_use)]
    assert plan.peak_vectors == max(needed) == max(held)
    assert plan.nfe == sum(isinstance(ins, Evaluate) for ins in code) == len(plan.evaluation_times)


# ---- equal algorithms ------------------------------------------------------------------------------------------------


@every_schedule
def test_ddim_is_euler_exactly_where_alpha_and_sigma_are_linear_in_t(schedule: iia.Schedule) -> None:
    same = plan_of("ddim", schedule).difference(plan_of("euler", schedule))
    if type(schedule).__name__ in ("EDM", "FlowMatching", "FromFunctions"):
        assert same <= 1e-12
    else:
        assert same > 1e-3


def heun_in(form: str, *, hold: bool = False) -> Callable[..., Any]:
    def step(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        def slope_at(y: Any, u: float) -> Any:
            p, q = conversion(ode.schedule, u, form, "velocity")
            return p * y + q * ode.evaluate(y, u, form).as_form(form)

        k1 = slope_at(x, t)
        y = x + (s - t) * k1
        if hold:
            y = ode.hold(0.5 * ode.hold(x + x) + ode.hold((s - t) * k1))
        return 0.5 * x + 0.5 * (y + (s - t) * slope_at(y, s))

    return step


@every_schedule
@every_prediction
def test_one_algorithm_written_in_several_ways_is_one_algorithm(schedule: iia.Schedule, prediction: str) -> None:
    grid = iia.grids.karras(5, 0.1, 20.0, schedule=schedule, to_data=False)
    heun = iia.get_solver("heun").plan(schedule, grid)
    for hold in (False, True):
        other = Written(heun_in(prediction, hold=hold)).plan(schedule, grid)
        assert len(other.code) > len(heun.code) if hold else other.code != heun.code
        assert other.equivalent(heun)
    assert not iia.get_solver("midpoint").plan(schedule, grid).equivalent(heun)


def test_plans_with_other_evaluations_are_infinitely_different() -> None:
    heun, euler = plan_of("heun", iia.EDM()), plan_of("euler", iia.EDM())
    assert heun.difference(euler) == math.inf
    assert plan_of("euler", iia.EDM(), 5).difference(euler) == math.inf
    moved = iia.grids.karras(6, sigma_max=80.001)
    assert iia.get_solver("euler").plan(iia.EDM(), moved).difference(euler) == math.inf
    assert euler.difference(euler) == 0.0


def test_the_difference_of_two_plans_is_that_of_their_weights() -> None:
    plan = Plan(iia.EDM(), (2.0, 1.0), (Evaluate(0, 2.0, "data"), Combine(((0, 0.5), (1, 0.5)), step=1)))
    other = replace(plan, code=(plan.code[0], Combine(((0, 0.5), (1, 0.5 + 1e-3)), step=1)))
    assert plan.difference(other) == pytest.approx(1e-3 / (0.5 * math.sqrt(5)), rel=1e-9)
    close(plan.canonical().matrix(), torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=F64))


# ---- Gaussian data ---------------------------------------------------------------------------------------------------


@every_solver_on_a_schedule
def test_the_answer_on_gaussian_data_is_what_a_run_gives(schedule: iia.Schedule, name: str) -> None:
    problem, plan = gaussian(), plan_of(name, schedule)
    response = plan.on_gaussian(problem.mean, problem.variance)
    x = problem.noisy(16, schedule, plan.grid[0], generator(3))
    scale = float(response(x).abs().max())
    close(response(x), plan.run(problem.ode(schedule), x), atol=1e-12 * scale)
    exact = problem.flow(x, schedule, plan.grid[0], plan.grid[-1])
    close(response.exact_gain * x + response.exact_offset, exact, atol=1e-12)


@every_schedule
def test_the_exact_error_on_gaussian_data_is_what_sampling_estimates(schedule: iia.Schedule) -> None:
    problem, plan = gaussian(), plan_of("midpoint", schedule)
    x = problem.noisy(20_000, schedule, plan.grid[0], generator(4))
    error = plan.run(problem.ode(schedule), x) - problem.flow(x, schedule, plan.grid[0], plan.grid[-1])
    squared = error.square().mean(dim=1)
    estimate, deviation = float(squared.mean()), float(squared.std()) / math.sqrt(len(x))
    assert abs(plan.on_gaussian(problem.mean, problem.variance).rmse ** 2 - estimate) < 4 * deviation
    assert deviation < 0.05 * estimate


# ---- running and tracing ---------------------------------------------------------------------------------------------


@every_solver_on_a_schedule
def test_running_a_plan_is_taking_the_steps_on_tensors(schedule: iia.Schedule, name: str) -> None:
    plan, problem, solver = plan_of(name, schedule), mixture(), iia.get_solver(name)
    ode = problem.ode(schedule, "noise")
    x = problem.noisy(5, schedule, plan.grid[0], generator(5))
    kept, seen = x.clone(), []
    states = plan.run(ode, x, trajectory=True, callback=lambda k, t, state: seen.append((k, t, state)))
    assert torch.equal(x, kept)
    assert ode.nfe == plan.nfe

    y, memory, n = x, (), plan.steps
    for i, (t, s) in enumerate(zip(plan.grid, plan.grid[1:], strict=False)):
        y, memory = take_step(solver, ode, y, t, s, Past(memory, i, n - 1 - i))
        close(states[i + 1], y, atol=1e-12 * float(states[: i + 2].abs().max()))  # rounding of the states so far
    assert ode.nfe == 2 * plan.nfe

    assert [(k, t) for k, t, _ in seen] == list(enumerate(plan.grid))[1:]
    assert torch.equal(torch.stack([x, *(state for _, _, state in seen)]), states)
    assert torch.equal(plan.run(ode, x), states[-1])


def test_weights_may_be_tensors_and_a_plan_may_add_a_constant() -> None:
    per_pixel, constant = torch.tensor([0.5, 0.25, 1.0], dtype=F64), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    step = lambda ode, x, t, s, past: per_pixel * x + (1 - per_pixel) * ode.data(x, t) + constant  # noqa: E731
    plan = iia.plan.trace(Written(step), iia.EDM(), [2.0, 1.0], consistent=False)
    problem = gaussian()
    x = problem.noisy(4, iia.EDM(), 2.0, generator())
    expected = per_pixel * x + (1 - per_pixel) * problem.ode(iia.EDM()).data(x, 2.0) + constant
    close(plan.run(problem.ode(iia.EDM()), x), expected, atol=1e-14)
    close(plan.on_gaussian(problem.mean, problem.variance)(x), expected, atol=1e-13)


@every_schedule
@pytest.mark.parametrize("result", ["0.99 * x + h * v", "h * v", "x + 2 * h * v", "x - h * v", "x"])
def test_a_step_with_a_wrong_weight_is_refused(schedule: iia.Schedule, result: str) -> None:
    def step(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return eval(result, {"x": x, "h": s - t, "v": ode.velocity(x, t)})

    with pytest.raises(iia.errors.PlanError, match=r"not a consistent solver.*weights of the step"):
        written(step, schedule)


@every_schedule
def test_a_consistent_step_need_not_be_exact_on_anything(schedule: iia.Schedule) -> None:
    def euler_in_log_snr(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        slope = schedule.alpha_prime(t) / schedule.alpha(t) - schedule.sigma_prime(t) / schedule.sigma(t)
        return x + (schedule.lam(s) - schedule.lam(t)) / slope * ode.velocity(x, t)

    assert written(euler_in_log_snr, schedule).nfe == 3


def test_a_step_that_evaluates_at_the_data_is_told_how_to_end() -> None:
    plan = written(lambda ode, x, t, s, past: x + (s - t) * ode.velocity(x, s), to_data=True)
    with pytest.raises(iia.errors.GridError, match=r"sigma = 0.*ode\.is_data"):
        plan.run(gaussian().ode(iia.EDM()), torch.ones(2, 3, dtype=F64))


@pytest.mark.parametrize("result", [None, 1.0, [X], (X, (), ()), torch.ones(3), "x"], ids=repr)
def test_a_step_that_returns_something_else_is_refused(result: Any) -> None:
    with pytest.raises(iia.errors.PlanError, match=r"must return the new state|made of the step's own vectors"):
        written(lambda *_: result)


@pytest.mark.parametrize("wrap", [lambda d: [d], lambda d: ({"last": d},), lambda d: ((d, {1}),)])
def test_a_memory_that_could_be_changed_is_refused(wrap: Callable[[Any], Any]) -> None:
    def step(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x + (s - t) * ode.velocity(x, t), wrap(ode.velocity(x, t))

    with pytest.raises(iia.errors.PlanError, match=r"memory with a (list|dict|set).*tuples or frozen dataclasses"):
        written(step)


def adams_bashforth_2(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
    d = ode.velocity(x, t)
    if past.index == 0:
        assert past.memory == ()
        return x + (s - t) * d, (d,)
    return x + (s - t) * (1.5 * d - 0.5 * past.memory[0]), (d,)


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.VP(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_a_multistep_method_hands_its_memory_on_and_has_its_order(schedule: iia.Schedule) -> None:
    problem, counts = gaussian(), [32, 64, 128]
    ends = schedule.t_of_noise_to_signal(5.0), schedule.t_of_noise_to_signal(0.3)
    plans = [Written(adams_bashforth_2).plan(schedule, iia.grids.uniform(n, *ends)) for n in counts]
    errors = [p.on_gaussian(problem.mean, problem.variance).rmse for p in plans]
    assert -slope(errors, counts) == pytest.approx(2, abs=0.15)
    assert [p.nfe for p in plans] == counts
    assert max(p.peak_vectors for p in plans) == 4  # the window, not the history


def test_a_step_knows_its_place_in_the_grid() -> None:
    seen: list[Past] = []
    written(lambda ode, x, t, s, past: (seen.append(past), x + (s - t) * ode.velocity(x, t))[1], n=4)
    assert seen == [Past((), 0, 2), Past((), 1, 1), Past((), 2, 0)]


SAME_TWICE = {
    "in two forms": lambda ode, y, s: ode.velocity(y, s) + 0 * ode.data(y, s),
    "held": lambda ode, y, s: ode.velocity(ode.hold(y), s) - ode.velocity(y, s) + ode.noise(y, s),
    "written out again": lambda ode, y, s: 0.5 * ode.velocity(y + 0, s) + 0.5 * ode.velocity(1.0 * y, s),
}


@pytest.mark.parametrize("what", SAME_TWICE)
def test_the_same_state_at_the_same_time_is_evaluated_once(what: str) -> None:
    tracer = Tracer(iia.EDM())
    y = X + -1.0 * tracer.velocity(X, 2.0)
    SAME_TWICE[what](tracer, y, 1.0)
    assert len(tracer.evaluations) == 2


def test_an_evaluation_at_the_end_of_a_step_serves_the_next_step() -> None:
    def step(ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        y = ode.hold(x + (s - t) * ode.velocity(x, t))
        return y, (ode.velocity(y, s),)

    assert written(step, n=5).nfe == 5


# ---- remembered verdicts and plans -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tabled(iia.Solver):
    """Euler in log SNR, whose weights come from a long table: consistent only if every entry is 1."""

    table: Tensor
    order = 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        sch = ode.schedule
        slope = sch.alpha_prime(t) / sch.alpha(t) - sch.sigma_prime(t) / sch.sigma(t)
        return x + self.table[1000] * (sch.lam(s) - sch.lam(t)) / slope * ode.velocity(x, t)


def tabled(entry: float) -> Tabled:
    table = torch.ones(2000, dtype=F64)
    table[1000] = entry
    return Tabled(table)


GRID = iia.grids.karras(5, 0.1, 20.0, to_data=False)


def test_an_inconsistent_solver_is_refused_after_a_consistent_one_that_prints_alike() -> None:
    good, bad = tabled(1.0), tabled(1.5)
    assert repr(good) == repr(bad)
    for make in (trace, traced):
        for _ in range(2):
            make(good, iia.EDM(), GRID)
            with pytest.raises(iia.errors.PlanError, match="not a consistent solver"):
                make(bad, iia.EDM(), GRID)


def test_plans_of_tables_that_print_alike_are_told_apart() -> None:
    near = traced(tabled(1.0), iia.EDM(), GRID), traced(tabled(1.0 + 1e-12), iia.EDM(), GRID)
    assert near[0] is not near[1] and near[0].code[1].terms != near[1].code[1].terms
    assert traced(tabled(1.0), iia.EDM(), GRID.clone()) is near[0]


class Weighed(iia.Solver):
    """Euler with a weight of the class."""

    order, weight = 1, 1.0

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        return x + self.weight * (s - t) * ode.velocity(x, t)


def test_a_class_that_was_changed_has_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced(Weighed(), iia.EDM(), GRID) is traced(Weighed(), iia.EDM(), GRID)
    with monkeypatch.context() as patch:
        patch.setattr(Weighed, "weight", 0.5)
        with pytest.raises(iia.errors.PlanError, match="not a consistent solver"):
            traced(Weighed(), iia.EDM(), GRID)
    first = traced(Weighed(), iia.EDM(), GRID)
    monkeypatch.setattr(Weighed, "step", lambda self, ode, x, t, s, past: x + (t - s) * -ode.velocity(x, t))
    assert traced(Weighed(), iia.EDM(), GRID) is not first


@given(st.lists(st.floats(width=32), max_size=3), st.lists(st.floats(width=32), max_size=3), st.booleans())
def test_keys_are_equal_exactly_if_contents_are(a: list[float], b: list[float], wide: bool) -> None:
    first = torch.tensor(a, dtype=torch.float32)
    second = torch.tensor(b, dtype=F64 if wide else torch.float32)
    same = first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes()
    assert (exact_key(Tabled(first)) == exact_key(Tabled(second))) == same
    assert (exact_key(a) == exact_key(b)) == (struct.pack(f"{len(a)}d", *a) == struct.pack(f"{len(b)}d", *b))
    assert exact_key({"a": (1, a)}) != exact_key({"a": (True, a)}) != exact_key({"a": [1, a]})


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        Written(print),
        torch.nn.Linear(1, 1),
        torch.ones(1, requires_grad=True),
        np.ones(2),
        ALL_SCHEDULES[-1],
    ],
    ids=["function", "solver with a function", "module", "with a gradient", "array", "schedule of functions"],
)
def test_contents_that_may_change_unseen_have_no_key(value: Any) -> None:
    assert exact_key(value) is None and exact_key((1, [value])) is None


@every_solver_on_a_schedule
def test_a_plan_that_was_traced_before_is_found_again(schedule: iia.Schedule, name: str) -> None:
    grid = iia.grids.karras(4, schedule=schedule)
    first = traced(iia.get_solver(name), schedule, grid)
    exact = exact_key(schedule) is not None
    assert (traced(iia.get_solver(name), copy.deepcopy(schedule), grid) is first) == exact
    assert first.difference(iia.get_solver(name).plan(schedule, grid)) == 0.0


def test_a_plan_is_not_found_again_under_another_default_dtype() -> None:
    class Rounds(iia.Solver):
        order, consistent = 1, False

        def step(self, ode: Any, x: Any, t: float, s: float, past: Any) -> Any:
            return x + float(torch.tensor(s - t)) * ode.velocity(x, t)

    grid, default = iia.grids.karras(4, 0.1, 30.0), torch.get_default_dtype()
    try:
        plans = []
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            plans.append(traced(Rounds(), iia.EDM(), grid))
    finally:
        torch.set_default_dtype(default)
    assert 0 < plans[0].difference(plans[1]) < 1e-5


def test_two_threads_get_one_plan() -> None:
    barrier = threading.Barrier(2, timeout=60)
    grid = iia.grids.karras(3, 0.123, 45.6)

    def find(_: int) -> Plan:
        barrier.wait()
        return traced(iia.get_solver("heun"), iia.EDM(), grid)

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(find, range(2))
    assert a is b


def test_a_class_that_is_defined_again_is_another_solver() -> None:
    def define(weight: float) -> type[iia.Solver]:
        class Again(iia.Solver):
            order, consistent = 1, False

            def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
                return x + weight * (s - t) * ode.velocity(x, t)

        return Again

    plans = [traced(define(w)(), iia.EDM(), GRID) for w in (1.0, 2.0)]
    assert plans[0].difference(plans[1]) > 0.1


def test_a_plan_of_inference_mode_serves_a_run_with_gradients() -> None:
    solver, problem = tabled(1.0), gaussian()
    grid = iia.grids.karras(4, 0.2, 20.0, to_data=False)
    with torch.inference_mode():
        plan = traced(solver, iia.EDM(), grid)
    assert traced(solver, iia.EDM(), grid) is plan
    x = problem.noisy(2, iia.EDM(), 20.0, generator()).requires_grad_()
    plan.run(problem.ode(iia.EDM()), x).sum().backward()
    assert x.grad is not None


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40))
def test_a_bounded_table_keeps_what_was_used_last(actions: list[tuple[int, bool]]) -> None:
    table: Bounded[int, int] = Bounded(4, lambda v: v, 12)
    expected: list[int] = []  # least recently used first; the value of key k is k
    for key, write in actions:
        if write and key not in expected:
            assert table.put(key, key) == key
            expected.append(key)
            while len(expected) > 4 or sum(expected) > 12:
                expected.pop(0)
        elif not write:
            assert table.get(key) == (key if key in expected else None)
            if key in expected:
                expected.append(expected.pop(expected.index(key)))
        assert len(table) == len(expected)
    assert len(copy.deepcopy(table)) == len(copy.copy(table)) == 0
