"""The command line: grids by name, what goes with which, commands, and errors of one line."""

import pytest
import torch
from support import F64, mixture, run

import iia_ode as iia
from iia_ode import grids
from iia_ode.experiments import get_setting
from iia_ode.files import read_tensors

SMALL = ["--setting", "mixture", "--samples", "16", "--fit-samples", "16"]
MIXTURE = get_setting("mixture")
ENDS = {"sigma_min": MIXTURE.sigma_min, "sigma_max": MIXTURE.sigma_max, "schedule": MIXTURE.schedule}


def grid_of(tmp_path, capsys, *options):
    """The grid that `iia-ode sample` used."""
    command = ["sample", "ddim", "--setting", "mixture", "--samples", "2", "--nfe", "5", "--out", str(tmp_path)]
    status, _, error = run(capsys, *command, *options)
    assert (status, error) == (0, "")
    return torch.tensor(read_tensors(tmp_path / "samples.safetensors", "samples")[1]["grid"], dtype=F64)


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_family_of_noise_levels_has_its_name_on_the_command_line(tmp_path, capsys, name):
    assert torch.equal(grid_of(tmp_path, capsys, "--grid", name), grids.GRIDS[name](5, **ENDS))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], grids.karras(5, **ENDS)),
        (["--rho", "3"], grids.karras(5, rho=3.0, **ENDS)),
        (["--rho", "0"], grids.log_snr(5, **ENDS)),
        (["--grid", "polyexponential", "--rho", "1.5"], grids.polyexponential(5, rho=1.5, **ENDS)),
        (["--grid", "beta", "--sigma-min", "0.1"], grids.beta(5, **{**ENDS, "sigma_min": 0.1})),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_the_exponent_goes_to_the_family_that_has_one(tmp_path, capsys, options, expected):
    assert torch.equal(grid_of(tmp_path, capsys, *options), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grid", "log_snr", "--rho", "7"], "--rho goes with --grid karras or polyexponential, not with log_snr"),
        (["--grid", "polyexponential", "--rho", "0"], "rho must be a finite positive number"),
        (["--rho", "0.01"], "0.01 is too small"),
        (["--grid", "spline"], "'spline' is not one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_that_do_not_go_together_are_one_line_of_error(tmp_path, capsys, options, words):
    status, _, error = run(capsys, "sample", "ddim", "--setting", "mixture", "--out", str(tmp_path), *options)
    assert (status, len(error.splitlines())) == (2, 1)
    assert words in error


def test_a_fitted_solver_brings_its_grid_and_takes_no_other(tmp_path, capsys):
    path = str(tmp_path / "fit.safetensors")
    fit = [
        "fit",
        "--setting",
        "mixture",
        "--preset",
        "iia-ddim",
        "--samples",
        "8",
        "--nfe",
        "4",
        "--grid",
        "linear_log",
    ]
    assert run(capsys, *fit, "--out", path)[0] == 0
    status, _, error = run(capsys, "sample", path, "--setting", "mixture", "--grid", "karras", "--out", str(tmp_path))
    assert status == 2 and "leave out --grid" in error


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["compare", "--out", "/dev/null/x"], "iia_ode.cli.compare.compare"),
        (["fit", "--out", "/dev/null/x"], "iia_ode.cli.fit.fit"),
        (["fit", "--solver", "iia-edm", "--out", "/dev/null/x"], "iia_ode.iia.IIA.fit"),
        (["fit", "--save-teacher", "/dev/null/x", "--out", "x"], "iia_ode.Teacher.solve"),
        (["sample", "heun", "--out", "/dev/null/x"], "iia_ode.cli.sample.sample"),
        (["train", "digits", "--out", "/dev/null/x"], "iia_ode.cli.train.train_digits"),
        (["train", "fashion", "--halfway", "/dev/null/x"], "iia_ode.cli.train.train_fashion"),
        (["train", "fashion-classifier", "--out", "/dev/null/x"], "iia_ode.cli.train.train_fashion_classifier"),
        (["train", "patches", "--out", "/dev/null/x"], "iia_ode.cli.train.train_patches"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(capsys, monkeypatch, tmp_path, arguments, work):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(work, refuse)
    status, _, error = run(capsys, *arguments)
    assert (status, len(error.splitlines())) == (2, 1)
    assert "/dev/null" in error


def test_fit_then_show_then_sample(tmp_path, capsys):
    file = str(tmp_path / "solver.safetensors")
    common = ["--setting", "mixture", "--samples", "12"]
    status, printed, _ = run(
        capsys, "fit", *common, "--preset", "iia-edm", "--nfe", "7", "--history", "2", "--out", file
    )
    assert status == 0
    assert "7 evaluations" in printed
    status, shown, _ = run(capsys, "show", file, "--plan")
    assert status == 0
    assert iia.load(file).table() in shown
    assert iia.load(file).explain() in shown
    assert str(iia.load(file).plan) in shown
    assert "history 2" in shown
    out = tmp_path / "samples"
    assert run(capsys, "sample", file, *common, "--out", str(out))[0] == 0
    ode, x = get_setting("mixture").draw_each(iia.noise.sample_seeds(0, range(12)))
    stored = iia.files.read_tensors(out / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(file)))
    assert run(capsys, "sample", str(tmp_path), *common, "--out", str(tmp_path / "again"))[0] == 0
    again = iia.files.read_tensors(tmp_path / "again" / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, again)


def test_a_warning_at_sampling_is_one_line_on_standard_error(tmp_path, capsys):
    file = str(tmp_path / "fit.safetensors")
    fit = ["fit", "--setting", "digits", "--samples", "2", "--preset", "iia-ddim", "--nfe", "3", "--out", file]
    assert run(capsys, *fit)[0] == 0
    sample = ["sample", file, "--setting", "digits", "--samples", "1", "--out", str(tmp_path)]
    assert run(capsys, *sample)[::2] == (0, "")
    status, _, said = run(capsys, *sample, "--guidance", "2")
    assert status == 0 and len(said.splitlines()) == 1
    assert said.startswith("iia-ode: warning: iia-ddim was fitted for guidance_scale 1.0, and this ODE has 2.0.")


def test_sample_draws_at_the_noise_level_that_the_files_grid_starts_from(tmp_path, capsys):
    file = tmp_path / "a fit"
    common = ["--setting", "mixture", "--samples", "12"]
    fit = ["fit", "--solver", "iia-edm", "--nfe", "5", "--sigma-max", "10", "--out", str(file)]
    assert run(capsys, *fit, *common)[0] == 0
    assert run(capsys, "sample", str(file), *common, "--out", str(tmp_path))[0] == 0
    setting = get_setting("mixture")
    setting.sigma_max = 10.0
    ode, x = setting.draw_each(iia.noise.sample_seeds(0, range(12)))
    stored = iia.files.read_tensors(tmp_path / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(file)))
    for option in ("--nfe", "--rho", "--sigma-min", "--sigma-max"):
        status, _, error = run(capsys, "sample", str(file), *common, option, "7")
        assert status == 2
        assert f"brings its own grid: leave out {option}, or fit again with it" in error


def test_a_file_called_like_a_solver_does_not_stand_in_its_way(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heun").touch()
    assert run(capsys, "sample", "heun", "--setting", "mixture", "--samples", "2")[0] == 0


def test_a_given_smallest_level_is_used(tmp_path, capsys):
    common = ["sample", "ddim", "--setting", "mixture", "--samples", "2", "--nfe", "3", "--out", str(tmp_path)]
    assert run(capsys, *common, "--sigma-min", "1e-5")[0] == 0
    assert iia.files.read_tensors(tmp_path / "samples.safetensors", "samples")[1]["grid"][-2:] == [1e-5, 0.0]


def test_show_needs_no_schedule_and_its_plan_does(tmp_path, capsys):
    mine = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)
    grid = iia.grids.karras(3, schedule=mine)
    fit = iia.preset("iia-ddim").fit(mixture().ode(mine), torch.randn(4, 4, dtype=torch.float64), grid)
    file = str(fit.save(tmp_path / "fit.safetensors"))
    status, printed, error = run(capsys, "show", file)
    assert (status, error) == (0, "")
    assert printed.startswith(f"{fit}\n\nnot explained: ")
    assert "pass schedule=" in printed
    status, printed, error = run(capsys, "show", file, "--plan")
    assert (status, printed) == (2, "")
    assert "pass schedule=" in error


def test_sample_takes_a_registered_name_and_draws_a_picture(tmp_path, capsys):
    status, printed, _ = run(capsys, "sample", "ddim", "--nfe", "3", "--samples", "4", "--out", str(tmp_path))
    assert status == 0
    assert "samples.png" in printed
    assert (tmp_path / "samples.png").exists()


def test_solvers_lists_every_name_that_can_be_used(capsys):
    status, printed, _ = run(capsys, "solvers")
    assert status == 0
    for name in [*iia.solver_names(), *iia.iia.PRESETS, *iia.solver_names(torchdiffeq=True)]:
        assert name in printed


def test_train_writes_a_loadable_denoiser(tmp_path, capsys, monkeypatch):
    images, labels = iia.denoisers.digits_data()
    monkeypatch.setattr("iia_ode.denoisers.pretrained.digits_data", lambda: (images[:12], labels[:12]))
    file = tmp_path / "net.safetensors"
    assert run(capsys, "train", "digits", "--steps", "2", "--batch", "4", "--out", str(file))[0] == 0
    assert iia.denoisers.load_denoiser(file).state_shape == (1, 8, 8)
    images, held_out = torch.rand(12, 3, 16, 16), torch.arange(12) < 4
    monkeypatch.setattr("iia_ode.denoisers.pretrained.patches_data", lambda: (images, held_out))
    assert run(capsys, "train", "patches", "--steps", "2", "--batch", "4", "--out", str(file))[0] == 0
    assert iia.denoisers.load_denoiser(file).state_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["compare", "--solvers", "huen"], "unknown solver 'huen'. Did you mean 'heun'"),
        (["compare", "--setting", "digit"], "unknown setting 'digit'. Did you mean 'digits'?"),
        (["compare", "--nfe", "5,x"], "Invalid value for '--nfe': 'x' is not a valid integer"),
        (["compare", "--nfe", "5,0"], "Invalid value for '--nfe': 0 is not in the range"),
        (["compare", "--nfe", ""], "Invalid value for '--nfe'"),
        (["compare", "--device", "tpu9"], "cannot be used here"),
        (["compare", "--device", "meta"], "cannot be used here"),
        (["compare", "--rho", "-1"], "Invalid value for '--rho': -1.0 is not in the range"),
        (["compare", "--rho", "1e-5"], "use 0 for a log-SNR grid, or at least 0.1"),
        (["compare", "--rho", "nan"], "'nan' is not a number"),
        (["compare", "--guidance", "inf"], "Invalid value for '--guidance'"),
        (["compare", "--sigma-min", "0"], "Invalid value for '--sigma-min': 0.0 is not in the range"),
        (["compare", *SMALL, "--sigma-min", "90"], "needs 0 < sigma_min < sigma_max, got 90.0 and 80.0"),
        (["compare", "--fit-samples", "-1"], "Invalid value for '--fit-samples'"),
        (["compare", "--seed", "99999999999999999999999"], "Invalid value for '--seed'"),
        (["compare", "--seed", "-1"], "Invalid value for '--seed'"),
        (["fit", "--out", "x", "--history", "-1"], "Invalid value for '--history'"),
        (["fit", "--out", "x", "--substeps", "0"], "Invalid value for '--substeps'"),
        (["fit", "--out", "x", "--chunk-size", "0"], "Invalid value for '--chunk-size'"),
        (["fit", "--out", "x", "--nfe", "0"], "Invalid value for '--nfe'"),
        (["sample", "heun", "--samples", "-1"], "Invalid value for '--samples'"),
        (["train", "digits", "--steps", "0"], "Invalid value for '--steps'"),
        (["train", "digits", "--steps", "-1"], "Invalid value for '--steps'"),
        (["train", "digits", "--batch", "0"], "Invalid value for '--batch'"),
        (["train", "bogus"], "No such command 'bogus'"),
        (["compare", *SMALL, "--guidance", "2"], "no conditions to guide by"),
        (["compare", "--setting", "patches", "--guidance", "2"], "patches has no conditions to guide by"),
        (["compare", "--samples", "0"], "Invalid value for '--samples': 0 is not in the range"),
        (["fit"], "Missing option '--out'"),
        (["fit", "--preset", "iia-edn", "--out", "x"], "Did you mean 'iia-edm'"),
        (["fit", *SMALL[:2], "--solver", "heun", "--nfe", "6", "--out", "x"], "cannot make exactly 6 evaluations"),
        (["sample", "iia-ddim"], "has to be fitted first: iia-ode fit --solver iia-ddim"),
        (["sample", "iia", "--nfe", "6"], "has to be fitted first: iia-ode fit --nfe 6"),
        (["compare", "--budget", "standard"], "--budget is for solver 'iia': add iia to --solvers"),
        (["sample", "nothing.safetensors"], "no file 'nothing.safetensors'"),
        (["show", "nothing"], "no file 'nothing'"),
        (["sample", "heun", "--setting", "mixture", "--nfe", "5", "--out", "/dev/null/x"], "/dev/null"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_an_error_is_one_line_and_exit_status_2(capsys, monkeypatch, tmp_path, arguments, text):
    monkeypatch.chdir(tmp_path)
    status, printed, error = run(capsys, *arguments)
    assert status == 2
    assert printed == ""
    lines = error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("iia-ode: error: ")
    assert text in lines[0]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nadvice"), "OutOfMemoryError: CUDA out of memory."),
        (RuntimeError("a device has gone\nadvice"), "RuntimeError: a device has gone"),
        (MemoryError(), "MemoryError: out of memory"),
    ],
    ids=lambda v: "" if isinstance(v, str) else type(v).__name__,
)
def test_trouble_of_torch_is_one_line_too(capsys, monkeypatch, tmp_path, error, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("iia_ode.cli.compare.compare", fail)
    assert run(capsys, "compare", *SMALL, "--out", str(tmp_path)) == (2, "", f"iia-ode: error: {text}\n")


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_group_without_a_command_prints_its_help(capsys, arguments):
    status, printed, error = run(capsys, *arguments)
    assert (status, error) == (0, "")
    assert run(capsys, *arguments, "--help")[1] == printed


def test_every_command_explains_itself(capsys):
    for command in (
        [],
        ["compare"],
        ["fit"],
        ["sample"],
        ["show"],
        ["solvers"],
        ["train"],
        ["train", "digits"],
        ["train", "digits-classifier"],
        ["train", "fashion"],
        ["train", "fashion-classifier"],
        ["train", "patches"],
    ):
        status, printed, _ = run(capsys, *command, "--help")
        assert status == 0
        assert "Usage: iia-ode" in printed
