"""Runs that wait at each evaluation: copies, files, edits and previews, and equality of plans."""

import copy
import os
import pickle  # noqa: TID251  (a user may pickle a run, the library does not)
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ALL_SCHEDULES, F64, close, every_prediction, every_schedule, generator, mixture, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.files import read_tensors, write_tensors
from iia_ode.plan import (
    Bands,
    Combine,
    Evaluate,
    LinearMap,
    Past,
    PerCondition,
    Plan,
    Run,
    evaluator,
    read_plan,
    read_run,
    run_code,
)
from iia_ode.plan.tracer import take_step

EDM = iia.EDM()
GRID = iia.grids.karras(4, 0.1, 20.0)
X = mixture().noisy(2, EDM, 20.0, generator(1))
ODE = mixture().ode(EDM, "v")
SHAPE = (2, 4)
FINISH = """
import sys
from safetensors.torch import save_file
from support import mixture
import iia_ode as iia
from iia_ode.plan import read_run
ode, ends = mixture().ode(iia.EDM(), "v"), {}
for path in sys.argv[2:]:
    run = read_run(path)
    while not run.done:
        run.give(ode.output(run.state, run.t))
    ends[path] = run.state
save_file(ends, sys.argv[1])
"""


def fitted() -> Plan:
    method = iia.IIA("dpmpp_2m", terms="window", target="trajectory", intercept=True)
    return method.fit(ODE, mixture().noisy(24, EDM, 20.0, generator(2)), GRID).plan


def odd() -> Plan:
    """A plan with a tensor weight, a linear map and a constant per condition."""
    m = LinearMap(Bands((4,), 2), torch.tensor([0.3, 0.7]))
    code = (
        Combine(((0, normal(4).abs()),), PerCondition("c", (3, 5), normal(2, 4))),
        Evaluate(1, 20.0, "noise"),
        Combine(((1, m), (2, 0.5)), PerCondition("c", (3, 5), normal(2, 4, seed=3)), 1),
        Evaluate(3, 2.0, "data"),
        Combine(((3, 0.1), (4, 0.9)), PerCondition("c", (3, 5), normal(2, 4, seed=4)), 2),
    )
    return Plan(EDM, (20.0, 2.0, 0.0), code)


PLANS = {name: iia.get_solver(name).plan(EDM, GRID) for name in iia.solver_names()}
LABELS = {"c": torch.tensor([5, 3])}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """A plan for each registered solver, a fitted solver's plan, and a plan with every kind of weight."""
    return {**PLANS, "fitted": fitted(), "odd": odd()}


def begun(plan: Plan, evaluations: int = 0, ode: Any = ODE) -> Run:
    run = plan.start(X, ode.prediction, conditioning=LABELS)
    for _ in range(evaluations):
        run.give(ode.output(run.state, run.t))
    return run


def finish(run: Run, ode: Any = ODE) -> Tensor:
    while not run.done:
        run.give(ode.output(run.state, run.t))
    return run.state


# ---- a run is the plan's run -----------------------------------------------------------------------------------------


@every_prediction
@every_schedule
def test_giving_each_output_is_running_the_plan(schedule: iia.Schedule, prediction: str) -> None:
    grid = iia.grids.karras(4, schedule=schedule, to_data=False)
    for name in ("unipc", "heun"):
        plan, ode = iia.get_solver(name).plan(schedule, grid), mixture().ode(schedule, prediction)
        x = mixture().noisy(2, schedule, plan.grid[0], generator(3)).float()
        run, points, times = plan.start(x, prediction), [x], []
        while not run.done:
            assert run.evaluation == len(times) and run.state.dtype == x.dtype
            times.append(run.t)
            run.give(ode.output(run.state, run.t))
            points += [state for _, state in run.reached]
        assert torch.equal(torch.stack(points), plan.run(ode, x, trajectory=True))
        assert tuple(times) == plan.evaluation_times
        assert run.t == plan.grid[-1] and run.evaluation == plan.nfe


def test_a_run_holds_no_more_vectors_than_the_plan_says(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        run = begun(plan)
        while not run.done:
            held = len(run.values)
            run.give(ODE.output(run.state, run.t))
            assert held < plan.peak_vectors
        assert list(run.values) == [len(plan.code)]


def test_the_loop_over_code_stores_the_bits_of_a_run(plans: dict[str, Plan]) -> None:
    x = X.float()
    for plan in PLANS.values():
        values = {0: x}
        for _ in run_code(plan.code, values, evaluator(ODE)):
            pass
        assert torch.equal(values[len(plan.code)], plan.run(ODE, x))


def test_starts_are_the_evaluations_at_the_states_of_the_grid() -> None:
    assert PLANS["dpmpp_2m"].starts == (0, 1, 2, 3)
    assert PLANS["heun"].starts[:4] == (0, None, 1, None)
    for plan in PLANS.values():
        run, points = begun(plan), {0: X} | dict(begun(plan).reached)
        for k in plan.starts:
            if k is not None and k in points:
                assert torch.equal(run.state, points[k]) and run.t == plan.grid[k]
            run.give(ODE.output(run.state, run.t))
            points |= dict(run.reached)


# ---- interrupted runs ------------------------------------------------------------------------------------------------


def test_a_run_that_is_saved_at_any_evaluation_and_finished_elsewhere_has_the_same_bits(
    plans: dict[str, Plan], tmp_path: Path
) -> None:
    expected = {}
    for name, plan in plans.items():
        run, paths = begun(plan), []
        for k in range(plan.nfe + 1):
            paths.append(str(run.save(tmp_path / f"{name}-{k}")))
            if not run.done:
                run.give(ODE.output(run.state, run.t))
        expected |= dict.fromkeys(paths, run.state)
    command = [sys.executable, "-c", FINISH, str(tmp_path / "ends"), *expected]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    ends = load_file(tmp_path / "ends")
    assert ends.keys() == expected.keys()
    assert all(torch.equal(ends[path], expected[path]) for path in expected)


def test_a_run_that_was_read_is_where_it_was(plans: dict[str, Plan], tmp_path: Path) -> None:
    for name in ("odd", "fitted", "unipc"):
        for k in range(plans[name].nfe + 1):
            run = begun(plans[name], k)
            again = read_run(run.save(tmp_path / name))
            assert (again.evaluation, again.t, again.done) == (run.evaluation, run.t, run.done)
            assert torch.equal(again.state, run.state) and again.plan == run.plan
            assert k == 0 or torch.equal(again.data, run.data)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r)), lambda r: r.to("cpu")]
)
def test_a_copy_of_a_run_goes_on_by_itself(duplicate: Any, plans: dict[str, Plan]) -> None:
    for name in ("fitted", "odd", "unipc", "ipndm"):
        run = begun(plans[name], 1)
        twin = duplicate(run)
        end = finish(run)
        assert twin.evaluation == 1 and twin.plan == run.plan
        assert torch.equal(finish(twin), end)


def test_a_deep_copy_shares_no_state_and_the_plan() -> None:
    run = begun(PLANS["dpmpp_2m"], 2)
    twin = copy.deepcopy(run)
    twin.state.fill_(0)
    assert bool(run.state.any()) and twin.plan is run.plan


def test_a_run_on_a_schedule_of_functions_is_read_with_the_schedule(tmp_path: Path) -> None:
    schedule = ALL_SCHEDULES[-1]
    plan = iia.get_solver("ddim").plan(schedule, iia.grids.karras(3, schedule=schedule))
    run = plan.start(X.float())
    path = run.save(tmp_path / "run")
    with pytest.raises(iia.errors.FileFormatError, match="schedule"):
        read_run(path)
    with pytest.raises(iia.errors.MismatchError, match="schedule"):
        read_run(path, schedule=EDM)
    assert torch.equal(read_run(path, schedule=schedule).state, X.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 1}, "instruction 1"),
        ({"position": 99}, "instruction 99"),
        ({"position": 4}, "vectors"),
        ({"prediction": "image"}, "image"),
        ({"seen": 2}, "last evaluation"),
        ({"code": [["evaluate", 0, "data"]]}, "no valid plan"),
    ],
)
def test_a_file_whose_run_cannot_go_on_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = begun(PLANS["euler"], 1).save(tmp_path / "run")
    tensors, header = read_tensors(path, "run")
    rest = {k: v for k, v in header.items() if k not in ("format", "kind")}
    write_tensors(path, "run", tensors, rest | change)
    with pytest.raises(iia.errors.FileFormatError, match=message):
        read_run(path)


# ---- edits and previews ----------------------------------------------------------------------------------------------


def test_an_edited_state_is_the_state_for_every_later_instruction() -> None:
    """Inpainting: the known half of the state is replaced at every grid point, as a step on tensors would have it."""
    known = torch.tensor([True, True, False, False])
    data = normal(*SHAPE, seed=5)

    def constrained(x: Tensor, t: float) -> Tensor:
        return torch.where(known, data + t * normal(*SHAPE, seed=6), x)

    for name in ("ddim", "dpmpp_2m", "heun", "ab2", "ipndm"):
        plan = PLANS[name]
        run = begun(plan)
        while not run.done:
            if plan.starts[run.evaluation] is not None:
                run.edit(constrained(run.state, run.t))
            run.give(ODE.output(run.state, run.t))
        solver, y, memory = iia.get_solver(name), X, ()
        for i, (t, s) in enumerate(zip(plan.grid, plan.grid[1:], strict=False)):
            y, memory = take_step(solver, ODE, constrained(y, t), t, s, Past(memory, i, plan.steps - 1 - i))
        close(run.state, y, atol=1e-10)


def test_an_edit_reaches_the_copies_of_a_state_and_nothing_else() -> None:
    code = (
        Evaluate(0, 20.0, "data"),
        Combine(((0, 0.5), (1, 0.5))),
        Combine(((2, 1.0),), step=1),
        Evaluate(2, 2.0, "data"),
        Combine(((0, 100.0), (2, 10.0), (3, 1.0)), step=2),
    )
    plan = Plan(EDM, (20.0, 2.0, 0.5), code)
    assert plan.starts == (0, 1)
    x, y = torch.ones(*SHAPE, dtype=F64), torch.full(SHAPE, 7.0, dtype=F64)
    run = plan.start(x)
    run.give(torch.zeros_like(x))
    assert [k for k, _ in run.reached] == [1]
    run.edit(y)
    assert torch.equal(run.state, y)
    run.give(torch.zeros_like(x))
    assert torch.equal(run.state, 100 * x + 11 * y)
    assert torch.equal(x, torch.ones_like(x)) and torch.equal(y, torch.full_like(y, 7.0))


@every_prediction
def test_previews_are_estimates_of_the_data_whatever_the_model_predicts(prediction: str) -> None:
    ode = mixture().ode(EDM, prediction)
    for name in ("heun", "dpmpp_3m", "unipc"):
        run = PLANS[name].start(X, prediction)
        with pytest.raises(iia.errors.InputError, match="no evaluation yet"):
            _ = run.data
        while not run.done:
            state, t = run.state, run.t
            run.give(ode.output(state, t))
            close(run.data, ode.data(state, t), atol=1e-11)


# ---- bad calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [None, 1.0, torch.zeros(3, 4), torch.zeros(*SHAPE, dtype=torch.int64), torch.zeros(*SHAPE, device="meta")],
    ids=str,
)
def test_an_output_or_an_edit_that_does_not_fit_is_refused(output: Any) -> None:
    run = begun(PLANS["euler"])
    with pytest.raises(iia.errors.InputError, match="output"):
        run.give(output)
    with pytest.raises(iia.errors.InputError, match="an edited state must be"):
        run.edit(output)


def test_a_run_that_is_done_takes_nothing_more() -> None:
    run = begun(PLANS["euler"], PLANS["euler"].nfe)
    for call in (run.give, run.edit):
        with pytest.raises(iia.errors.InputError, match=r"done.*run\.state"):
            call(X)


def test_a_start_that_does_not_fit_is_refused() -> None:
    plan = PLANS["euler"]
    with pytest.raises(iia.errors.InputError, match="float32 or float64"):
        plan.start(X.half())
    with pytest.raises(iia.errors.UnknownNameError, match="noise"):
        plan.start(X, "nois")
    with pytest.raises(iia.errors.MismatchError, match="condition 'c'"):
        odd().start(X)
    with pytest.raises(iia.errors.InputError, match=r"linear map of samples \[4\]|weight of shape \[4\]"):
        odd().start(normal(2, 5), conditioning=LABELS)


def test_a_run_shares_no_memory_with_the_caller() -> None:
    for name in ("dpmpp_2m", "heun", "unipc"):
        plan = iia.get_solver(name).plan(EDM, GRID)
        x, buffer = X.clone(), torch.empty_like(X)
        run = plan.start(x, ODE.prediction)
        x.zero_()
        while not run.done:
            run.give(buffer.copy_(ODE.output(run.state, run.t)))
            buffer.zero_()
            run.data.zero_()
            if not run.done:
                edited = run.state.clone()
                run.edit(edited)
                edited.zero_()
            run.state.zero_()
        assert torch.equal(run.state, plan.run(ODE, X))


def test_a_model_that_fails_only_once_is_told_from_a_failing_model() -> None:
    calls = []

    def flaky(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return x * (float("nan") if len(calls) == 2 else 0.5)

    ode = iia.ProbabilityFlowODE(flaky, EDM)
    with pytest.raises(iia.errors.NonFiniteError, match="other outputs for the same inputs"):
        PLANS["euler"].run(ode, X)


# ---- what is prepared once -------------------------------------------------------------------------------------------


def test_weights_are_put_in_place_once_and_for_a_bounded_number_of_places() -> None:
    plan = odd()
    first = plan.prepared("v", X)
    assert plan.prepared("v", X + 1) is first
    assert plan.prepared("v", X.float()) is not first and plan.prepared("noise", X) is not first
    for n in range(20):
        PLANS["euler"].prepared("v", torch.zeros(1, n + 1))
    assert len(PLANS["euler"]._prepared) <= 8
    assert len(pickle.dumps(plan)) < 20_000


def test_gradients_reach_the_weights_of_a_plan_at_every_run() -> None:
    weight = torch.ones(4, dtype=F64, requires_grad=True)
    plan = Plan(EDM, (20.0, 2.0), (Combine(((0, weight),), step=1),))
    for k in (1, 2):
        plan.run(ODE, X).sum().backward()
        close(weight.grad, k * X.sum(0))


# ---- equality --------------------------------------------------------------------------------------------------------


def test_plans_are_equal_if_their_content_is(plans: dict[str, Plan], tmp_path: Path) -> None:
    assert len(set(plans.values())) == len({p._content for p in plans.values()})
    for name, plan in plans.items():
        again = read_plan(plan.save(tmp_path / name))
        assert again == plan and hash(again) == hash(plan) and again is not plan
        assert replace(plan, name="other") == plan
        last = plan.code[-1]
        assert isinstance(last, Combine)
        ((j, w), *rest) = last.terms
        nearly = replace(last, terms=((j, w * (1 + 1e-15)), *rest))
        assert replace(plan, code=(*plan.code[:-1], nearly)) != plan
        assert plan != name


def test_equal_plans_may_differ_in_nothing_that_a_run_uses() -> None:
    plan = odd()
    ins = plan.code[0]
    assert isinstance(ins, Combine)
    for change in (
        {"terms": ((0, normal(4).abs() + 1e-16),)},
        {"constant": PerCondition("c", (5, 3), normal(2, 4))},
        {"constant": normal(4)},
    ):
        assert replace(plan, code=(replace(ins, **change), *plan.code[1:])) != plan
    assert odd() == plan
    assert replace(PLANS["euler"], schedule=iia.VE()) != PLANS["euler"]
