"""Studies of one's own: a folder that keeps references and cells, flat tables, observed orders."""

import math
from dataclasses import replace

import pytest
import torch
from support import mixture, run

import iia_ode as iia
from iia_ode.experiments import Comparison, Row, compare, step_errors

WINDOW = iia.IIA("ddim", "window", "trajectory", guard=False)


def problem(n=6, **options):
    x = 80 * torch.randn((n, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mixture().ode(iia.EDM()), x, options


def study(ode, x, solvers=("ddim", WINDOW), counts=(2, 3), **options):
    """A study and the model evaluations that it made."""
    with ode.counting() as spent:
        given = {"fit_samples": 8, "tolerance": 1e-3, "repeats": 0, **options}
        result = compare(ode, list(solvers), list(counts), given.pop("grids", ["karras", "log_snr"]), x=x, **given)
    return result, spent.samples


def same(a, b):
    """Whether two studies have equal results; times of equal runs differ."""
    rows = [[replace(r, seconds=0.0, fit_seconds=0.0) for r in result.rows] for result in (a, b)]
    return rows[0] == rows[1] and all(torch.equal(v, b.samples[k]) for k, v in a.samples.items())


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_study_that_was_killed_goes_on_with_the_missing_cells_and_computes_none_twice(tmp_path):
    ode, x, _ = problem()
    counts = 3, 4  # with two evaluations all grids are equal, and equal cells are measured once
    whole, total = study(ode, x, counts=counts)
    said, probe = [], 2

    def die(line):
        said.append(line)
        if "RMSE" in line and sum("RMSE" in old for old in said) == 3:
            raise KeyboardInterrupt

    ode = problem()[0]  # an ODE remembers the size of its data
    with ode.counting() as before, pytest.raises(KeyboardInterrupt):
        study(ode, x, counts=counts, resume=tmp_path, report=die)
    ode = problem()[0]
    resumed, rest = study(ode, x, counts=counts, resume=tmp_path, report=said.append)
    assert before.samples + rest - 2 * probe == total
    assert same(resumed, whole)
    again, nothing = study(ode, x, counts=counts, resume=tmp_path, report=said.append)
    assert nothing == probe
    assert again.rows == resumed.rows and torch.equal(again.reference, resumed.reference)
    assert said[-1].endswith("(found)")
    assert again.fits.keys() == whole.fits.keys() and again.plans == whole.plans
    assert all(fit.plan == whole.fits[key].plan for key, fit in again.fits.items())


@pytest.mark.parametrize(
    "change",
    [
        {"tolerance": 1e-4},
        {"seed": 1, "solvers": [WINDOW]},
        {"fit_samples": 9, "solvers": [WINDOW]},
        {"repeats": 1},
        {"solvers": [replace(WINDOW, history=0)]},
        {"solvers": [replace(WINDOW, target="local")]},
        {"solvers": [iia.IIA("ddim", iia.iia.Window(), "trajectory", guard=False, intercept=True)]},
        {"solvers": ["dpmpp_2m"], "counts": [3]},
        {"grids": {"karras": lambda n: iia.grids.karras(n, rho=3)}, "counts": [3]},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_cell_made_with_another_option_is_not_used(tmp_path_factory, kept, change):
    _, x, _ = problem()
    ode, folder = kept
    solvers, counts = change.get("solvers", ["ddim"]), change.get("counts", [2])
    options = {k: v for k, v in change.items() if k not in ("solvers", "counts")}
    said = []
    options = {"grids": "karras", **options}
    result, _ = study(ode, x, solvers, counts, resume=folder, report=said.append, **options)
    assert not any("RMSE" in line and "(found)" in line for line in said)
    assert same(result, study(ode, x, solvers, counts, **options)[0])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A model, and a folder with a study of the model."""
    ode, x, _ = problem()
    folder = tmp_path_factory.mktemp("kept")
    study(ode, x, resume=folder)
    return ode, folder


def test_a_cell_is_found_for_other_names_of_solvers_and_grids(kept):
    ode, folder = kept
    _, x, _ = problem()
    result, spent = study(ode, x, [{"name": "ddim"}], [2], grids={"mine": iia.grids.karras}, resume=folder)
    assert spent == 2
    assert [(r.solver, r.method, r.grid) for r in result.rows] == [("ddim", "ddim", "mine")]


class Scaled(torch.nn.Module):
    """A network with one weight, and a number that no fingerprint sees."""

    def __init__(self, weight, factor=1.0):
        super().__init__()
        self.weight, self.factor = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64)), [factor]

    def forward(self, x, t):
        return self.factor[0] * self.weight * x / (1 + t[:, None] ** 2)


def test_a_changed_model_never_uses_the_cells_of_another(tmp_path):
    def measured(model, **options):
        x = 80 * torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ode = iia.ProbabilityFlowODE(model, iia.EDM(), "data", **options)
        return compare(ode, "ddim", 2, x=x, tolerance=1e-3, resume=tmp_path).rows[0].rmse

    first, second = measured(Scaled(1.0)), measured(Scaled(0.5))
    assert first != second and measured(Scaled(1.0)) == first
    with pytest.raises(iia.errors.MismatchError, match="the code of the model has changed"):
        measured(Scaled(1.0, factor=0.5))
    assert measured(Scaled(1.0, factor=0.5), tag="half") == second


def test_a_model_that_nothing_identifies_is_measured_and_not_kept(tmp_path):
    x = 80 * torch.randn(4, 3, dtype=torch.float64)
    arguments = lambda x, t: x / (1 + t[:, None] ** 2), iia.EDM(), "data"
    with pytest.warns(iia.errors.FingerprintWarning, match=r"keeps and finds nothing.*tag='my-model-v1'"):
        compare(iia.ProbabilityFlowODE(*arguments), "ddim", 2, x=x, resume=tmp_path / "none", tolerance=1e-3)
    assert not (tmp_path / "none").exists()
    compare(iia.ProbabilityFlowODE(*arguments, tag="mine"), "ddim", 2, x=x, resume=tmp_path / "some", tolerance=1e-3)
    assert (tmp_path / "some" / "cells").exists()


@pytest.mark.parametrize("part", ["cells", "references", "fits", "models"])
def test_a_damaged_file_of_a_study_is_made_again_and_said(tmp_path, part):
    ode, x, _ = problem(3)
    first, _ = study(ode, x, [WINDOW], [2], grids="karras", resume=tmp_path)
    (file,) = (tmp_path / part).iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    said = []
    again, _ = study(ode, x, [WINDOW], [2], grids="karras", resume=tmp_path, report=said.append)
    assert same(again, first) and file.stat().st_size == len(whole)
    assert sum("made again" in line and file.name in line for line in said) == 1


def test_fits_by_functions_of_ones_own_are_made_anew_each_time(tmp_path):
    def mine(step, earlier):
        return iia.iia.directions.window(step, earlier)

    ode, x, _ = problem(3)
    said = []
    for _ in range(2):
        study(ode, x, [iia.IIA("ddim", mine, guard=False)], [2], grids="karras", resume=tmp_path, report=said.append)
    assert not any("RMSE" in line and "(found)" in line for line in said)
    assert sum("fitted again in every study" in line for line in said) == 2


def test_a_given_reference_is_part_of_the_key(tmp_path):
    ode, x, _ = problem(3)
    zero, one = (study(ode, x, ["ddim"], [2], reference=0 * x + k, resume=tmp_path)[0].rows[0].rmse for k in (0, 1))
    assert zero != one
    assert not (tmp_path / "references").exists()


# ---- costs, tables and orders ----------------------------------------------------------------------------------------


def test_a_row_has_the_cost_of_the_run_and_apart_from_it_the_cost_of_the_fit():
    ode, x, _ = problem()
    result, _ = study(ode, x, ["heun", WINDOW], [3], grids="karras", repeats=2)
    plain, fitted = result.rows
    assert plain.sample_evaluations == fitted.sample_evaluations == 3 * 6
    assert plain.seconds > 0 and fitted.seconds > 0
    assert (plain.fit_samples, plain.fit_evaluations, plain.fit_sample_evaluations, plain.fit_seconds) == (0, 0, 0, 0)
    record, teacher = result.fits["iia(ddim)", 3].record, iia.Teacher.solve(ode, x[:2], 80.0, 0.0)
    assert fitted.fit_sample_evaluations >= record.sample_evaluations + 8 * (teacher.record.options.steps + 1)
    assert fitted.fit_seconds > 0
    assert result.protocol.repeats == 2 and result.protocol.surroundings["device"].startswith("cpu")
    assert result.protocol.fingerprint == ode.fingerprint()


def test_rows_come_back_from_csv_without_loss(tmp_path):
    ode, x, _ = problem(1)
    result, _ = study(ode, x, ["ddim", WINDOW])
    assert math.isnan(result.rows[0].standard_error)
    text = result.csv(tmp_path / "study.csv")
    assert (tmp_path / "study.csv").read_text() == text
    back = Comparison.read_csv(tmp_path / "study.csv")
    assert [str(r) for r in back.rows] == [str(r) for r in result.rows]  # NaN is not equal to itself
    assert back.table() == result.table() and back.csv() == text
    lines = text.splitlines()
    assert len(lines) == 1 + len(result.rows)
    (tmp_path / "less.csv").write_text("solver,nfe,rmse\nddim,3,0.5\n")
    with pytest.raises(iia.errors.FileFormatError, match="no column 'standard_error'"):
        Comparison.read_csv(tmp_path / "less.csv")
    (tmp_path / "less.csv").write_text("solver,nfe,rmse,standard_error,note\nddim,3,0.5,0.1,mine\n")
    assert Comparison.read_csv(tmp_path / "less.csv").rows == (Row("ddim", 3, 0.5, 0.1),)
    (tmp_path / "less.csv").write_text("solver,nfe,rmse,standard_error\nddim,three,0.5,0.1\n")
    with pytest.raises(iia.errors.FileFormatError, match="nfe 'three', expected a value of type int"):
        Comparison.read_csv(tmp_path / "less.csv")
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(iia.errors.FileFormatError, match="not readable"):
            Comparison.read_csv(path)


def test_the_flat_markdown_has_a_line_for_each_row(tmp_path):
    ode, x, _ = problem()
    result, _ = study(ode, x, ["ddim", "heun"], [3])
    text = result.markdown(tmp_path / "study.md")
    assert (tmp_path / "study.md").read_text() == text + "\n"
    head, rule, *lines = text.splitlines()
    assert head.startswith("| solver | grid | NFE | RMSE |") and rule.count("---") == head.count("|") - 1
    assert [line.split(" | ")[:3] for line in lines] == [[f"| {r.method}", r.grid, str(r.nfe)] for r in result.rows]
    assert "fit" not in head and "fit samples" in study(ode, x, [WINDOW], [2])[0].markdown()


def test_the_observed_order_of_ddim_is_one_and_of_heun_two_on_a_smooth_problem():
    smooth = iia.problems.Mixture(torch.ones(2), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.8).ode(iia.EDM())
    x = 2.0 * torch.randn((8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grids = {"smooth": lambda n: iia.grids.log_snr(n, sigma_min=0.2, sigma_max=2.0, to_data=False)}
    result = compare(smooth, ["ddim", "heun", "ipndm3"], [8, 16, 32, 64, 128], grids, x=x, repeats=0)
    orders = {s.solver: s for s in result.slopes(least=16)}
    assert orders["ddim"].order == pytest.approx(1, abs=0.1)
    assert orders["heun"].order == pytest.approx(2, abs=0.15)
    assert orders["ddim"].nfes == (16, 32, 64, 128)
    assert 0 < orders["ddim"].standard_error < 0.05
    assert str(orders["ddim"]).startswith("ddim: order 1.0")


def test_a_slope_is_that_of_least_squares_with_its_scatter_over_the_range_that_is_named():
    noisy = [Row("a", n, 3 / n**2 * (1.1 if n in (8, 32) else 1.0), 0.0) for n in (4, 8, 16, 32, 64)]
    (found,) = Comparison([*noisy, Row("b", 8, 0.1, 0.0)]).slopes()
    n, e = torch.tensor([[r.nfe, r.rmse] for r in noisy], dtype=torch.float64).log().T
    design = torch.stack([n, torch.ones_like(n)], 1)
    solution = torch.linalg.lstsq(design, e[:, None])
    variance = (e - design @ solution.solution[:, 0]).square().sum() / 3 * torch.linalg.inv(design.T @ design)[0, 0]
    assert found.order == pytest.approx(-float(solution.solution[0]), rel=1e-12)
    assert found.standard_error == pytest.approx(float(variance.sqrt()), rel=1e-9)
    (two,) = Comparison(noisy).slopes(least=16, most=32)
    assert two.nfes == (16, 32) and math.isnan(two.standard_error)
    with pytest.raises(iia.errors.InputError, match="a slope needs two numbers of evaluations"):
        Comparison(noisy).slopes(least=64)


# ---- errors of single steps ------------------------------------------------------------------------------------------


def test_the_local_errors_of_a_study_are_those_of_its_plans_along_the_reference(tmp_path):
    ode, x, _ = problem()
    result, _ = study(ode, x, ["ddim", WINDOW], [2, 3], grids="karras")
    teacher = iia.Teacher.for_grid(ode, x, iia.grids.karras(3))
    found = step_errors(ode, x, result, 3, teacher=teacher)
    assert [(r.solver, r.nfe, r.step) for r in found.rows] == [(s, 3, k) for s in result.solvers for k in range(3)]
    by_hand = iia.testing.local_errors(ode, x, iia.get_solver("ddim").plan(iia.EDM(), iia.grids.karras(3)), teacher)
    for row, own in zip(found.rows[:3], by_hand, strict=True):
        assert row.rmse == pytest.approx(float(own.square().mean().sqrt()), rel=1e-12)
        assert row.level == row.t and row.standard_error > 0
    assert [r.fitted for r in found.rows] == [False] * 3 + [True] * 3
    head, first, *_ = found.table().splitlines()
    assert head.split() == ["solver", "NFE", "step", "0", "step", "1", "step", "2"] and first.split()[:2] == [
        "ddim",
        "3",
    ]
    assert found.csv(tmp_path / "steps.csv") == (tmp_path / "steps.csv").read_text()
    assert len(step_errors(ode, x, result, teacher=teacher).rows) == 2 * (2 + 3)
    with pytest.raises(iia.errors.InputError, match=r"no plan of 7 evaluations; it has plans of \[2, 3\]"):
        step_errors(ode, x, result, 7)
    with pytest.raises(iia.errors.InputError, match="it has plans of no evaluations"):
        step_errors(ode, x, Comparison(result.rows))


def test_local_errors_of_a_study_start_where_alpha_is_zero_and_are_those_of_a_fine_teacher_by_default():
    ode = mixture().ode(iia.FlowMatching())
    x = torch.randn((4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = {"uniform": lambda n: iia.grids.uniform(n, 1.0, 0.0)}
    found = step_errors(ode, x, study(ode, x, ["ddim"], [4], grids=uniform)[0])
    assert found.rows[0].level == math.inf and found.teacher_error < min(r.rmse for r in found.rows)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_csv_and_goes_on_in_the_folder(tmp_path, capsys):
    small = ["compare", "--setting", "mixture", "--samples", "4", "--fit-samples", "4", "--solvers", "ddim,heun"]
    places = [
        "--out",
        str(tmp_path / "out"),
        "--resume",
        str(tmp_path / "kept"),
        "--csv",
        str(tmp_path / "a" / "all.csv"),
    ]
    assert run(capsys, *small, "--nfe", "3", *places)[0] == 0
    status, printed, said = run(capsys, *small, "--nfe", "3,5", *places)
    assert status == 0 and printed.splitlines()[-1].endswith(f"; {tmp_path / 'a' / 'all.csv'}")
    assert [line.split()[0] for line in said.splitlines() if line.endswith("(found)")] == ["reference:", "ddim", "heun"]
    rows = Comparison.read_csv(tmp_path / "a" / "all.csv").rows
    assert [(r.solver, r.nfe) for r in rows] == [("ddim", 3), ("ddim", 5), ("heun", 3), ("heun", 5)]
    assert (tmp_path / "a" / "all.csv").read_text() == (tmp_path / "out" / "compare.csv").read_text()
