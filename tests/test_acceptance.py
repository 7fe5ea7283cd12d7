"""The benchmarks of fitted solvers: what is stored is kept, the search covers all solvers, pages are made from the store."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import iia_ode as iia
from iia_ode.iia.families import LeapGrid
from iia_ode.iia.initial import start_time

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


common, classic, acceptance, ablation, never_worse, further, preset_losses = map(
    _load, ("common", "classic", "acceptance", "ablation", "never_worse", "further", "preset_losses")
)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Lines of progress; nothing that one test caches is seen by another."""
    lines: list[str] = []
    monkeypatch.setattr(common, "CACHE", tmp_path_factory.mktemp("cache"))
    common.batch.cache_clear()
    monkeypatch.setattr(common, "say", lines.append)
    yield lines
    common.batch.cache_clear()


def few_grids() -> list[LeapGrid]:
    return [LeapGrid(a, 0.1) for a in (4.0, 10.0)]


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_an_entry_is_made_once_and_again_under_other_conditions(tmp_path: Path) -> None:
    store, made = common.Store(tmp_path / "new"), []

    def make() -> dict[str, float]:
        made.append(1)
        return {"rmse": 0.1234567891, "worst": float("inf")}

    for _ in range(2):
        entry = store.cell("digits-nfe05-seed0", "classic", {"samples": 8}, make)
    assert len(made) == 1
    assert (entry["rmse"], entry["worst"]) == (0.123457, None)
    assert entry["library"] == iia.__version__
    store.cell("digits-nfe05-seed0", "scalar", {"samples": 8}, make)
    store.cell("digits-nfe05-seed0", "classic", {"samples": 16}, make)
    assert len(made) == 3
    assert {k: e["under"]["samples"] for k, e in store.read("digits-nfe05-seed0").items()} == {
        "classic": 16,
        "scalar": 8,
    }
    assert not list((tmp_path / "new").glob(".*"))


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    store = common.Store(tmp_path)
    store.put("a", "kept", {"rmse": 1.0, "under": {}})

    def fail() -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.cell("a", "new", {}, fail)
    assert list(store.read("a")) == ["kept"]


def test_noise_that_is_measured_is_not_noise_that_is_fitted_to(cached: list[str]) -> None:
    own, test = (common.batch("gaussian", 16, 0, unseen) for unseen in (False, True))
    assert not torch.isclose(own.x, test.x).any()
    assert own.final.shape == own.x.shape


@pytest.mark.parametrize("nfe", [4, 5])
def test_the_search_covers_every_solver_that_can_make_the_count(nfe: int) -> None:
    found, left = acceptance.able("gaussian", nfe), []
    for name in set(iia.solver_names()) - set(found):
        with pytest.raises(iia.GridError):
            iia.get_solver(name).grid_for(nfe, iia.grids.karras, iia.EDM())
        left.append(name)
    assert len(found) + len(left) == len(iia.solver_names())
    assert all(acceptance.classic_plan(name, "gaussian", nfe, 5.0, 0.1).nfe == nfe for name in found)


def _shifted_gaussian(samples: int):
    """Gaussian data moved by a label of each sample, and plans for it; the reference of the first draws is one plan's own."""
    setting = common.setting_of("gaussian")
    generator = torch.Generator().manual_seed(0)
    x = 8 * torch.randn((samples, 8), generator=generator, dtype=torch.float64)
    label = torch.randn((samples, 1), generator=generator, dtype=torch.float64)
    ode = iia.ProbabilityFlowODE(
        lambda x, t, label: label + (x - label) / (1 + t[:, None] ** 2), setting.schedule, conditioning={"label": label}
    )
    plans = {
        (solver, grid): classic.classic_plan(solver, "gaussian", 4, *grid)
        for solver in ("ddim", "ipndm2", "dpmpp_2m", "heun", "unipc")
        for grid in ((7.0, 0.1), (3.0, 0.3))
        if common.levels_for(solver, "gaussian", 4) is not None
    }
    final = iia.sample(ode, x, common.grid_of("expab3", "gaussian", 40), "expab3")
    first = -(-samples // classic.BLOCKS)
    own = plans["ddim", (3.0, 0.3)].run(ode, x)
    final[:first] = own[:first]
    return common.Batch(setting, ode, x, final, {}), plans


@pytest.mark.parametrize("samples", [1, 5, 16, 75])
def test_the_search_finds_the_pair_that_is_best_on_all_draws_with_the_conditions_of_each(samples: int) -> None:
    batch, plans = _shifted_gaussian(samples)
    every = {pair: common.error_of(plan, batch) for pair, plan in plans.items()}
    best = classic.lowest(plans, batch)
    assert best.pair == min(every, key=every.__getitem__)
    assert best.rmse == pytest.approx(every[best.pair], rel=1e-9, abs=1e-12)
    # What leads after the first draws is not the best of all.
    assert (best.pair == ("ddim", (3.0, 0.3))) == (samples == 1)
    assert 1 <= best.finished <= best.pairs == len(plans)


def test_the_best_classic_solver_is_the_one_that_running_every_pair_to_the_end_finds(
    cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classic, "KARRAS", common.KARRAS[::6])
    own = common.batch("gaussian", 64, 0, False)
    pairs = [(s, grid) for s in classic.able("gaussian", 5) for grid in classic.KARRAS]
    every = {(s, grid): common.error_of(classic.classic_plan(s, "gaussian", 5, *grid), own) for s, grid in pairs}
    best = classic.classic_search("gaussian", 5, own)
    assert best.rmse == pytest.approx(min(every.values()), rel=1e-9)
    assert every[best.pair] == pytest.approx(best.rmse, rel=1e-9)
    assert best.pairs == len(every)
    assert best.sample_evaluations < 5 * 64 * best.pairs / 4


def test_a_pair_whose_run_is_not_finite_never_wins() -> None:
    batch, plans = _shifted_gaussian(20)

    def fails(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.where(
            t[:, None] < 0.2, torch.nan, batch.ode.model(x, t, label)
        )  # which only grids that go there meet

    ode = iia.ProbabilityFlowODE(fails, batch.setting.schedule, conditioning=batch.ode.conditioning)
    broken = common.Batch(batch.setting, ode, batch.x, batch.final, {})
    lost = [pair for pair, plan in plans.items() if not common.error_of(plan, broken) < float("inf")]
    assert {grid for _, grid in lost} == {(7.0, 0.1)}
    best = classic.lowest(plans, broken)
    assert best.pair not in lost
    assert best.rmse == pytest.approx(common.error_of(plans[best.pair], broken), rel=1e-9)


def test_stages_that_meet_in_the_same_numbers_are_not_taken_for_memory_used_twice() -> None:
    batch, _ = _shifted_gaussian(4)
    ode = iia.ProbabilityFlowODE(lambda x, t: torch.zeros_like(x), batch.setting.schedule, "noise")
    plan = common.plan_of("rk4", batch.setting, torch.tensor([8.0, 4.0, 1.0], dtype=torch.float64))
    own = common.Batch(batch.setting, ode, batch.x, batch.final, {})
    assert classic.lowest({("rk4", (7.0, 0.1)): plan}, own).rmse == pytest.approx(common.error_of(plan, own))


def test_a_rerun_does_only_what_is_missing(cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "KARRAS", common.KARRAS[::9])
    monkeypatch.setattr(acceptance, "leap_grids", lambda *_: few_grids())
    some = ["--settings", "gaussian", "--nfe", 4, "--samples", 16, "--fit-samples", 16, "--out", tmp_path / "results"]
    rows = ["--rows", "classic", "scalar", "iia-ddim"]
    run(acceptance, monkeypatch, *some, *rows)
    (path,) = (tmp_path / "results").iterdir()
    first = common.Store(path.parent).read(path.stem)
    assert list(first) == ["classic", "scalar", "iia-ddim"]
    run(acceptance, monkeypatch, *some, *rows, "biia-edm", "iia-ipndm")
    second = common.Store(path.parent).read(path.stem)
    assert {k: second[k] for k in first} == first
    assert set(second) - set(first) == {"biia-edm", "iia-ipndm"}
    # Other unseen samples: the choice stays, the measurement is made again.
    monkeypatch.setattr(acceptance, "classic_search", None)
    run(acceptance, monkeypatch, *some[:5], 12, *some[6:], "--rows", "classic")
    third = common.Store(path.parent).read(path.stem)
    assert third["classic"]["fit_rmse"] == first["classic"]["fit_rmse"]
    assert third["classic"]["rmse"] != first["classic"]["rmse"]
    page = tmp_path / "page.md"
    run(acceptance, monkeypatch, "--out", path.parent, "--page", page, "--table")
    text = page.read_text()
    assert f"`{first['classic']['solver']}`" in text
    assert f"{first['scalar']['rmse']:.4f} ±" in text
    assert "samples 12, 16; fit samples 16; seed 0; iia_ode" in text


def test_thresholds_are_set_beside_what_was_measured() -> None:
    found = {5: {"classic": {"rmse": 0.2}, "scalar": {"rmse": 0.1}, "thorough": {"rmse": 0.1}}}
    text = acceptance.judged("digits", found)
    assert "| scalar closed form | 5 | 0.85 | 0.500 | - | yes |" in text
    assert "| thorough | 5 | 0.35 | 0.500 | - | **no** |" in text
    assert "| thorough | 6 | 0.35 | - | - | not measured |" in text


def test_a_preset_that_does_not_win_is_flagged() -> None:
    found = {5: {"iia-ddim": {"rmse": 0.3, "base_rmse": 0.2}, "iia-edm": {"rmse": 0.1, "base_rmse": 0.2}}}
    text = acceptance.presets(found, [5])
    assert "0.3000 / 0.2000 = 1.50 **loses**" in text
    assert text.count("loses") == 1


def test_violations_are_listed_with_their_figures(
    cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(never_worse.SAMPLES, "gaussian", (16, 16))
    out, page = tmp_path / "results", tmp_path / "page.md"
    run(never_worse, monkeypatch, "--settings", "gaussian", "--bases", "ddim", "rk4", "--nfe", 4, 5, "--out", out)
    store = common.Store(out)
    assert {k for k in store.read("gaussian-ddim-seed0") if k[-1] in "45"} == {
        f"{t} {n}" for t in ("window", "paper") for n in (4, 5)
    }
    entry = store.read("gaussian-ddim-seed0")["window 5"]
    assert entry["ratio"] == pytest.approx(entry["fit"] / entry["base"], rel=1e-4)
    assert entry["ratio"] < never_worse.LIMIT
    store.put("gaussian-ddim-seed0", "window 5", entry | {"ratio": 1.5})
    # Asked for another number of evaluations: what is stored and above the limit is measured whatever it was made at.
    run(never_worse, monkeypatch, "--settings", "gaussian", "--bases", "ddim", "--nfe", 4, "--confirm", "--out", out)
    found = store.read("gaussian-ddim-seed0")
    second, third = found["window 5 again"], found["window 5 confirmed"]
    assert second["under"]["seeds"] == [1, 2, 3, 4] and third["under"]["seeds"] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert third["draws"] == 128 and third["ratio"] < never_worse.LIMIT and third["ratio"] != second["ratio"]
    assert second["draws"] == 64 and second["all_draws"] == 80
    assert second["ratio"] < never_worse.LIMIT and second["all_ratio"] < never_worse.LIMIT  # what was made up is gone
    run(never_worse, monkeypatch, "--out", out, "--page", page, "--table")
    (line,) = [
        row for row in page.read_text().splitlines() if row.startswith("| gaussian | `ddim` | window | 5 | 1.500 |")
    ]
    figures = [second[key] for key in ("ratio", "sure", "all_ratio", "all_sure")] + [third["ratio"], third["sure"]]
    most = never_worse.highest(third | {"fell_back": False})
    assert line.endswith("".join(f" {figure:.4g} |" for figure in figures) + f" {most:.3f} |")
    (row,) = [row for row in page.read_text().splitlines() if row.startswith("| gaussian | window |")]
    assert "| 1 | 0 of 1 | 0 of 1 |" in row  # above the limit at first, not on all draws, nor on others alone


def test_a_fit_is_in_doubt_where_its_interval_reaches_beyond_the_limit() -> None:
    def entry(ratio: float, standard_errors: float, *, fell_back: bool = False) -> dict[str, float | bool]:
        return {"ratio": ratio, "sure": standard_errors, "fell_back": fell_back}

    # Squares 0.19 lower, known to 0.095: at most 1 - 0.19 + 1.645 * 0.095 of the base's, and to 0.19 no longer.
    assert never_worse.highest(entry(0.9, -2.0)) == pytest.approx((1 - 0.19 + 1.645 * 0.095) ** 0.5)
    assert not never_worse.doubtful(entry(0.9, -2.0))
    assert never_worse.doubtful(entry(0.9, -1.0))
    assert not never_worse.doubtful(entry(1.0, 0.0, fell_back=True))
    assert not never_worse.doubtful(entry(1.2, 3.0))  # a violation, not a doubt


def test_every_number_of_evaluations_is_run_with_some_bases_and_every_base_in_its_turn() -> None:
    chosen = never_worse.spread(("ddim", "heun", "ipndm2"), "mixture", never_worse.NFES, 2)
    taken = [nfe for nfes in chosen.values() for nfe in nfes]
    assert {*taken, *never_worse.NFES} == set(range(4, 41))
    assert all(taken.count(nfe) == 2 for nfe in taken)
    assert all(common.levels_for(s, "mixture", nfe) is not None for s, nfes in chosen.items() for nfe in nfes)
    assert min(len(nfes) for nfes in chosen.values()) > 10


def test_presets_that_lose_are_found_in_the_stored_results_and_their_page_says_how_sure_that_is(
    cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preset_losses, "RESULTS", tmp_path)
    monkeypatch.setattr(preset_losses, "SETTINGS", ("gaussian",))
    monkeypatch.setattr(preset_losses, "ADDED_UP", (("gaussian", "iia-ddim", 4),))
    monkeypatch.setattr(preset_losses, "FIT_SAMPLES", {"closed form": 16})
    monkeypatch.setattr(preset_losses, "SAMPLES", {"closed form": 24})
    rows = {"iia-ddim": {"rmse": 0.3, "base_rmse": 0.2}, "iia-ipndm": {"rmse": 0.1, "base_rmse": 0.2}}
    for preset, row in rows.items():
        common.Store(tmp_path / "acceptance").put("gaussian-nfe04-seed0", preset, row | {"under": {}})
    assert preset_losses.losing("gaussian", [4, 5]) == [("iia-ddim", 4)]
    out, page = tmp_path / "losses", tmp_path / "page.md"
    run(preset_losses, monkeypatch, "--settings", "gaussian", "--out", out)
    stored = common.Store(out).read("gaussian")
    assert set(stored) == {"iia-ddim 4", "iia-ddim 4 by step"}
    value, error = stored["iia-ddim 4"]["as the paper"]["ratio"]
    run(preset_losses, monkeypatch, "--out", out, "--page", page, "--table")
    assert f"| gaussian | `iia-ddim` | 4 | {value:.2f} ± {error:.2f} |" in page.read_text()


def test_errors_of_steps_add_up_to_the_final_error(cached: list[str]) -> None:
    test = common.batch("gaussian", 8, 0, True)
    plan = acceptance.classic_plan("ddim", "gaussian", 5, 5.0, 0.1)
    steps = preset_losses.carried(plan, test)
    assert len(steps) == plan.steps
    final = common.run(plan, test).double() - test.final
    # The flow is carried by an integration of tolerance 1e-6, and ends at half the last level, not at the data.
    torch.testing.assert_close(steps.sum(dim=0), final.flatten(1), rtol=1e-3, atol=1e-4)


def test_the_ablation_page_has_a_row_for_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, page = common.Store(tmp_path), tmp_path / "page.md"
    for seed, error in enumerate((0.1, 0.3)):
        for label, factor in (("full recipe", 1), ("history: 0", 2)):
            entry = {"rmse": factor * error, "median": 0.05, "under": {"samples": 4}, "library": "0"}
            store.put(f"gaussian-nfe05-seed{seed}", label, entry)
    run(ablation, monkeypatch, "--out", tmp_path, "--page", page, "--table")
    lines = page.read_text().splitlines()
    assert "| full recipe | 0.2000 ± 0.1414 | 1.00 | 0.0500 |" in lines
    assert "| history: 0 | 0.4000 ± 0.2828 | 2.00 | 0.0500 |" in lines
    assert all(any(line.startswith(f"| {v} |") for line in lines) for v in {**ablation.CHANGED, **ablation.ADDED})


@pytest.mark.parametrize("label", ["full recipe", "warm start", "refinement: none, intercept", "+ window, substeps"])
def test_a_variant_is_made(label: str, cached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"refined": 16, "gauss_newton": 1, "probes": 1, "adam": 1}
    monkeypatch.setitem(ablation.EFFORT, "closed form", ablation.EFFORT["closed form"] | few)
    monkeypatch.setattr(ablation, "leap_grids", lambda *_: few_grids())
    some = ["--settings", "gaussian", "--nfe", 3, "--seeds", 1, "--samples", 8, "--fit-samples", 32, "--out", tmp_path]
    run(ablation, monkeypatch, *some, "--variants", label)
    entry = common.Store(tmp_path).read("gaussian-nfe03-seed0")[label]
    assert entry.get("skipped") is None
    assert entry["rmse"] < 0.5


@pytest.mark.parametrize("name", list(further.CASES))
def test_a_denoiser_that_took_no_part_says_the_same_of_the_data_in_every_form(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(further, "STEPS", 1)
    further.ode_of.cache_clear()
    ode = further.ode_of(name)
    further.ode_of.cache_clear()
    t = ode.schedule.t_of_noise_to_signal(0.7)
    x = torch.randn((5, further.CASES[name].dimension), dtype=torch.float64)
    level = torch.full((5, 1), 0.7, dtype=torch.float64)
    expected = ode.model.data(x / ode.schedule.alpha(t), level)
    torch.testing.assert_close(ode.data(x, t), expected, rtol=1e-9, atol=1e-9)
    noisiest = ode.data(ode.schedule.sigma(start_time(ode, None)) * x, start_time(ode, None))  # where the fits begin
    assert bool(torch.isfinite(noisiest).all()) and float(noisiest.abs().max()) < 100


def test_the_page_of_further_denoisers_has_their_ratios(tmp_path: Path) -> None:
    store, page = common.Store(tmp_path), tmp_path / "page.md"
    for row, rmse in {"classic": 0.2, "closed-form": 0.1, "standard": 0.06, "thorough": 0.05}.items():
        more = {"solver": "ipndm", "rho": 7.0, "sigma_min": 0.1, "chosen": "scalars", "under": {}, "library": "0"}
        store.put("moons-nfe05", row, {"rmse": rmse, "error": 0.01, **more})
    options = ["--out", str(tmp_path), "--page", str(page), "--table"]
    further.run(common.parser("", "further", ["moons"], [5]).parse_args(options))
    line = next(line for line in page.read_text().splitlines() if line.startswith("| 5 |"))
    assert "0.1000 ± 0.0100 = 0.50 | 0.0600 ± 0.0100 = 0.30 | 0.0500 ± 0.0100 = 0.25 | scalars |" in line
    store.put("moons-nfe08", "standard", {"rmse": 0.1, "error": 0.01, "under": {}, "library": "0"})
    further.run(common.parser("", "further", ["moons"], [5]).parse_args(options))
    assert not any(line.startswith("| 8 |") for line in page.read_text().splitlines())
