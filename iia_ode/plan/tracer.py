"""Tracing: a solver's ``step``, called with symbolic vectors, becomes a plan."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from ..bounded import Bounded
from ..errors import GridError, PlanError, ScheduleError
from ..forms import Evaluation, Forms
from ..schedules import Schedule
from ..transforms import outside
from .checks import check_grid
from .consistency import WAY_OUT, inconsistency
from .exact import exact_key, is_lasting
from .instructions import Combine, Evaluate, Instruction
from .plan import Plan
from .vectors import Vector, is_number, vector_indices

__all__ = ["Past", "Steppable", "Tracer", "take_step", "trace", "traced"]


@dataclass(frozen=True)
class Past:
    """The information of a step about the steps before and after; immutable.

    Attributes
    ----------
    memory : tuple returned by the previous step beside the state; ``()`` on the first step.
    index : number of steps before.
    remaining : number of steps after.
    """

    memory: Any = ()
    index: int = 0
    remaining: int = 0


class Steppable(Protocol):
    """A solver as the tracer sees it: a label and a step."""

    @property
    def label(self) -> str:
        """The solver's name."""

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state at time s, or (state, memory)."""


class Tracer(Forms[Vector]):
    """The ODE of a ``step`` while a plan is made: evaluations return symbolic vectors and become instructions.

    A tracer has the methods of :class:`~iia_ode.ProbabilityFlowODE` available to a step. A state is evaluated at most once at
    each time, even if a step requests the evaluation several times or in several forms.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.code: list[Instruction] = []
        self.evaluations: list[Evaluation[Vector]] = []
        self._cache: dict[tuple[int, float], Evaluation[Vector]] = {}
        self._held: dict[frozenset[tuple[int, float]], int] = {}  # combinations that are vectors already
        self._same: dict[int, int] = {}  # a state at a grid point may equal a vector that was held before

    def fork(self) -> Tracer:
        """An independent copy with all vectors and evaluations so far."""
        twin = Tracer(self.schedule)
        twin.code, twin.evaluations, twin._cache = list(self.code), list(self.evaluations), dict(self._cache)
        twin._held, twin._same = dict(self._held), dict(self._same)
        return twin

    def retain(self, live: set[int]) -> set[int]:
        """The vectors reachable from `live`: `live` itself, and known evaluations and sums of reachable vectors.

        Other vectors are dropped, and made again on request.
        """
        live, size = set(live), -1
        while size != len(live):
            size = len(live)
            live |= {self._same[j] for j in live if j in self._same}
            live |= {k for key, k in self._held.items() if all(j in live for j, _ in key)}
            live |= {next(iter(e.output.weights)) for (j, _), e in self._cache.items() if j in live}
        self._held = {key: k for key, k in self._held.items() if k in live}
        self._cache = {key: e for key, e in self._cache.items() if key[0] in live}
        return live

    def _emit(self, instruction: Instruction) -> Vector:
        self.code.append(instruction)
        return Vector({len(self.code): 1.0})

    def hold(self, x: Vector, step: int | None = None) -> Vector:
        """x as a stored vector: required by an evaluation, and cheaper for a long combination used twice."""
        if not isinstance(x, Vector):
            raise PlanError(f"expected a state made of the step's own vectors, got {type(x).__name__}.")
        if step is None and x.index is not None:
            return x
        plain = x.constant is None and all(is_number(w) for w in x.weights.values())
        key = frozenset((j, float(w)) for j, w in x.weights.items()) if plain else None
        known = x.index if key is None or x.index is not None else self._held.get(key)
        if step is None and known is not None:
            return Vector({known: 1.0})
        terms = tuple(x.weights.items()) if known is None else ((known, 1.0),)  # no sum is computed twice
        y = self._emit(Combine(terms, x.constant, step))
        if known is not None:
            self._same[len(self.code)] = self._same.get(known, known)
        elif key is not None:
            self._held[key] = len(self.code)
        return y

    def evaluate(self, x: Vector, t: float, form: str = "data") -> Evaluation[Vector]:
        """An evaluation of the model at state x and time t; a run stores the output in `form`."""
        t = float(t)
        state = self.hold(x)
        (index,) = state.weights
        index = self._same.get(index, index)
        if (index, t) not in self._cache:
            if not self.schedule.covers(t):
                raise ScheduleError(
                    f"a step evaluates the model at t = {t:g}, outside the {type(self.schedule).__name__} schedule."
                )
            if self.is_data(t) and form in ("data", "score"):
                form = "noise"  # at the data the data estimate is the state, and leaves the other forms open
            evaluation = Evaluation(self.schedule, t, state, self._emit(Evaluate(index, t, form)), form)
            self._cache[index, t] = evaluation
            self.evaluations.append(evaluation)
        return self._cache[index, t]

    def known(self, x: Vector, t: float) -> Evaluation[Vector] | None:
        """The evaluation at state x and time t if there was an evaluation, else None."""
        index = x.index
        return None if index is None else self._cache.get((self._same.get(index, index), float(t)))

    def is_data(self, t: float) -> bool:
        """Whether sigma = 0 at time t."""
        return self.schedule.sigma(t) == 0


def take_step(solver: Steppable, ode: Any, x: Any, t: float, s: float, past: Past) -> tuple[Any, Any]:
    """A step as (state, memory), with the memory ``()`` where the solver returns none."""
    try:
        result = solver.step(ode, x, t, s, past)
    except (TypeError, AttributeError) as error:
        if not isinstance(x, Vector):
            raise
        raise PlanError(
            f"{solver.label}.step cannot be traced: {str(error).rstrip('.')}. Its arguments are symbolic vectors."
        ) from error
    except (ArithmeticError, ValueError, PlanError, ScheduleError) as error:
        # Of a step from the data, nearly always a division by sigma or a logarithm of sigma, which are 0 there.
        if not isinstance(x, Vector) or isinstance(error, GridError) or not ode.is_data(t):
            raise
        raise GridError(
            f"{solver.label} has no step from the data (t = {t:g}, sigma = 0): {str(error).rstrip('.')}. Start at a small "
            "sigma, or use 'heun' or another solver with such a step."
        ) from error
    if isinstance(result, tuple):
        if len(result) != 2:
            raise PlanError(
                f"{solver.label}.step must return the new state, or (state, memory); got {len(result)} values."
            )
        vector_indices(result[1])  # refuses a memory that could change behind the plan's back
        return result
    if not isinstance(result, Vector | Tensor):
        raise PlanError(f"{solver.label}.step must return the new state, or (state, memory); got {result!r}.")
    return result, ()


def trace(solver: Steppable, schedule: Schedule, grid: Tensor | Sequence[float], *, consistent: bool = True) -> Plan:
    """Trace a solver on a schedule and a grid to a plan.

    Parameters
    ----------
    solver : the solver, with a ``step`` and a ``label``.
    schedule : the noise schedule.
    grid : float64 times [N + 1], from the initial state to the final one.
    consistent : whether the plan is checked for consistency; a solver's attribute ``consistent = False`` switches the check
        off too.

    Raises
    ------
    GridError : the grid is not usable; see :func:`check_grid`.
    PlanError : the step is not linear in the vectors, or the solver does not converge on this range of times: its step is
        inconsistent or zero-unstable, or its weights are valid on equal steps only; see :mod:`iia_ode.plan.consistency`.
    """
    times = check_grid(schedule, grid)
    tracer, x, memory = Tracer(schedule), Vector({0: 1.0}), ()
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        y, memory = take_step(solver, tracer, x, t, s, Past(memory, i, len(times) - 2 - i))
        x = tracer.hold(y, step=i + 1)
    plan = Plan(schedule, tuple(times), tuple(tracer.code), solver.label)
    if consistent and getattr(solver, "consistent", True):
        with outside():
            fault = inconsistency(plan, lambda finer: trace(solver, schedule.everywhere(), finer, consistent=False))
        if fault is not None:
            raise PlanError(f"{solver.label} {fault}. {WAY_OUT}")
    return plan


_PLANS: Bounded[Hashable, Plan] = Bounded(128, lambda plan: plan.weight_bytes, 2**26)
_NEAR: Bounded[Hashable, tuple[ref[Steppable], ref[Schedule], Plan]] = Bounded(128)
"""The same by the places of solver and schedule in memory and by the times, for solvers and schedules that never change."""


def traced(solver: Steppable, schedule: Schedule, grid: Tensor | Sequence[float]) -> Plan:
    """Trace a solver as :func:`trace` does, with memoized plans of equal solvers, schedules and grids.

    At most 128 plans are kept, with at most 64 MiB of tensor weights; threads may share plans. A solver or a schedule without
    an exact key, such as a schedule from functions, is traced at each call; see :func:`~iia_ode.plan.exact.exact_key`.

    Raises
    ------
    GridError, PlanError : as :func:`trace`.
    """
    times = grid.tolist() if isinstance(grid, Tensor) else grid
    if not (isinstance(grid, Tensor) and grid.ndim == 1 and is_lasting(solver) and is_lasting(schedule)):
        return _memoized(solver, schedule, grid, times)
    near = id(solver), id(schedule), struct.pack(f"<{len(times)}d", *times)
    known = _NEAR.get(near)
    if known is not None and known[0]() is solver and known[1]() is schedule:
        return known[2]
    plan = _memoized(solver, schedule, grid, times)
    _NEAR.drop(near)
    _NEAR.put(near, (ref(solver), ref(schedule), plan))
    return plan


def _memoized(solver: Steppable, schedule: Schedule, grid: Tensor | Sequence[float], times: Sequence[float]) -> Plan:
    # A step may make tensors in torch's default dtype, on its default device.
    with outside():
        default = torch.empty(0)
        key = exact_key(solver, solver.label, schedule, times, default.dtype, default.device)
    known = None if key is None else _PLANS.get(key)
    if known is not None:
        return known
    if key is None:
        return trace(solver, schedule, grid)
    with torch.inference_mode(False):  # weights of a plan made in inference mode must serve a run with gradients
        plan = trace(solver, schedule, grid)
    return _PLANS.put(key, plan)
