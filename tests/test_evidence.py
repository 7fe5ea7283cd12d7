"""Experiments: measurements are kept by seed, estimates have errors, and committed results make their pages."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from iia_ode.cli import cli
from iia_ode.errors import FileFormatError, InputError, MismatchError, UnknownNameError
from iia_ode.evidence import (
    EXPERIMENTS,
    Cell,
    Estimate,
    Experiment,
    Measurements,
    Part,
    agreement,
    get_experiment,
    load,
    run,
)
from iia_ode.evidence.page import page
from iia_ode.evidence.running import about
from iia_ode.plots.figures import figure_of

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "experiments"


class Toy(Experiment):
    """Two cells of noise around known values."""

    name, title, question = "toy", "A toy", "Is b larger than a?"
    keys, values, method = ("case",), ("value",), "By a generator."

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.measured = shift, []

    def cells(self, quick):
        return [Cell(case, partial(self._measured, case)) for case in ("a",) + ("b",) * (not quick)]

    def _measured(self, case, seed, folder):
        self.measured.append((case, seed))
        noise = float(torch.randn((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        return [{"case": case, "value": (1.0 if case == "a" else 2.0) + self.shift + 0.01 * noise}]

    def answer(self, found):
        return f"b / a = {found.ratio('value', over={'case': 'b'}, under={'case': 'a'})}."

    def tables(self, found):
        return [Part("Values.", str(found.estimate("value", case="a")))]

    def figure(self, found):
        return figure_of()


def rows(values, **columns):
    return [{"seed": seed, "v": value, **columns} for seed, value in enumerate(values)]


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_an_estimate_is_the_mean_over_seeds_with_its_standard_error(values):
    found = Measurements(rows(values)).estimate("v")
    there = torch.tensor(values, dtype=torch.float64)
    assert math.isclose(found.mean, float(there.mean()), rel_tol=1e-12)
    assert math.isclose(found.error, float(there.std()) / len(values) ** 0.5, rel_tol=1e-9, abs_tol=1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.floats(0.1, 10))
def test_a_ratio_pairs_the_rows_of_a_seed_so_a_common_factor_has_no_spread(values, factor):
    found = Measurements(rows(values, s="a") + rows([factor * v for v in values], s="b"))
    ratio = found.ratio("v", over={"s": "b"}, under={"s": "a"})
    assert math.isclose(ratio.mean, factor, rel_tol=1e-12)
    assert ratio.error <= 1e-12 * factor


@given(
    st.lists(st.fixed_dictionaries({"seed": st.integers(0, 2)}, optional={"a": st.integers(0, 2)}), max_size=8),
    st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 3), max_size=3)),
)
def test_rows_are_found_in_their_order_as_a_scan_finds_them(known, wanted):
    members = wanted if isinstance(wanted, list) else [wanted]
    found = Measurements(known).where(a=wanted, seed=(0, 1.0))
    assert list(found.rows) == [r for r in known if r.get("a") in members and r["seed"] in (0, 1)]


def test_two_rows_for_one_seed_are_refused_because_a_mean_over_both_would_mix_cases():
    with pytest.raises(InputError, match="several rows of v"):
        Measurements(rows([1.0], s="a") + rows([2.0], s="b")).estimate("v")


def test_a_pooled_ratio_is_the_geometric_mean_over_cases_and_its_error_is_over_seeds():
    cases = [
        {"seed": s, "case": c, "v": v} for s, c, v in ((0, "a", 1.0), (0, "b", 4.0), (1, "a", 4.0), (1, "b", 16.0))
    ]
    found = Measurements(cases).pooled(lambda own: [own.estimate("v", case=c) for c in "ab"])
    assert math.isclose(found.mean, 4.0)
    assert found.seeds == 2


def test_an_estimate_is_written_with_two_digits_of_its_error():
    assert str(Estimate(0.123456, 0.0123, 3)) == "0.123 ± 0.012"
    assert str(Estimate(123.456, 12.3, 3)) == "123 ± 12"
    assert str(Estimate(0.5, math.nan, 1)) == "0.5"


def test_below_and_above_need_the_whole_interval_so_three_seeds_need_four_errors():
    assert not Estimate(0.9, 0.03, 3).below(1)
    assert Estimate(0.9, 0.02, 3).below(1)
    assert not Estimate(0.5, math.nan, 1).below(1)


def test_an_interrupted_run_goes_on_with_the_missing_cells_and_gives_the_same_rows(tmp_path):
    whole = run(Toy(), tmp_path / "whole")
    broken = Toy()
    broken._measured = lambda case, seed, folder: (
        (_ for _ in ()).throw(KeyboardInterrupt) if seed else Toy._measured(broken, case, seed, folder)
    )
    with pytest.raises(KeyboardInterrupt):
        run(broken, tmp_path / "part")
    resumed = Toy()
    assert run(resumed, tmp_path / "part").rows == whole.rows
    assert resumed.measured == [(case, seed) for seed in (1, 2) for case in "ab"]


def test_results_of_a_smoke_run_are_not_taken_for_those_of_a_full_run(tmp_path):
    run(Toy(), tmp_path, quick=True)
    with pytest.raises(MismatchError, match="'quick'"):
        run(Toy(), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": 3}'])
def test_a_damaged_file_of_results_is_named(tmp_path, text):
    (tmp_path / "seed-0.json").write_text(text)
    with pytest.raises(FileFormatError, match="seed-0"):
        run(Toy(), tmp_path)


def test_a_table_of_all_rows_is_written_with_a_column_for_the_seed(tmp_path):
    run(Toy(), tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "seed,case,value"
    assert len(lines) == 7


def test_runs_of_one_truth_agree_and_a_shifted_run_does_not(tmp_path):
    toy = Toy()
    first, second = run(toy, tmp_path / "1"), run(toy, tmp_path / "2", toy.again)
    shifted = run(Toy(shift=0.1), tmp_path / "3", toy.again)
    assert agreement(toy, first, second).inside == 2
    found = agreement(toy, first, shifted)
    assert found.inside == 0
    assert found.ratio > 1


def test_a_page_has_the_question_the_answer_the_command_and_the_agreement(tmp_path):
    toy = Toy()
    first, second = (run(toy, tmp_path / str(k), s, command="cmd") for k, s in enumerate((toy.seeds, toy.again)))
    text = page(toy, first, about(tmp_path / "0"), "toy.png", (second, about(tmp_path / "1")))
    assert all(part in text for part in (toy.question, toy.answer(first), "```sh\ncmd\n```", "2 of 2 values agree"))
    assert toy.answer(Measurements([*first.rows, *second.rows])) in text
    assert "Not measured yet" not in text


def test_a_page_of_an_unfinished_run_says_what_is_missing(tmp_path):
    toy = Toy()
    run(toy, tmp_path)
    path = tmp_path / "seed-1.json"
    part = json.loads(path.read_text())
    del part["cells"]["b"]
    path.write_text(json.dumps(part))
    assert "Not measured yet: b." in page(toy, load(toy, tmp_path), about(tmp_path), "toy.png")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_committed_results_of_two_runs_that_make_its_page(name):
    experiment = get_experiment(name)
    for quick in (True, False):
        cells = [cell.name for cell in experiment.cells(quick)]
        assert len(set(cells)) == len(cells) > 0
    first, second = load(experiment, COMMITTED / name), load(experiment, COMMITTED / f"{name}-again")
    assert len(first.distinct("seed")) >= 2
    assert not set(first.distinct("seed")) & set(second.distinct("seed"))
    its = about(COMMITTED / name)
    text = page(experiment, first, its, "figure.png", (second, about(COMMITTED / f"{name}-again")))
    assert experiment.answer(first) in text
    assert all(note in text for note in experiment.notes(first))
    assert experiment.answer(first).count(". ") <= 1, "an answer has at most two sentences"
    for claim in experiment.claims(Measurements([*first.rows, *second.rows])):
        assert len(claim.measured.split()) <= 25
        assert len(claim.verdict.split()) <= 6
    assert "nan" not in text.replace("nanometer", "")
    assert experiment.figure(first).axes


@pytest.mark.parametrize(
    ("substeps", "local", "verdict"),
    [(0.9, 0.9, "no loss"), (2.0, 0.9, "explains the loss"), (2.0, 2.0, "does not explain the loss")],
)
def test_the_diagnostic_of_figure_4_blames_the_restart_only_if_the_exact_flow_has_no_loss(substeps, local, verdict):
    errors = {"base": 1.0, "substeps": substeps, "local": local, "trajectory": 0.5}
    found = Measurements(
        {
            "seed": seed,
            "base": "ipndm",
            "target": t,
            "nfe": n,
            "typical": error * (1 + 0.01 * seed * (t != "base")),
            "step": 0.5,
        }
        for seed in (0, 1, 2)
        for t, error in errors.items()
        for n in (5, 10, 20)
    )
    (note,) = get_experiment("fig4").notes(found)
    assert verdict in note


def test_an_unknown_experiment_is_refused_with_the_names_of_the_others():
    with pytest.raises(UnknownNameError, match="fig2"):
        get_experiment("fig1")


def test_a_smoke_run_on_the_command_line_writes_the_page_the_figure_and_the_rows(tmp_path):
    result = CliRunner().invoke(cli, ["experiment", "fig3", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} >= {"seed-0.json", "results.csv", "page.md", "figure.png", "figure.svg"}
    assert json.loads((tmp_path / "seed-0.json").read_text())["size"] == "quick"


def test_the_command_without_a_name_lists_every_experiment():
    result = CliRunner().invoke(cli, ["experiment"])
    assert all(name in result.output for name in EXPERIMENTS)
