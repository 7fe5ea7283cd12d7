"""``iia-ode fit``: one call or one solver, options that go together, files of trajectories, several processes."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import run

import iia_ode as iia
from iia_ode.cli import main
from iia_ode.experiments import get_setting
from iia_ode.iia import IIA

SEARCH = ["fit", "--setting", "mixture", "--nfe", "2", "--samples", "16", "--budget", "closed-form"]
WINDOW = ["--setting", "mixture", "--solver", "ddim", "--terms", "window", "--target", "trajectory", "--nfe", "5"]


# ---- one call --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ode_and_x():
    return get_setting("mixture").draw(16, 0)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What one search printed, its file, and the folder that it drew into."""
    folder, said, errors = tmp_path_factory.mktemp("searched"), io.StringIO(), io.StringIO()
    file, drawn = folder / "fit.safetensors", folder / "drawn"
    with redirect_stdout(said), redirect_stderr(errors):
        main([*SEARCH, "--out", str(file), "--plots", str(drawn)])
    assert errors.getvalue() == ""
    return said.getvalue(), file, drawn


def test_without_a_solver_fit_is_the_one_call_and_prints_its_findings(searched, ode_and_x):
    printed, file, _ = searched
    ode, x = ode_and_x
    by_hand = iia.fit(ode, 2, x=x, budget="closed-form", sigma_max=80.0, sigma_min=0.002)
    fit = iia.load(file)
    assert fit.plan == by_hand.plan
    assert str(fit) in printed
    assert re.match(r"2 evaluations, 16 draws of noise: about \d+ sample evaluations", printed)
    for ingredient in fit.record.search.ingredients:
        assert f"{ingredient.name}: error" in printed


def test_show_lists_the_ingredients_marks_the_chosen_one_and_draws_as_fit_does(tmp_path, capsys, searched):
    printed, file, drawn = searched
    assert sorted(p.name for p in drawn.iterdir()) == ["coefficients.png", "ingredients.png", "residuals.png"]
    assert all(str(path) in printed for path in drawn.iterdir())
    status, shown, error = run(capsys, "show", str(file), "--plots", str(tmp_path))
    assert (status, error) == (0, "")
    fit = iia.load(file)
    assert fit.explain() in shown
    table = shown.split("ingredient ")[-1].split("\n\n")[0].splitlines()[1:]
    ingredients = fit.record.search.ingredients
    assert [line.split("  ")[0] for line in table] == [i.name for i in ingredients]
    assert ["*" in line for line in table] == [i.chosen for i in ingredients]
    for path in drawn.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_was_found_samples_unseen_noise(tmp_path, capsys, searched):
    sample = ["sample", str(searched[1]), "--setting", "mixture", "--samples", "5", "--out", str(tmp_path)]
    assert run(capsys, *sample)[0] == 0
    ode, x = get_setting("mixture").draw_each(iia.noise.sample_seeds(0, range(5)))
    stored = iia.files.read_tensors(tmp_path / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(searched[1])))


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
    fit = ["fit", "--setting", "mixture", "--nfe", "5", "--samples", "16", "--solver", *options]
    status, printed, _ = run(capsys, *fit, "--out", str(file))
    assert status == 0
    grid = method.base_solver.grid_for(5, iia.grids.karras, iia.EDM())
    expected = method.fit(*ode_and_x, grid)
    assert iia.load(file).plan == expected.plan
    assert str(expected) in printed


def test_the_guards_warning_is_one_line_on_standard_error(tmp_path, capsys):
    status, _, error = run(capsys, "fit", *WINDOW, "--samples", "3", "--out", str(tmp_path / "a"))
    assert (status, len(error.splitlines())) == (0, 1)
    assert error.startswith("iia-ode: warning: iia(ddim) is not clearly better than its base")
    assert "3 samples cannot tell a gain from chance" in error


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


@pytest.mark.parametrize("method", [SEARCH, ["fit", *WINDOW, "--samples", "16"]], ids=["one call", "one solver"])
def test_trajectories_are_made_once_and_serve_every_fit_of_the_same_noise(tmp_path, capsys, method):
    kept, plain, first, second = (str(tmp_path / name) for name in ("teacher", "plain", "first", "second"))
    assert run(capsys, *method, "--out", plain)[0] == 0
    assert run(capsys, *method, "--save-teacher", kept, "--out", first)[0] == 0
    assert len(iia.load(kept)) == 16
    assert run(capsys, *method, "--teacher", kept, "--out", second)[0] == 0
    fits = [iia.load(file) for file in (plain, first, second)]
    assert all(fit.plan == fits[0].plan for fit in fits)
    assert fits[2].record.sample_evaluations <= fits[0].record.sample_evaluations - 16 * 24  # its steps, at least
    if method is SEARCH:  # the trajectories of a search serve a fit on a grid
        assert run(capsys, "fit", *WINDOW, "--samples", "16", "--teacher", kept, "--out", second)[0] == 0
    status, _, error = run(capsys, *method, "--seed", "1", "--teacher", kept, "--out", second)
    assert status == 2
    assert "the teacher starts from other states" in error


# ---- several processes -----------------------------------------------------------------------------------------------


def test_processes_that_cannot_be_joined_are_one_line_of_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    for options in ([], ["--solver", "ddim"]):
        status, _, error = run(capsys, "fit", "--setting", "mixture", *options, "--out", str(tmp_path / "fit"))
        assert (status, len(error.splitlines())) == (2, 1)
        assert "cannot join the 2 processes announced by WORLD_SIZE" in error
    for wrong in ("many", "0"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        status, _, error = run(capsys, "fit", "--setting", "mixture", "--out", str(tmp_path / "f"))
        assert (status, error) == (
            2,
            f"iia-ode: error: WORLD_SIZE must be a number of processes, got {wrong!r}.\n",
        )


# The test sets what torchrun sets. The two processes are forks of one, which imports torch once.
TWO = {
    "search": [*SEARCH, "--save-teacher", "teacher-search"],
    "fit": [
        "fit",
        *WINDOW,
        "--samples",
        "21",
        "--guard",
        "--ridge",
        "auto",
        "--intercept",
        "--save-teacher",
        "teacher-fit",
    ],
    "few": ["fit", *WINDOW, "--samples", "3"],
    "sample": ["sample", "heun", "--setting", "mixture", "--nfe", "5", "--samples", "7"],
    "dying": ["fit", *WINDOW, "--samples", "8"],
}
IN_EACH = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from iia_ode import Teacher
from iia_ode.cli import main

def each():
    for name, port, arguments in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = port
        if name == "dying" and os.environ["RANK"] == "1":
            Teacher.for_grid = lambda *_, **__: os._exit(9)
        with open(f"{name}-{os.environ['RANK']}.txt", "w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
            main([*arguments, "--out", f"two-{name}"])

numbers = []
for rank in range(2):
    if number := os.fork():
        numbers.append(number)
        continue
    os.environ["RANK"] = str(rank)
    try:
        each()
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]))
"""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Where two processes wrote, after some commands; the second is as if killed in the middle of the last."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("two")
    commands = json.dumps([(name, str(free_port()), arguments) for name, arguments in TWO.items()])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", IN_EACH, commands],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "[2, 9]\n", done.stderr
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def said(folder, name):
    """What each of the two processes printed."""
    return [(folder / f"{name}-{k}.txt").read_text() for k in range(2)]


@pytest.mark.parametrize("name", ["search", "fit"])
def test_two_processes_write_the_files_that_one_would(tmp_path, capsys, monkeypatch, by_two, name):
    first, second = said(by_two, name)
    assert (first.count("teacher-"), first.count("written: "), second) == (1, 2, "")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *TWO[name], "--out", "one")[0] == 0
    together, alone = iia.load(by_two / f"two-{name}"), iia.load("one")
    assert together.plan.difference(alone.plan) < 1e-9
    assert (together.record.batch, together.record.origin) == (alone.record.batch, alone.record.origin)
    assert together.record.sample_evaluations == pytest.approx(alone.record.sample_evaluations, rel=0.01)
    assert [r.accepted for r in together.reports] == [r.accepted for r in alone.reports]
    teachers = [iia.load(path / f"teacher-{name}") for path in (by_two, tmp_path)]
    assert torch.allclose(teachers[0].final, teachers[1].final, rtol=1e-12, atol=1e-12)


def test_of_two_processes_one_says_what_is_spent_and_warns(by_two):
    assert "trajectories of 60 steps, in 2 processes" in said(by_two, "fit")[0]
    first, second = said(by_two, "few")
    assert (first.count("iia-ode: warning: "), second) == (1, "")


def test_two_processes_write_the_samples_that_one_would(tmp_path, capsys, by_two):
    options = TWO["sample"]
    assert run(capsys, *options, "--out", str(tmp_path / "one"))[0] == 0
    assert run(capsys, *options[:-1], "4", "--out", str(tmp_path / "fewer"))[0] == 0
    two, one, fewer = (
        iia.files.read_tensors(path / "samples.safetensors", "samples")[0]["samples"]
        for path in (by_two / "two-sample", tmp_path / "one", tmp_path / "fewer")
    )
    assert torch.allclose(two, one, rtol=1e-12, atol=1e-12)
    assert torch.allclose(fewer, one[:4], rtol=1e-12, atol=1e-12)
    assert said(by_two, "sample")[1] == ""


def test_a_process_that_dies_is_one_line_of_error_and_leaves_no_file(by_two):
    (line,) = (line for line in said(by_two, "dying")[0].splitlines() if line.startswith("iia-ode: error: "))
    assert "process 0 of 2 heard nothing from another process" in line
    assert not (by_two / "two-dying").exists()


# ---- the reference -------------------------------------------------------------------------------------------------


def test_every_name_of_a_fit_is_in_the_api_reference():
    reference = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    documented = {line.split("::")[1].strip().rsplit(".", 1)[-1] for line in reference.splitlines() if "::" in line}
    modules = {"__version__", "denoisers", "errors", "grids", "metrics", "plots", "problems", "reference", "testing"}
    for names in (iia.__all__, iia.iia.__all__, iia.plots.__all__):
        assert set(names) - modules <= documented
