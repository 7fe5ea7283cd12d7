"""Checks of solvers: functions that raise :class:`~iia_ode.errors.ConformanceError` for a broken promise.

``check(solver)`` runs all checks. In your own test suite, each check is a test case::

    @pytest.mark.parametrize("check", iia_ode.testing.CHECKS)
    def test_my_solver(check):
        check(MySolver())
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TypeAlias

import torch

from ..errors import ConformanceError, UnknownNameError
from ..grids import karras, uniform
from ..iia import IIA
from ..iia.directions import StepRecord, Term
from ..iia.fitted import read_fit
from ..integrate import odeint, sample
from ..plan import trace
from ..schedules import EDM, VP, Cosine, FlowMatching
from ..solvers import Solver, SolverLike, as_solver, get_solver
from .cases import SCHEDULES, TRACKS, draw, every_schedule, gaussian, mixture, points, rms
from .irregular import irregular_misses, irregular_order
from .orders import (
    COARSER,
    COUNTS,
    TOLERANCE,
    OrderMeasurement,
    claimed_order,
    local_slopes,
    measure_orders,
    order_misses,
    order_summary,
)
from .requirements import name_of, require, require_convergence
from .runs import default_dtype, eager_run, traced_in_turn

__all__ = ["CHECKS", "Check", "CheckResult", "check", "order_result", "run_checks"]

Check: TypeAlias = Callable[[SolverLike], None]

REVERSIBLE = 1e-10  # rounding error of a round trip that is exact by construction

_CHECKS: list[Check] = []


def _promise(function: Callable[[Solver], None]) -> Check:
    """Add a check to the suite, and let the check take a registered name as well as a solver."""

    @wraps(function)
    def named(solver: SolverLike) -> None:
        function(as_solver(solver))

    _CHECKS.append(named)
    return named


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes
    ----------
    name : name of the check.
    promise : the promise in one sentence.
    problem : the measured and the expected value; None for a passed check.
    """

    name: str
    promise: str
    problem: str | None


def run_checks(solver: SolverLike, checks: Iterable[Check] | None = None) -> tuple[CheckResult, ...]:
    """Run checks on a solver and return their results; errors of the solver become failed checks.

    Parameters
    ----------
    solver : a registered name, or a solver.
    checks : members of ``CHECKS``; the whole suite by default.

    Returns
    -------
    One result for each check, in order.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver.
    """
    found, results = as_solver(solver), []
    for one in CHECKS if checks is None else checks:
        problem = None
        try:
            one(found)
        except ConformanceError as error:
            problem = str(error)
        except Exception as error:  # a solver under test may fail in any way
            problem = f"{found.label}: {type(error).__name__}: {error}"
        results.append(_result(one, problem))
    return tuple(results)


def order_result(solver: Solver, measurements: Sequence[OrderMeasurement]) -> CheckResult:
    """The result of the order check from given measurements."""
    claimed = claimed_order(solver)
    misses = order_misses(measurements, claimed)
    problem = f"{solver.label}: {order_summary(measurements, claimed)}: {'; '.join(misses)}." if misses else None
    return _result(check_order_is_the_claimed_one, problem)


def _result(one: Check, problem: str | None) -> CheckResult:
    name = getattr(one, "__name__", str(one))
    return CheckResult(name, (one.__doc__ or name).splitlines()[0], problem)


def check(solver: SolverLike) -> None:
    """Run the whole suite on a solver.

    Parameters
    ----------
    solver : a registered name, or a solver.

    Raises
    ------
    ConformanceError : the solver fails some checks; the message lists each with the measured and the expected value.
    UnknownNameError, InputError : `solver` is no solver, or its order is no whole number of at least 1.
    """
    claimed_order(as_solver(solver))
    broken = [result for result in run_checks(solver) if result.problem is not None]
    if broken:
        head = f"{as_solver(solver).label} does not keep {len(broken)} of {len(CHECKS)} promises:"
        raise ConformanceError("\n".join([head, *(f"- {result.name}: {result.problem}" for result in broken)]))


# ---- accuracy --------------------------------------------------------------------------------------------------------


@_promise
def check_order_is_the_claimed_one(solver: Solver) -> None:
    """The measured order is the claimed order, start-up steps excluded.

    On Gaussian data and on a mixture, on EDM, VP and flow matching, on grids uniform in t and in log-SNR, in both directions;
    see :mod:`iia_ode.testing.orders`.
    """
    claimed_order(solver)
    problem = order_result(solver, measure_orders(solver)).problem
    if problem is not None:
        raise ConformanceError(problem)


@_promise
def check_irregular_grids_have_their_order(solver: Solver) -> None:
    """On grids with steps alternately twice as long and half as long, the order is `irregular_order`, by default the order."""
    misses = irregular_misses(solver, SCHEDULES[1:])
    claimed = irregular_order(solver)
    require(
        not misses,
        solver,
        f"on irregular grids {'; '.join(misses)}, claimed {claimed}: use the weights of the grid's own steps, or say "
        "irregular_order for a method that has its order on smooth grids only",
    )


@_promise
def check_encoding_and_decoding_return(solver: Solver) -> None:
    """Encoding data to noise and decoding again returns the state, with an error that falls as the grid is refined."""
    # An Euler step at the start costs h^2 once; an inconsistent first step costs h.
    least = min(solver.order, 2) if solver.consistent else 1
    for schedule in SCHEDULES:
        grids = partial(karras, schedule=schedule, to_data=False)
        require_convergence(solver, schedule, lambda n, g=grids: g(n + 1).flip(0), (12, 48))  # type: ignore[misc]
        ode, gaps, slope = mixture().ode(schedule), [], -math.inf
        counts = (COARSER, *COUNTS)
        for n in counts:
            grid = TRACKS[-1].grid(schedule, n)
            x = draw(mixture(), 8, schedule, float(grid[0]))
            gaps.append(rms(sample(ode, sample(ode, x, grid, solver), grid.flip(0), solver) - x))
            slope = local_slopes(counts[: len(gaps)], gaps)[-1] if len(gaps) > 1 else slope
            if slope >= least - TOLERANCE or gaps[-1] < REVERSIBLE:
                break
        steps, shown = ", ".join(map(str, counts)), ", ".join(f"{gap:.2g}" for gap in gaps)
        require(
            slope >= least - TOLERANCE or gaps[-1] < REVERSIBLE,
            solver,
            f"on {name_of(schedule)}, encoding and decoding over {steps} steps misses the start by {shown}: order "
            f"{slope:.2f}, "
            f"expected at least {least}",
        )


@_promise
def check_pure_noise_is_a_valid_start(solver: Solver) -> None:
    """Integration starts from pure noise, where alpha = 0."""
    for schedule in (FlowMatching(), Cosine()):
        require_convergence(
            solver, schedule, partial(uniform, t_start=schedule.t_noise, t_end=schedule.t_data), (16, 64)
        )


@_promise
def check_partly_noised_state_is_a_valid_start(solver: Solver) -> None:
    """Integration starts from a partly noised state and ends on its data."""
    for schedule in SCHEDULES:
        require_convergence(solver, schedule, partial(karras, sigma_max=1.5, schedule=schedule), (8, 24))


@_promise
def check_any_number_of_intervals_works(solver: Solver) -> None:
    """Grids of one, two and more intervals work, to the data and between two noise levels."""
    schedule = VP()
    ode = gaussian().ode(schedule)
    for n in (1, 2, 3, 4, 5, 6, 25):
        for to_data in (True, False):
            grid = karras(n if to_data else n + 1, 0.02, 20.0, schedule=schedule, to_data=to_data)
            x = draw(gaussian(), 4, schedule, float(grid[0]))
            states = odeint(ode, x, grid, method=solver)
            where = f"a grid of {n} interval{'s' * (n > 1)}" + " to the data" * to_data
            require(len(states) == n + 1, solver, f"{where} gives {len(states)} states, expected {n + 1}")
            require(bool(torch.isfinite(states).all()), solver, f"{where} gives states that are not finite")
            require(not torch.equal(states[0], states[1]), solver, f"the first step of {where} does not move the state")


@_promise
def check_last_step_lands_on_the_data(solver: Solver) -> None:
    """The step to sigma = 0 lands on the data without an evaluation at sigma = 0, on every kind of schedule."""
    for schedule in every_schedule():
        require_convergence(solver, schedule, partial(karras, schedule=schedule), (12, 36))
        # Close to one of a few data points the flow is straight: a valid step reduces the noise.
        ode, grid = points().ode(schedule), karras(6, 0.01, 0.1, schedule=schedule)
        states = odeint(ode, draw(points(), 8, schedule, float(grid[0])), grid, method=solver)
        estimate = ode.data(states[-2], float(grid[-2]))
        before, left = rms(states[-2] - estimate), rms(states[-1] - estimate)
        require(
            left < before,
            solver,
            f"on {name_of(schedule)}, the step from sigma/alpha = 0.01 to 0 begins {before:.2g} from the data and ends "
            f"{left:.2g} from it",
        )


# ---- states and symmetries -------------------------------------------------------------------------------------------


@_promise
def check_state_keeps_its_dtype(solver: Solver) -> None:
    """float32 and float64 states keep dtype and accuracy under every default dtype of torch."""
    ode, grid = mixture().ode(VP()), karras(12, schedule=VP())
    x = draw(mixture(), 4, VP(), float(grid[0]))
    exact = odeint(ode, x, grid, method=solver)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        for default in (torch.float32, torch.float64):
            with default_dtype(default):
                final = sample(ode, x.to(dtype), grid, solver)
            require(final.dtype == dtype, solver, f"a {dtype} state became {final.dtype}")
            gap = rms(final.double() - exact[-1]) / rms(exact)
            require(
                gap <= tolerance, solver, f"in {dtype}, with torch's default {default}, the result is off by {gap:.2g}"
            )


@_promise
def check_batch_order_does_not_matter(solver: Solver) -> None:
    """A permuted batch gives permuted results, and a single sample gives the same result as in a batch."""
    ode, grid = mixture().ode(EDM()), karras(6)
    x, order = draw(mixture(), 6, EDM(), float(grid[0])), [3, 0, 5, 1, 4, 2]
    together = sample(ode, x, grid, solver)
    scale = rms(together)
    for name, gap in (
        ("a permuted batch", rms(sample(ode, x[order], grid, solver) - together[order])),
        ("a sample alone", rms(sample(ode, x[:1], grid, solver) - together[:1])),
    ):
        require(gap <= 1e-12 * scale, solver, f"{name} gives results that differ by {gap / scale:.2g}")


# ---- the step function -----------------------------------------------------------------------------------------------


@_promise
def check_plan_equals_eager_run(solver: Solver) -> None:
    """The plan gives the same states as calls of `step` on tensors."""
    for schedule in SCHEDULES:
        ode, grid = mixture().ode(schedule), karras(7, 0.02, 20.0, schedule=schedule)
        x = draw(mixture(), 4, schedule, float(grid[0]))
        plan = trace(solver, schedule, grid, consistent=False)
        planned = plan.run(ode, x, trajectory=True)
        with ode.counting() as spent:
            eager = eager_run(solver, ode, x, grid)
        gap = rms(eager - planned) / rms(planned)
        require(gap <= 1e-11, solver, f"on {name_of(schedule)}, eager and planned states differ by {gap:.2g}")
        # An eager run may make more: a plan evaluates a state at a time once, however often the step asks.
        require(
            spent.evaluations >= plan.nfe,
            solver,
            f"on {name_of(schedule)}, the plan makes {plan.nfe} evaluations and an eager run {spent.evaluations}",
        )


@_promise
def check_runs_do_not_share_state(solver: Solver) -> None:
    """The solver keeps no state: two interleaved integrations with one instance are independent."""
    schedule = EDM()
    grids = (karras(6), uniform(8, 20.0, 0.5))
    alone = [trace(copy.deepcopy(solver), schedule, grid, consistent=False) for grid in grids]
    for plan, other in zip(traced_in_turn(solver, schedule, grids), alone, strict=True):
        gap = plan.difference(other)
        require(
            gap <= 1e-14,
            solver,
            "two interleaved integrations with one instance differ from two with an instance each: keep earlier values in the "
            "memory that the step returns, not on self",
        )


@_promise
def check_memory_does_not_grow(solver: Solver) -> None:
    """A longer grid needs no more vectors at once: a step keeps a window of earlier vectors, not the whole history."""
    peaks = [trace(solver, EDM(), karras(n), consistent=False).peak_vectors for n in (24, 48)]
    require(
        peaks[0] == peaks[1],
        solver,
        f"24 steps hold {peaks[0]} vectors at once and 48 steps {peaks[1]}: drop vectors from memory that no later step "
        "reads, and ode.hold a combination that is carried along",
    )


@_promise
def check_options_survive_json(solver: Solver) -> None:
    """The options of a solver survive JSON and make an equal solver."""
    options = solver.options()
    try:
        read = json.loads(json.dumps(options))
    except TypeError as error:
        raise ConformanceError(f"{solver.label}: options {options} cannot be written as JSON: {error}.") from error
    kind = type(solver)
    try:
        registered = type(get_solver(solver.name)) is kind
    except UnknownNameError:
        registered = False
    if not registered and not is_dataclass(solver):
        return  # a class without options
    again = get_solver(solver.name, **read) if registered else kind(**read)
    plans = [trace(s, EDM(), karras(5), consistent=False) for s in (solver, again)]
    require(
        again.label == solver.label and plans[0].difference(plans[1]) == 0.0,
        solver,
        f"made again from its options {options}, the solver is {again.label}, with a plan that differs by "
        f"{plans[0].difference(plans[1]):.2g}",
    )


@_promise
def check_saved_solver_gives_equal_samples(solver: Solver) -> None:
    """A fitted solver over this base gives equal samples after saving and loading."""
    ode, grid = mixture().ode(VP()), karras(5, schedule=VP())
    x = draw(mixture(), 4, VP(), float(grid[0]))
    fit = IIA(solver, terms=_no_terms).fit(ode, x, grid)
    with tempfile.TemporaryDirectory() as folder:
        loaded = read_fit(fit.save(Path(folder) / "fit.safetensors"))
    expected = sample(ode, x, grid, solver)
    gap = rms(sample(ode, x, solver=fit) - expected) / rms(expected)
    require(gap <= 1e-12, solver, f"an IIA fit without terms differs from its base by {gap:.2g}")
    require(
        torch.equal(sample(ode, x, solver=loaded), sample(ode, x, solver=fit)),
        solver,
        "the loaded solver gives other samples",
    )
    require(loaded.record == fit.record, solver, f"saved with {fit.record}, but loaded with {loaded.record}")


CHECKS: tuple[Check, ...] = tuple(_CHECKS)
"""The suite: functions that take a solver or a registered name and raise :class:`~iia_ode.errors.ConformanceError`."""


def _no_terms(step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
    return ()
