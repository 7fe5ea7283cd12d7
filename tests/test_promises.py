"""Promises that hold on every path: an answer is right, or the library says that it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import close
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.errors import InputError, StateSizeWarning
from iia_ode.plan import advance
from iia_ode.statistics import StatisticsTables

F64 = torch.float64
GRID = iia.grids.karras(6, 0.05, 10.0)


def shrinking(x: Tensor, t: Tensor) -> Tensor:
    """The data estimate for data N(0, 1)."""
    return x / (1 + t.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


def ode_of(model=shrinking, **options) -> iia.ProbabilityFlowODE:
    return iia.ProbabilityFlowODE(model, iia.EDM(), "data", **options)


def noise(*shape: int, seed: int = 0, sigma: float = 10.0) -> Tensor:
    return sigma * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- derivatives -----------------------------------------------------------------------------------------------------


class Preconditioned(nn.Module):
    """A data estimate with a skip of the state around a network, whose input may be detached."""

    def __init__(self, cut: bool, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.cut, self.skip = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)), cut, skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1 / (1 + t[:, None] ** 2).sqrt()
        part = self.net(4 * scale * (x.detach() if self.cut else x))
        return scale**2 * x + 4 * scale * part if self.skip else part


@pytest.mark.parametrize("mode", ["auto", "reverse"])
@pytest.mark.parametrize("skip", [False, True])
def test_statistics_of_a_model_that_cuts_its_derivatives_are_refused(mode, skip):
    def estimate(cut):
        ode = ode_of(Preconditioned(cut, skip).double())
        return iia.ModelStatistics.estimate(ode, noise(16, 3), [10.0, 0.05], points=5, mode=mode)

    assert isinstance(estimate(False), StatisticsTables)
    if skip or mode == "auto":  # without any derivative, reverse differentiation fails by itself
        with pytest.raises(InputError, match=r"cuts its derivatives.*detach"):
            estimate(True)


class Trained(iia.EDM):
    """A schedule with a parameter."""

    def __init__(self) -> None:
        self.scale = torch.ones((), dtype=F64, requires_grad=True)

    def sigma(self, t):
        return t * self.scale if isinstance(t, Tensor) else t * float(self.scale)


def test_no_path_drops_the_gradient_by_a_schedule():
    ode, x = iia.ProbabilityFlowODE(shrinking, Trained(), "data"), noise(2, 3)
    grid = torch.tensor(GRID.tolist(), dtype=F64)
    rows = torch.stack([grid, 0.9 * grid])
    with torch.no_grad():
        plan = iia.get_solver("ddim").plan(ode.schedule, grid)
    for path in (
        lambda: iia.odeint(ode, x, grid, method="ddim"),
        lambda: iia.odeint(ode, x, rows, method="ddim"),
        lambda: plan.run(ode, x),
    ):
        with pytest.raises(InputError, match="no gradient flows to the schedule"):
            path()
    with torch.no_grad():
        assert iia.odeint(ode, x, rows, method="ddim").shape == (7, 2, 3)


# ---- sizes of states -------------------------------------------------------------------------------------------------


def test_every_path_warns_of_states_without_their_noise():
    ode, x, plain = ode_of(), noise(8, 30, sigma=1.0), iia.get_solver("ddim").plan(iia.EDM(), GRID)
    rows = torch.stack([GRID * (1 + k / 10) for k in range(8)])
    good = rows[:, :1] * x
    one = good.clone()
    one[3] /= 10
    for path in (
        lambda: iia.sample(ode, x, rows, "ddim"),
        lambda: iia.odeint(ode, x, rows, method="ddim"),
        lambda: iia.sample(ode, plain.start(x, "data")),
        lambda: advance(ode, plain.start(x, "data"), until=2),
        lambda: iia.ModelStatistics.estimate(ode, x, [10.0, 0.05], points=3),
    ):
        with pytest.warns(StateSizeWarning):
            path()
    with pytest.warns(StateSizeWarning, match="sample 3 has"):
        iia.sample(ode, one, rows, "ddim")
    few = noise(8, 4, sigma=1.0)  # no single sample is certain, all together are
    with pytest.warns(StateSizeWarning, match="relative to their noise"):
        iia.sample(ode, 0.3 * rows[:, :1] * few, rows, "ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iia.sample(ode, good, rows, "ddim")
        half = advance(ode, plain.start(10 * x, "data"), until=2)
        iia.sample(ode, half)
        iia.sample(ode, x, rows, "ddim", check_finite=False)


# ---- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heun", "unipc"])
def test_vmap_over_conditions_keeps_the_states_of_the_batch(name):
    def conditioned(x, t, c):
        return (0.5 * x + c) / (1 + t[:, None] ** 2)

    x, conditions = noise(3, 4), noise(5, 3, 4, seed=1, sigma=1.0)
    ode, plan = ode_of(conditioned, conditioning={"c": conditions[0]}), iia.get_solver(name).plan(iia.EDM(), GRID)
    rows = torch.stack([GRID, 0.9 * GRID, 0.8 * GRID])
    for path in (
        lambda c: iia.sample(ode.condition(c=c), x, GRID, name),
        lambda c: iia.odeint(ode.condition(c=c), x, GRID, method=name),
        lambda c: iia.sample(ode.condition(c=c), x, rows, name),
        lambda c: iia.sample(ode.condition(c=c), plan.start(x, "data")),
    ):
        close(torch.func.vmap(path)(conditions), torch.stack([path(c) for c in conditions]))
