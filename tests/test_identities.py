"""Solvers that are one under two names have the same weights."""

import pytest
import torch
from support import F64, close

import iia_ode as iia
from iia_ode.solvers import ExponentialAdams, UniPC
from iia_ode.testing.identities import IDENTITIES, Identity

CASES = [(identity, schedule) for identity in IDENTITIES for schedule in identity.schedules]


@pytest.mark.parametrize(
    ("identity", "schedule"), CASES, ids=[f"{i.statement} on {type(s).__name__}" for i, s in CASES]
)
def test_two_solvers_that_are_one_have_the_same_weights(identity: Identity, schedule: iia.Schedule) -> None:
    assert identity.difference(schedule) <= 1e-13


@pytest.mark.parametrize(
    ("left", "right", "schedule"),
    [
        ("ddim", "euler", iia.VP()),
        ("lms", "ab4", iia.VP()),
        ("deis_rho_heun", "heun", iia.VP()),
        ("ipndm", "lms", iia.EDM()),
        ("expab2", "dpmpp_2m", iia.EDM()),
        ("expab3", "dpmpp_3m", iia.EDM()),
        ("expab3", "deis_lab3", iia.EDM()),
    ],
)
def test_and_weights_tell_different_solvers_apart(left: str, right: str, schedule: iia.Schedule) -> None:
    grid = iia.grids.karras(8, 0.02, 20.0, schedule=schedule)
    assert iia.get_solver(left).plan(schedule, grid).difference(iia.get_solver(right).plan(schedule, grid)) > 1e-3


PATH_FREE = ["ddim", "deis_lab3", "dpm2", "dpmpp_2m", "dpmpp_3s", "expab4", "ipndm2", "lms", "unipc", "deis_rho_kutta"]


@pytest.mark.parametrize("name", PATH_FREE)
@pytest.mark.parametrize("schedule", [iia.VP(), iia.FlowMatching(), iia.Cosine()], ids=lambda s: type(s).__name__)
def test_a_method_in_log_snr_or_sigma_over_alpha_gives_the_same_answer_on_every_schedule(
    name: str, schedule: iia.Schedule
) -> None:
    """Only the noise levels matter: x / alpha and the data estimate are the same on every path through them."""
    plans = [iia.get_solver(name).plan(s, iia.grids.karras(6, 0.02, 20.0, schedule=s)) for s in (schedule, iia.EDM())]
    ours, edm = (plan.canonical().matrix() for plan in plans)
    start, *levels = (plans[0].grid[0], *plans[0].evaluation_times, plans[0].grid[-1])
    rows = torch.tensor([schedule.alpha(t) for t in levels], dtype=F64)
    ours = ours / rows[:, None]
    ours[:, 0] *= schedule.alpha(start)
    close(ours, edm, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.VP(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_unipc_of_order_three_predicts_with_exponential_adams_and_no_choice_of_b_matters(
    schedule: iia.Schedule,
) -> None:
    """Beyond its first two steps, whose single difference has the published constant 1/2."""
    grid = iia.grids.karras(8, 0.02, 20.0, schedule=schedule, to_data=False)
    rows = [
        solver.plan(schedule, grid).code
        for solver in (UniPC(corrector=False), UniPC(corrector=False, variant="bh1"), ExponentialAdams(max_order=3))
    ]
    # The weights of each step's own combination, by size: the solvers number their vectors differently.
    weights = [[sorted(float(w) for _, w in i.terms) for i in code if len(i.reads) > 1] for code in rows]
    assert [len(w) for w in weights] == [7, 7, 7]
    for bh2, bh1, adams in list(zip(*weights, strict=True))[2:]:
        assert bh2 == pytest.approx(bh1, rel=1e-12)
        assert bh2 == pytest.approx(adams, rel=1e-9)
    assert weights[0][1] != pytest.approx(weights[1][1], rel=1e-3)
