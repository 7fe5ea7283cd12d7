"""Defects of published formulas, as docs/errata.md states them: lost orders, wrong nodes, and larger errors."""

import math

import pytest
from evidence import defects
from evidence.defects import EDM, ERRORS, LOG_SNR, ORDERS, TABLEAUS, final_error
from evidence.published import ClosedFormDEIS, StochasticAdams
from evidence.upstream import IPNDMvAsPublished

import iia_ode as iia
from iia_ode.testing.orders import local_slopes

BY_NAME = {row.name: row for row in ERRORS}


@pytest.mark.parametrize("row", ORDERS, ids=lambda row: row.name)
def test_the_published_formula_has_a_lower_order_than_it_claims_and_the_correct_one_has_it(
    row: defects.OrderRow,
) -> None:
    published, correct = (defects.quick_order(s, counts=(48, 96)) for s in (row.published_on(LOG_SNR), row.correct))
    assert correct > row.claimed - 0.15
    if row.keeps_order:
        assert published == pytest.approx(row.claimed, abs=0.15)
    else:
        assert published < row.claimed - 0.8


@pytest.mark.parametrize("order", [3, 4])
def test_ipndm_v_loses_its_order_where_steps_change_abruptly(order: int) -> None:
    for solver, expected in (
        (IPNDMvAsPublished(max_order=order), {3: 2, 4: 0}[order]),
        (f"lms{order}".strip("4"), order),
    ):
        errors = [final_error(solver, EDM, defects.uneven(n), exact_start=True) for n in (96, 192)]
        assert local_slopes((96, 192), errors)[0] == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", TABLEAUS)
def test_wrong_nodes_show_on_problems_that_depend_on_t_only(name: str) -> None:
    rest, wrong, right = TABLEAUS[name]
    orders = (
        defects.tableau_order(*rest, wrong, counts=(24, 48)),
        defects.tableau_order(*rest, wrong, autonomous=True, counts=(24, 48)),
        defects.tableau_order(*rest, right, counts=(24, 48)),
    )
    assert orders == pytest.approx((1, 4, 4), abs=0.15)


def test_a_tableau_with_such_nodes_is_refused_here() -> None:
    with pytest.raises(iia.errors.PlanError, match="inconsistent"):
        type(
            "Late",
            (iia.RungeKutta,),
            {"order": 4, "a": iia.get_solver("rk4").a, "b": iia.get_solver("rk4").b, "c": defects.TORCHDYN_NODES},
        )


@pytest.mark.parametrize(
    ("closed", "here"),
    [(ClosedFormDEIS, "deis_lab3"), (StochasticAdams, "unipc")],
    ids=["DEIS", "SA-Solver"],
)
def test_closed_forms_are_right_in_float64_and_get_worse_with_more_steps_in_float32(closed: type, here: str) -> None:
    def error(solver: iia.Solver | str, n: int) -> float:
        return float(final_error(solver, EDM, LOG_SNR.grid(EDM, n), exact_start=True))

    assert error(closed(precision="float64"), 24) == pytest.approx(error(here, 24), rel=1e-4)
    assert error(closed(), 24) == pytest.approx(error(here, 24), rel=0.5)
    assert error(closed(), 300) > 1e-3 > 1e4 * error(here, 300)


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
    row = BY_NAME[name]
    assert row.published(steps) > worse * row.correct(steps)


def test_a_sum_of_ten_thousand_points_does_no_harm() -> None:
    row = BY_NAME["DEIS, 10,000 points"]
    assert row.published(60) == pytest.approx(row.correct(60), rel=1e-2)


@pytest.mark.parametrize("name", ["DPM-Solver++(3M), last level twice", "UniPC-3, bh1"])
def test_what_is_no_number_upstream_is_one_here(name: str) -> None:
    assert math.isnan(BY_NAME[name].published(20))
    assert math.isfinite(BY_NAME[name].correct(20))
