"""`sample` and `odeint`: one answer however it is asked for, torchdiffeq's methods by name, gradients, and every refusal."""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from support import (
    ALPHAS_CUMPROD,
    F64,
    close,
    every_schedule,
    every_solver,
    every_solver_on_a_schedule,
    gaussian,
    generator,
    in_turn,
    mixture,
    slope,
)
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.forms import PREDICTIONS

every_method = pytest.mark.parametrize("method", iia.solver_names(torchdiffeq=True))

EDM = iia.EDM()
ADAPTIVE = ["adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "scipy_solver"]
INNER = iia.grids.log_snr(9, 0.3, 5.0, to_data=False)
FINE = iia.grids.uniform(60, 5.0, 0.3)
SMOOTH = [iia.EDM(), iia.VE(), iia.VP(), iia.Cosine(), iia.FlowMatching()]


def start(schedule: iia.Schedule = EDM, t: float = 5.0, n: int = 4) -> Tensor:
    return gaussian().noisy(n, schedule, t, generator(1))


def model(function: Callable[..., Any], **options: Any) -> iia.ProbabilityFlowODE:
    return iia.ProbabilityFlowODE(function, EDM, **options)


def call(integrate: Callable[..., Any], ode: Any, x: Any, grid: Any = None, method: Any = "heun") -> Any:
    """`sample` or `odeint`, which takes its method by name."""
    return integrate(ode, x, grid, **{"solver" if integrate is iia.sample else "method": method})


# ---- one answer ------------------------------------------------------------------------------------------------------


@every_solver_on_a_schedule
def test_sample_is_the_last_state_of_odeint(name: str, schedule: iia.Schedule) -> None:
    grid = iia.grids.karras(5, schedule=schedule)
    ode, x = gaussian().ode(schedule, "noise"), start(schedule, float(grid[0]))
    states = iia.odeint(ode, x, grid, method=name)
    assert states.shape == (6, *x.shape)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], iia.sample(ode, x, grid, name))


@pytest.mark.parametrize("name", ["ddim", "heun", "expab3", "ipndm", "dpmpp_3s"])
def test_a_solver_that_does_not_treat_its_last_step_apart_may_be_stopped_at_any_grid_point(name: str) -> None:
    grid = iia.grids.karras(5)
    ode, x = gaussian().ode(EDM, "noise"), start(EDM, float(grid[0]))
    assert torch.equal(iia.odeint(ode, x, grid, method=name)[3], iia.odeint(ode, x, grid[:4], method=name)[-1])


@every_solver
def test_a_solver_may_be_given_by_name_as_instance_or_as_plan(name: str) -> None:
    ode, x, solver = gaussian().ode(EDM), start(), iia.get_solver(name)
    plan = solver.plan(EDM, INNER)
    expected = iia.sample(ode, x, INNER, name)
    for given in (solver, plan):
        assert torch.equal(iia.sample(ode, x, INNER, given), expected)
        assert torch.equal(iia.odeint(ode, x, INNER, method=given)[-1], expected)
    assert torch.equal(iia.sample(ode, x, solver=plan), expected)


def test_heun_is_the_default() -> None:
    ode, x = gaussian().ode(EDM), start()
    assert torch.equal(iia.sample(ode, x, INNER), iia.sample(ode, x, INNER, "heun"))
    assert not torch.equal(iia.sample(ode, x, INNER), iia.sample(ode, x, INNER, "ddim"))


@in_turn("name, prediction", iia.solver_names(), PREDICTIONS)
def test_the_answer_does_not_depend_on_what_the_model_predicts(name: str, prediction: str) -> None:
    schedule, grid = iia.VP(), iia.grids.karras(6, schedule=iia.VP())
    x = start(schedule, float(grid[0]))
    expected = iia.sample(gaussian().ode(schedule), x, grid, name)
    close(iia.sample(gaussian().ode(schedule, prediction), x, grid, name), expected, atol=1e-11)


def test_progress_shows_a_bar_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ode, x = gaussian().ode(EDM), start()
    quiet = iia.sample(ode, x, INNER)
    assert capsys.readouterr().err == ""
    assert torch.equal(iia.sample(ode, x, INNER, progress=True), quiet)
    assert "heun" in (shown := capsys.readouterr().err)
    assert "16/16" in shown


@pytest.mark.parametrize("solver", ["heun", "dopri5", "torchdiffeq:rk4"])
def test_a_callback_sees_every_grid_point_after_the_first(solver: str) -> None:
    ode, x, seen = gaussian().ode(EDM), start(), []
    final = iia.sample(ode, x, INNER, solver, callback=lambda k, t, state: seen.append((k, t, state)))
    assert [(k, t) for k, t, _ in seen] == list(enumerate(INNER.tolist()))[1:]
    close(torch.stack([s for _, _, s in seen]), iia.odeint(ode, x, INNER, method=solver)[1:], atol=1e-12)
    assert torch.equal(seen[-1][2], final)


# ---- torchdiffeq's signature ----------------------------------------------------------------------------------------


def test_odeint_has_the_signature_of_torchdiffeqs() -> None:
    theirs, ours = (inspect.signature(f).parameters for f in (torchdiffeq.odeint, iia.odeint))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    ode, x = gaussian().ode(EDM), start()
    assert torch.equal(iia.odeint(func=ode, y0=x, t=INNER, method="ddim"), iia.odeint(ode, x, INNER, method="ddim"))
    assert torch.equal(iia.odeint(ode, x, INNER), iia.odeint(ode, x, INNER, method="heun"))
    given = iia.odeint(ode, x, INNER, method="dopri5", rtol=1e-7, atol=1e-9)
    assert torch.equal(iia.odeint(ode, x, INNER, method="dopri5"), given)


@pytest.mark.parametrize("solver", ["heun", "ddim", iia.get_solver("rk4")])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rtol": 1e-3}, "rtol would have no effect: omit it and take a finer grid.*'dopri5'"),
        ({"rtol": 1e-3, "atol": 1e-3}, "rtol and atol would have no effect: omit them"),
        ({"options": {"step_size": 0.1}}, r"options {'step_size': 0.1} are for torchdiffeq.*get_solver\(name, option"),
        ({"event_fn": lambda t, y: y.mean()}, "finds no events: omit event_fn, or use method='dopri5'"),
    ],
)
def test_what_a_fixed_plan_cannot_use_is_refused_with_what_to_write_instead(
    solver: Any, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(iia.errors.InputError, match=words):
        iia.odeint(ODE, start(), INNER, method=solver, **given)
    if "event_fn" not in given:
        with pytest.raises(iia.errors.InputError, match=words):
            iia.sample(ODE, start(), INNER, solver, **given)


def test_sample_takes_the_tolerances_and_options_of_torchdiffeqs_methods() -> None:
    ode, x, ends = gaussian().ode(EDM), start(), INNER[[0, -1]]
    for method, given in (
        ("dopri5", {"rtol": 1e-3, "atol": 1e-4}),
        ("torchdiffeq:heun3", {"options": {"step_size": 0.5}}),
    ):
        expected = iia.odeint(ode, x, ends, method=method, **given)[-1]
        assert torch.equal(iia.sample(ode, x, ends, method, **given), expected)
        assert not torch.equal(iia.sample(ode, x, ends, method), expected)


def test_progress_of_torchdiffeqs_methods_counts_their_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    ode, x = gaussian().ode(EDM), start()
    quiet = iia.sample(ode, x, INNER, "torchdiffeq:heun3")
    spent = ode.nfe
    assert capsys.readouterr().err == ""
    assert torch.equal(iia.sample(ode, x, INNER, "torchdiffeq:heun3", progress=True), quiet)
    assert f"heun3: {spent} evaluations" in capsys.readouterr().err


# From N(0, v + 5^2) the flow shrinks a state by sqrt((v + t^2) / (v + 5^2)).
@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("torchdiffeq:heun3", {"step_size": 0.01})])
@pytest.mark.parametrize("times", [[5.0, 0.3], [5.0, 4.0, 0.3]])
def test_an_event_is_found_where_the_exact_flow_has_it(method: str, options: Any, times: list[float]) -> None:
    problem = gaussian()
    x = problem.mean.expand(1, 3) + torch.tensor([[3.0, 0.0, 0.0]], dtype=F64)
    seen: list[float] = []

    def event(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return y[0, 0] - problem.mean[0] - 1.5

    time, states = iia.odeint(problem.ode(EDM), x, times, method=method, options=options, event_fn=event)
    v = float(problem.variance[0])
    close(time, math.sqrt((v + 25) / 4 - v), atol=1e-3)
    assert states.shape == (2, 1, 3)
    close(states[1], problem.flow(x, EDM, 5.0, float(time)), atol=1e-3)
    assert min(seen) >= 0.3 - 0.02


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("dopri5", None, iia.errors.GridError, "does not change its sign between t = 5 and 0.3: extend the grid"),
        ("torchdiffeq:heun3", {"step_size": 0.1}, iia.errors.GridError, "does not change its sign"),
        ("torchdiffeq:heun3", None, iia.errors.InputError, "step_size.*or use method='dopri5'"),
        ("scipy_solver", None, iia.errors.InputError, "finds no events: use method='dopri5'"),
    ],
)
def test_an_event_that_is_not_found_is_an_error(method: str, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        iia.odeint(ODE, start(), INNER, method=method, options=options, event_fn=lambda t, y: y.abs().sum() + 1)


def test_torchdiffeq_is_imported_by_its_first_use() -> None:
    code = (
        "import sys, torch, iia_ode as iia; x = torch.ones(2, 3)\n"
        "ode = iia.ProbabilityFlowODE(lambda x, t: x / 2, iia.EDM())\n"
        "iia.sample(ode, x, [5.0, 1.0]); assert 'torchdiffeq' not in sys.modules\n"
        "iia.sample(ode, x, [5.0, 1.0], 'dopri5', rtol=1e-3, atol=1e-3); assert 'torchdiffeq' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- torchdiffeq's methods -------------------------------------------------------------------------------------------


def test_the_list_of_methods_is_torchdiffeqs_own() -> None:
    methods = iia.solver_names(torchdiffeq=True)
    assert methods == sorted(set(methods))
    assert {"dopri5", "rk4", "implicit_adams"} <= set(methods)
    with pytest.raises(ValueError, match="Invalid method") as caught:
        torchdiffeq.odeint(lambda t, y: y, torch.ones(1), torch.tensor([0.0, 1.0]), method="no such method")
    assert set(re.findall(r'"(\w+)"', str(caught.value).split("one of")[-1])) == set(methods)


@every_method
def test_every_method_of_torchdiffeq_is_torchdiffeqs_own(method: str) -> None:
    ode, x = gaussian().ode(EDM), start()
    # One interval for the adaptive ones, of which theirs would otherwise step past the end and interpolate.
    adaptive = method in ADAPTIVE and method != "scipy_solver"
    grid = FINE[[0, -1]] if adaptive else FINE
    options = {"step_t": grid[1:]} if adaptive else None
    theirs = torchdiffeq.odeint(ode, x, grid, rtol=1e-6, atol=1e-6, method=method, options=options)
    names = [f"torchdiffeq:{method}"] + ([] if method in iia.solver_names() else [method])
    for name in names:
        assert torch.equal(iia.odeint(ode, x, grid, method=name, rtol=1e-6, atol=1e-6), theirs)
        # Without tolerances, which are tight, over a shorter way.
        assert torch.equal(iia.sample(ode, x, FINE[:2], name), iia.odeint(ode, x, FINE[:2], method=name)[-1])


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_follow_the_exact_flow_within_the_grid(method: str, schedule: iia.Schedule) -> None:
    problem, grid = gaussian(), iia.grids.karras(7, 0.002, 5.0, schedule=schedule, to_data=False)
    x, times = start(schedule, float(grid[0])), []
    exact = [problem.flow(x, schedule, float(grid[0]), t) for t in grid.tolist()]
    ode = problem.ode(schedule)
    ode.model.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1][0])))
    states = iia.odeint(ode, x, grid, method=method, rtol=1e-5, atol=1e-5)
    close(states, torch.stack(exact), atol=2e-3)
    low, high = float(grid[-1]), float(grid[0])
    assert low * (1 - 1e-6) <= min(times) <= max(times) <= high * (1 + 1e-6)  # scipy_solver rounds times to float32


def test_options_and_tolerances_reach_torchdiffeq() -> None:
    ode, x = gaussian().ode(EDM), start()
    exact = gaussian().flow(x, EDM, 5.0, 0.3)
    ends = INNER[[0, -1]]
    errors = [
        float((iia.odeint(ode, x, ends, method="dopri5", rtol=r, atol=r)[-1] - exact).abs().max()) for r in (1e-3, 1e-9)
    ]
    assert errors[1] < 1e-7 < 1e-5 < errors[0]
    fine = iia.odeint(ode, x, ends, method="torchdiffeq:rk4", options={"step_size": 0.05})
    assert float((fine[-1] - exact).abs().max()) < 1e-5
    assert float((iia.odeint(ode, x, ends, method="torchdiffeq:rk4")[-1] - exact).abs().max()) > 1e-2


def test_rk4_and_torchdiffeqs_rk4_are_two_methods_of_order_4() -> None:
    ode, x = gaussian().ode(EDM), start()
    exact, counts = gaussian().flow(x, EDM, 5.0, 0.3), [16, 32, 64]
    states = {
        name: [iia.sample(ode, x, iia.grids.log_snr(n + 1, 0.3, 5.0, to_data=False), name) for n in counts]
        for name in ("rk4", "torchdiffeq:rk4")
    }
    for found in states.values():
        assert -slope([float((s - exact).abs().max()) for s in found], counts) == pytest.approx(4, abs=0.15)
    gap, error = (float((states["rk4"][0] - other).abs().max()) for other in (states["torchdiffeq:rk4"][0], exact))
    assert gap > 0.1 * error


def test_a_name_that_both_have_means_the_one_registered_here() -> None:
    ode, x = gaussian().ode(EDM), start()
    shared = set(iia.solver_names()) & set(iia.solver_names(torchdiffeq=True))
    assert shared >= {"euler", "midpoint", "rk4"}
    for name in shared:
        assert torch.equal(
            iia.odeint(ode, x, INNER, method=name), iia.odeint(ode, x, INNER, method=iia.get_solver(name))
        )


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: type(s).__name__)
def test_gradients_through_odeint_are_those_of_the_flow(schedule: iia.Schedule) -> None:
    problem, grid = gaussian(), iia.grids.log_snr(17, 0.3, 5.0, schedule=schedule, to_data=False)
    x = start(schedule, float(grid[0])).requires_grad_()
    response = iia.get_solver("rk4").plan(schedule, grid).on_gaussian(problem.mean, problem.variance)
    for method, gain, atol in (("rk4", response.gain, 1e-12), ("dopri5", response.exact_gain, 1e-5)):
        (gradient,) = torch.autograd.grad(iia.odeint(problem.ode(schedule), x, grid, method=method)[-1].sum(), x)
        close(gradient, gain.expand_as(x), atol=atol)


@every_solver
def test_gradients_reach_the_state_and_the_parameters_of_the_model(name: str) -> None:
    grid, x = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=F64), start(t=2.0, n=2).requires_grad_()
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)

    def final(x: Tensor, weight: Tensor) -> Tensor:
        return iia.odeint(model(lambda y, t: torch.tanh(weight * y) + t[:, None] * weight), x, grid, method=name)[-1]

    assert torch.autograd.gradcheck(final, (x, weight))


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_sample_builds_no_graph(solver: str) -> None:
    net = nn.Linear(3, 3, dtype=F64)
    seen: list[bool] = []

    def watch(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return net(x)

    x = start().requires_grad_()
    assert not iia.sample(model(watch), x, INNER, solver).requires_grad
    assert seen
    assert not any(seen)
    assert torch.is_grad_enabled()
    assert iia.odeint(model(watch), x, INNER, method=solver).requires_grad


# ---- refusals --------------------------------------------------------------------------------------------------------

ODE = gaussian().ode(EDM)
NAN, INF = math.nan, math.inf
REFUSED: dict[str, tuple[Callable[[], Any], type[iia.IIAError], str]] = {
    "wrong shape": (
        lambda: (ODE, start()[:, :2], INNER),
        iia.errors.InputError,
        r"must have shape \[B, 3\], got \[4, 2\]",
    ),
    "no batch": (lambda: (ODE, start()[0], INNER), iia.errors.InputError, r"must have shape \[B, 3\], got \[3\]"),
    "a scalar": (
        lambda: (model(torch.zeros_like), torch.tensor(1.0), INNER),
        iia.errors.InputError,
        r"batch dimension.*\[\]",
    ),
    "an empty batch": (
        lambda: (ODE, start()[:0], INNER),
        iia.errors.InputError,
        r"non-empty batch dimension.*\[0, 3\]",
    ),
    "not a tensor": (
        lambda: (ODE, [1.0, 2.0, 3.0], INNER),
        iia.errors.InputError,
        r"must be a torch\.Tensor, got list",
    ),
    "half": (
        lambda: (ODE, start().half(), INNER),
        iia.errors.InputError,
        r"float32 or float64, got torch\.float16.*x\.float",
    ),
    "bfloat16": (lambda: (ODE, start().bfloat16(), INNER), iia.errors.InputError, r"got torch\.bfloat16.*x\.float\(\)"),
    "integers": (lambda: (ODE, start().long(), INNER), iia.errors.InputError, r"float32 or float64, got torch\.int64"),
    "a bare model": (
        lambda: (torch.zeros_like, start(), INNER),
        iia.errors.InputError,
        r"ProbabilityFlowODE\(model, iia_ode",
    ),
    "no grid": (lambda: (ODE, start()), iia.errors.GridError, r"'heun' needs a grid, such as grid=iia_ode\.grids"),
    "no grid, theirs": (
        lambda: (ODE, start(), None, "dopri5"),
        iia.errors.GridError,
        r"'dopri5' needs a grid, such as",
    ),
    "one time": (
        lambda: (ODE, start(), INNER[:1]),
        iia.errors.GridError,
        r"at least two times, such as.*got shape \[1\]",
    ),
    "two rows": (lambda: (ODE, start(), INNER.repeat(2, 1)), iia.errors.GridError, r"got \[2, 9\] for 4 samples"),
    "a number of steps": (lambda: (ODE, start(), 10), iia.errors.GridError, r"1-d float64 tensor.*got int"),
    "an array": (lambda: (ODE, start(), INNER.numpy()), iia.errors.GridError, r"1-d float64 tensor.*got ndarray"),
    "a name as grid": (lambda: (ODE, start(), "karras"), iia.errors.GridError, r"1-d float64 tensor.*got str"),
    "names in the grid": (lambda: (ODE, start(), ["5", "1"]), iia.errors.GridError, r"1-d float64 tensor"),
    "turning": (
        lambda: (ODE, start(), [5.0, 3.0, 4.0]),
        iia.errors.GridError,
        r"\[5, 3, 4\] turns.*points 1 and 2 \(3, 4\)",
    ),
    "repeating": (
        lambda: (ODE, start(), [5.0, 3.0, 3.0]),
        iia.errors.GridError,
        r"stands still.*points 1 and 2 \(3, 3\)",
    ),
    "from the data": (
        lambda: (ODE, start(), [0.0, 1.0]),
        iia.errors.GridError,
        r"at the data \(t = 0.*data prediction does not determine dx/dt.*small sigma",
    ),
    "NaN": (lambda: (ODE, start(), [5.0, NAN, 1.0]), iia.errors.GridError, r"leaves the EDM schedule: \[5, nan, 1\]"),
    "infinite": (lambda: (ODE, start(), [INF, 1.0]), iia.errors.GridError, r"leaves the EDM schedule: \[inf, 1\]"),
    "theirs to the data": (
        lambda: (ODE, start(), [5.0, 0.0], "dopri5"),
        iia.errors.GridError,
        r"at the data.*does not determine dx/dt.*to_data=False",
    ),
    "unknown": (
        lambda: (ODE, start(), INNER, "huen"),
        iia.errors.UnknownNameError,
        r"unknown solver 'huen'. Did you mean 'heun'",
    ),
    "unknown, theirs": (
        lambda: (ODE, start(), INNER, "torchdiffeq:dopri"),
        iia.errors.UnknownNameError,
        r"unknown torchdiffeq method 'dopri'. Did you mean 'dopri\d'",
    ),
    "a preset": (
        lambda: (ODE, start(), INNER, "iia-ddim"),
        iia.errors.InputError,
        r"'iia-ddim' has to be fitted first: fit = iia_ode\.preset\('iia-ddim'\)\.fit",
    ),
    "a class": (
        lambda: (ODE, start(), INNER, iia.RungeKutta),
        iia.errors.InputError,
        r"a name, a Solver, a FittedSolver or a Plan",
    ),
    "nothing": (lambda: (ODE, start(), INNER, None), iia.errors.InputError, r"must be a name.*got NoneType"),
    "plan and another grid": (
        lambda: (ODE, start(), INNER[:3], iia.get_solver("heun").plan(EDM, INNER)),
        iia.errors.MismatchError,
        r"heun has its own grid of 9 times.*omit it",
    ),
    "plan of another schedule": (
        lambda: (ODE, start(), None, iia.get_solver("heun").plan(iia.VP(), [0.9, 0.5])),
        iia.errors.MismatchError,
        r"traced for VP \(.*the ODE has EDM",
    ),
    "model of another shape": (
        lambda: (model(lambda x, t: x[:, :1]), start(), INNER),
        iia.errors.InputError,
        r"model returned \[4, 1\] for a state of shape \[4, 3\]",
    ),
    "model without a tensor": (
        lambda: (model(lambda x, t: (x,)), start(), INNER),
        iia.errors.InputError,
        r"returned tuple.*one tensor",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("integrate", [iia.sample, iia.odeint])
def test_what_cannot_be_integrated_is_refused_with_what_to_write_instead(
    integrate: Callable[..., Tensor], what: str
) -> None:
    arguments, error, message = REFUSED[what]
    with pytest.raises(error, match=message) as caught:
        call(integrate, *arguments())
    assert isinstance(caught.value, iia.IIAError)


OUTSIDE = {
    "EDM": (EDM, [5.0, -1.0]),
    "VE": (iia.VE(), [5.0, -1.0]),
    "VP": (iia.VP(), [1.0, -0.5]),
    "Cosine": (iia.Cosine(), [0.9, -0.5]),
    "FlowMatching": (iia.FlowMatching(), [0.9, -0.5]),
    "Discrete": (iia.Discrete(ALPHAS_CUMPROD), [900.0, -1.5]),
    "FlowMatching beyond the noise": (iia.FlowMatching(), [1.5, 0.5]),
    "Cosine beyond the noise": (iia.Cosine(), [1.5, 0.5]),
    "Discrete beyond the noise": (iia.Discrete(ALPHAS_CUMPROD), [1500.0, 500.0]),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_grid_that_leaves_the_schedule_is_refused(what: str) -> None:
    schedule, grid = OUTSIDE[what]
    with pytest.raises(iia.errors.GridError, match=f"leaves the {what.split()[0]} schedule"):
        iia.sample(gaussian().ode(schedule), start(), grid)


def test_the_names_offered_are_all_there_is_and_each_once() -> None:
    with pytest.raises(iia.errors.UnknownNameError) as caught:
        iia.sample(ODE, start(), INNER, "no such solver")
    offered = str(caught.value).split("Known: ")[1].rstrip(".").split(", ")
    assert {*iia.solver_names(), *iia.solver_names(torchdiffeq=True), "iia-ddim", "iia-edm"} <= set(offered)
    assert len(offered) == len(set(offered))


def test_an_option_that_would_be_ignored_is_refused() -> None:
    for method, options in (("dopri5", {"first_stp": 0.1}), ("heun", {"step_size": 0.1}), ("rk4", {"step_size": 0.1})):
        with pytest.raises(iia.IIAError, match=next(iter(options))):
            iia.odeint(ODE, start(), INNER, method=method, options=options)


# ---- models that fail ------------------------------------------------------------------------------------------------


def fails_below(level: float, answer: float) -> iia.ProbabilityFlowODE:
    return model(lambda x, t: torch.where(t[:, None] < level, torch.full_like(x, answer), x / (1 + t[:, None] ** 2)))


@in_turn("name, answer", iia.solver_names(), (NAN, INF, -INF))
def test_a_model_that_is_not_finite_is_named_with_the_evaluation(name: str, answer: float) -> None:
    plan = iia.get_solver(name).plan(EDM, INNER)
    first = next(i for i, t in enumerate(plan.evaluation_times) if t < 1.0)
    message = rf"evaluation {first + 1} of {plan.nfe} \(t = {plan.evaluation_times[first]:.6g}\) under {name}.*dtype"
    for integrate in (iia.sample, iia.odeint):
        with pytest.raises(iia.errors.NonFiniteError, match=message):
            call(integrate, fails_below(1.0, answer), start(), INNER, name)
    assert not bool(
        torch.isfinite(iia.sample(fails_below(1.0, answer), start(), INNER, name, check_finite=False)).all()
    )


@pytest.mark.parametrize("method", ["dopri5", "torchdiffeq:rk4", "heun3", "scipy_solver"])
@pytest.mark.parametrize("integrate", [iia.sample, iia.odeint])
def test_a_method_of_torchdiffeq_does_not_hand_out_nan_either(method: str, integrate: Callable[..., Tensor]) -> None:
    with pytest.raises(iia.errors.NonFiniteError, match=method.removeprefix("torchdiffeq:")):
        call(integrate, fails_below(1.0, NAN), start(), INNER, method)


def test_a_result_too_large_for_its_dtype_is_told_from_a_failing_model() -> None:
    with pytest.raises(iia.errors.NonFiniteError, match=r"overflowed torch\.float32: every model output was finite"):
        iia.sample(model(lambda x, t: torch.full_like(x, 3e38), prediction="velocity"), start().float(), [5.0, 0.1])


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_an_exception_of_the_model_reaches_the_caller_as_it_is(solver: str, error: type[Exception]) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise error("the model's own words")

    with pytest.raises(error, match="the model's own words"):
        iia.sample(model(broken), start(), INNER, solver)


# ---- nothing is read back from the device ----------------------------------------------------------------------------


@every_solver_on_a_schedule
def test_no_value_is_read_from_the_device_before_the_last_evaluation(name: str, schedule: iia.Schedule) -> None:
    """On the meta device a tensor has no values: whatever reads one (item, tolist, bool, cpu) raises."""
    ode, grid = iia.ProbabilityFlowODE(lambda x, t: 0.5 * x, schedule, "v"), iia.grids.karras(5, schedule=schedule)
    x = torch.empty(4, 4, dtype=F64, device="meta")
    plan = iia.get_solver(name).plan(schedule, grid)
    assert iia.sample(ode, x, grid, name, check_finite=False).shape == x.shape
    assert ode.nfe == plan.nfe
    assert iia.sample(ode, x, grid, name).shape == x.shape  # nor does the check of numbers that are not there


@every_schedule
def test_nor_do_the_models_in_closed_form_read_one(schedule: iia.Schedule) -> None:
    x = torch.empty(4, 4, dtype=F64, device="meta")
    assert iia.sample(
        mixture().ode(schedule, "v"), x, iia.grids.karras(5, schedule=schedule), check_finite=False
    ).is_meta


def test_a_model_that_reads_a_value_is_caught_by_that_test() -> None:
    x = torch.empty(4, 3, dtype=F64, device="meta")
    ode = model(lambda x, t: x * float(x.mean()))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        iia.sample(ode, x, INNER, check_finite=False)
    assert ode.nfe == 1
