"""States of every shape: plain numbers, other resolutions, and what is no state at all."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import F64, close, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.errors import InputError, MismatchError, NonFiniteError
from iia_ode.iia import refine
from iia_ode.metrics import rmse, rmse_with_error

GRID = iia.grids.karras(5, 0.05, 20.0)
DDIM = iia.get_solver("ddim").plan(iia.EDM(), GRID)


def shrink(x: Tensor, t: Tensor) -> Tensor:
    """The data estimate for data N(0, 1), for samples of every shape."""
    return x / (1 + t.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


def states(*shape: int) -> Tensor:
    return 20 * normal(*shape)


def ode() -> iia.ProbabilityFlowODE:
    return iia.ProbabilityFlowODE(shrink, iia.EDM(), "data")


# Each function takes an ODE and states, and returns the numbers of its result.
PATHS: dict[str, Callable[[iia.ProbabilityFlowODE, Tensor], Tensor]] = {
    "sample": lambda o, x: iia.sample(o, x, GRID, "heun"),
    "odeint": lambda o, x: iia.odeint(o, x, GRID, method="dpmpp_2m")[-1],
    "torchdiffeq": lambda o, x: iia.odeint(o, x, GRID[:-1], method="dopri5", rtol=1e-5, atol=1e-5)[-1],
    "run": lambda o, x: DDIM.run(o, x),
    "teacher": lambda o, x: iia.Teacher.solve(o, x, 20.0, 0.0).final,
    "reference": lambda o, x: iia.reference.solve(o, x, 20.0, 0.0),
    "guarded fit": lambda o, x: iia.IIA("ddim", ridge="auto", guard=True).fit(o, x, GRID).plan.run(o, x),
    "fit with a constant": lambda o, x: (
        iia.IIA("ddim", terms="window", target="trajectory", intercept=True).fit(o, x, GRID).plan.run(o, x)
    ),
    "fit to local targets": lambda o, x: iia.IIA("ddim", target="local", guard=False).fit(o, x, GRID).plan.run(o, x),
    "one call": lambda o, x: iia.fit(o, 2, x=x, budget="closed-form").plan.run(o, x),
    "refine": lambda o, x: refine(o, x, DDIM, x / 20, iterations=2).plan.run(o, x),
    "statistics": lambda o, x: iia.ModelStatistics.estimate(o, x, GRID[:-1], points=3, shared="all").l,
    "error": lambda o, x: torch.tensor(rmse_with_error(iia.sample(o, x, GRID), x / 20), dtype=F64),
}


@pytest.mark.filterwarnings("ignore::iia_ode.errors.GuardWarning")
@pytest.mark.parametrize("path", PATHS)
def test_a_state_of_numbers_gives_what_the_same_numbers_give_as_vectors(path: str) -> None:
    x = states(16)
    close(
        PATHS[path](ode(), x).flatten(),
        PATHS[path](ode(), x[:, None]).flatten(),
        atol=1e-6 if path == "refine" else 1e-9,
    )


def test_a_fit_with_constants_of_numbers_is_kept_in_its_file(tmp_path: Any) -> None:
    x = states(64)
    fit = iia.IIA("ddim", terms="window", target="trajectory", intercept=True, guard=False).fit(ode(), x, GRID)
    read = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert torch.equal(iia.sample(ode(), x, solver=read), iia.sample(ode(), x, solver=fit))


def test_a_one_call_fit_draws_noise_for_samples_that_are_numbers() -> None:
    assert iia.fit(ode(), 2, shape=(), samples=32, budget="closed-form").nfe == 2
    assert iia.fit(ode(), 2, noise=normal(32), budget="closed-form").nfe == 2


@pytest.mark.parametrize("kind", ["fit", "loaded", "refined"])
def test_a_fit_with_scalar_weights_runs_at_every_resolution(kind: str, tmp_path: Any) -> None:
    x, other = states(16, 1, 4, 4), states(3, 1, 6, 4)
    fit = iia.preset("iia-ddim").fit(ode(), x, GRID)
    if kind == "loaded":
        fit = iia.load(fit.save(tmp_path / "fit.safetensors"))
    if kind == "refined":
        refined = refine(ode(), x, fit.plan, iia.reference.solve(ode(), x, 20.0, 0.0), iterations=2).plan
        fit = iia.FittedSolver(refined, fit.reports, fit.record)
    close(iia.sample(ode(), other, solver=fit), fit.plan.run(ode(), other))
    by_rows = torch.cat([iia.sample(ode(), other[..., i : i + 2, :], solver=fit) for i in (0, 2, 4)], dim=-2)
    close(iia.sample(ode(), other, solver=fit), by_rows, atol=1e-12)


def test_a_fit_with_maps_or_constants_keeps_to_its_shape() -> None:
    x, other = states(16, 1, 4, 4), states(3, 1, 6, 4)
    constants = iia.IIA("ddim", terms="window", target="trajectory", intercept=True, guard=False).fit(ode(), x, GRID)
    window = iia.iia.Window(bands=2)
    maps = iia.IIA("ddim", terms=window, target="trajectory", guard=False).fit(ode(), x, GRID)
    for fit in (constants, maps):
        with pytest.raises(MismatchError, match=r"states \[B, 1, 4, 4\], got \[3, 1, 6, 4\]"):
            iia.sample(ode(), other, solver=fit)


@pytest.mark.parametrize("path", [p for p in PATHS if p != "error"])
@pytest.mark.parametrize(
    ("state", "text"),
    [
        (normal(8, 3).to(torch.complex64), r"must be real.*view_as_real"),
        ((normal(8, 3), torch.zeros(8)), r"got tuple: join its parts in one tensor"),
        (normal(8, 3).half(), r"float32 or float64, got torch\.float16: pass x\.float\(\)"),
        (torch.ones(8, 3, dtype=torch.int64), r"float32 or float64, got torch\.int64"),
        (np.ones((8, 3)), r"got ndarray: pass torch\.as_tensor\(x\)"),
        (torch.ones(0, 3), r"non-empty batch"),
        (torch.ones(4, 0), r"non-empty batch"),
        (torch.tensor(1.0), r"non-empty batch"),
    ],
    ids=["complex", "tuple", "half", "integer", "numpy", "no samples", "no components", "no batch"],
)
def test_what_is_no_state_is_refused_on_every_path(path: str, state: Any, text: str) -> None:
    if path == "refine":
        with pytest.raises(InputError, match=text):
            refine(ode(), state, DDIM, normal(8, 3))
        return
    with pytest.raises(InputError, match=text):
        PATHS[path](ode(), state)


@pytest.mark.parametrize(
    "state", [normal(8, 3).to(torch.complex64), normal(0, 3), [1.0, 2.0]], ids=["complex", "empty", "list"]
)
def test_an_error_of_no_states_is_refused(state: Any) -> None:
    with pytest.raises(InputError, match=r"states to compare"):
        rmse(state, state)


@pytest.mark.filterwarnings("ignore::iia_ode.errors.GuardWarning")
@pytest.mark.parametrize("path", ["sample", "torchdiffeq", "teacher", "guarded fit", "statistics"])
def test_the_layout_of_a_state_does_not_matter(path: str) -> None:
    x = states(8, 3, 4, 4)
    expected = PATHS[path](ode(), x)
    wide = torch.zeros(8, 3, 4, 8, dtype=F64)
    wide[..., ::2] = x
    for y in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.clone().requires_grad_()):
        close(PATHS[path](ode(), y).detach().contiguous(), expected, atol=1e-12)


def test_a_fit_names_the_samples_that_are_not_finite() -> None:
    x = states(16, 3)
    x[5, 1], x[9, 0] = torch.nan, torch.inf
    for fit in (iia.IIA("ddim"), iia.preset("iia-edm")):
        with pytest.raises(NonFiniteError, match=r"samples 5, 9 of the batch"):
            fit.fit(ode(), x, GRID)
    with pytest.raises(NonFiniteError, match=r"samples 5, 9 of the batch"):
        iia.fit(ode(), 2, x=x)
    with pytest.raises(NonFiniteError, match=r"samples 5, 9 of the batch"):
        refine(ode(), x, DDIM, x)
    with pytest.raises(NonFiniteError, match=r"samples 5, 9 of the batch"):
        iia.ModelStatistics.estimate(ode(), x, GRID[:-1])
    with pytest.raises(NonFiniteError, match=r"samples 5, 9 of the batch"):
        iia.Teacher.solve(ode(), x, 20.0, 0.0, chunk_size=3)


def test_a_fit_names_the_samples_on_which_the_model_is_not_finite() -> None:
    bad = states(16, 3)
    bad[6] = 7.0

    def net(x: Tensor, t: Tensor) -> Tensor:
        out = shrink(x, t)
        return torch.where((x[:, :1] == 7.0), torch.nan, out)

    broken = iia.ProbabilityFlowODE(net, iia.EDM(), "data")
    with pytest.raises(NonFiniteError, match=r"sample 6 of the batch"):
        iia.IIA("ddim", guard=False).fit(broken, bad, GRID, chunk_size=4)
    with pytest.raises(NonFiniteError, match=r"sample 6 of the batch"):
        iia.Teacher.solve(broken, bad, 20.0, 0.0, chunk_size=4)


@pytest.mark.parametrize(
    "number", [np.array(0.5), np.float32(0.5), torch.tensor(0.5), np.int64(1), np.array([0.5, 1.0, 2.0])]
)
def test_a_weight_is_a_number_of_numpy_or_of_torch(number: Any) -> None:
    class Scaled(iia.Solver):
        order = 1
        consistent = False

        def step(self, ode, x, t, s, past):
            return number * x + x * number - ode.data(x, t) * number

    plan = Scaled().plan(iia.EDM(), GRID[:2])
    x = states(4, 3)
    w = torch.as_tensor(number, dtype=F64)
    close(plan.run(ode(), x), 2 * w * x - w * shrink(x, torch.full((4,), 20.0, dtype=F64)), atol=1e-12)
