"""Promises that hold on every path: an answer is right, or the library says that it is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support import close
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.errors import FileFormatError, InputError, StateSizeWarning
from iia_ode.iia import refine
from iia_ode.iia.batch import Batch
from iia_ode.ode import Wrapped, cached
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


# ---- conditions ------------------------------------------------------------------------------------------------------


def test_a_cache_answers_for_the_conditions_as_they_are_now():
    def conditioned(x, t, c, names):
        return x * 0 + c[:, None] + len(names[0])

    def fresh(change):
        ode = ode_of(
            conditioned,
            conditioning={"c": torch.zeros(2), "names": ["a", "b"]},
            unconditional={"c": c0, "names": ["-"]},
        )
        own = cached(ode)
        before = [own.output(x, 1.0) for _ in range(2)]
        change(own, ode)
        assert torch.equal(own.output(x, 1.0), ode.output(x, 1.0))
        assert not torch.equal(own.output(x, 1.0), before[0]) and torch.equal(before[0], before[1])

    x, c0 = torch.ones(2, 3), torch.ones(2)
    new = {"c": torch.full((2,), 3.0), "names": ["a", "b"]}
    with torch.no_grad():
        fresh(lambda own, ode: setattr(own, "conditioning", new))
        fresh(lambda own, ode: setattr(ode, "conditioning", new))
        fresh(lambda own, ode: own.conditioning.update(c=new["c"]))
        fresh(lambda own, ode: own.conditioning["c"].add_(1))
        fresh(lambda own, ode: own.conditioning["names"].insert(0, "longer") or own.conditioning["names"].pop())
        fresh(lambda own, ode: setattr(own, "guidance_scale", 2.0))
        fresh(lambda own, ode: setattr(own, "guidance_scale", torch.tensor([2.0, 3.0])))


class Louder(Wrapped):
    """A factor per sample."""

    def __init__(self, inner, factor):
        super().__init__(inner)
        self.factor = factor

    def output(self, x, t):
        return self.factor[:, None] * self.inner.output(x, t)

    def subset(self, index, batch):
        part = super().subset(index, batch)
        part.factor = self.factor[index]
        return part


def test_samples_that_differ_in_guidance_or_in_an_attribute_alone_are_no_copies():
    def conditioned(x, t, c):
        return x * c[:, None]

    x = noise(1, 3).expand(3, 3).clone()
    both = {"conditioning": {"c": torch.ones(3)}, "unconditional": {"c": torch.zeros(3)}}
    guided = ode_of(conditioned, guidance_scale=torch.tensor([1.0, 2.0, 2.0]), **both)
    louder = Louder(ode_of(), torch.tensor([1.0, 2.0, 2.0], dtype=F64))
    for ode in (guided, louder):
        assert Batch(ode, x).distinct().tolist() == [True, True, False]
    assert Batch(ode_of(), x).distinct().tolist() == [True, False, False]


# ---- numbers and paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.array, torch.tensor, float], ids=lambda kind: kind.__name__
)
def test_every_kind_of_real_number_is_a_number(kind, tmp_path):
    ode, x = ode_of(), noise(16, 3)
    fit = iia.IIA("ddim", guard=False).fit(ode, x, GRID, held_out=kind(0.25))
    assert fit.record.held_out == 4 and iia.load(fit.save(tmp_path / "fit")).record == fit.record
    plan = iia.get_solver("ddim").plan(iia.EDM(), GRID)
    refine(ode, x, plan, x / 10, iterations=1, held_out=kind(0.25), outliers=kind(2.0), tolerance=kind(0.5))
    for wrong in (kind(1.5), "0.25", True, None, np.array([0.25]), torch.tensor(True)):
        with pytest.raises(InputError, match="held_out"):
            refine(ode, x, plan, x / 10, iterations=1, held_out=wrong)
    assert refine(ode, x, plan, x / 10, iterations=1, outliers=np.inf).iterations


def test_guidance_functions_may_return_arrays():
    def conditioned(x, t, c):
        return x * c[:, None]

    both = {"conditioning": {"c": torch.ones(3)}, "unconditional": {"c": torch.zeros(3)}}

    def by_numpy(t):
        return np.where(np.asarray(t) > 1, 3.0, 1.5)

    def by_torch(t):
        return torch.where(torch.as_tensor(t) > 1, 3.0, 1.5)

    rows = torch.stack([GRID, 0.9 * GRID, 0.8 * GRID])
    for grid in (GRID, rows):
        found = [
            iia.sample(ode_of(conditioned, guidance_scale=f, **both), noise(3, 3), grid) for f in (by_numpy, by_torch)
        ]
        close(found[0], found[1], rtol=1e-12)
    arrays = [ode_of(conditioned, guidance_scale=f([1.0, 2.0, 3.0]), **both) for f in (np.array, torch.tensor)]
    close(*(iia.sample(ode, noise(3, 3), GRID) for ode in arrays))


@pytest.mark.parametrize("path", ["x" * 5000, "missing", "a/" * 3000])
def test_a_path_that_no_file_has_is_the_librarys_own_error(path):
    with pytest.raises(FileFormatError, match="no file"):
        iia.load(path)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_refine_takes_tensors_of_inference_mode(inside):
    def conditioned(x, t, c):
        return c * x / (1 + t[:, None] ** 2)

    with torch.inference_mode():
        x, c = noise(8, 3), torch.ones(8, 1, dtype=F64)
    plan = iia.get_solver("ddim").plan(iia.EDM(), GRID)
    with torch.inference_mode(inside):
        found = refine(ode_of(conditioned, conditioning={"c": c}), x, plan, x / 10, iterations=1)
    plain = refine(ode_of(conditioned, conditioning={"c": c.clone()}), x.clone(), plan, x.clone() / 10, iterations=1)
    assert found.gain == plain.gain < 1


def test_scipy_drops_no_gradient_in_silence():
    x, grid = noise(2, 3).requires_grad_(), torch.tensor([10.0, 1.0], dtype=F64)
    with pytest.raises(InputError, match="no gradient flows through it: use method='dopri5'"):
        iia.odeint(ode_of(), x, grid, method="scipy_solver", options={"solver": "LSODA"})
    assert iia.odeint(ode_of(), x.detach(), grid, method="scipy_solver", options={"solver": "LSODA"}).shape == (2, 2, 3)
