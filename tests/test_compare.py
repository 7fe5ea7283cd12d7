"""The main job: the comparison, its plots, and the command line."""

import csv
import io
import json
import sys

import pytest
import torch
from matplotlib.figure import Figure
from support import mixture, run

import iia_ode as iia
from iia_ode import plots
from iia_ode.experiments import compare, get_setting, setting_names
from iia_ode.metrics import rmse, rmse_with_error

SMALL = ["--setting", "mixture", "--samples", "16", "--fit-samples", "16"]


# ---- the promise of the README, on fewer samples and counts ----------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    solvers = ["ddim", "iia-ddim", "heun", "biia-edm", "iia-edm"]
    return compare(get_setting("digits"), solvers, [5, 9], iia.grids.karras, samples=32, fit_samples=64)


@pytest.mark.parametrize("nfe", [5, 9])
@pytest.mark.parametrize(("fitted", "base"), [("iia-ddim", "ddim"), ("biia-edm", "heun"), ("iia-edm", "heun")])
def test_on_the_digits_a_fit_beats_its_base_on_unseen_noise(digits, fitted, base, nfe):
    assert digits.error(fitted, nfe) < digits.error(base, nfe)


def test_a_comparison_is_reproducible_and_its_seed_matters():
    def again(seed):
        return compare(get_setting("mixture"), ["iia-ddim"], [5], iia.grids.karras, samples=8, fit_samples=8, seed=seed)

    assert again(0).rows[0].rmse == again(0).rows[0].rmse
    assert again(0).rows[0].rmse != again(1).rows[0].rmse


def test_fits_never_see_the_noise_they_are_measured_on():
    """The measured error is that of states drawn with the odd seed; the fit's are drawn with the even one."""
    setting = get_setting("mixture")
    result = compare(setting, ["iia-ddim"], [5], iia.grids.karras, samples=8, fit_samples=8, seed=3)
    fit_x, test_x = setting.draw(8, 6)[1], setting.draw(8, 7)[1]
    ode = setting.draw(8, 7)[0]
    assert not any(torch.equal(a, b) for a in fit_x for b in test_x)
    by_hand = iia.preset("iia-ddim").fit(ode, iia.grids.karras(5), fit_x)
    assert torch.equal(result.samples["iia-ddim", 5], iia.sample(ode, test_x, solver=by_hand))


def test_a_solver_sits_out_the_counts_it_cannot_make():
    result = compare(get_setting("mixture"), ["heun", "ddim"], [4, 5], iia.grids.karras, samples=4, fit_samples=4)
    assert result.error("heun", 4) is None
    assert [(r.solver, r.nfe) for r in result.rows] == [("heun", 5), ("ddim", 4), ("ddim", 5)]
    lines = result.table().splitlines()
    assert lines[0].split() == ["solver", "/", "NFE", "4", "5"]
    assert lines[1].split()[:2] == ["heun", "-"]
    with pytest.raises(iia.InputError, match="none of heun can make any of 4 evaluations"):
        compare(get_setting("mixture"), ["heun"], [4], iia.grids.karras, samples=4, fit_samples=4)


def test_the_star_in_the_table_is_on_the_lowest_error_of_its_column():
    result = compare(get_setting("mixture"), ["heun", "ddim"], [5, 39], iia.grids.karras, samples=4, fit_samples=4)
    rows = {line.split()[0]: line.split()[1:] for line in result.table().splitlines()[1:]}
    for column, nfe in enumerate([5, 39]):
        best = min(("heun", "ddim"), key=lambda s, n=nfe: result.error(s, n))
        assert [s for s in rows if rows[s][column].endswith("*")] == [best]


def test_rmse_is_per_component_and_its_standard_error_shrinks_with_samples():
    x = torch.randn((400, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, error = rmse_with_error(x, torch.zeros_like(x))
    assert value == pytest.approx(float(x.square().mean().sqrt()), rel=1e-14)
    assert rmse_with_error(x[:100], torch.zeros(100, 5))[1] == pytest.approx(2 * error, rel=0.3)
    assert rmse(x, x) == 0.0
    with pytest.raises(iia.InputError, match="shapes"):
        rmse(x, x[:10])


@pytest.mark.parametrize("name", setting_names())
def test_a_setting_draws_the_same_for_the_same_seed_and_starts_at_its_noise_level(name):
    setting = get_setting(name)
    (ode, x), (_, again) = setting.draw(2000, 5), setting.draw(2000, 5)
    assert torch.equal(x, again)
    assert not torch.equal(x, setting.draw(2000, 6)[1])
    assert float(x.double().std()) == pytest.approx(setting.sigma_max, rel=0.02)
    ode.check_state_shape(x)


@pytest.mark.parametrize("name", setting_names())
def test_a_setting_draws_the_same_whatever_the_default_device(name):
    expected = get_setting(name).draw(5, 3)[1]
    torch.set_default_device("meta")
    try:
        ode, x = get_setting(name).draw(5, 3)
    finally:
        torch.set_default_device(None)
    assert torch.equal(x, expected)
    assert all(v.device.type == "cpu" for v in ode.conditioning.values())
    assert all(v.device.type == "cpu" for v in ode.model.state_dict().values())


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_plots_draw_on_the_axes_they_are_given(digits, tmp_path):
    ax = Figure().add_subplot()
    assert plots.error_against_nfe(digits, ax) is ax
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(digits.solvers)
    grid = plots.image_grid(digits.reference, columns=8)
    assert grid.images[0].get_array().shape == (4 * 9 - 1, 8 * 9 - 1)
    assert plots.save_figure(ax, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_plot_names_the_extra(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(iia.MissingDependencyError, match=r"pip install 'iia-ode\[plot\]'"):
        plots.error_against_nfe(digits)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_everything_it_made(tmp_path, capsys):
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "compare", *SMALL, "--nfe", "5,6", "--out", str(out))
    assert status == 0
    assert {p.name for p in out.iterdir()} == {"compare.csv", "compare.json", "compare.png", "fits", "table.md"}
    rows = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert {(r["solver"], r["nfe"]) for r in rows} == {
        *(("ddim", n) for n in "56"),
        *(("iia-ddim", n) for n in "56"),
        *((s, "5") for s in ("heun", "biia-edm", "iia-edm")),
    }
    for row in rows:
        assert f"{float(row['rmse']):.4f}" in printed
        assert (int(row["fit_evaluations"]) > 0) == ("iia" in row["solver"])
    assert json.loads((out / "compare.json").read_text())["setting"] == "mixture"
    assert sorted(p.name for p in (out / "fits").iterdir()) == [
        "biia-edm-5.safetensors",
        "iia-ddim-5.safetensors",
        "iia-ddim-6.safetensors",
        "iia-edm-5.safetensors",
    ]
    assert iia.load(out / "fits" / "iia-edm-5.safetensors").nfe == 5


def test_what_one_call_finds_can_be_compared_and_finds_its_own_grid():
    setting = get_setting("mixture")
    result = compare(setting, ["heun", "iia"], [4, 5], iia.grids.karras, samples=16, fit_samples=32)
    for nfe in (4, 5):
        by_hand = iia.fit(*_drawn(setting, nfe), budget="closed-form", sigma_max=80.0, report=None)
        assert torch.equal(result.fits["iia", nfe].grid, by_hand.grid)
        assert result.settings["grids"][f"iia {nfe}"] == by_hand.grid.tolist()
    rows = {(r.solver, r.nfe): r for r in result.rows}
    assert rows["iia", 5].fit_samples == 32
    assert rows["iia", 5].fit_evaluations == result.fits["iia", 5].about["evaluations"]
    assert rows["iia", 5].rmse < rows["heun", 5].rmse
    with pytest.raises(iia.UnknownNameError, match="unknown budget 'huge'"):
        compare(setting, ["iia"], [4], iia.grids.karras, budget="huge")


def _drawn(setting, nfe):
    ode, x = setting.draw(32, 0)
    return ode, nfe, x


def test_fits_to_accurate_trajectories_share_them_and_each_counts_them():
    setting = get_setting("mixture")
    shared = compare(setting, ["iia-ddim"], [4, 6], iia.grids.karras, samples=8, fit_samples=8, target="trajectory")
    ode, x = setting.draw(8, 0)
    for nfe, row in zip((4, 6), shared.rows, strict=True):
        alone = iia.preset("iia-ddim", target="trajectory").fit(ode, iia.grids.karras(nfe), x)
        assert shared.fits["iia-ddim", nfe].plan.difference(alone.plan) == 0
        assert row.fit_evaluations == alone.about["evaluations"]


def test_compare_lists_what_it_wrote_and_nothing_of_an_earlier_run(tmp_path, capsys):
    def listed(*solvers):
        status, printed, _ = run(
            capsys, "compare", *SMALL, "--nfe", "5", "--solvers", ",".join(solvers), "--out", str(tmp_path)
        )
        assert status == 0
        return set(printed.splitlines()[-1].removeprefix(f"written to {tmp_path}/: ").split(", "))

    (tmp_path / "stale.csv").touch()
    plain = {"compare.csv", "table.md", "compare.json", "compare.png"}
    assert listed("ddim", "iia-ddim") == plain | {"fits/*.safetensors (1)"}
    assert listed("ddim") == plain


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["compare", "--out", "/dev/null/x"], "iia_ode.cli.compare.compare"),
        (["fit", "--out", "/dev/null/x"], "iia_ode.cli.fit.fit"),
        (["fit", "--solver", "iia-edm", "--out", "/dev/null/x"], "iia_ode.iia.IIA.fit"),
        (["fit", "--save-teacher", "/dev/null/x", "--out", "x"], "iia_ode.iia.Teacher.solve"),
        (["sample", "heun", "--out", "/dev/null/x"], "iia_ode.cli.sample.sample"),
        (["train", "digits", "--out", "/dev/null/x"], "iia_ode.cli.train.train_digits"),
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


def test_compare_writes_a_picture_of_samples_where_they_are_images(tmp_path, capsys):
    small = ["--samples", "8", "--fit-samples", "8", "--nfe", "5", "--solvers", "ddim,heun"]
    assert run(capsys, "compare", *small, "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_fit_then_show_then_sample(tmp_path, capsys):
    file = str(tmp_path / "fit.safetensors")
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
    ode, x = get_setting("mixture").draw(12, 1)
    stored = iia.files.read_tensors(out / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(file)))


def test_sample_draws_at_the_noise_level_that_the_files_grid_starts_from(tmp_path, capsys):
    file = tmp_path / "a fit"
    common = ["--setting", "mixture", "--samples", "12"]
    fit = ["fit", "--solver", "iia-edm", "--nfe", "5", "--sigma-max", "10", "--out", str(file)]
    assert run(capsys, *fit, *common)[0] == 0
    assert run(capsys, "sample", str(file), *common, "--out", str(tmp_path))[0] == 0
    setting = get_setting("mixture")
    setting.sigma_max = 10.0
    ode, x = setting.draw(12, 1)
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
    mine = iia.from_functions(lambda t: 1 - t, lambda t: t)
    grid = iia.grids.karras(3, schedule=mine)
    fit = iia.preset("iia-ddim").fit(mixture().ode(mine), grid, torch.randn(4, 4, dtype=torch.float64))
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
    for name in [*iia.solver_names(), *iia.iia.PRESETS, *iia.torchdiffeq_methods()]:
        assert name in printed


def test_train_writes_a_loadable_denoiser(tmp_path, capsys, monkeypatch):
    images, labels = iia.denoisers.digits_data()
    monkeypatch.setattr("iia_ode.denoisers.pretrained.digits_data", lambda: (images[:40], labels[:40]))
    file = tmp_path / "net.safetensors"
    assert run(capsys, "train", "digits", "--steps", "2", "--batch", "4", "--out", str(file))[0] == 0
    assert iia.denoisers.load_denoiser(file).state_shape == (1, 8, 8)
    images, held_out = torch.rand(40, 3, 16, 16), torch.arange(40) < 10
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
        (["compare", "--budget", "standard"], "--budget is that of solver 'iia'"),
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
        ["train", "patches"],
    ):
        status, printed, _ = run(capsys, *command, "--help")
        assert status == 0
        assert "Usage: iia-ode" in printed
