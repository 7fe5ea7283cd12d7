"""Devices without float64: every path runs there, and gives what it gives on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import DEVICE, chip
from fits import QUICK
from support import ALL_SCHEDULES, close, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import iia_ode as iia
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.iia import refine
from iia_ode.metrics import rmse
from iia_ode.ode import cached

EDM = iia.EDM()
GRID = iia.grids.karras(4, 0.05, 20.0)
INNER = iia.grids.karras(4, 0.05, 20.0, to_data=False)
X = 20 * normal(24, 3, dtype=torch.float32)


class Net(nn.Module):
    """A small network in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = t[:, None]
        return (x + 0.3 * s * self.layers(x / (1 + s))) / (1 + s * s)


class Refusing(TorchDispatchMode):
    """Refuses results in float64 on device meta, or of float32 tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            single = any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args)
            if single or out.device.type == "meta":
                raise TypeError(f"no float64 here: {func}")
        return out


def fitted(ode: iia.ProbabilityFlowODE, x: Tensor, **options: Any) -> Tensor:
    fit = iia.IIA("ddim", guard=True, **options).fit(ode, x, GRID)
    return iia.sample(ode, x, solver=fit)


PATHS: dict[str, Callable[[iia.ProbabilityFlowODE, Tensor], Tensor]] = {
    **{f"sample {n}": lambda ode, x, n=n: iia.sample(ode, x, GRID, n) for n in ("heun", "unipc", "dpmpp_2m")},
    "grid on the device": lambda ode, x: iia.sample(ode, x, GRID.float().to(x.device), "ddim"),
    "odeint": lambda ode, x: iia.odeint(ode, x, GRID, method="lms"),
    "torchdiffeq's rk4": lambda ode, x: iia.odeint(ode, x, INNER, method="torchdiffeq:rk4"),
    "dopri5": lambda ode, x: iia.sample(ode, x, INNER, "dopri5", rtol=1e-3, atol=1e-3),
    "an event": lambda ode, x: iia.odeint(
        ode, x, INNER, method="dopri5", rtol=1e-2, atol=1e-2, event_fn=lambda t, y: t - 1
    )[1],
    "teacher": lambda ode, x: iia.Teacher.solve(ode, x, 20.0, 0.0, steps=6).final,
    "thresholds": lambda ode, x: iia.sample(dynamic_thresholding(ode), x, GRID, "heun"),
    "memoized": lambda ode, x: iia.sample(cached(ode), x, GRID, "heun"),
    "window": lambda ode, x: fitted(ode, x, terms="window", target="trajectory", intercept=True),
    "iia-ddim": lambda ode, x: fitted(ode, x),
    "refined": lambda ode, x: iia.sample(
        ode, x, solver=refine(ode, x, iia.get_solver("ddim").plan(EDM, GRID), 0 * x, iterations=2).plan
    ),
    "one call": lambda ode, x: iia.sample(ode, 4 * x, solver=iia.fit(ode, 1, x=4 * x[:8], budget=QUICK)),
    "statistics": lambda ode, x: iia.ModelStatistics.estimate(ode, x, INNER, points=2, mode="reverse").l,
    "reference": lambda ode, x: iia.reference.solve(ode, x, 2.0, 1.0, rtol=1e-3, atol=1e-3),
    "dense reference": lambda ode, x: iia.reference.trajectory(ode, x, 2.0, 1.0, rtol=1e-3, atol=1e-3, points=2)(1.5),
    "metrics": lambda ode, x: torch.tensor(rmse(x, x + 1)),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_device_without_float64_gives_the_bits_of_the_host(name: str) -> None:
    expected = PATHS[name](iia.ProbabilityFlowODE(Net(), EDM), X)
    with chip():
        found = PATHS[name](iia.ProbabilityFlowODE(Net().to(DEVICE), EDM), X.to(DEVICE))
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=lambda s: type(s).__name__)
def test_times_on_the_device_are_in_float32_and_those_on_the_host_in_float64(schedule: iia.Schedule) -> None:
    for prediction in ("data", "noise", "velocity"):
        ode = iia.ProbabilityFlowODE(lambda x, t: torch.sin(x), schedule, prediction)
        for t in (torch.tensor(0.4), 0.2 + 0.5 * torch.rand(24)):
            expected = ode(t.double(), X)
            assert torch.equal(ode(t, X), expected)
            with chip():
                close(ode(t.to(DEVICE), X.to(DEVICE)).cpu(), expected, rtol=3e-5, atol=3e-5)
                assert torch.equal(ode(t, X.to(DEVICE)).cpu(), expected)


def test_nothing_makes_float64_of_a_float32_state() -> None:
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t[:, None] ** 2), EDM)
    meta = X.to("meta")
    with Refusing():
        for solver in ("ddim", "heun", "dpmpp_2m", "torchdiffeq:rk4", "dopri5"):
            assert iia.sample(ode, X, INNER, solver).dtype == torch.float32
            assert iia.odeint(ode, X, INNER, method=solver).dtype == torch.float32
        for t in (0.4, torch.tensor(0.4), torch.rand(24)):
            ode(t, X)
        for solver in ("ddim", "heun", "dpmpp_2m"):
            assert iia.sample(ode, meta, GRID, solver).shape == X.shape
            assert iia.odeint(ode, meta, GRID, method=solver)[0].shape == X.shape
        for t in (0.4, torch.tensor(0.4), torch.ones(24), torch.ones((), device="meta"), torch.ones(24, device="meta")):
            assert ode(t, meta).dtype == torch.float32
