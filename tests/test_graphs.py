"""Gradients by states, parameters and times, the transforms of torch.func, and graphs of torch.compile and torch.export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from support import ALL_SCHEDULES, F64, close, normal
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import iia_ode as iia
from iia_ode.plan import Bands, Combine, Evaluate, Graph, LinearMap, Plan, graph

# torch scripts its own decompositions when forward differentiation is first used, and warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

EDM = iia.EDM()
GRID = iia.grids.karras(3, 0.05, 10.0)
TIMES = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
X = 6 * normal(5, 3)  # about the size of states at level 10


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x) / (1 + t[:, None] ** 2)


SMOOTH = [s for s in ALL_SCHEDULES if not isinstance(s, iia.Discrete)]

ODE = iia.ProbabilityFlowODE(model, EDM)
PLAN = iia.get_solver("ddim").plan(EDM, GRID)


def mapped() -> Plan:
    """A plan with a tensor weight, a linear map and a constant."""
    m = LinearMap(Bands((3,), 2), torch.tensor([0.3, 0.7]))
    code = (Evaluate(0, 10.0, "data"), Combine(((0, normal(3)), (1, m)), normal(3, seed=1), 1))
    return Plan(EDM, (10.0, 0.0), code)


MAPPED = mapped()
RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "Plan.run": lambda x: PLAN.run(ODE, x),
    "maps": lambda x: MAPPED.run(ODE, x),
    "sample": lambda x: iia.sample(ODE, x, GRID, "unipc"),
    "odeint": lambda x: iia.odeint(ODE, x, GRID, method="heun")[-1],
    "functions": lambda x: iia.odeint(
        iia.ProbabilityFlowODE(model, ALL_SCHEDULES[-1], "velocity"), x / 6, TIMES, method="dpmpp_2m"
    )[-1],
}


def differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """The Jacobian by central differences, with the input's axis last."""
    moves = step * torch.eye(len(x), dtype=F64)
    return torch.stack([(f(x + v) - f(x - v)) / (2 * step) for v in moves], dim=-1)


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_transforms_of_torch_func_pass_through_a_run(name: str) -> None:
    def f(z: Tensor) -> Tensor:
        return RUNS[name](z[None])[0]

    x, expected = X[0], differences(f, X[0])
    close(vmap(f)(X), RUNS[name](X), rtol=1e-12, atol=1e-14)
    close(jacrev(f)(x), expected, atol=1e-7)
    close(jacfwd(f)(x), expected, atol=1e-7)
    close(vmap(jacrev(f))(X)[0], expected, atol=1e-7)
    close(jvp(f, (x,), (X[1],))[1], expected @ X[1], atol=1e-6)
    close(grad(lambda z: f(z).sum())(x), expected.sum(0), atol=1e-7)
    close(hessian(f)(x), differences(jacrev(f), x), atol=1e-6)


def test_a_plan_used_in_a_transform_first_is_as_good_as_new() -> None:
    plan = mapped()
    jacrev(lambda z: plan.run(ODE, z))(X.float())
    torch.export.export(Exported(lambda z: plan.run(ODE, z)), (X.float(),))
    assert torch.equal(plan.run(ODE, X.float()), mapped().run(ODE, X.float()))


def test_parameters_reach_a_sample_through_torch_func() -> None:
    def end(w: Tensor) -> Tensor:
        return iia.sample(iia.ProbabilityFlowODE(lambda x, t: torch.tanh(w * x), EDM), X, GRID, "heun").sum(0)

    close(jacrev(end)(X[0]), differences(end, X[0]), atol=1e-7)


@pytest.mark.parametrize("transform", [vmap, jacrev])
def test_what_torchdiffeq_cannot_transform_is_refused_with_what_to_use(transform: Any) -> None:
    with pytest.raises(iia.errors.InputError, match="use a solver of this library"):
        transform(lambda z: iia.odeint(ODE, z[None], GRID[:-1], method="dopri5"))(X)


# ---- gradients by times ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["torchdiffeq:rk4", "dopri5"])
@pytest.mark.parametrize("schedule", SMOOTH[2::2], ids=lambda s: type(s).__name__)
def test_gradients_by_times_are_those_of_torchdiffeq_and_of_differences(schedule: iia.Schedule, method: str) -> None:
    ode = iia.ProbabilityFlowODE(model, schedule)

    def end(times: Tensor) -> Tensor:
        return iia.odeint(ode, X, times, method=method)[-1].sum()

    leaf = TIMES.clone().requires_grad_()
    end(leaf).backward()
    close(leaf.grad, differences(end, TIMES, 1e-5), rtol=1e-4, atol=1e-4)
    if method != "dopri5":  # whose steps end at the times here and not there
        other = TIMES.clone().requires_grad_()
        torchdiffeq.odeint(ode, X, other, method=method.removeprefix("torchdiffeq:"))[-1].sum().backward()
        close(leaf.grad, other.grad, rtol=1e-12)


def test_gradients_by_parameters_of_a_schedule_flow_through_torchdiffeqs_methods() -> None:
    def end(power: Tensor, method: str) -> Tensor:
        flow = iia.Schedule.from_functions(lambda t: (1 - t) ** power[0], lambda t: t)
        return iia.odeint(iia.ProbabilityFlowODE(model, flow), X, TIMES, method=method)[-1].sum()

    power = torch.tensor([1.2], dtype=F64)
    slope = torch.autograd.functional.jacobian(lambda p: end(p, "torchdiffeq:rk4"), power)
    close(slope, differences(lambda p: end(p, "torchdiffeq:rk4"), power), rtol=1e-6)
    with pytest.raises(iia.errors.InputError, match="no gradient flows to the schedule"):
        end(power.requires_grad_(), "heun")
    with torch.no_grad():
        end(power, "heun")


@pytest.mark.parametrize("method", ["heun", iia.get_solver("ddim"), iia.get_solver("ddim").plan(EDM, GRID)])
def test_gradients_by_the_times_of_a_plan_are_an_error(method: Any) -> None:
    grid = GRID.clone().requires_grad_()
    with pytest.raises(iia.errors.InputError, match=r"no gradient flows: pass grid\.detach"):
        iia.odeint(ODE, X, grid, method=method)
    with pytest.raises(iia.errors.InputError, match="no gradient flows"):
        jvp(lambda g: iia.sample(ODE, X, g, method), (GRID,), (GRID,))
    assert torch.equal(iia.sample(ODE, X, grid, method), iia.sample(ODE, X, GRID, method))


def test_gradients_reach_conditions_and_survive_checkpoints() -> None:
    def end(x: Tensor, c: Tensor) -> Tensor:
        ode = iia.ProbabilityFlowODE(lambda x, t, c: model(x, t) * c, EDM, conditioning={"c": c})
        return iia.odeint(ode, x, GRID, method="dpmpp_2m")[-1]

    x, c = X.clone().requires_grad_(), normal(5, 1, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(end, (x, c))
    plain = torch.autograd.grad(end(x, c).sum(), (x, c))
    again = torch.autograd.grad(checkpoint(end, x, c, use_reentrant=False).sum(), (x, c))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---- graphs ----------------------------------------------------------------------------------------------------------


class Exported(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_run_is_one_graph_that_is_compiled_once() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ode = iia.ProbabilityFlowODE(model, EDM)
    plan = iia.get_solver("ddim").plan(EDM, GRID)  # never run before
    compiled = torch.compile(lambda x: plan.run(ode, x), backend=backend, fullgraph=True)
    for factor in (1.0, 2.0, 3.0):
        assert torch.equal(compiled(factor * X), PLAN.run(ODE, factor * X))
    assert len(graphs) == 1


@pytest.mark.parametrize("of", [lambda: PLAN, mapped], ids=["numbers", "maps"])
def test_a_run_and_a_sample_of_a_plan_can_be_exported(of: Callable[[], Plan]) -> None:
    plan = of()
    for run in (lambda x: plan.run(ODE, x), lambda x: iia.sample(ODE, x, solver=plan)):
        program = torch.export.export(Exported(run), (X,))
        assert torch.equal(program.module()(2 * X), run(2 * X))


def test_a_grid_inside_an_export_is_refused_with_what_to_write() -> None:
    with pytest.raises(iia.errors.InputError, match="pass solver=plan"):
        torch.export.export(Exported(lambda x: iia.sample(ODE, x, GRID, "ddim")), (X,))


def test_derivatives_pass_a_run_that_goes_on_and_a_schedule_of_timesteps() -> None:
    x = X[0]
    whole = jacrev(lambda z: iia.sample(ODE, z[None], solver=PLAN)[0])(x)
    close(jacrev(lambda z: iia.sample(ODE, PLAN.start(z[None], "data"))[0])(x), whole, atol=1e-12)
    steps = iia.Discrete(torch.linspace(0.99, 0.01, 20, dtype=F64))
    ode, grid = iia.ProbabilityFlowODE(lambda x, t: 0.1 * x, steps, "noise"), iia.grids.discrete(3, steps)
    assert jacrev(lambda z: iia.sample(ode, z[None], grid, "ddim")[0])(x).diag().abs().min() > 0


def test_a_grid_per_sample_says_that_its_times_have_no_gradient_and_passes_vmap() -> None:
    grid = GRID.repeat(len(X), 1)
    with pytest.raises(iia.errors.InputError, match="no gradient flows"):
        iia.odeint(ODE, X, grid.clone().requires_grad_(), method="heun")
    found = vmap(lambda z: iia.sample(ODE, z[None], GRID[None], "heun")[0])(X)
    close(found, iia.sample(ODE, X, GRID, "heun"), rtol=1e-12, atol=1e-13)


# ---- graphs of CUDA ----------------------------------------------------------------------------------------------------


class Standing:
    """Stands for a CUDA graph on the host: a replay repeats the run on its buffers, and writes to the same result."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        self.captures += 1
        final = run()
        return (lambda: final.copy_(run())), final


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Standing:
    """Captures on the host."""
    found = Standing()
    monkeypatch.setattr("iia_ode.plan.capture._captured", found)
    return found


def test_a_graph_gives_the_bits_of_the_run_for_any_states_and_keeps_none_of_them(standing: Standing) -> None:
    guided = iia.ProbabilityFlowODE(
        lambda x, t, y: model(x, t) * y[:, None],
        EDM,
        conditioning={"y": torch.linspace(0.5, 1, 5, dtype=F64)},
        unconditional={"y": torch.ones(1, dtype=F64)},
        guidance_scale=2.0,
    )
    draw = Graph(PLAN, guided, X)
    first = draw(X)
    kept = first.clone()
    for scale in (1.0, 1.2, 0.9):
        assert torch.equal(draw(scale * X), PLAN.run(guided, scale * X))
    assert torch.equal(first, kept)
    assert standing.captures == 1


def test_a_graph_refuses_states_of_another_shape_dtype_or_device(standing: Standing) -> None:
    draw = Graph(PLAN, ODE, X)
    for other in (X[:2], X.float(), X.to("meta"), None):
        with pytest.raises(iia.errors.InputError, match="this graph was captured for"):
            draw(other)


def test_a_graph_names_no_culprit_but_says_how_to_find_it(standing: Standing) -> None:
    draw = Graph(PLAN, iia.ProbabilityFlowODE(lambda x, t: x / x.sum().clamp(min=0), EDM), X)
    with pytest.raises(iia.errors.NonFiniteError, match=r"plan\.run\(ode, x\) names"):
        draw(-X.abs())


def test_states_on_the_host_have_no_graph_and_the_error_says_what_to_use() -> None:
    with pytest.raises(iia.errors.InputError, match=r"use plan\.run"):
        graph(PLAN, ODE, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_run_on_a_device_is_the_run() -> None:
    x = X.cuda()
    draw = graph(PLAN, ODE, x)
    for scale in (1.0, 1.3):
        close(draw(scale * x), PLAN.run(ODE, scale * x))
