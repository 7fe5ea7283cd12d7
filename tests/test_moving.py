"""Plans on other schedules of the same levels."""

import pytest
import torch
from support import F64, generator, mixture

import iia_ode as iia
from iia_ode.errors import GridError, PlanError
from iia_ode.solvers import get_solver

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
SCHEDULES = {
    "discrete": iia.Discrete((1 - BETAS).cumprod(0)),
    "vp": iia.VP(),
    "edm": iia.EDM(),
    "ve": iia.VE(),
    "cosine": iia.Cosine(),
    "flow": iia.FlowMatching(),
}
LEVELS = (14.0, 6.0, 2.0, 0.7, 0.1)


def grid(schedule: iia.Schedule) -> torch.Tensor:
    return torch.tensor([*map(schedule.t_of_noise_to_signal, LEVELS), schedule.t_data], dtype=F64)


@pytest.mark.parametrize("target", SCHEDULES)
@pytest.mark.parametrize("source", SCHEDULES)
def test_a_moved_plan_gives_the_same_data(source: str, target: str) -> None:
    old, new = SCHEDULES[source], SCHEDULES[target]
    states = [mixture().noisy(5, s, s.t_of_noise_to_signal(LEVELS[0]), generator()) for s in (old, new)]
    for name in ("dpmpp_2m", "heun", "unipc"):
        plan = get_solver(name).plan(old, grid(old))
        moved = plan.on(new)
        ours, theirs = (
            iia.sample(mixture().ode(s, "noise"), x, solver=p)
            for s, x, p in zip((new, old), states[::-1], (moved, plan), strict=True)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert moved.starts == plan.starts and moved.nfe == plan.nfe and len(moved.code) == len(plan.code)
        assert moved.on(old).equivalent(plan, 1e-9)


def test_a_plan_on_its_own_schedule_is_itself() -> None:
    plan = get_solver("ddim").plan(SCHEDULES["edm"], grid(SCHEDULES["edm"]))
    assert plan.on(iia.EDM()) is plan


def test_weights_per_component_and_constants_move_too() -> None:
    edm, vp = iia.EDM(), iia.VP()
    base = get_solver("ddim").plan(edm, grid(edm))
    gains, constant = torch.linspace(0.5, 1.5, 4, dtype=F64), torch.ones(4, dtype=F64)
    code = tuple(
        iia.plan.Combine(tuple((j, w * gains) for j, w in i.terms), constant, i.step)
        if isinstance(i, iia.plan.Combine)
        else i
        for i in base.code
    )
    plan = iia.Plan(edm, base.grid, code)
    t = vp.t_of_noise_to_signal(LEVELS[0])
    x = mixture().noisy(5, edm, LEVELS[0], generator())
    ours = iia.sample(mixture().ode(vp, "data"), vp.alpha(t) * x, solver=plan.on(vp))
    torch.testing.assert_close(ours, iia.sample(mixture().ode(edm, "data"), x, solver=plan), rtol=1e-9, atol=1e-9)


def test_a_level_that_the_other_schedule_lacks_is_named() -> None:
    flow = iia.FlowMatching()
    plan = get_solver("euler").plan(flow, torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    with pytest.raises(GridError, match="a time without signal"):
        plan.on(iia.EDM())
    assert plan.on(iia.Cosine()).grid[0] == 1.0
    with pytest.raises(GridError, match=r"level sigma/alpha = 80.*does not reach"):
        get_solver("ddim").plan(iia.EDM(), torch.tensor([80.0, 1.0, 0.0], dtype=F64)).on(SCHEDULES["discrete"])
    with pytest.raises(PlanError, match="moves to a Schedule"):
        plan.on("edm")
