"""Models that reuse memory: each gives the results of a careful twin on every path, to the last bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import F64, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.ode import cached
from iia_ode.plan import Plan
from iia_ode.plan.memory import is_unshared

EDM = iia.EDM()
GRID = iia.grids.karras(4, 0.05, 20.0)
INNER = iia.grids.karras(4, 0.05, 20.0, to_data=False)
X = 20 * normal(24, 4)


def answer(x: Tensor, t: Tensor) -> Tensor:
    """A smooth estimate of the data."""
    s = t.reshape(-1, 1).to(x)
    return (x + s * torch.sin(x / (1 + s))) / (1 + s * s)


class OneBuffer(nn.Module):
    """Writes every answer to the beginning of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(999, 4, dtype=F64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.memory[: len(x)].copy_(answer(x, t))


class MovingView(OneBuffer):
    """Writes every answer to one buffer, a row further at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.memory[self.calls % 5 :][: len(x)].copy_(answer(x, t))


class Spoiler(nn.Module):
    """Overwrites its last answer, and everything that it was given, at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for v in self.known:
            v.fill_(1e9)
        out = answer(x, t)
        self.known = [x, t, out]
        return out


class InPlace(nn.Module):
    """Changes the states in place and returns them; changes the times too."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x.copy_(answer(x, t))
        t.fill_(-1.0)
        return x


class ViewOfInput(nn.Module):
    """Changes the states in place and returns a view of them."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.copy_(answer(x, t)).unflatten(1, (2, 2)).flatten(1)


class Expanded(nn.Module):
    """Returns one number per sample, expanded to all components."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t).mean(1, keepdim=True).expand_as(x)


class Itself(nn.Module):
    """Returns the states themselves."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


MODELS = [OneBuffer, MovingView, Spoiler, InPlace, ViewOfInput, Expanded, Itself]
every_model = pytest.mark.parametrize("kind", MODELS, ids=lambda k: k.__name__)


def careful(kind: type[nn.Module]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same answers, in memory of their own."""

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return kind()(x.clone(), t.clone()).clone()

    return forward


def by_hand(model: Callable[[Tensor, Tensor], Tensor], prediction: str, plan: Plan, x: Tensor) -> list[Tensor]:
    """The states and previews of a run that is fed by hand."""
    run, seen = plan.start(x, prediction), []
    while not run.done:
        run.give(model(run.state, torch.full((len(x),), run.t, dtype=F64)))
        seen.append(run.data)
    return [*seen, run.state]


def paths(model: Any, prediction: str) -> dict[str, Callable[[], Any]]:
    """Results by path."""
    ode = iia.ProbabilityFlowODE(model, EDM, prediction)
    small = X[:6]
    plan = iia.get_solver("unipc").plan(EDM, INNER)
    found: dict[str, Callable[[], Any]] = {}
    for name in ("heun", "unipc"):
        found[f"sample {name}"] = lambda name=name: iia.sample(ode, small, INNER, name)
    for name in ("expab4", "torchdiffeq:rk4"):
        found[f"odeint {name}"] = lambda name=name: iia.odeint(ode, small, INNER, method=name)
    found["odeint dopri5"] = lambda: iia.odeint(ode, small, INNER, method="dopri5", rtol=1e-3, atol=1e-3)
    found["by hand"] = lambda: torch.stack(by_hand(model, prediction, plan, small))
    found["a value"] = lambda: torch.stack([ode(t, small) for t in (3.0, torch.tensor(2.0), 1 + normal(6).abs())])
    found["teacher"] = lambda: iia.Teacher.solve(ode, small, 20.0, 0.05, steps=8, chunk_size=4).path.states
    found["cached"] = lambda: torch.stack([iia.sample(cached(ode), small, INNER, "unipc") for _ in range(2)])
    found["reference"] = lambda: iia.reference.solve(ode, small, 2.0, 0.5, rtol=1e-3, atol=1e-3)
    found["dense reference"] = lambda: iia.reference.trajectory(ode, small, 2.0, 0.5, points=3, rtol=1e-3, atol=1e-3)(
        1.0
    )
    return found


@pytest.mark.parametrize("prediction", ["data", "velocity"])
@every_model
def test_a_model_that_reuses_memory_gives_the_bits_of_a_careful_one(kind: type[nn.Module], prediction: str) -> None:
    for name, expected in paths(careful(kind), prediction).items():
        assert torch.equal(paths(kind(), prediction)[name](), expected()), name


@every_model
def test_guidance_and_thresholds_read_memory_before_it_changes(kind: type[nn.Module]) -> None:
    def finals(model: Any) -> Tensor:
        def guided(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return model(x.add_(c[:, None]), t)

        conditions = {
            "conditioning": {"c": torch.ones(6, dtype=F64)},
            "unconditional": {"c": torch.zeros(1, dtype=F64)},
        }
        ode = iia.ProbabilityFlowODE(guided, EDM, "data", guidance_scale=3.0, **conditions)
        return torch.stack([iia.sample(o, X[:6], INNER, "unipc") for o in (ode, dynamic_thresholding(ode))])

    assert torch.equal(finals(kind()), finals(careful(kind)))


@pytest.mark.parametrize("kind", [OneBuffer, Spoiler])
def test_fits_to_a_model_that_reuses_memory_are_the_fits_to_a_careful_one(kind: type[nn.Module]) -> None:
    def fitted(model: Any) -> list[Any]:
        ode = iia.ProbabilityFlowODE(model, EDM, "data")
        method = iia.IIA("ddim", terms="window", target="trajectory", guard=False)
        fit = method.fit(ode, X, GRID, chunk_size=9)
        local = iia.IIA("dpmpp_2m", guard=False).fit(ode, X, GRID, chunk_size=24)
        statistics = iia.ModelStatistics.estimate(ode, X[:6], INNER, points=3, mode="forward")
        return [fit.plan, local.plan, *(getattr(statistics, k) for k in "lsb")]

    for a, b in zip(fitted(kind()), fitted(careful(kind)), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("entries", [1, 4])
def test_a_model_may_write_to_its_conditions(entries: int) -> None:
    def writes(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        c += 0.1 * t[:, None]
        return x / (1 + t[:, None] ** 2) + torch.tanh(c)

    def plain(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x / (1 + t[:, None] ** 2) + torch.tanh(c + 0.1 * t[:, None])

    grid, given = iia.grids.karras(4), normal(entries, 3)
    kept = given.clone()
    first, second = (
        iia.sample(iia.ProbabilityFlowODE(m, iia.EDM(), conditioning={"c": given}), 80 * normal(4, 3), grid, "heun")
        for m in (writes, plain)
    )
    assert torch.equal(first, second) and torch.equal(given, kept)


class WritesLate(nn.Module):
    """Changes the states in place from the third call on, for states that it has seen too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.known: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = answer(x, t)
        if self.calls >= 3:
            for v in (x, *self.known):
                v.fill_(1e9)
        self.known.append(x)
        return out


class WritesByNumPy(nn.Module):
    """Changes the states in place where torch does not see the change."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = answer(x, t)
        x.numpy()[...] = 1e9
        return out


class GradientByState(nn.Module):
    """The gradient of an energy, which torch adds to the gradient that a state has."""

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        self.first, self.calls = first, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        x = x if self.calls >= self.first else x.clone()
        with torch.enable_grad():
            x.requires_grad_(True)
            torch.cos(x / (1 + t[:, None])).sum().backward()
        assert x.grad is not None
        return x.grad


def test_the_gradient_of_an_energy_is_that_of_one_call() -> None:
    def finals(kind: Callable[[], Any]) -> Tensor:
        def doubled(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return model(x, t) * c[:, None]

        model, conditions = kind(), {"conditioning": {"c": torch.ones(24)}, "unconditional": {"c": 2 * torch.ones(1)}}
        apart = iia.ProbabilityFlowODE(doubled, EDM, guidance_scale=3.0, batched_guidance=False, **conditions)
        plan = iia.get_solver("ddim").plan(EDM, GRID)
        plain = plan.run(iia.ProbabilityFlowODE(kind(), EDM), X)
        return torch.stack([plain.detach(), iia.sample(apart, X, GRID, "heun")])

    expected = finals(lambda: careful(GradientByState))
    assert torch.equal(finals(GradientByState), expected)
    assert torch.equal(finals(lambda: GradientByState(first=4)), expected)


def test_a_hook_on_the_input_of_a_model_sees_the_gradient_by_the_model_alone() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(torch.zeros_like)
        return answer(x, t)

    x = X.clone().requires_grad_(True)
    plan = iia.get_solver("ddim").plan(EDM, INNER)
    (found,) = torch.autograd.grad(plan.run(iia.ProbabilityFlowODE(model, EDM), x).sum(), x)
    (kept,) = torch.autograd.grad(plan.run(iia.ProbabilityFlowODE(lambda x, t: answer(x.detach(), t), EDM), x).sum(), x)
    assert torch.allclose(found, kept)


def test_the_second_of_two_networks_may_write_to_the_data_of_its_states() -> None:
    def writes(x: Tensor, t: Tensor) -> Tensor:
        out = answer(x, t)
        x.data.clamp_(-1.0, 1.0)
        return out

    found, expected = (
        iia.sample(iia.ProbabilityFlowODE(iia.ode.by_level({0.0: low, 5.0: answer}), EDM), X, GRID, "heun")
        for low in (writes, answer)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "ipndm"])
@pytest.mark.parametrize("kind", [WritesLate, WritesByNumPy, Spoiler], ids=lambda k: k.__name__)
def test_a_run_notices_a_model_that_writes_to_its_states(kind: type[nn.Module], solver: str) -> None:
    expected = iia.sample(iia.ProbabilityFlowODE(answer, EDM), X, GRID, solver)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(iia.sample(iia.ProbabilityFlowODE(kind(), EDM), X, GRID, solver), expected)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])  # without and with memory of earlier outputs
def test_a_run_copies_the_state_once_for_a_model_that_only_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, copied = Tensor.clone, []

    def counting(self: Tensor, **options: Any) -> Tensor:
        copied.append(self)
        return clone(self, **options)

    plan = iia.get_solver(name).plan(EDM, iia.grids.karras(20, 0.05, 20.0, to_data=False))
    ode = iia.ProbabilityFlowODE(answer, EDM)
    expected = plan.run(ode, X, callback=lambda *_: None)
    monkeypatch.setattr(Tensor, "clone", counting)
    assert torch.equal(plan.run(ode, X), expected)
    assert len(copied) <= 3  # of the initial state, for the first call, and of no later state or output


KEPT: list[Any] = []


def kept(value: Any, of: Callable[[Any], Any] = lambda v: v) -> Any:
    """A value that somebody else holds too, by the result of a function of the value."""
    KEPT.append(of(value))
    return value


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: normal(3, 4), True),
        (lambda: 2.0 * X, True),
        (lambda: X, False),
        (lambda: X[:], False),
        (lambda: X.detach(), False),
        (lambda: kept(normal(3, 4)), False),
        (lambda: kept(normal(3, 4), Tensor.flatten), False),
        (lambda: kept(normal(3, 4), Tensor.numpy), False),
        (lambda: kept(normal(3, 4), lambda v: v.untyped_storage()), False),
        (lambda: torch.from_numpy(np.ones(3)), False),
        (lambda: normal(9)[:3], False),
        (lambda: torch.ones(1).expand(3), False),
        (lambda: torch.sigmoid(normal(3).requires_grad_()), False),  # its graph holds the output
        (lambda: torch.ones(3, device="meta"), False),
        (lambda: nn.Parameter(normal(3)), False),
    ],
)
def test_memory_that_anybody_else_can_reach_is_shared(make: Callable[[], Tensor], expected: bool) -> None:
    def found() -> bool:
        value = make()
        return is_unshared(value)

    with torch.enable_grad():
        assert found() == expected
    KEPT.clear()
    assert not torch.func.vmap(lambda v: v * is_unshared(2.0 * v))(torch.ones(2)).any()
