"""The main job: the comparison, its plots, and the command line."""

import csv
import io
import json
import sys

import pytest
import torch
from matplotlib.figure import Figure

import iia_ode as iia
from iia_ode import plots
from iia_ode.cli import main
from iia_ode.experiments import compare, get_setting, setting_names
from iia_ode.metrics import rmse, rmse_with_error

SMALL = ["--setting", "mixture", "--samples", "16", "--fit-samples", "16"]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command line."""
    try:
        main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---- the promise of the README, on fewer samples and counts ----------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    solvers = ["ddim", "iia-ddim", "heun", "biia-edm", "iia-edm"]
    return compare(get_setting("digits"), solvers, [5, 9], iia.grids.karras, samples=32, fit_samples=64)


@pytest.mark.parametrize("nfe", [5, 9])
@pytest.mark.parametrize(("fitted", "base"), [("iia-ddim", "ddim"), ("biia-edm", "heun"), ("iia-edm", "heun")])
def test_on_the_digits_a_fit_beats_its_base_on_unseen_noise(digits, fitted, base, nfe):
    assert digits.error(fitted, nfe) < digits.error(base, nfe)


def test_a_comparison_is_reproducible_and_its_seed_matters(digits):
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
    assert str(iia.load(file).plan) in shown
    assert "history 2" in shown
    out = tmp_path / "samples"
    assert run(capsys, "sample", file, *common, "--out", str(out))[0] == 0
    ode, x = get_setting("mixture").draw(12, 1)
    stored = iia.files.read_tensors(out / "samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(stored, iia.sample(ode, x, solver=iia.load(file)))


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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["compare", "--solvers", "huen"], "unknown solver 'huen'. Did you mean 'heun'?"),
        (["compare", "--setting", "digit"], "unknown setting 'digit'. Did you mean 'digits'?"),
        (["compare", "--nfe", "5,x"], "not a list of positive integers"),
        (["compare", "--nfe", "0"], "not a list of positive integers"),
        (["compare", "--device", "tpu9"], "cannot be used here"),
        (["compare", *SMALL, "--rho", "-1"], "rho must be positive"),
        (["compare", *SMALL, "--guidance", "2"], "no conditions to guide by"),
        (["compare", *SMALL, "--samples", "0"], "at least one"),
        (["fit"], "Missing option '--out'"),
        (["fit", "--preset", "iia-edn", "--out", "x"], "Did you mean 'iia-edm'"),
        (["fit", *SMALL[:2], "--nfe", "6", "--out", "x"], "cannot make exactly 6 evaluations"),
        (["sample", "iia-ddim"], "has to be fitted first: iia-ode fit --preset iia-ddim"),
        (["sample", "nothing.safetensors"], "no file 'nothing.safetensors'"),
        (["show", "nothing"], "no file 'nothing'"),
        (["sample", "heun", "--setting", "mixture", "--nfe", "5", "--out", "/dev/null/x"], "Not a directory"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_an_error_is_one_line_and_exit_status_2(capsys, arguments, text):
    status, printed, error = run(capsys, *arguments)
    assert status == 2
    assert printed == ""
    lines = error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("iia-ode: error: ")
    assert text in lines[0]


def test_every_command_explains_itself(capsys):
    for command in ([], ["compare"], ["fit"], ["sample"], ["show"], ["solvers"], ["train"], ["train", "digits"]):
        status, printed, _ = run(capsys, *command, "--help")
        assert status == 0
        assert "Usage: iia-ode" in printed
