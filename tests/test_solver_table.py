"""The committed measurements of solvers are those of the registry."""

from pathlib import Path

import pytest

import iia_ode as iia
from iia_ode.experiments import solver_table as table
from iia_ode.testing.orders import TOLERANCE

ROWS = {row["name"]: row for row in table.load_rows()}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_there_is_a_row_for_every_solver_and_for_no_other() -> None:
    assert sorted(ROWS) == iia.solver_names()


@every_row
def test_what_is_claimed_evaluated_and_held_is_what_the_code_says(row: table.Row) -> None:
    now = table.facts(row["name"])
    assert now == {key: row[key] for key in now}


@every_row
def test_the_least_measured_order_is_the_claimed_one_and_none_lies_between_whole_orders(row: table.Row) -> None:
    orders = list(row["orders"].values())
    assert len(orders) == 18
    assert min(orders) == pytest.approx(row["order"], abs=TOLERANCE)
    for order in orders:
        assert order == pytest.approx(round(order), abs=TOLERANCE)


def test_the_table_beside_them_has_the_same_rows() -> None:
    assert table.RESULTS.with_suffix(".md").read_text() == f"{table.solver_table()}\n"


def test_a_family_has_its_own_rows_and_a_wrong_one_is_named() -> None:
    assert [row["name"] for row in table.solver_table("blocks").rows] == ["dpmpp_2s_blocks", "dpmpp_3s_blocks"]
    with pytest.raises(iia.UnknownNameError, match=r"unknown family 'multi_step'.*'multistep'"):
        table.solver_table("multi_step")


def test_rows_of_solvers_that_are_gone_go(tmp_path: Path) -> None:
    path = tmp_path / "solvers.json"
    with pytest.raises(iia.InputError, match="run python benchmarks/solver_table"):
        table.load_rows(path)
    table.save_rows([ROWS["heun"], ROWS["ddim"] | {"name": "gone"}, ROWS["ddim"]], path)
    assert [row["name"] for row in table.load_rows(path)] == ["ddim", "heun"]
