"""``iia-ode fit``: one call or one solver, options that go together, files of trajectories, several processes."""

import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import run

import iia_ode as iia
from iia_ode.cli.ranks import Process
from iia_ode.experiments import get_setting
from iia_ode.iia import IIA, Teacher

SEARCH = ["fit", "--setting", "mixture", "--nfe", "4", "--samples", "32", "--budget", "closed-form"]
WINDOW = ["--setting", "mixture", "--solver", "ddim", "--terms", "window", "--target", "trajectory", "--nfe", "5"]
ROOT = Path(__file__).parent.parent


# ---- one call --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ode_and_x():
    return get_setting("mixture").draw(32, 0)


def test_without_a_solver_fit_is_the_one_call(tmp_path, capsys, ode_and_x):
    file = tmp_path / "fit.safetensors"
    status, printed, error = run(capsys, *SEARCH, "--out", str(file))
    assert (status, error) == (0, "")
    ode, x = ode_and_x
    by_hand = iia.fit(ode, 4, x, budget="closed-form", sigma_max=80.0, report=None)
    fit = iia.load(file)
    assert fit.plan.difference(by_hand.plan) == 0
    assert str(fit) in printed
    assert re.match(r"4 evaluations, 32 draws of noise: about \d+ sample evaluations", printed)
    for ingredient in fit.record.search.ingredients:
        assert f"{ingredient.name}: error" in printed


def test_show_lists_the_ingredients_and_marks_the_chosen_one(tmp_path, capsys):
    file = tmp_path / "fit.safetensors"
    assert run(capsys, *SEARCH, "--out", str(file))[0] == 0
    status, shown, error = run(capsys, "show", str(file))
    assert (status, error) == (0, "")
    fit = iia.load(file)
    assert fit.explain() in shown
    table = shown.split("ingredient ")[-1].splitlines()[1:]
    ingredients = fit.record.search.ingredients
    assert [line.split("  ")[0] for line in table] == [i.name for i in ingredients]
    assert ["*" in line for line in table] == [i.chosen for i in ingredients]


def test_what_was_found_is_drawn_where_one_asks(tmp_path, capsys):
    file, drawn, again = tmp_path / "fit.safetensors", tmp_path / "drawn", tmp_path / "again"
    status, printed, _ = run(capsys, *SEARCH, "--out", str(file), "--plots", str(drawn))
    assert status == 0
    assert sorted(p.name for p in drawn.iterdir()) == ["coefficients.png", "ingredients.png", "residuals.png"]
    assert all(str(path) in printed for path in drawn.iterdir())
    assert run(capsys, "show", str(file), "--plots", str(again))[0] == 0
    for path in drawn.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_was_found_samples_unseen_noise(tmp_path, capsys):
    file = tmp_path / "fit.safetensors"
    assert run(capsys, *SEARCH, "--out", str(file))[0] == 0
    sample = ["sample", str(file), "--setting", "mixture", "--samples", "5", "--out", str(tmp_path)]
    assert run(capsys, *sample)[0] == 0
    ode, x = get_setting("mixture").draw_each(iia.noise.sample_seeds(0, range(5)))
    stored = iia.files.read_tensors(tmp_path / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(file)))


# ---- one solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["iia-edm"], iia.preset("iia-edm")),
        (["iia-ddim", "--history", "2", "--ridge", "1e-6"], iia.preset("iia-ddim", history=2, ridge=1e-6)),
        (["biia-edm", "--substeps", "2", "--guard"], iia.preset("biia-edm", substeps=2, guard=True)),
        (["heun", "--terms", "window", "--target", "local"], IIA("heun", "window", "local")),
        (["heun", "--no-guard"], IIA("heun", guard=False)),
        (
            ["dpmpp_3m", "--terms", "window", "--target", "trajectory", "--ridge", "auto", "--intercept"],
            IIA("dpmpp_3m", "window", "trajectory", ridge="auto", intercept=True),
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.filterwarnings("ignore::iia_ode.errors.GuardWarning")
def test_with_a_solver_fit_is_iia_with_these_options(tmp_path, capsys, options, method, ode_and_x):
    file = tmp_path / "fit.safetensors"
    fit = ["fit", "--setting", "mixture", "--nfe", "5", "--samples", "32", "--solver", *options]
    status, printed, _ = run(capsys, *fit, "--out", str(file))
    assert status == 0
    grid = method.base_solver.grid_for(5, iia.grids.karras, iia.EDM())
    expected = method.fit(ode_and_x[0], grid, ode_and_x[1], seed=0)
    assert iia.load(file).plan.difference(expected.plan) == 0
    assert str(expected) in printed


def test_the_guards_warning_is_one_line_on_standard_error(tmp_path, capsys, monkeypatch):
    def worse(self, plan, reports):
        warnings.warn("worse than\nits base", iia.errors.GuardWarning, stacklevel=2)
        return plan, reports, {"base": 1.0, "fit": 2.0, "fell_back": True, "reference": "none"}

    monkeypatch.setattr("iia_ode.iia.fitting.Fitting._guarded", worse)
    fit = ["fit", *WINDOW, "--samples", "8", "--out", str(tmp_path / "a")]
    assert run(capsys, *fit)[::2] == (0, "iia-ode: warning: worse than its base\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--terms", "window"], "--terms goes with --solver"),
        (["--target", "local"], "--target goes with --solver"),
        (["--history", "2"], "--history goes with --solver"),
        (["--substeps", "2"], "--substeps goes with --solver"),
        (["--ridge", "auto"], "--ridge goes with --solver"),
        (["--intercept"], "--intercept goes with --solver"),
        (["--no-guard"], "--guard/--no-guard goes with --solver"),
        (["--grid", "karras"], "--grid goes with --solver"),
        (["--rho", "3"], "--rho goes with --solver"),
        (["--solver", "heun", "--budget", "standard"], "--budget is for a search"),
        (["--solver", "iia-edm", "--terms", "window"], "preset iia-edm brings its own terms"),
        (
            ["--solver", "heun", "--substeps", "2", "--target", "local"],
            "--substeps is for --target substeps, not for local",
        ),
        (["--solver", "heun", "--ridge", "much"], "'much' is not a valid float"),
        (["--solver", "heun", "--ridge", "-1"], "-1.0 is not in the range"),
        (["--solver", "unipc_bh9"], "unknown preset or solver 'unipc_bh9'. Did you mean"),
        (["--solver", "midpoint"], "the paper has no terms for base 'midpoint'"),
        (["--solver", "heun", "--target", "nearest"], "'nearest' is not one of"),
        (["--budget", "huge"], "'huge' is not one of"),
        (["--samples", "4"], "at least 8 different draws of noise"),
        (["--teacher", "a", "--save-teacher", "b"], "choose one"),
        (["--solver", "iia-edm", "--teacher", "a"], "goes with --target trajectory or with --guard"),
        (["--sigma-max", "2", "--save-teacher", "b"], "needs --sigma-max of at least 3"),
        (["--teacher", "nothing"], "no file 'nothing'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_that_do_not_go_together_are_one_line_of_error(tmp_path, capsys, monkeypatch, options, text):
    monkeypatch.chdir(tmp_path)
    status, printed, error = run(capsys, "fit", "--setting", "mixture", "--nfe", "5", *options, "--out", "fit")
    assert (status, printed, len(error.splitlines())) == (2, "", 1)
    assert text in error
    assert not (tmp_path / "fit").exists()


# ---- files of trajectories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SEARCH, ["fit", *WINDOW, "--samples", "32"]], ids=["one call", "one solver"])
def test_trajectories_are_made_once_and_serve_every_fit_of_the_same_noise(tmp_path, capsys, method):
    kept, plain, first, second = (str(tmp_path / name) for name in ("teacher", "plain", "first", "second"))
    assert run(capsys, *method, "--out", plain)[0] == 0
    assert run(capsys, *method, "--save-teacher", kept, "--out", first)[0] == 0
    assert len(Teacher.load(kept)) == 32
    assert run(capsys, *method, "--teacher", kept, "--out", second)[0] == 0
    fits = [iia.load(file) for file in (plain, first, second)]
    assert all(fit.plan.difference(fits[0].plan) == 0 for fit in fits)
    assert fits[2].record.sample_evaluations <= fits[0].record.sample_evaluations - 32 * 40  # its steps, at least
    other = ["fit", *WINDOW, "--samples", "32"] if method is SEARCH else SEARCH
    assert run(capsys, *other, "--teacher", kept, "--out", second)[0] == 0
    status, _, error = run(capsys, *method, "--seed", "1", "--teacher", kept, "--out", second)
    assert status == 2
    assert "the teacher starts from other states" in error


# ---- several processes -----------------------------------------------------------------------------------------------


def test_every_sample_belongs_to_exactly_one_process():
    for size in (1, 2, 3, 7):
        shares = [list(range(20))[Process(rank, size, "cpu").share(20)] for rank in range(size)]
        assert [k for share in shares for k in share] == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--save-teacher", "t"], "--save-teacher needs one process"),
        ([], "cannot join the 2 processes announced by WORLD_SIZE"),
        (["--solver", "ddim", "--samples", "1"], "1 samples are too few for 2 processes"),
        (["--solver", "ddim", "--save-teacher", "t", "--target", "trajectory"], "--save-teacher needs one process"),
        (["--solver", "ddim"], "cannot join the 2 processes announced by WORLD_SIZE"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_does_not_go_with_several_processes_is_said(tmp_path, capsys, monkeypatch, options, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    status, _, error = run(capsys, "fit", "--setting", "mixture", *options, "--out", str(tmp_path / "fit"))
    assert (status, len(error.splitlines())) == (2, 1)
    assert text in error
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE must be a number" in run(capsys, "fit", "--setting", "mixture", "--out", str(tmp_path / "f"))[2]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


with_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")


@with_gloo
def test_two_processes_find_the_solver_that_one_would(tmp_path, capsys):
    options = ["--setting", "mixture", "--nfe", "3", "--budget", "closed-form", "--samples", "24"]
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [sys.executable, "-m", *launch, "-m", "iia_ode", "fit", *options, "--out", str(two)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("teacher: ") == done.stdout.count("written: ") == 1
    assert run(capsys, "fit", *options, "--out", str(one))[0] == 0
    together, alone = iia.load(two), iia.load(one)
    assert together.plan.difference(alone.plan) < 1e-9
    assert together.record.sample_evaluations == alone.record.sample_evaluations
    assert together.record.origin.fingerprint == alone.record.origin.fingerprint


TWO = {
    "fit": ["fit", *WINDOW, "--samples", "21", "--guard", "--ridge", "auto", "--intercept"],
    "sample": ["sample", "heun", "--setting", "mixture", "--nfe", "5", "--samples", "7"],
    "dying": ["fit", *WINDOW, "--samples", "8"],
}
IN_EACH = """
import json, os, sys
from contextlib import redirect_stdout
from iia_ode.cli import main
from iia_ode.iia.fitting import Fitting

for name, port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    if name == "dying" and os.environ["RANK"] == "1":
        Fitting._guarded = lambda *_: os._exit(9)
    with open(f"{name}-{os.environ['RANK']}.txt", "w") as printed, redirect_stdout(printed):
        main([*arguments, "--out", f"two-{name}"])
"""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Where two processes wrote, after three commands; the second is as if killed in the middle of the last. And their errors.

    In one pair of processes, as most of the time of each goes into starting it.
    """
    folder = tmp_path_factory.mktemp("two")
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    commands = json.dumps([(name, str(free_port()), arguments) for name, arguments in TWO.items()])
    command = [sys.executable, "-c", IN_EACH, commands]
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env=environment(RANK=str(k), **meeting), stderr=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 9], errors
    return folder, errors


@with_gloo
def test_two_processes_write_the_file_that_one_would(tmp_path, capsys, by_two):
    folder, _ = by_two
    first, second = ((folder / f"fit-{k}.txt").read_text() for k in range(2))
    assert "in 2 processes" in first
    assert (first.count("written: "), second) == (1, "")
    one = tmp_path / "one"
    assert run(capsys, *TWO["fit"], "--out", str(one))[0] == 0
    together, alone = iia.load(folder / "two-fit"), iia.load(one)
    assert together.record.batch == alone.record.batch == 21
    for a, b in zip(together.reports, alone.reports, strict=True):
        assert a.corrections == pytest.approx(b.corrections, rel=1e-9, abs=1e-9)
        assert a.accepted == b.accepted
    assert together.plan.difference(alone.plan) < 1e-9


@with_gloo
def test_two_processes_write_the_samples_that_one_would(tmp_path, capsys, by_two):
    options = TWO["sample"]
    assert run(capsys, *options, "--out", str(tmp_path / "one"))[0] == 0
    assert run(capsys, *options[:-1], "4", "--out", str(tmp_path / "fewer"))[0] == 0
    two, one, fewer = (
        iia.files.read_tensors(path / "samples.safetensors", "samples")[0]["samples"]
        for path in (by_two[0] / "two-sample", tmp_path / "one", tmp_path / "fewer")
    )
    assert torch.allclose(two, one, rtol=1e-12, atol=1e-12)
    assert torch.allclose(fewer, one[:4], rtol=1e-12, atol=1e-12)


@with_gloo
def test_a_process_that_dies_is_one_line_of_error_and_leaves_no_file(by_two):
    folder, errors = by_two
    (line,) = (line for line in errors[0].splitlines() if line.startswith("iia-ode: error: "))
    assert "process 0 of 2 heard nothing from another one" in line
    assert sorted(p.name for p in folder.glob("two-*")) == ["two-fit", "two-sample"]


# ---- the reference -------------------------------------------------------------------------------------------------


def test_every_name_of_a_fit_is_in_the_api_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    documented = {line.split("::")[1].strip().rsplit(".", 1)[-1] for line in reference.splitlines() if "::" in line}
    modules = {"__version__", "denoisers", "errors", "grids", "metrics", "plots", "problems", "reference", "testing"}
    for names in (iia.__all__, iia.iia.__all__, iia.plots.__all__):
        assert set(names) - modules <= documented
