"""The errata page: what it says of each published formula holds, and its tables are those of the script."""

import importlib.util
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import iia_ode as iia

ROOT = Path(__file__).resolve().parent.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("errata_benchmark", ROOT / "benchmarks/errata.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


errata = _load()
EDM, LOG_SNR = errata.EDM, errata.LOG_SNR
every_order = pytest.mark.parametrize("row", errata.ORDERS, ids=lambda row: row.name)


@cache
def orders(name: str) -> tuple[float, float]:
    """Orders of a row's published and correct formulas on Gaussian data."""
    (row,) = [r for r in errata.ORDERS if r.name == name]
    published, correct = (errata.quick_order(s, counts=(48, 96)) for s in (row.published_on(LOG_SNR), row.correct))
    return published, correct


def block(name: str) -> list[list[str]]:
    """The rows of one of the committed tables, without its head."""
    text = errata.TABLES.read_text().split(f"<!-- {name} -->")[1].split("<!--")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]


def label(cell: str) -> str:
    """A first cell without its link."""
    return re.sub(r"\[(.*)\]\(.*\)", r"\1", cell)


# ---- what is measured --------------------------------------------------------------------------------------------------


@every_order
def test_the_published_formula_has_a_lower_order_than_it_claims_and_the_correct_one_has_it(
    row: "errata.OrderRow",
) -> None:
    published, correct = orders(row.name)
    assert correct > row.claimed - 0.15
    if row.keeps_order:
        assert published == pytest.approx(row.claimed, abs=0.15)
    else:
        assert published < row.claimed - 0.8


@every_order
def test_the_table_of_orders_says_what_is_measured(row: "errata.OrderRow") -> None:
    (cells,) = [r for r in block("orders") if label(r[0]) == row.name]
    claimed, published, correct = map(float, cells[1:4])
    assert claimed == row.claimed
    assert correct > claimed - 0.15
    assert abs(published - round(published)) < 0.15
    # The least of all grids and schedules is no more than what one of them shows.
    assert published < orders(row.name)[0] + 0.15
    assert (round(published) == claimed) == row.keeps_order
    errors = [
        errata.final_error(s, EDM, LOG_SNR.grid(EDM, 96), exact_start=True)
        for s in (row.published_on(LOG_SNR), row.correct)
    ]
    assert errors == pytest.approx([float(v) for v in cells[5:]], rel=0.05)


@pytest.mark.parametrize("order", [3, 4])
def test_ipndm_v_loses_its_order_where_steps_change_abruptly(order: int) -> None:
    for solver, expected in (
        (errata.IPNDMvAsPublished(max_order=order), {3: 2, 4: 0}[order]),
        (f"lms{order}".strip("4"), order),
    ):
        errors = [errata.final_error(solver, EDM, errata.uneven(n), exact_start=True) for n in (96, 192)]
        assert errata.local_slopes((96, 192), errors)[0] == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", errata.TABLEAUS)
def test_wrong_nodes_show_on_problems_that_depend_on_t_only(name: str) -> None:
    rest, wrong, right = errata.TABLEAUS[name]
    orders = (
        errata.tableau_order(*rest, wrong, counts=(24, 48)),
        errata.tableau_order(*rest, wrong, autonomous=True, counts=(24, 48)),
        errata.tableau_order(*rest, right, counts=(24, 48)),
    )
    assert orders == pytest.approx((1, 4, 4), abs=0.15)


def test_a_tableau_with_such_nodes_is_refused_here() -> None:
    with pytest.raises(iia.PlanError, match="inconsistent"):
        type(
            "Late",
            (iia.RungeKutta,),
            {"order": 4, "a": iia.get_solver("rk4").a, "b": iia.get_solver("rk4").b, "c": errata.TORCHDYN_NODES},
        )


@pytest.mark.parametrize(
    ("closed", "here"),
    [(errata.ClosedFormDEIS, "deis_lab3"), (errata.StochasticAdams, "unipc")],
    ids=["DEIS", "SA-Solver"],
)
def test_closed_forms_are_right_in_float64_and_get_worse_with_more_steps_in_float32(closed: type, here: str) -> None:
    def error(solver: iia.Solver | str, n: int) -> float:
        return float(errata.final_error(solver, EDM, LOG_SNR.grid(EDM, n), exact_start=True))

    assert error(closed(precision="float64"), 24) == pytest.approx(error(here, 24), rel=1e-4)
    assert error(closed(), 24) == pytest.approx(error(here, 24), rel=0.5)
    assert error(closed(), 300) > 1e-3 > 1e4 * error(here, 300)


ERRORS = {row.name: row for row in errata.ERRORS}


@pytest.mark.parametrize(
    ("name", "steps", "worse"),
    [
        ("DDIM, linspace", 300, 5),
        ("iPNDM from alpha = 0", 150, 30),
        ("iPNDM, uniform t to the data", 150, 50),
        ("implicit_adams of torchdiffeq", 150, 50),
        ("explicit_adams of torchdiffeq", 60, 1e6),
        ("F-PNDM, one timestep off", 60, 10),
        ("UniPC-3, rounded timesteps", 150, 10),
    ],
)
def test_what_is_published_is_worse_by_far(name: str, steps: int, worse: float) -> None:
    row = ERRORS[name]
    assert row.published(steps) > worse * row.correct(steps)


def test_a_sum_of_ten_thousand_points_does_no_harm() -> None:
    row = ERRORS["DEIS, 10,000 points"]
    assert row.published(60) == pytest.approx(row.correct(60), rel=1e-2)


@pytest.mark.parametrize("name", ["DPM-Solver++(3M), last level twice", "UniPC-3, bh1"])
def test_what_is_no_number_upstream_is_one_here(name: str) -> None:
    assert math.isnan(ERRORS[name].published(20))
    assert math.isfinite(ERRORS[name].correct(20))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_tables_hold_every_row_of_the_script_once() -> None:
    extra = [f"{row.name}, steps 2 : 1" for row in errata.ORDERS if row.section == "ipndm-v"]
    assert sorted(label(r[0]) for r in block("orders")) == sorted([*(row.name for row in errata.ORDERS), *extra])
    assert [label(r[0]) for r in block("errors")[::2]] == [row.name for row in errata.ERRORS]
    assert [r[0] for r in block("few")[::2]] == [name for name, _, _ in errata.PAIRS]
    assert [r[0] for r in block("nodes")] == list(errata.TABLEAUS)


def test_the_rows_link_to_sections_of_the_page() -> None:
    page = (ROOT / "docs/errata.md").read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {row.section for row in (*errata.ORDERS, *errata.ERRORS)} <= slugs


def test_rk4_of_torchdiffeq_is_the_three_eighths_rule() -> None:
    assert [float(r[1]) < 1e-12 for r in block("names")] == [True, False]
    assert errata.name_table().splitlines()[3].split("|")[2].strip() == block("names")[1][1]
