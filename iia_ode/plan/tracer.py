"""Tracing: a solver's ``step``, called with symbolic vectors, becomes a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import GridError, PlanError, ScheduleError
from ..ode import Evaluation
from ..schedules import Schedule
from .analysis import consistency_error
from .plan import Combine, Evaluate, Instruction, Plan
from .vectors import Vector

__all__ = ["Past", "Steppable", "Tracer", "check_grid", "take_step", "trace"]


@dataclass(frozen=True)
class Past:
    """What a step knows beyond its own interval; immutable.

    Attributes
    ----------
    memory : what the previous step returned beside its state; ``()`` on the first step.
    index : how many steps came before this one.
    remaining : how many come after it.
    """

    memory: Any = ()
    index: int = 0
    remaining: int = 0


class Steppable(Protocol):
    """What can be traced: a name and a step."""

    @property
    def name(self) -> str:
        """What the solver is called."""

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state at time s, or (state, memory)."""


class Tracer:
    """What ``step`` sees as the ODE while a plan is made: evaluations return symbolic vectors and become instructions.

    Has the same face as :class:`~iia_ode.ProbabilityFlowODE` as far as a step may use it. The same state at the same time
    is evaluated once, however often and in whichever forms it is asked for.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.code: list[Instruction] = []
        self.evaluations: list[Evaluation[Vector]] = []
        self._cache: dict[tuple[int, float], Evaluation[Vector]] = {}

    def fork(self) -> Tracer:
        """A copy that knows all vectors and evaluations so far, and whose further code stays its own."""
        twin = Tracer(self.schedule)
        twin.code, twin.evaluations, twin._cache = list(self.code), list(self.evaluations), dict(self._cache)
        return twin

    def _emit(self, instruction: Instruction) -> Vector:
        self.code.append(instruction)
        return Vector({len(self.code): 1.0})

    def hold(self, x: Vector, step: int | None = None) -> Vector:
        """x as one stored vector: an evaluation needs that, and a long combination used twice is cheaper so."""
        if not isinstance(x, Vector):
            raise PlanError(f"expected a state made of the step's own vectors, got {type(x).__name__}.")
        if step is None and x.index is not None:
            return x
        return self._emit(Combine(tuple(x.weights.items()), x.constant, step))

    def evaluate(self, x: Vector, t: float, form: str = "data") -> Evaluation[Vector]:
        """One evaluation of the model; `form` is how a run stores it."""
        t = float(t)
        state = self.hold(x)
        index = state.index
        if index is None:
            raise PlanError("a held vector has an index")  # unreachable: `hold` returns one vector
        if (index, t) not in self._cache:
            if self.is_data(t):
                raise ScheduleError(
                    f"a step evaluates the model at the data (t = {t:g}, sigma = 0), where no model is defined: test "
                    "ode.is_data(s) and finish with a formula that does not."
                )
            evaluation = Evaluation(self.schedule, t, state, self._emit(Evaluate(index, t, form)), form)
            self._cache[index, t] = evaluation
            self.evaluations.append(evaluation)
        return self._cache[index, t]

    def data(self, x: Vector, t: float) -> Vector:
        """Estimate of x_0."""
        return self.evaluate(x, t, "data").data

    def noise(self, x: Vector, t: float) -> Vector:
        """Estimate of eps."""
        return self.evaluate(x, t, "noise").noise

    def score(self, x: Vector, t: float) -> Vector:
        """Estimate of the score."""
        return self.evaluate(x, t, "score").score

    def v(self, x: Vector, t: float) -> Vector:
        """alpha eps - sigma x_0."""
        return self.evaluate(x, t, "v").v

    def velocity(self, x: Vector, t: float) -> Vector:
        """dx/dt."""
        return self.evaluate(x, t, "velocity").velocity

    def is_data(self, t: float) -> bool:
        """Whether sigma = 0 at time t."""
        return self.schedule.sigma(t) == 0


def take_step(solver: Steppable, ode: Any, x: Any, t: float, s: float, past: Past) -> tuple[Any, Any]:
    """One step as (state, memory), whether or not the solver returns a memory."""
    result = solver.step(ode, x, t, s, past)
    if isinstance(result, tuple):
        if len(result) != 2:
            raise PlanError(
                f"{solver.name}.step must return the new state, or (state, memory); got {len(result)} values."
            )
        return result
    if not isinstance(result, Vector | Tensor):
        raise PlanError(f"{solver.name}.step must return the new state, or (state, memory); got {result!r}.")
    return result, ()


def trace(solver: Steppable, schedule: Schedule, grid: Tensor, *, consistent: bool = True) -> Plan:
    """The plan of a solver on a schedule and a grid (float64 times [N + 1], from the initial state to the final one).

    Raises
    ------
    GridError : the grid is not usable; see :func:`check_grid`.
    PlanError : the step is not linear in its vectors, or (unless `consistent` is False) not even of order zero: neither
        the solution with constant data nor the one at rest stays what it is.
    """
    times = check_grid(schedule, grid)
    tracer, x, memory = Tracer(schedule), Vector({0: 1.0}), ()
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        y, memory = take_step(solver, tracer, x, t, s, Past(memory, i, len(times) - 2 - i))
        x = tracer.hold(y, step=i + 1)
    plan = Plan(schedule, tuple(times), tuple(tracer.code), solver.name)
    if consistent and (error := consistency_error(plan)) > 1e-9:
        raise PlanError(
            f"{solver.name} is not a consistent solver: on a solution that it must keep exactly (constant data, or a state "
            f"at rest) it is off by {error:.2g}. Check that the weights of the step sum to what they should."
        )
    return plan


def check_grid(schedule: Schedule, grid: object) -> list[float]:
    """The times of a grid, once it is known to be usable.

    Raises
    ------
    GridError : not 1-dimensional, fewer than two times, not finite, outside the schedule, not strictly monotone in
        sigma/alpha, or starting at the data.
    """
    values = torch.as_tensor(grid, dtype=torch.float64) if isinstance(grid, Tensor | list | tuple) else None
    if values is None or values.ndim != 1 or len(values) < 2:
        what = f"shape {list(values.shape)}" if values is not None else type(grid).__name__
        raise GridError(
            f"a grid is a 1-d float64 tensor of at least two times, such as iia.grids.karras(10); got {what}."
        )
    values = values.detach().cpu()
    level = schedule.sigma(values), schedule.alpha(values)
    if not bool(torch.isfinite(values).all()) or any(bool((~torch.isfinite(v) | (v < 0)).any()) for v in level):
        raise GridError(f"the grid leaves the {type(schedule).__name__} schedule: {_brief(values)}.")
    angle = torch.atan2(*level)  # monotone in sigma/alpha, and finite where alpha = 0
    decreasing = angle.diff() < 0
    if not bool(decreasing.all()) and bool(decreasing.any() or (angle.diff() == 0).any()):
        bad = int((decreasing != decreasing[0]).nonzero()[0]) if bool((decreasing != decreasing[0]).any()) else 0
        raise GridError(
            f"a grid must be strictly monotone from noise to data (or back): {_brief(values)} turns or stands still "
            f"between its points {bad} and {bad + 1} ({values[bad]:g}, {values[bad + 1]:g})."
        )
    if float(level[0][0]) == 0:
        raise GridError(
            f"the grid starts at the data (t = {float(values[0]):g}, sigma = 0), where no model can be evaluated: "
            "start at a small sigma."
        )
    return list(values.tolist())


def _brief(values: Tensor) -> str:
    shown = [f"{v:g}" for v in values.tolist()]
    return "[" + ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]) + "]"
