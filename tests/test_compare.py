"""The main job: the comparison, its plots, and the command line."""

import csv
import io
import json
import re
from functools import partial

import pytest
import torch
from support import mixture, run

import iia_ode as iia
from iia_ode.experiments import Comparison, Row, compare, get_setting, setting_names
from iia_ode.metrics import paired_ratio, rmse, rmse_with_error

SMALL = ["--setting", "mixture", "--samples", "16", "--fit-samples", "16"]
PLOTS = {"compare.png", "seconds.png"}


# ---- the promise of the README, on fewer samples and counts ----------------------------------------------------------


def quick(name):
    """A setting whose references are as accurate as these comparisons need."""
    setting = get_setting(name)
    setting.reference_tolerance = 1e-3
    return setting


@pytest.fixture(scope="module")
def digits():
    solvers = ["ddim", "iia-ddim", "heun", "biia-edm", "iia-edm"]
    return compare(quick("digits"), solvers, [5, 7], iia.grids.karras, samples=4, fit_samples=6)


@pytest.mark.parametrize("nfe", [5, 7])
@pytest.mark.parametrize(("fitted", "base"), [("iia-ddim", "ddim"), ("biia-edm", "heun"), ("iia-edm", "heun")])
def test_on_the_digits_a_fit_beats_its_base_on_unseen_noise(digits, fitted, base, nfe):
    assert digits.error(fitted, nfe) < digits.error(base, nfe)


def test_a_comparison_is_reproducible_and_its_seed_matters():
    def again(seed):
        return compare(quick("mixture"), ["iia-ddim"], [5], iia.grids.karras, samples=8, fit_samples=8, seed=seed)

    first, second, other = (again(seed).rows[0].rmse for seed in (0, 0, 1))
    assert first == second != other


def test_fits_never_see_the_noise_they_are_measured_on():
    """The measured error is that of states drawn with the odd seed; the fit's are drawn with the even one."""
    setting = quick("mixture")
    result = compare(setting, ["iia-ddim"], [5], iia.grids.karras, samples=8, fit_samples=8, seed=3)
    fit_x, test_x = setting.draw(8, 6)[1], setting.draw(8, 7)[1]
    ode = setting.draw(8, 7)[0]
    assert not any(torch.equal(a, b) for a in fit_x for b in test_x)
    by_hand = iia.preset("iia-ddim").fit(ode, fit_x, iia.grids.karras(5))
    assert torch.equal(result.samples["iia-ddim", 5], iia.sample(ode, test_x, solver=by_hand))


def test_a_solver_sits_out_the_counts_it_cannot_make():
    result = compare(quick("mixture"), ["heun", "ddim"], [4, 5], iia.grids.karras, samples=4, fit_samples=4)
    assert result.error("heun", 4) is None
    assert [(r.solver, r.nfe) for r in result.rows] == [("heun", 5), ("ddim", 4), ("ddim", 5)]
    lines = result.table().splitlines()
    assert lines[0].split() == ["solver", "/", "NFE", "4", "5"]
    assert lines[1].split()[:2] == ["heun", "-"]
    with pytest.raises(iia.errors.InputError, match="none of heun can make any of 4 evaluations"):
        compare(get_setting("mixture"), ["heun"], [4], iia.grids.karras, samples=4, fit_samples=4)


def test_the_star_in_the_table_is_on_the_lowest_error_of_its_column():
    result = compare(quick("mixture"), ["heun", "ddim"], [5, 39], iia.grids.karras, samples=4, fit_samples=4)
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
    with pytest.raises(iia.errors.InputError, match="shapes"):
        rmse(x, x[:10])


def test_the_standard_error_of_a_ratio_is_how_it_scatters_and_pairs_cancel_what_is_common():
    common, own = torch.randn((2, 500, 400), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares, others = common.exp(), (common + 0.3 * own).exp() / 4
    found = torch.tensor([paired_ratio(a, b) for a, b in zip(squares, others, strict=True)])
    assert found[:, 0].mean() == pytest.approx(2.0, rel=0.05)
    assert float(found[:, 1].mean()) == pytest.approx(float(found[:, 0].std()), rel=0.15)
    unpaired = paired_ratio(squares[0], others[0][torch.randperm(400, generator=torch.Generator().manual_seed(1))])
    assert unpaired[1] > 3 * found[:, 1].median()
    assert paired_ratio(9 * squares[0], squares[0]) == pytest.approx((3.0, 0.0), abs=1e-12)


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


# ---- a model of one's own, solvers of every kind, several families of grids ------------------------------------------


def own_model(n=12, seed=5):
    """The ODE of a mixture as a user gives a model, with unseen states and their accurate final states."""
    ode = mixture().ode(iia.EDM())
    x = mixture().noisy(n, iia.EDM(), 80.0, torch.Generator().manual_seed(seed))
    return ode, x, iia.reference.solve(ode, x, 80.0, 0.0, rtol=1e-6, atol=1e-6, sigma_min=0.002)


def test_a_model_of_ones_own_is_compared_on_its_own_states():
    ode, x, reference = own_model()
    result = compare(ode, ["ddim", "heun"], 5, x=x, name="mine", tolerance=1e-6, sigma_min=0.002)
    assert result.error("ddim", 5) == rmse(iia.sample(ode, x, iia.grids.karras(5), "ddim"), reference)
    again = compare(ode, ["ddim"], [5], iia.grids.karras, x=x, reference=reference)
    assert again.error("ddim", 5) == result.error("ddim", 5)
    assert result.protocol.setting == "mine" and result.protocol.samples == 12
    assert "mine" in json.dumps(result.settings)


@pytest.mark.parametrize("schedule", [iia.Cosine(), iia.FlowMatching()], ids=["cosine", "flow"])
def test_a_model_of_any_schedule_is_compared_with_fits_and_the_one_call(schedule):
    ode = mixture().ode(schedule)
    grids = {"levels": partial(iia.grids.karras, schedule=schedule)}
    x = mixture().noisy(8, schedule, float(iia.grids.karras(2, schedule=schedule)[0]), torch.Generator().manual_seed(0))
    budget = iia.Budget(teacher_steps=10, trials=2, starts=0)
    result = compare(ode, ["iia-ddim", "iia"], 2, grids, x=x, fit_samples=8, budget=budget, tolerance=1e-3)
    assert [r.solver for r in result.rows] == ["iia-ddim", "iia"]
    assert result.settings["schedule"] == schedule.config()


def test_every_kind_of_solver_has_a_line_of_its_own():
    ode, x, reference = own_model()
    window = iia.IIA("ddim", "window", "trajectory", guard=False)
    fit = window.fit(ode, x.roll(1, 1), iia.grids.karras(4))
    solvers = {
        "name": "ddim",
        "instance": iia.get_solver("dpmpp_2m", max_order=3),
        "mapping": {"name": "dpmpp_2m", "options": {"max_order": 3}},
        "preset by name": "iia-ddim",
        "preset": iia.preset("iia-ddim"),
        "IIA": window,
        "fit": fit,
        "plan": fit.plan,
    }
    result = compare(ode, solvers, [4, 5], x=x, reference=reference, fit_samples=8)
    rows = {(r.solver, r.nfe): r for r in result.rows}
    assert result.solvers == tuple(solvers) and len(rows) == 14  # the fit and the plan have four evaluations only
    assert rows["instance", 4].rmse == rows["mapping", 4].rmse
    assert rows["preset", 5].rmse == rows["preset by name", 5].rmse
    assert rows["fit", 4].rmse == rows["plan", 4].rmse == rmse(iia.sample(ode, x, solver=fit), reference)
    assert {name for name, _ in result.fits} == {"preset by name", "preset", "IIA"}
    assert [r.solver for r in result.rows if r.nfe == 4 and r.fitted] == ["preset by name", "preset", "IIA", "fit"]
    assert rows["IIA", 5].fit_samples == result.protocol.fit_samples == 8
    unnamed = compare(ode, [solvers["mapping"], solvers["preset"], fit], 4, x=x, reference=reference, fit_samples=8)
    assert unnamed.solvers == ("dpmpp_3m", "iia-ddim", "iia(ddim)")


def test_each_solver_is_measured_on_each_family_of_grids():
    ode, x, reference = own_model()
    families = {"karras": "karras", "steep": partial(iia.grids.karras, rho=3)}
    result = compare(ode, ["ddim", "heun"], [5], families, x=x, reference=reference)
    assert result.solvers == ("ddim on karras", "ddim on steep", "heun on karras", "heun on steep")
    assert [r.grid for r in result.rows] == ["karras", "steep"] * 2
    expected = iia.sample(ode, x, iia.grids.karras(5, rho=3), "ddim")
    assert torch.equal(result.samples["ddim on steep", 5], expected)
    assert torch.equal(result.grids["ddim on steep", 5], iia.grids.karras(5, rho=3))
    named = compare(ode, "ddim", 5, ["log_snr", partial(iia.grids.karras, rho=3)], x=x, reference=reference)
    assert named.solvers == ("ddim on log_snr", "ddim on karras(rho=3)")


def test_fits_of_ones_own_model_are_made_on_other_noise_under_the_same_conditions():
    labels = torch.arange(12)
    seen = []

    def model(x, t, label):
        seen.append((x.clone(), label.clone()))
        return x / (1 + t[:, None] ** 2) + label[:, None] / 100

    ode = iia.ProbabilityFlowODE(model, iia.EDM(), "data", conditioning={"label": labels})
    x = 80 * torch.randn((12, 3), generator=torch.Generator().manual_seed(0))
    result = compare(ode, ["iia-ddim"], 3, x=x, reference=x / 80, fit_samples=24)
    first, label = next(call for call in seen if len(call[0]) == 24)
    assert not any(torch.equal(a, b) for a in x for b in first)
    assert label.tolist() == sorted([*range(12)] * 2)
    assert float(first.std()) == pytest.approx(80, rel=0.3)
    fit_x = 80 * torch.randn((6, 3), generator=torch.Generator().manual_seed(1))
    given = compare(ode, ["iia-ddim"], 3, x=x, fit_x=fit_x, reference=x / 80)
    assert given.fits["iia-ddim", 3].record.batch == 6
    assert result.fits["iia-ddim", 3].record.batch == 24
    with pytest.raises(iia.errors.InputError, match="share samples"):
        compare(ode, ["iia-ddim"], 3, x=x, fit_x=x.flip(0), reference=x / 80)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": None}, "needs the unseen initial states"),
        ({"samples": 4}, "omit samples"),
        ({"guidance_scale": 2.0}, "omit guidance_scale"),
        ({"reference": torch.zeros(3)}, "reference must have the shape of x"),
        ({"solvers": []}, "at least one solver"),
        ({"solvers": ["dpmpp_2m", iia.get_solver("dpmpp_2m")]}, "two solvers are called 'dpmpp_2m'"),
        ({"solvers": [3]}, "expected the name of a registered solver"),
        ({"solvers": ["dopri5"]}, "method of torchdiffeq"),
        ({"solvers": "hun"}, "unknown solver 'hun'"),
        ({"nfes": []}, "at least one number of evaluations"),
        ({"nfes": [2.5]}, "number of evaluations"),
        ({"grids": iia.grids.karras(5)}, "name of a family"),
        ({"grids": "karas"}, "unknown family of grids 'karas'"),
        ({"grids": [iia.grids.karras, iia.grids.karras]}, "two families of grids have one name"),
        ({"grids": ["karras", partial(iia.grids.karras, sigma_max=40.0)]}, "have one name"),
        ({"grids": {"a": "karras", "b": partial(iia.grids.karras, sigma_max=40.0)}}, "goes from level 40"),
        ({"grids": {"a": "karras", "b": partial(iia.grids.karras, to_data=False)}}, "to 0.002"),
        ({"model": iia.EDM()}, "compare takes a Setting"),
        ({"model": "digits"}, "omit x"),
        ({"seed": -1}, "seed"),
    ],
)
def test_misuse_of_a_comparison_is_one_clear_error(changes, match):
    ode = mixture().ode(iia.EDM())
    arguments = {"model": ode, "solvers": ["ddim"], "nfes": [3], "x": 80 * torch.randn(4, 4, dtype=torch.float64)}
    with pytest.raises(iia.IIAError, match=match):
        compare(**(arguments | changes))


def test_a_setting_that_draws_at_another_level_than_the_grids_is_refused():
    with pytest.raises(iia.errors.GridError, match="start at level 40, and mixture draws states of level 80"):
        compare("mixture", ["ddim"], [3], partial(iia.grids.karras, sigma_max=40.0), samples=4)


def test_a_comparison_is_made_from_measurements_of_ones_own():
    rows = [Row("mine", n, 1e-5 / n, 1e-6) for n in (4, 8)] + [Row("theirs", 8, 2e-6, 1e-7, fitted=True)]
    result = Comparison(rows)
    assert (result.solvers, result.nfes) == (("mine", "theirs"), (4, 8))
    assert result.error("theirs", 4) is None
    assert result.table().splitlines()[1].split() == ["mine", "2.500e-06*", "1.250e-06*"]
    assert result.settings == {"grids": {}}
    with pytest.raises(iia.errors.InputError, match="Row"):
        Comparison([])


# ---- the command line ------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_everything_it_made(tmp_path, capsys):
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "compare", *SMALL, "--nfe", "5,6", "--out", str(out))
    assert status == 0
    assert {p.name for p in out.iterdir()} == {"compare.csv", "compare.json", "fits", "table.md", *PLOTS}
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


def test_what_one_call_finds_can_be_compared_finds_its_own_grid_and_is_said(caplog):
    setting, said = quick("mixture"), []
    caplog.set_level("INFO", logger="iia_ode")
    result = compare(setting, ["heun", "iia"], [2, 3], iia.grids.karras, samples=8, fit_samples=16, report=said.append)
    ode, x = setting.draw(16, 0)
    for nfe in (2, 3):
        by_hand = iia.fit(ode, nfe, x=x, budget="closed-form", sigma_max=80.0, sigma_min=setting.sigma_min)
        assert torch.equal(result.fits["iia", nfe].grid, by_hand.grid)
        assert result.settings["grids"][f"iia {nfe}"] == by_hand.grid.tolist()
    rows = {(r.solver, r.nfe): r for r in result.rows}
    assert rows["iia", 3].fit_samples == 16
    assert rows["iia", 3].fit_evaluations == by_hand.record.evaluations  # trajectories included
    assert rows["iia", 3].rmse < rows["heun", 3].rmse
    assert sum("iia at" in line and "RMSE" in line for line in said) == 2
    assert len(re.findall(r"sample evaluations, \d+ s at", caplog.text)) == caplog.text.count("chosen: ") == 4
    with pytest.raises(iia.errors.UnknownNameError, match="unknown budget 'huge'"):
        compare(setting, ["iia"], [4], iia.grids.karras, budget="huge")


def test_fits_to_accurate_trajectories_share_them_and_each_counts_them():
    setting = quick("mixture")
    shared = compare(setting, ["iia-ddim"], [4, 6], iia.grids.karras, samples=8, fit_samples=8, target="trajectory")
    ode, x = setting.draw(8, 0)
    for nfe, row in zip((4, 6), shared.rows, strict=True):
        alone = iia.preset("iia-ddim", target="trajectory").fit(ode, x, iia.grids.karras(nfe))
        assert shared.fits["iia-ddim", nfe].plan == alone.plan
        assert row.fit_evaluations == alone.record.evaluations


def test_compare_lists_what_it_wrote_and_nothing_of_an_earlier_run(tmp_path, capsys):
    def listed(*solvers):
        status, printed, _ = run(
            capsys, "compare", *SMALL, "--nfe", "5", "--solvers", ",".join(solvers), "--out", str(tmp_path)
        )
        assert status == 0
        return set(printed.splitlines()[-1].removeprefix(f"written to {tmp_path}/: ").split(", "))

    (tmp_path / "stale.csv").touch()
    plain = {"compare.csv", "table.md", "compare.json", *PLOTS}
    assert listed("ddim", "iia-ddim") == plain | {"fits/*.safetensors (1)"}
    assert listed("ddim") == plain


def test_compare_writes_a_picture_of_samples_where_they_are_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("iia_ode.cli.options.get_setting", quick)
    small = ["--samples", "2", "--fit-samples", "2", "--nfe", "5", "--solvers", "ddim,heun"]
    assert run(capsys, "compare", *small, "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_compares_files_and_several_families(tmp_path, capsys):
    ode, x = get_setting("mixture").draw(16, 0)
    iia.preset("iia-ddim").fit(ode, x, iia.grids.karras(5)).save(tmp_path / "mine.safetensors")
    arguments = [
        "--nfe",
        "5",
        "--solvers",
        f"ddim,iia-ddim,{tmp_path / 'mine.safetensors'}",
        "--out",
        str(tmp_path / "out"),
    ]
    status, _, _ = run(capsys, "compare", *SMALL, *arguments, "--grids", "karras,log_snr")
    assert status == 0
    rows = [r["solver"] for r in csv.DictReader(io.StringIO((tmp_path / "out" / "compare.csv").read_text()))]
    assert rows == [f"{s} on {g}" for s in ("ddim", "iia-ddim") for g in ("karras", "log_snr")] + ["mine"]
    assert (tmp_path / "out" / "fits" / "iia-ddim-on-log_snr-5.safetensors").exists()
    status, _, said = run(capsys, "compare", *SMALL, "--grids", "karras,beta", "--grid", "karras")
    assert status == 2 and "leave out --grid" in said
    status, _, said = run(capsys, "compare", *SMALL, "--grids", "karas")
    assert status == 2 and "karas" in said
