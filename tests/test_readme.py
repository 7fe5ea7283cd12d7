"""What the README says is so."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_of_python_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith("import ")]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code, namespace)
    assert namespace["x_0"].shape == (10, 16)
    assert "iia-5: ddim with fitted weights, 5 steps, 5 evaluations" in capsys.readouterr().out


def table():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "results" / "table.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    counts = [int(c) for c in rows[0][1:]]
    return {row[0]: dict(zip(counts, row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.parametrize(
    ("fitted", "base", "nfes"),
    [
        ("iia-edm", "heun", [5, 7, 9, 11, 15]),
        ("biia-edm", "heun", [5, 7, 9, 11, 15]),
        ("iia-ddim", "ddim", [5, 6, 8, 10, 15, 20]),
    ],
)
def test_every_preset_is_below_its_base_on_the_digits(fitted, base, nfes):
    figures = table()
    for nfe in nfes:
        assert float(figures[fitted][nfe].rstrip("*")) < float(figures[base][nfe].rstrip("*"))


@pytest.mark.parametrize(
    ("row", "setting", "seed"),
    [
        ("digits 8x8", "digits", 0),
        ("digits 8x8, other noise", "digits", 1),
        ("patches 16x16", "patches", 0),
        ("mixture, 64-d", "mixture64", 0),
        ("mixture, 64-d, other noise", "mixture64", 1),
    ],
)
def test_what_it_says_of_the_one_call_is_what_was_measured(row, setting, seed):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row} ")]
    said = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    for nfe, figure in zip((5, 6, 8, 10), said, strict=True):
        stored = ROOT / "benchmarks" / "results" / "acceptance" / f"{setting}-nfe{nfe:02}-seed{seed}.json"
        found = json.loads(stored.read_text())
        assert figure == f"{found['standard']['rmse'] / found['classic']['rmse']:.2f}"


def test_what_it_says_of_the_largest_budget_is_what_was_measured():
    text = " ".join(README.split())
    said = re.search(
        r"ratio is at most (\S+) on the digits, (\S+) on the patches and (\S+) on the mixture", text
    ).groups()
    results = ROOT / "benchmarks" / "results" / "acceptance"
    spent = []
    for setting, figure in zip(("digits", "patches", "mixture64"), said, strict=True):
        stored = [
            json.loads(p.read_text()) for n in (5, 6, 8, 10) for p in results.glob(f"{setting}-nfe{n:02}-seed*.json")
        ]
        rows = [entries for entries in stored if "thorough" in entries]  # of every noise that was measured
        assert len(rows) >= 4
        assert figure == f"{max(r['thorough']['rmse'] / r['classic']['rmse'] for r in rows):.2f}"
        spent += [r["thorough"]["sample_evaluations"] / r["standard"]["sample_evaluations"] for r in rows]
    numbers = ("five", "six", "seven", "eight", "nine", "ten")
    (times,) = re.findall(r"costs up to (\w+) times as much", text)
    assert 5 + numbers.index(times) == round(max(spent))


def test_what_it_says_of_further_denoisers_is_what_was_measured():
    (figure,) = re.findall(r"ratio is at most (\d\.\d\d) at 5 and 8 evaluations", " ".join(README.split()))
    stored = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results" / "further").glob("*-nfe0[58].json")]
    assert len(stored) == 6
    assert figure == f"{max(rows['standard']['rmse'] / rows['classic']['rmse'] for rows in stored):.2f}"


def test_every_file_it_links_to_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists()
