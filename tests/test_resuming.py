"""Stopping and going on, callbacks with the estimate of the data, and a level per sample."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import F64, close, every_solver, in_turn, mixture, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.errors import GridError, InputError, MismatchError, NonFiniteError
from iia_ode.plan import advance

GRID = iia.grids.karras(8)
FLOW = iia.FlowMatching()


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """The data estimate for data N(0.7, 0.3)."""
    return 0.7 + 0.3 / (0.3 + t[:, None] ** 2) * (x - 0.7)


def ode() -> iia.ProbabilityFlowODE:
    return iia.ProbabilityFlowODE(denoise, iia.EDM(), "data")


def states(n: int = 16) -> Tensor:
    return 80 * normal(n, 3)


# ---- stopping and going on -------------------------------------------------------------------------------------------


@every_solver
def test_a_run_that_is_stopped_and_goes_on_is_the_whole_run(name: str) -> None:
    plan, x = iia.get_solver(name).plan(iia.EDM(), GRID), states(4)
    whole = iia.sample(ode(), x, solver=plan)
    for k in (0, 4, 7):
        run = advance(ode(), plan.start(x, "data"), until=k)
        assert run.point >= k
        assert torch.equal(iia.sample(ode(), run), whole)


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(0, 8), min_size=1, max_size=4).map(sorted))
def test_any_number_of_stops_changes_no_bit(stops: list[int]) -> None:
    plan, x = iia.get_solver("dpmpp_3m").plan(iia.EDM(), GRID), states(4)
    run, seen = plan.start(x, "data"), []
    for k in stops:
        run = advance(ode(), run, until=k, callback=lambda k, t, state: seen.append(k))
        assert run.point == k
    final = iia.sample(ode(), run, callback=lambda k, t, state: seen.append(k))
    assert torch.equal(final, iia.sample(ode(), x, solver=plan))
    assert seen == list(range(1, 9))


def test_a_stopped_run_goes_on_from_a_file_in_another_run_of_the_model(tmp_path: Any) -> None:
    plan, x = iia.get_solver("unipc").plan(iia.EDM(), GRID), states(4)
    run = advance(ode(), plan.start(x, "data"), until=5)
    read = iia.load(run.save(tmp_path / "half.safetensors"))
    assert torch.equal(iia.sample(ode(), read), iia.sample(ode(), x, solver=plan))


def test_going_on_leaves_the_stopped_run_as_it_was() -> None:
    plan, x = iia.get_solver("lms").plan(iia.EDM(), GRID), states(4)
    run = advance(ode(), plan.start(x, "data"), until=3)
    kept = copy.deepcopy(run)
    first, second = iia.sample(ode(), run), iia.sample(ode(), run)
    assert torch.equal(first, second)
    assert run.point == kept.point == 3
    assert torch.equal(run.state, kept.state)

    def fail(k: int, t: float, state: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iia.sample(ode(), run, callback=fail)
    assert torch.equal(iia.sample(ode(), run), first)


def test_a_cut_grid_starts_a_multistep_solver_without_memory() -> None:
    x = states()
    at = float(GRID[4])
    for name, same in (("heun", True), ("dpmpp_2m", False)):
        first = iia.sample(ode(), x, iia.grids.cut(GRID, end=at), name)
        halves = iia.sample(ode(), first, iia.grids.cut(GRID, start=at), name)
        assert torch.allclose(halves, iia.sample(ode(), x, GRID, name), atol=1e-12) == same


def test_what_a_run_cannot_go_on_with_is_refused() -> None:
    plan, x = iia.get_solver("ddim").plan(iia.EDM(), GRID), states(4)
    run = advance(ode(), plan.start(x, "data"), until=3)
    with pytest.raises(InputError, match="has its grid and its solver"):
        iia.sample(ode(), run, GRID)
    with pytest.raises(InputError, match="has its grid and its solver"):
        iia.sample(ode(), run, solver="ddim")
    with pytest.raises(InputError, match="rtol would have no effect"):
        iia.sample(ode(), run, rtol=1e-3)
    for k in (2, 9, 1.5):
        with pytest.raises(InputError, match=r"until, the index of a grid point"):
            advance(ode(), run, until=k)
    with pytest.raises(MismatchError, match="traced for EDM"):
        iia.sample(iia.ProbabilityFlowODE(denoise, FLOW, "data"), run)
    with pytest.raises(MismatchError, match="takes data prediction, and the ODE has noise"):
        iia.sample(iia.ProbabilityFlowODE(denoise, iia.EDM(), "noise"), run)
    with pytest.raises(InputError, match="expected a run"):
        advance(ode(), x)
    with pytest.raises(NonFiniteError, match=r"at evaluation 4 of 8"):
        iia.sample(iia.ProbabilityFlowODE(lambda x, t: x * torch.nan, iia.EDM(), "data"), run)


# ---- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "unipc", "torchdiffeq:euler", "torchdiffeq:rk4", "dopri5"])
def test_a_callback_gets_the_estimate_of_the_data_while_the_run_goes_on(name: str) -> None:
    order: list[Any] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        order.append("call")
        return 0.5 + 0 * x

    model, grid = iia.ProbabilityFlowODE(net, iia.EDM(), "data"), iia.grids.karras(4, to_data=False)

    def callback(k: int, t: float, state: Tensor, data: Tensor) -> None:
        assert t == float(grid[k])
        close(data, torch.full_like(state, 0.5), atol=1e-12)
        order.append(k)

    iia.sample(model, states(9), grid, name, callback=callback, **({"rtol": 1e-3} if name == "dopri5" else {}))
    assert [k for k in order if k != "call"] == [1, 2, 3]
    assert order.index(1) < len(order) - 1 - order[::-1].index("call")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", None),
        ("rk4", {"step_size": 0.7}),
        ("midpoint", {"step_size": 0.7, "interp": "cubic"}),
        ("explicit_adams", {"step_size": 0.5}),
        ("dopri5", None),
        ("bosh3", {"step_t": torch.tensor([3.0, 2.0])}),
    ],
)
@pytest.mark.parametrize("down", [True, False])
def test_callbacks_during_a_run_of_torchdiffeq_get_its_states_and_change_no_bit(
    name: str, options: dict[str, Any] | None, down: bool
) -> None:
    grid, x = torch.tensor([5.0, 3.5, 2.0, 1.0], dtype=F64), normal(4, 3, dtype=torch.float32)
    grid = grid if down else grid.flip(0)
    expected = iia.odeint(ode(), x, grid, method=f"torchdiffeq:{name}", options=options)
    seen: list[Tensor] = []
    final = iia.sample(
        ode(), x, grid, f"torchdiffeq:{name}", options=options, callback=lambda k, t, state: seen.append(state.clone())
    )
    assert torch.equal(final, expected[-1])
    assert torch.equal(torch.stack(seen), expected[1:])


def test_a_callback_takes_the_estimate_by_name_or_as_a_fourth_argument_or_not_at_all() -> None:
    kept: list[Any] = []

    def named(k: int, t: float, state: Tensor, *, data: Tensor) -> None:
        kept.append(data)

    def four(k: int, t: float, state: Tensor, estimate: Tensor, /) -> None:
        kept.append(estimate)

    for callback in (
        named,
        four,
        lambda k, t, s, data: kept.append(data),
        lambda k, t, s, data=None: kept.append(data),
    ):
        kept.clear()
        iia.sample(ode(), states(2), GRID, "ddim", callback=callback)
        assert [v.shape for v in kept] == [(2, 3)] * 8
        assert torch.equal(kept[-1], iia.sample(ode(), states(2), GRID, "ddim"))  # the step to the data lands on it
    for callback in (
        lambda k, t, s: kept.append(s),
        lambda *a: kept.append(a[2]),
        lambda k, t, s, frames=kept: frames.append(s),
    ):
        kept.clear()
        iia.sample(ode(), states(2), GRID, "ddim", callback=callback)
        assert torch.equal(kept[-1], iia.sample(ode(), states(2), GRID, "ddim"))
    with pytest.raises(InputError, match=r"callback\(k, t, state, data\), got 3"):
        iia.sample(ode(), states(2), GRID, "ddim", callback=3)


def test_there_is_no_estimate_before_the_first_evaluation() -> None:
    x, kept = states(16), []
    fit = iia.preset("iia-ddim").fit(ode(), x / 2, iia.grids.karras(4, sigma_max=40.0))
    warm = iia.WarmStart.affine(iia.EDM(), 80.0, 40.0, x, x / 2)
    iia.sample(ode(), x, solver=fit.after(warm), callback=lambda k, t, s, data: kept.append(data))
    assert kept[0] is None
    assert all(v.shape == x.shape for v in kept[1:])


# ---- a level per sample ----------------------------------------------------------------------------------------------

NAMES = sorted(iia.solver_names(), key=lambda name: name != "analytic_first_step")  # needs a level, which EDM has


@in_turn("name, schedule", NAMES, [iia.EDM(), FLOW])
def test_samples_on_grids_of_their_own_are_those_of_single_runs(name: str, schedule: iia.Schedule) -> None:
    if schedule is FLOW:
        grids = torch.stack([iia.grids.uniform(5, t, 0.0) for t in (1.0, 0.8, 0.4)])
    else:
        grids = torch.stack([iia.grids.karras(5, 0.02, t) for t in (5.0, 1.0, 0.2)])
    x, model = normal(3, 4), mixture().ode(schedule, "velocity" if schedule is FLOW else "data")
    single = torch.cat([iia.odeint(model, x[i : i + 1], grids[i], method=name) for i in range(3)], dim=1)
    close(iia.odeint(model, x, grids, method=name), single, atol=1e-10)
    close(iia.sample(model, x, grids, name), single[-1], atol=1e-10)


def test_samples_on_grids_of_their_own_share_every_model_call() -> None:
    called: list[Tensor] = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        called.append(t.clone())
        return denoise(x, t) + shift[:, None]

    shifts = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    model = iia.ProbabilityFlowODE(net, iia.EDM(), "data", conditioning={"shift": shifts}, model_dtype=F64)
    grids = torch.stack([iia.grids.karras(6, sigma_max=s) for s in (5.0, 1.0, 0.2)])
    x, seen = normal(3, 3), []
    final = iia.sample(model, x, grids, "dpmpp_2m", callback=lambda k, t, s, data: seen.append((t, s, data)))
    assert len(called) == 6
    assert all(torch.equal(t, grids[:, k]) for k, t in enumerate(called))
    assert [tuple(t.tolist()) for t, _, _ in seen] == [tuple(row.tolist()) for row in grids.T[1:]]
    assert torch.equal(seen[-1][1], final)
    close(seen[-1][2], final, atol=1e-12)
    for i in range(3):
        one = model.condition(shift=shifts[i : i + 1])
        close(final[i : i + 1], iia.sample(one, x[i : i + 1], grids[i], "dpmpp_2m"), atol=1e-12)


def test_equal_grids_per_sample_are_one_grid() -> None:
    x = states(4).float()
    expected = iia.sample(ode(), x, GRID, "unipc")
    for grids in (GRID.expand(4, -1), GRID[None]):
        close(iia.sample(ode(), x, grids, "unipc"), expected, rtol=1e-5, atol=1e-5)
    assert iia.sample(ode(), x, GRID[None], "unipc").dtype == torch.float32


def test_grids_per_sample_that_cannot_be_run_are_refused() -> None:
    grids = GRID.expand(3, -1)
    with pytest.raises(GridError, match=r"\[B, N \+ 1\] times, got \[3, 9\] for 4 samples"):
        iia.sample(ode(), states(4), grids, "ddim")
    with pytest.raises(GridError, match=r"1-d float64.*a grid per sample with a solver"):
        iia.sample(ode(), states(3), grids, "dopri5")
    with pytest.raises(GridError, match=r"1-d float64.*a grid per sample with a solver"):
        iia.IIA("ddim").fit(ode(), states(3), grids)
    with pytest.raises(GridError, match=r"strictly monotone"):
        iia.sample(ode(), states(2), torch.stack([GRID, GRID * 0]), "ddim")
    with pytest.raises(InputError, match="rtol would have no effect"):
        iia.sample(ode(), states(3), grids, "ddim", rtol=1e-3)
    bad = states(3)
    bad[1] = torch.nan
    with pytest.raises(NonFiniteError, match="sample 1 of the batch"):
        iia.sample(ode(), bad, grids, "ddim")
