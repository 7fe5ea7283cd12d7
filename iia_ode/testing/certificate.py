"""Certificates of solvers: the measurements of the conformance suite, as a table and as data."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

from ..errors import IIAError, PlanError
from ..forms import conversion
from ..grids import karras
from ..iia import FittedSolver
from ..plan import Combine, Evaluate, Plan, trace
from ..schedules import Schedule
from ..solvers import Solver, SolverLike, as_solver
from .cases import SCHEDULES
from .conformance import CHECKS, CheckResult, check_order_is_the_claimed_one, order_result, run_checks
from .irregular import irregular_order
from .orders import OrderMeasurement, as_schedules, claimed_order, measure_orders, order_summary
from .plans import PlanCertificate, plan_certificate
from .stability import stability_limit

__all__ = ["Certificate", "final_step", "verify"]

STEPS = 12  # of the grid to the data that evaluations and vectors are counted on


@dataclass(frozen=True)
class Certificate:
    """Measured properties of a solver. ``str()`` is a table, :meth:`as_dict` is JSON-ready.

    Attributes
    ----------
    solver, options : label and options.
    claimed_order : the attribute ``order`` of the solver.
    orders : measured orders with the start-up steps left out. The claim is about these orders.
    cold_orders : orders of whole integrations from a cold start, in the same sequence.
    evaluations : model evaluations of the first, a middle and the last step of a grid of 12 steps to the data; () for a solver
        that fails on the step to the data.
    nfe : model evaluations of all 12 steps; None for a solver that fails there.
    peak_vectors : the largest number of vectors alive at once on this grid.
    final_step : description of the step to sigma = 0, by name of the schedule.
    stability : the largest z with bounded solutions of dx/dt = mu x for all h mu in [-z, 0]; None beyond 60, 0 for a
        zero-unstable method, and nan for a solver whose memory grows from step to step.
    imaginary_stability : the same for h mu from 0 to iz.
    irregular_order : the order that the solver claims on grids with steps alternately of lengths 2 and 1.
    checks : the result of each check of the suite.
    only_on : schedules given by the user, if `orders` and `final_step` cover no others; otherwise empty.

    Orders are measured on EDM, VP and FlowMatching, over sigma/alpha from 2 to 0.5 on grids uniform in t, and from 5 to 0.3
    and back on grids uniform in log-SNR. The error excludes the first quarter of each grid. Orders are not measured outside
    this range or on other schedules. There the checks only require that the error falls with the number of steps.
    """

    solver: str
    options: dict[str, Any]
    claimed_order: int
    orders: tuple[OrderMeasurement, ...]
    cold_orders: tuple[OrderMeasurement, ...]
    evaluations: tuple[int, ...]
    nfe: int | None
    peak_vectors: int | None
    final_step: dict[str, str]
    stability: float | None
    imaginary_stability: float | None
    irregular_order: int
    checks: tuple[CheckResult, ...]
    only_on: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the solver passes every check."""
        return all(one.problem is None for one in self.checks)

    @property
    def diagnosis(self) -> str:
        """The verdict and the first fault, as a sentence without a full stop."""
        broken = [one for one in self.checks if one.problem is not None]
        if not broken:
            return f"passed, {len(self.checks)} of {len(self.checks)} checks"
        order = order_summary(self.orders, self.claimed_order)
        first = order or re.split(r" \(|;|: ", (broken[0].problem or "").removeprefix(f"{self.solver}: "))[0].rstrip(
            "."
        )
        more = f"{len(self.checks) - len(broken)} of {len(self.checks)} checks passed"
        return f"FAILED, {first}; {more}"

    def as_dict(self) -> dict[str, Any]:
        """The certificate in JSON's own types; None stands for numbers that are not finite."""
        plain: dict[str, Any] = _jsonable(asdict(self) | {"passed": self.passed})
        return plain

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.solver}: {self.diagnosis}"
        yield ""
        if self.only_on:
            yield f"Covers only {', '.join(self.only_on)}"
        elsewhere = f" on smooth grids, {self.irregular_order} on irregular grids"
        yield f"Order {self.claimed_order} claimed{elsewhere * (self.irregular_order != self.claimed_order)}; measured"
        yield f"  {'on':<15}{'problem':<10}{'grid uniform in':<19}{'order':>6}  {'':<8}{'cold start':>10}"
        for warm, cold in zip(self.orders, self.cold_orders, strict=True):
            where = f"  {warm.schedule:<15}{warm.problem:<10}{warm.grid:<19}"
            yield f"{where}{_shown(warm):>6}  {_verdict(warm, self.claimed_order):<8}{_shown(cold):>10}"
        yield ""
        yield from self._facts()
        yield ""
        yield "Checks"
        for one in self.checks:
            yield f"  {'ok' if one.problem is None else 'FAILED':<8}{one.promise}"
            if one.problem is not None:
                yield f"          {one.problem}"

    def _facts(self) -> Iterator[str]:
        if self.evaluations:
            first, middle, last = self.evaluations
            yield f"Evaluations        {first} in the first step, {middle} in the middle, {last} in the last; " + (
                f"{self.nfe} over {STEPS} steps to the data"
            )
            yield f"Vectors at once    {self.peak_vectors}"
        yield f"Stability          bounded on dx/dt = mu x for h mu in {_interval(self.stability, '-')}"
        yield f"{'':<19}and in {_interval(self.imaginary_stability, 'i')}"
        for k, (schedule, what) in enumerate(self.final_step.items()):
            yield f"{'' if k else 'Step to sigma = 0':<19}{schedule}: {what}"


def verify(
    solver: SolverLike | Plan | FittedSolver,
    *,
    schedules: Schedule | Iterable[Schedule] = SCHEDULES,
    file: TextIO | None = None,
    quiet: bool = False,
) -> Certificate | PlanCertificate:
    """Measure a solver, run the conformance suite on it, and print the certificate. Takes a few seconds.

    A plan or a fitted solver is measured on its own grid instead; see :class:`PlanCertificate`.

    Parameters
    ----------
    solver : a registered name, a solver, registered or not, a plan, or a fitted solver.
    schedules : one or more schedules on which the order is measured; smooth, with sigma/alpha from 0.3 to 5 in their range.
        With schedules other than the default, the certificate states that it covers only the given schedules.
    file : output stream; standard output by default.
    quiet : print nothing.

    Returns
    -------
    The certificate of the solver, or of the plan. A failed check raises nothing here; :func:`iia_ode.testing.check` raises.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver or has no valid ``order``, or `schedules` holds no schedule.
    PlanError : the solver's step cannot be traced.
    """
    if isinstance(solver, Plan | FittedSolver):
        of_plan = plan_certificate(solver)
        if not quiet:
            print(of_plan, file=sys.stdout if file is None else file)
        return of_plan
    found, asked = as_solver(solver), as_schedules(schedules)
    claimed = claimed_order(found)
    orders = measure_orders(found, asked)
    others = [one for one in CHECKS if one is not check_order_is_the_claimed_one]
    evaluations, nfe, peak_vectors = _counts(found)
    certificate = Certificate(
        solver=found.label,
        options=found.options(),
        claimed_order=claimed,
        orders=orders,
        cold_orders=measure_orders(found, asked, from_exact_start=False),
        evaluations=evaluations,
        nfe=nfe,
        peak_vectors=peak_vectors,
        final_step={type(s).__name__: final_step(found, s) for s in asked if s.sigma(s.t_data) == 0},
        stability=_stability(found, -1.0),
        imaginary_stability=_stability(found, 1j),
        irregular_order=irregular_order(found),
        checks=(order_result(found, orders), *run_checks(found, others)),
        only_on=() if asked == SCHEDULES else tuple(map(repr, asked)),
    )
    if not quiet:
        print(certificate, file=sys.stdout if file is None else file)
    return certificate


def _interval(limit: float | None, sign: str) -> str:
    if limit is not None and math.isnan(limit):
        return "no known range: the memory of the solver grows"
    end = "60" if limit is None else f"{limit:.3f}"
    shown = f"[-{end}, 0]" if sign == "-" else f"[0, {end}i]"
    return f"{shown}, the whole range that was tested" if limit is None else shown


def _stability(solver: Solver, direction: complex) -> float | None:
    try:
        return stability_limit(solver, direction)
    except PlanError:  # of a memory that grows, which a check reports
        return math.nan


def _counts(solver: Solver) -> tuple[tuple[int, ...], int | None, int | None]:
    """Evaluations of the first, a middle and the last step, evaluations of all steps, and peak number of vectors."""
    try:
        plan = trace(solver, SCHEDULES[0], karras(STEPS, schedule=SCHEDULES[0]), consistent=False)
    except IIAError:  # the checks report the reason
        return (), None, None
    counts = plan.evaluations_per_step
    return (counts[0], counts[STEPS // 2], counts[STEPS - 1]), plan.nfe, plan.peak_vectors


def final_step(solver: Solver, schedule: Schedule) -> str:
    """Describe the step to sigma = 0: the model's data estimate, an Euler step, or a formula of its own.

    The decision is algebraic: the plan's last instruction is replaced by the candidate formula, and the two plans are
    compared.
    """
    try:
        plan = trace(solver, schedule, karras(STEPS, schedule=schedule), consistent=False)
    except IIAError as error:
        return f"none, {error}"
    t, s = plan.grid[-2:]
    if s in plan.evaluation_times:
        return "a formula that evaluates the model at the data, where data prediction leaves the noise open"
    before = next(k for k, ins in enumerate(plan.code, 1) if isinstance(ins, Combine) and ins.step == plan.steps - 1)
    for k, ins in reversed(list(enumerate(plan.code, start=1))):
        if isinstance(ins, Evaluate) and ins.t == t:
            p, q = conversion(schedule, t, ins.form, "data")
            if _ends_with(plan, {ins.state: p, k: q}):
                return "the model's data estimate"
            p, q = conversion(schedule, t, ins.form, "velocity")
            slope = {ins.state: (s - t) * p, k: (s - t) * q}
            if _ends_with(plan, slope | {before: 1.0 + slope.get(before, 0.0)}):
                return "an Euler step"
    return "a formula of its own"


def _ends_with(plan: Plan, weights: dict[int, float]) -> bool:
    """Whether the plan's last instruction is this combination, in effect."""
    last = Combine(tuple(weights.items()), step=plan.steps)
    return plan.equivalent(replace(plan, code=(*plan.code[:-1], last)), tolerance=1e-9)


def _verdict(measurement: OrderMeasurement, claimed: int) -> str:
    if not measurement.agrees_with(claimed):
        return "FAILED"
    return "ok" if math.isfinite(measurement.order) and round(measurement.order) == claimed else "higher"


def _shown(measurement: OrderMeasurement) -> str:
    if math.isfinite(measurement.order):
        return f"{measurement.order:.2f}"
    return "exact" if measurement.order > 0 else "none"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else repr(value)
