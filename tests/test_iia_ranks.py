"""A fit over several processes is the fit of the whole batch in one; this file is also what those processes run."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from iia_ode.iia.gather import Ranks
from iia_ode.iia.remembered import RememberedODE
from iia_ode.iia.shared import SharedODE
from support import mixture

import iia_ode as iia
from iia_ode.autofit import fit
from iia_ode.denoisers import dynamic_thresholding
from iia_ode.errors import RankError
from iia_ode.iia import IIA, Budget, Teacher

GRID = iia.grids.karras(5)
BATCH = 80
CUTS = {"three": [0, 21, 66, 80], "two": [0, 53, 80]}
METHODS = {
    "three": IIA("ddim", "window", "substeps", intercept=True, ridge="auto"),
    "two": IIA("heun", "iia-edm", "trajectory"),
}
# A refinement too, and draws that the call makes itself.
BUDGET = Budget(draws=96, teacher_steps=20, rounds=((0.2, 1),), descent=0, starts=1, iterations=2, finals=0.5)
CALL = {"budget": BUDGET, "chunk_size": 71, "report": None}


def problem(rows):
    """A conditional model: each sample has its own shift."""
    shift = torch.linspace(-0.5, 0.5, BATCH, dtype=torch.float64)
    x = mixture().noisy(BATCH, iia.EDM(), 80.0, torch.Generator().manual_seed(0))
    inner = mixture().ode(iia.EDM()).model

    def model(x, t, shift):
        return inner(x, t) + shift[:, None]

    return iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"shift": shift[rows]}), x[rows]


def within(rows):
    """What a fit is called with."""
    ode, x = problem(rows)
    return ode, GRID, x


def derivatives(share=lambda ode: ode):
    """Two samples, fewer than there are processes: output, and derivatives by states and by one time for both."""
    ode, x = problem(slice(0, 2))
    found = []
    guided = iia.ProbabilityFlowODE(
        ode.model,
        ode.schedule,
        conditioning=ode.conditioning,
        unconditional={"shift": torch.zeros(1)},
        guidance_scale=2.5,
    )
    for own in (ode, guided, dynamic_thresholding(guided)):
        leaves = x.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        out = share(own).output(*leaves)
        gradients = torch.autograd.grad((out * torch.arange(out.numel()).reshape(out.shape)).sum(), leaves)
        found += [v.flatten().tolist() for v in (out, *gradients)]
    return found


@torch.no_grad()
def remembered(ode, x, differs):
    """Outputs where some is asked again, by one process not quite as by the others, and how often the model was asked."""
    known = RememberedODE(ode)
    again = torch.nextafter(x, 2 * x) if differs else x
    asked = (x, x, again, 3 * x, x, 3 * x + 1)
    with known.counting() as spent:
        outputs = [known.output(v, 2.0).flatten().tolist() for v in asked]
    return outputs, spent.evaluations


def failing_in_the_last(ode, ranks):
    """The ODE, whose model fails in the last process from its fourth call on."""
    calls = 0

    def model(x, t, shift):
        nonlocal calls
        calls += 1
        if ranks.rank == ranks.size - 1 and calls > 3:
            raise ValueError("no such layer")
        return ode.model(x, t, shift)

    return iia.ProbabilityFlowODE(model, ode.schedule, conditioning=ode.conditioning)


def worker(rank, folder):
    """What each of three processes does: fits, mistakes, and fits in which the last process fails or dies."""
    options = {"timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, **options)
    pair, single = dist.new_group([0, 1], **options), dist.new_group([2], **options)
    fragile = dist.new_group([0, 1, 2], timeout=timedelta(seconds=10))
    brief = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    for name, group in (("three", None), ("two", pair)):
        if rank + 1 < len(CUTS[name]):
            ode, x = problem(slice(CUTS[name][rank], CUTS[name][rank + 1]))
            METHODS[name].fit(ode, GRID, x, group=group, chunk_size=4).save(folder / f"{name}-{rank}.safetensors")
    first, last = CUTS["three"][rank : rank + 2]
    rows = torch.tensor([*range(first, last), 0, 30])  # two samples four times each
    METHODS["three"].fit(*within(rows)).save(folder / f"copies-{rank}.safetensors")
    try:
        METHODS["three"].fit(*within(torch.arange(20)))
    except iia.errors.InputError as error:
        (folder / f"same-{rank}").write_text(str(error))
    ode, x = problem(slice(None))
    fit(ode, 3, x / 80, **CALL).save(folder / f"call-{rank}.safetensors")
    if rank < 2:
        fit(ode, 3, x / 80, group=pair, checkpointed=True, **CALL).save(folder / f"again-{rank}.safetensors")
    else:
        fit(ode, 3, x / 80, group=single, **CALL).save(folder / f"again-{rank}.safetensors")
    (folder / f"derivatives-{rank}").write_text(json.dumps(derivatives(lambda ode: SharedODE(ode, Ranks(None)))))
    (folder / f"remembered-{rank}").write_text(json.dumps(remembered(SharedODE(ode, Ranks(None)), x, rank == 1)))
    few = iia.ProbabilityFlowODE(ode.model, ode.schedule, conditioning={"shift": torch.zeros(40)})
    for name, own, noise in (("noise", ode, (x / 80).roll(rank, 0)), ("conditions", few, x / 80)):
        try:
            fit(own, 4, noise, **CALL)
        except iia.IIAError as error:
            (folder / f"{name}-{rank}").write_text(f"{type(error).__name__}: {error}")
    try:
        SharedODE(ode, Ranks(None)).output(x, 0.5 + rank)
    except RankError as error:
        (folder / f"apart-{rank}").write_text(str(error))
    if rank < 2:
        try:
            fit(failing_in_the_last(ode, Ranks(brief)), 4, x / 80, group=brief, **CALL)
        except RankError as error:
            (folder / f"failure-{rank}").write_text(str(error))
    ode, x = problem(slice(rank, rank + 2))
    try:
        METHODS["three"].fit(ode, iia.grids.karras(3 + rank), x)
    except RankError as error:
        (folder / f"mistake-{rank}").write_text(str(error))
    try:  # who has a teacher knows more ends than who has none
        METHODS["three"].fit(ode, GRID, x, teacher=Teacher.solve(ode, x, 80.0, 0.0) if rank == 1 else None)
    except RankError as error:
        (folder / f"teacher-{rank}").write_text(str(error))
    calls = 0

    def dying(x, t, shift):
        nonlocal calls
        calls += 1
        if rank == 2 and calls == 6:
            os._exit(7)
        return x / (1 + t[:, None]) + shift[:, None]

    try:
        failing = iia.ProbabilityFlowODE(dying, iia.EDM(), conditioning=ode.conditioning)
        METHODS["three"].fit(failing, GRID, x, group=fragile).save(folder / f"partial-{rank}.safetensors")
    except RankError as error:
        (folder / f"death-{rank}").write_text(str(error))
    os._exit(0)  # the group is broken: there is nothing left to close down in order


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


@pytest.mark.parametrize("name", ["three", "two"])
def test_every_process_gets_the_fit_of_the_whole_batch(folder, name):
    whole = METHODS[name].fit(*within(slice(None)))
    assert not whole.record.endpoint.fell_back  # there is something to compare
    for rank in range(len(CUTS[name]) - 1):
        fit = iia.load(folder / f"{name}-{rank}.safetensors")
        assert fit.record.batch == BATCH
        assert fit.record.held_out == whole.record.held_out == 20
        assert fit.record.sample_evaluations == whole.record.sample_evaluations
        assert [r.accepted for r in fit.reports] == [r.accepted for r in whole.reports]
        for a, b in zip(fit.reports, whole.reports, strict=True):
            assert a.corrections == pytest.approx(b.corrections, rel=1e-9, abs=1e-9)
            assert a.held_after == pytest.approx(b.held_after, rel=1e-9)
        assert fit.plan.difference(whole.plan) < 1e-9
        assert fit.record.endpoint.fit == pytest.approx(whole.record.endpoint.fit, rel=1e-9)


def test_samples_that_several_processes_have_count_once(folder):
    whole = METHODS["three"].fit(*within(slice(None)))
    for rank in range(3):
        fit = iia.load(folder / f"copies-{rank}.safetensors")
        assert (fit.record.batch, fit.record.held_out) == (BATCH, 20)
        assert fit.plan.difference(whole.plan) < 1e-9
        assert "process noise of its own" in (folder / f"same-{rank}").read_text()


@pytest.mark.parametrize("name", ["three", "two"])
def test_all_processes_have_the_very_same_numbers(folder, name):
    fits = [iia.load(folder / f"{name}-{rank}.safetensors") for rank in range(len(CUTS[name]) - 1)]
    assert all(fit.reports == fits[0].reports for fit in fits)
    assert all(fit.plan.difference(fits[0].plan) == 0 for fit in fits)


@pytest.fixture(scope="module")
def alone():
    """What one call finds in one process."""
    ode, x = problem(slice(None))
    return fit(ode, 3, x / 80, **CALL)


def test_one_call_in_several_processes_finds_what_it_finds_in_one(folder, alone):
    assert "refined" in next(i.name for i in alone.record.search.ingredients if i.chosen)
    for rank in range(3):
        found = iia.load(folder / f"call-{rank}.safetensors")
        assert found.plan.difference(alone.plan) < 1e-9
        assert found.record.sample_evaluations == alone.record.sample_evaluations
        names = [f.record.origin.fingerprint.partition(".")[2] for f in (found, alone)]
        assert names[0] == names[1]  # but for the name of this file, which is the main program of those processes


def test_a_group_has_a_call_of_its_own_whether_checkpointed_or_of_one_process(folder, alone):
    assert all(iia.load(folder / f"again-{rank}.safetensors").plan.difference(alone.plan) < 1e-9 for rank in range(3))


def test_a_shared_evaluation_has_the_derivatives_of_the_whole_even_where_samples_are_fewer_than_processes(folder):
    for rank in range(3):
        for found, own in zip(json.loads((folder / f"derivatives-{rank}").read_text()), derivatives(), strict=True):
            assert found == pytest.approx(own, rel=1e-12, abs=1e-12)


def test_what_is_remembered_is_everyones_or_asked_for_by_all(folder):
    ode, x = problem(slice(None))
    right = remembered(ode, x, differs=False)
    assert right[1] == 3
    for rank in range(3):
        outputs, evaluations = json.loads((folder / f"remembered-{rank}").read_text())
        assert evaluations == 4
        for found, own in zip(outputs, right[0], strict=True):
            assert found == pytest.approx(own, rel=1e-12)


def test_one_call_with_another_noise_in_each_process_is_refused(folder):
    for rank in range(3):
        assert "give all of them the same noise" in (folder / f"noise-{rank}").read_text()


def test_conditions_for_too_few_samples_are_refused_as_in_one_process(folder):
    for rank in range(3):
        text = (folder / f"conditions-{rank}").read_text()
        assert text.startswith("InputError: conditioning 'shift' has 40 entries for a batch of")


def test_processes_that_make_different_calls_are_told(folder):
    for rank in range(3):
        assert "came to different decisions" in (folder / f"apart-{rank}").read_text()


def test_a_model_that_fails_in_one_process_ends_the_call_in_all(folder):
    assert "heard nothing from another one" in (folder / "failure-0").read_text()
    assert "the model failed in process 1 of 2: ValueError: no such layer" in (folder / "failure-1").read_text()


def test_processes_that_ask_for_different_fits_are_told(folder):
    for rank in range(3):
        assert "asked for different fits" in (folder / f"mistake-{rank}").read_text()
        assert "a teacher to all or to none" in (folder / f"teacher-{rank}").read_text()


def test_a_process_that_dies_is_an_error_for_the_others_and_leaves_no_file(folder):
    for rank in range(2):
        assert "heard nothing from another one" in (folder / f"death-{rank}").read_text()
    assert not list(folder.glob("partial*"))


def forked(rank, folder):
    """A process of its own for a rank: to import torch once takes less than three times. Returns its number."""
    if number := os.fork():
        return number
    worker(rank, folder)
    os._exit(1)  # not reached: a worker ends itself


if __name__ == "__main__":
    place = Path(sys.argv[1])
    numbers = [forked(rank, place) for rank in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    (place / "codes").write_text(json.dumps(codes))
