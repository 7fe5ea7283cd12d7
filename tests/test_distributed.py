"""Several processes that share every evaluation do what one would; this file is also what those processes run.

The model here uses +, *, and / alone, which round the same in any batch: what is found must be equal to the last bit.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import F64, mixture, normal
from torch import nn

import iia_ode as iia
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.iia import IIA, refine
from iia_ode.ode import Shared, cached
from iia_ode.teacher import Teacher

GRID = iia.grids.karras(4)
BATCH = 32
SIZE = 3  # processes
METHODS = {
    "intercept": IIA("ddim", "window", "substeps", intercept=True, ridge="auto", guard=False, substeps=2),
    "trajectory": IIA("heun", "iia-edm", "trajectory"),
}
# A refinement, and draws that the call makes itself.
BUDGET = iia.Budget(draws=36, teacher_steps=12, trials=2, starts=1, iterations=2, finals=0.5, chunk_size=20)


def shifted(x, t, shift):
    """A nonlinear denoiser with a condition."""
    y = x / (1 + t[:, None])
    return 1.5 * y / (1 + y * y) + shift[:, None]


def problem(model=shifted):
    """The ODE of a model whose samples each have their own shift, and initial states."""
    shift = torch.linspace(-0.5, 0.5, BATCH, dtype=F64)
    return iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"shift": shift}), 80 * normal(BATCH, 4)


class Scaled(nn.Module):
    """A linear network with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, x, t):
        return self.scale * x


def derivatives(share):
    """Two samples, fewer than there are processes: outputs, and derivatives by states, by one time, and by a parameter."""
    ode, x = problem()
    plain = ode.subset(slice(0, 2), BATCH)
    guided = iia.ProbabilityFlowODE(
        ode.model,
        ode.schedule,
        conditioning=plain.conditioning,
        unconditional={"shift": torch.zeros(1)},
        guidance_scale=2.5,
    )
    nested = iia.ProbabilityFlowODE(
        lambda x, t, cond: shifted(x, t, *cond["in"]) + cond["ids"].sum(),
        ode.schedule,
        conditioning={"cond": {"in": (plain.conditioning["shift"],), "ids": Shared(torch.ones(3))}},
        unconditional={"cond": {"in": (torch.zeros(1, dtype=F64),), "ids": Shared(torch.zeros(4))}},
        guidance_scale=torch.tensor([1.5, 2.5], dtype=F64),
    )
    found = []
    for own in (plain, guided, nested, dynamic_thresholding(guided)):
        leaves = x[:2].clone().requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
        out = share(own).output(*leaves)
        gradients = torch.autograd.grad((out * torch.arange(out.numel()).reshape(out.shape)).sum(), leaves)
        found += [v.flatten().tolist() for v in (out, *gradients)]
    network = Scaled()
    share(iia.ProbabilityFlowODE(network, iia.EDM())).output(x, 0.7).sum().backward()
    return found, float(network.scale.grad)


@torch.no_grad()
def memoized(share, differs=False):
    """Outputs asked for in turn, some of them again, by one process not quite as by the others; and the count of calls."""
    ode, x = problem()
    known = cached(share(ode))
    again = torch.nextafter(x, 2 * x) if differs else x
    with known.counting() as spent:
        outputs = [known.output(v, 2.0).flatten().tolist() for v in (x, x, again, 3 * x, x, 3 * x + 1)]
    return outputs, spent.evaluations


def sampled(share):
    """Final states by solvers of every kind, and under thresholds below and above the distribution."""
    ode, x = problem()
    whole = share(ode)
    short = iia.grids.karras(3, 0.1, 80.0, to_data=False)
    finals = {
        "heun": iia.sample(whole, x, GRID, "heun"),
        "dopri5": iia.sample(whole, x, short, "dopri5", rtol=1e-3, atol=1e-3),
        "odeint": iia.odeint(whole, x, GRID, method="dpmpp_2m")[-1],
        "one": iia.sample(share(ode.subset(slice(0, 1), BATCH)), x[:1], GRID, "ddim"),  # fewer than processes
        "below": iia.sample(share(dynamic_thresholding(ode)), x, GRID, "ddim"),
        "above": iia.sample(dynamic_thresholding(share(ode)), x, GRID, "ddim"),
        "reference": iia.reference.solve(whole, x, 80.0, 1.0, rtol=1e-4, atol=1e-4),
    }
    with whole.counting() as spent:
        iia.sample(whole, x, GRID, "heun")
    finals["spent"] = torch.tensor([spent.evaluations, spent.samples])
    return {name: v.tolist() for name, v in finals.items()}


def refined(share):
    """A refinement."""
    ode, x = problem()
    plan = iia.get_solver("ddim").plan(ode.schedule, GRID)
    target = Teacher.solve(ode, x, 80.0, 0.0, steps=12).final
    return refine(share(ode), x, plan, target, iterations=2).plan


def with_copies(x):
    """The samples with two of them once more, conditions included."""
    ode, _ = problem()
    index = torch.tensor([*range(BATCH), 0, 30])
    return ode.subset(index, BATCH), x[index]


# ---- what each process does ------------------------------------------------------------------------------------------


def failing_in_the_last(rank, size, how):
    """The problem with a model that fails in the last process from its fourth call on."""
    calls = 0

    def model(x, t, shift):
        nonlocal calls
        calls += 1
        if rank == size - 1 and calls > 3:
            how()
        return shifted(x, t, shift)

    return problem(model)


def no_such_layer():
    """A fault of a model."""
    raise ValueError("no such layer")


def error_of(call):
    """The kind and the text of the error that a call raises."""
    try:
        call()
    except iia.IIAError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistakes(rank, share):
    """Calls in which a process differs from the others, and calls that are wrong in all: name to error."""
    ode, x = problem()
    whole, method = share(ode), METHODS["intercept"]
    few = iia.ProbabilityFlowODE(shifted, iia.EDM(), conditioning={"shift": torch.zeros(20)})
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=12) if rank == 1 else None
    plan = iia.get_solver("ddim" if rank else "dpmpp_2m").plan(ode.schedule, GRID)
    other = {"shift": ode.conditioning["shift"].roll(rank)}
    calls = {
        "states of fit": lambda: iia.fit(whole, 4, x=x.roll(rank, 0), budget=BUDGET),
        "evaluations of fit": lambda: iia.fit(whole, 4 + rank, x=x, budget=BUDGET),
        "states of IIA": lambda: method.fit(whole, x + rank, GRID),
        "grid of IIA": lambda: method.fit(whole, x, iia.grids.karras(3 + rank)),
        "option of IIA": lambda: IIA("ddim", "window", ridge=0.1 * rank).fit(whole, x, GRID),
        "teacher of IIA": lambda: method.fit(whole, x, GRID, teacher=teacher),
        "conditions": lambda: iia.sample(share(ode.condition(**other)), x, GRID),
        "plan": lambda: iia.sample(whole, x, solver=plan),
        "tolerance": lambda: iia.sample(whole, x, GRID[:2], "dopri5", rtol=0.1 ** (rank + 1)),
        "states of refine": lambda: refine(whole, x + rank, iia.get_solver("ddim").plan(ode.schedule, GRID), x),
        "states of a teacher": lambda: Teacher.solve(whole, x + rank, 80.0, 0.0),
        "states of a reference": lambda: iia.reference.solve(whole, x + rank, 80.0, 1.0),
        "another call": lambda: iia.sample(whole, x, GRID) if rank else method.fit(whole, x, GRID),
        "time": lambda: whole.output(x, 0.5 + rank),
        "samples": lambda: share(iia.ProbabilityFlowODE(Scaled(), iia.EDM())).output(x[: BATCH - rank], 0.5),
        "too few conditions": lambda: iia.fit(share(few), 4, x=x, budget=BUDGET),
        "no number": lambda: iia.sample(whole, x * torch.inf, GRID),
        "twice": lambda: iia.distributed(whole),
    }

    def counted():
        with whole.counting():
            whole.output(x, 0.5)
            raise iia.errors.InputError("in a block that counts")

    return {name: error_of(call) for name, call in (calls | {"counted": counted}).items()}


def work(rank, folder):
    """Everything that each of three processes does; the last of them dies at the end."""
    long = {"timeout": timedelta(seconds=120)}
    dist.init_process_group(init_method=f"file://{folder}/store", rank=rank, world_size=SIZE, **long)  # gloo by default
    pair, fragile = dist.new_group([0, 1], **long), dist.new_group(timeout=timedelta(seconds=20))
    brief = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    share, by_two = iia.distributed, partial(iia.distributed, group=pair)
    ode, x = problem()

    def keep(name, fit):
        fit.save(folder / f"{name}-{rank}.safetensors")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copies, states = with_copies(x)
        keep("intercept", METHODS["intercept"].fit(share(copies), states, GRID, chunk_size=11))
    keep("rounded", METHODS["trajectory"].fit(share(mixture().ode(iia.EDM())), x, GRID))
    keep("fit", iia.fit(share(ode), 2, x=x, budget=BUDGET))
    keep("refined", refined(share))
    found = {
        "caught": [type(w.message).__name__ for w in caught],
        "sampled": sampled(share),
        "derivatives": derivatives(share),
        "memoized": memoized(share, differs=rank == 1),
        "mistakes": mistakes(rank, share),
        "outside": error_of(lambda: by_two(ode)),
    }
    if rank < 2:
        keep("trajectory", METHODS["trajectory"].fit(by_two(ode), x, GRID))
        keep("checkpointed", iia.fit(by_two(ode), 2, x=x, budget=replace(BUDGET, checkpointed=True)))
        failing, _ = failing_in_the_last(rank, 2, no_such_layer)
        found["failure"] = error_of(lambda: iia.fit(iia.distributed(failing, brief), 3, x=x, budget=BUDGET))
    (folder / f"found-{rank}").write_text(json.dumps(found))
    dist.barrier()  # the last process had less to do
    dying, _ = failing_in_the_last(rank, SIZE, lambda: os._exit(7))
    text = error_of(lambda: keep("partial", METHODS["intercept"].fit(iia.distributed(dying, fragile), x, GRID)))
    (folder / f"death-{rank}").write_text(text)
    os._exit(0)  # the group is broken: there is nothing left to close down in order


# ---- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where three processes left what they found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "codes").read_text()) == [0, 0, 7], done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process found."""
    return [json.loads((folder / f"found-{rank}").read_text()) for rank in range(SIZE)]


def fits(folder, name, processes=SIZE):
    """The file of each process."""
    return [iia.load(folder / f"{name}-{rank}.safetensors") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone():
    """What one call finds in one process."""
    ode, x = problem()
    return iia.fit(ode, 2, x=x, budget=BUDGET)


def plain(ode):
    """One process."""
    return ode


def test_every_process_gets_the_fit_of_one_where_samples_are_there_twice_and_go_in_chunks(folder, found):
    ode, x = problem()
    whole = METHODS["intercept"].fit(ode, x, GRID)
    for fit, own in zip(fits(folder, "intercept"), found, strict=True):
        assert own["caught"] == ["DuplicateWarning"]
        assert (fit.record.batch, fit.record.held_out) == (BATCH, 8)
        assert fit.plan.difference(whole.plan) < 1e-12  # the chunks are others
    first, *others = fits(folder, "intercept")
    assert all(fit.plan == first.plan for fit in others)


def test_a_group_of_some_processes_gets_the_fit_of_one_with_its_costs(folder, found):
    ode, x = problem()
    whole = METHODS["trajectory"].fit(ode, x, GRID)
    assert not whole.record.endpoint.fell_back  # there is something to compare
    for fit in fits(folder, "trajectory", 2):
        assert fit.plan == whole.plan
        assert fit.reports == whole.reports
        assert (fit.record.evaluations, fit.record.sample_evaluations) == (
            whole.record.evaluations,
            whole.record.sample_evaluations,
        )
    assert "not in the group" in found[2]["outside"]


def test_a_model_that_rounds_differently_in_smaller_batches_gets_the_same_fit_in_all_and_nearly_that_of_one(folder):
    whole = METHODS["trajectory"].fit(mixture().ode(iia.EDM()), problem()[1], GRID)
    first, *others = fits(folder, "rounded")
    assert first.plan.difference(whole.plan) < 1e-9
    assert all(fit.plan == first.plan and fit.reports == first.reports for fit in others)


def test_one_call_in_several_processes_finds_what_it_finds_in_one(folder, alone):
    assert "refined" in next(i.name for i in alone.record.search.ingredients if i.chosen)
    for fit in fits(folder, "fit"):
        assert fit.plan.difference(alone.plan) == 0
        # Two batches may have a share in common, which is evaluated once.
        assert 0.99 < fit.record.sample_evaluations / alone.record.sample_evaluations <= 1
        assert fit.record.evaluations <= alone.record.evaluations
        assert [i.error for i in fit.record.search.ingredients] == [i.error for i in alone.record.search.ingredients]


def test_a_checkpointed_call_of_a_group_finds_the_same(folder, alone):
    assert all(fit.plan.difference(alone.plan) < 1e-12 for fit in fits(folder, "checkpointed", 2))


def test_a_refinement_in_several_processes_is_that_of_one(folder):
    whole = refined(plain)
    assert all(plan.difference(whole) == 0 for plan in fits(folder, "refined"))


def test_samples_and_what_they_cost_are_those_of_one_process(found):
    expected = sampled(plain)
    for own in found:
        assert own["sampled"] == expected


def test_derivatives_are_those_of_one_process_even_where_samples_are_fewer_than_processes(found):
    expected, of_parameter = derivatives(plain)
    for own in found:
        for a, b in zip(own["derivatives"][0], expected, strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    # Each process has the part of its own samples.
    assert sum(own["derivatives"][1] for own in found) == pytest.approx(of_parameter, rel=1e-12)


def test_a_question_asked_again_by_one_process_not_quite_as_by_the_others_has_the_right_answer(found):
    right, evaluations = memoized(plain)
    assert evaluations == 3
    for own in found:
        assert own["memoized"][1] == 4  # of the busiest process
        for a, b in zip(own["memoized"][0], right, strict=True):
            assert a == pytest.approx(b, rel=1e-12)


def test_processes_that_were_given_different_things_are_told_all_of_them(found):
    for own in found:
        wrong = own["mistakes"]
        for name in ("states of fit", "evaluations of fit", "states of IIA", "grid of IIA", "option of IIA"):
            assert wrong[name].startswith("RankError: the processes were asked for different things"), name
        for name in ("teacher of IIA", "conditions", "plan", "tolerance", "states of refine", "another call"):
            assert wrong[name].startswith("RankError: the processes were asked for different things"), name
        for name in ("states of a teacher", "states of a reference"):
            assert wrong[name].startswith("RankError: the processes were asked for different things"), name
        for name in ("time", "samples"):
            assert wrong[name].startswith("RankError: the processes came to different decisions"), name


def test_what_is_wrong_in_every_process_is_the_error_of_one_and_leaves_the_processes_usable(found):
    ode, x = problem()
    for own in found:
        wrong = own["mistakes"]
        assert wrong["too few conditions"].startswith("InputError: conditioning 'shift' has 20 entries for a batch of")
        assert wrong["no number"] == error_of(lambda: iia.sample(ode, x * torch.inf, GRID))
        assert wrong["twice"].startswith("InputError: this ODE is distributed already")
        assert wrong["counted"] == "InputError: in a block that counts"


def test_a_model_that_fails_in_one_process_ends_the_call_in_all(found):
    assert "heard nothing from another process" in found[0]["failure"]
    assert "the model failed in process 1 of 2: ValueError: no such layer" in found[1]["failure"]


def test_a_process_that_dies_is_an_error_for_the_others_and_leaves_no_file(folder):
    for rank in range(2):
        assert "heard nothing from another process" in (folder / f"death-{rank}").read_text()
    assert not list(folder.glob("partial*"))


def test_without_other_processes_a_distributed_ode_is_the_ode():
    ode, _ = problem()
    assert iia.distributed(ode) is ode
    with pytest.raises(iia.errors.InputError, match="takes a ProbabilityFlowODE, got function"):
        iia.distributed(shifted)


def forked(rank, folder):
    """A process of its own for a rank: to import torch once takes less than three times. Returns its number."""
    if number := os.fork():
        return number
    try:
        work(rank, folder)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)  # not reached: a worker ends itself


if __name__ == "__main__":
    place = Path(sys.argv[1])
    numbers = [forked(rank, place) for rank in range(SIZE)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    (place / "codes").write_text(json.dumps(codes))
