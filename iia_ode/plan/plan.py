"""The plan: a solver, a schedule and a grid as a straight-line program of two instructions."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bounded import Bounded
from ..errors import PlanError
from ..files import write_tensors
from ..ode import ProbabilityFlowODE
from ..schedules import Schedule
from ..transforms import kept_property, transformed
from .analysis import CanonicalForm, GaussianResponse, canonical_form, gaussian_response
from .callbacks import Callback
from .checks import check_code, check_grid
from .counted import Counted
from .exact import exact_key
from .instructions import Combine, Evaluate, Instruction
from .loop import run_plan
from .maps import LinearMap, PerCondition
from .moving import moved
from .prepared import Prepared, prepare
from .projections import PLACES
from .run import Run, start
from .storing import pack
from .vectors import format_terms

__all__ = ["KIND", "Plan"]

KIND = "plan"


@dataclass(frozen=True, eq=False)
class Plan(Counted):
    """A solver on a schedule and a grid, traced to numbers; immutable, and checked when made.

    Instruction k (from 1) writes vector k; vector 0 is the initial state. Weights are float64 numbers on the host, float64
    tensors broadcast over the batch, or linear maps of one sample. Copies of tensor weights on a device are kept for
    later runs.

    Two plans are equal, and have one hash, if their schedules, grids, instructions and weights are equal bit for bit; names
    are not compared. :meth:`equivalent` compares plans as algorithms, up to rounding.

    Parameters
    ----------
    schedule : the noise schedule of the weights.
    grid : times, from the initial state to the final one.
    code : the instructions.
    name : the solver's name.

    Raises
    ------
    GridError : the grid is not usable.
    PlanError : an instruction reads a later vector, a weight or time is not finite, or the instructions do not write the
        states at all grid points in order, with the last state by the last instruction.
    """

    schedule: Schedule
    grid: tuple[float, ...]
    code: tuple[Instruction, ...]
    name: str = "plan"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise PlanError(f"a plan needs the schedule that it was made for, got {self.schedule!r}.")
        # Tuples: a list could be changed behind the plan's back.
        object.__setattr__(self, "grid", tuple(check_grid(self.schedule, list(self.grid))))
        object.__setattr__(self, "code", tuple(self.code))
        check_code(self)

    # ---- comparison and analysis -------------------------------------------------------------------------------------

    @kept_property
    def weight_bytes(self) -> int:
        """Memory of tensor weights, linear maps and constants, in bytes on the host."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(self)}.values())

    @kept_property
    def _content(self) -> Hashable:
        content = exact_key(*pack(self), self.schedule.config())
        return id(self) if content is None else content

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self is other or self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def canonical(self) -> CanonicalForm:
        """The plan with all vectors but its evaluations eliminated; equal algorithms have equal canonical forms."""
        return canonical_form(self)

    def difference(self, other: Plan) -> float:
        """Largest difference of the canonical weights, relative to unit data; infinite if the evaluations differ."""
        return self.canonical().difference(other.canonical())

    def equivalent(self, other: Plan, tolerance: float = 1e-12) -> bool:
        """Whether the two plans are the same algorithm up to rounding ("DDIM is Euler where alpha = 1").

        Parameters
        ----------
        other : the plan to compare with.
        tolerance : largest :meth:`difference` of plans that count as equal.

        Returns
        -------
        True if the difference is within the tolerance.
        """
        return self.difference(other) <= tolerance

    def on(self, schedule: Schedule) -> Plan:
        """The plan on another schedule, at the same levels sigma/alpha.

        The states of the new plan are the states of this plan times a factor per time, such as alpha from EDM to VP. Both
        plans give the same data for the same model, up to rounding.

        Parameters
        ----------
        schedule : the other schedule.

        Returns
        -------
        The plan; this plan itself if the schedule is its own.

        Raises
        ------
        GridError : the other schedule lacks a level of the plan, or the model there does not know a level.
        """
        if not isinstance(schedule, Schedule):
            raise PlanError(f"a plan moves to a Schedule such as iia_ode.VP(), got {schedule!r}.")
        if schedule is self.schedule or schedule.config() == self.schedule.config():
            return self
        return Plan(schedule, *moved(self, schedule), self.name)

    def on_gaussian(self, mean: Tensor | float, variance: Tensor | float) -> GaussianResponse:
        """Compute the exact response to data N(mean, diag variance), and the exact flow; no network, no sampling.

        Parameters
        ----------
        mean, variance : moments of the data, numbers or float64 tensors [*shape] of one sample; variances are not negative.

        Returns
        -------
        Gains and offsets per component, of the plan and of the exact flow.

        Raises
        ------
        PlanError : a linear map of the plan mixes components, or a constant depends on a condition.
        """
        return gaussian_response(self, mean, variance)

    def __str__(self) -> str:
        head = (
            f"{self.name} on {type(self.schedule).__name__}: {self.steps} steps from t = {self.grid[0]:.6g} to "
            f"{self.grid[-1]:.6g}, {self.nfe} evaluations, at most {self.peak_vectors} vectors at once"
        )
        return "\n".join([head, *_lines(self)])

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, instructions and schedule as JSON in its header."""
        code, tensors = pack(self)
        header = {"name": self.name, "code": code, "schedule": self.schedule.config()}
        return write_tensors(path, KIND, tensors, header)

    # ---- runs --------------------------------------------------------------------------------------------------------

    def run(
        self,
        ode: ProbabilityFlowODE,
        x: Tensor,
        *,
        trajectory: bool = False,
        check_finite: bool = True,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the plan from state x [B, ...].

        Parameters
        ----------
        ode : the model; its schedule must be the plan's.
        x : initial state [B, ...], float32 or float64; not changed.
        trajectory : return the states at all grid points, [len(grid), B, ...], instead of the last state.
        check_finite : check the final state once, after the loop, and warn if x is smaller than the noise at ``grid[0]``.
            Where the final state is not finite, a second run finds the first model output with NaN or infinity, and doubles
            the evaluations of the failed run.
        callback : called as ``callback(k, t, state)`` at every grid point after the first; the state must not be written to. A
            function with a parameter named ``data``, or with four parameters, also gets the estimate of x_0 by the last
            evaluation, [B, ...], or None before the first evaluation.
        progress : show a bar over the evaluations.

        Returns
        -------
        The final state, [B, ...], or all states at grid points; dtype and device of x.

        Raises
        ------
        InputError : x is not a float32 or float64 tensor with a batch dimension.
        MismatchError : the ODE has another schedule than the plan, or lacks a condition of the plan's constants.
        NonFiniteError : the final state holds NaN or infinity; the message names the first such evaluation.
        """
        return run_plan(
            self, ode, x, trajectory=trajectory, check_finite=check_finite, callback=callback, progress=progress
        )

    def start(self, x: Tensor, prediction: str = "data", *, conditioning: Mapping[str, Any] | None = None) -> Run:
        """Start a run that waits at the first evaluation, for callers that call the model themselves.

        Parameters
        ----------
        x : initial state [B, ...], float32 or float64; not changed.
        prediction : form of the model's outputs: ``"data"``, ``"noise"``, ``"score"``, ``"v"`` or ``"velocity"``.
        conditioning : conditions of the batch by name; needed only for plans with constants per condition.

        Returns
        -------
        The run, at its first evaluation.

        Raises
        ------
        InputError : x is not a float32 or float64 tensor with a batch dimension, or does not fit the weights.
        UnknownNameError : no such prediction type.
        MismatchError : a condition of the plan's constants is missing.
        """
        return start(self, x, prediction, conditioning)

    def prepared(self, prediction: str, like: Tensor) -> Prepared:
        """Conversion factors and weights of a run, made once per prediction type, sample shape, dtype and device.

        Parameters
        ----------
        prediction : form of the model's outputs.
        like : a state [B, ...], float32 or float64.

        Returns
        -------
        Factors and weights in the dtype and on the device of `like`.
        """
        if self._has_gradients or transformed():
            return prepare(self, prediction, like)
        key = (prediction, type(like), like.device, like.dtype, like.shape[1:])
        known = self._prepared.get(key)
        return self._prepared.put(key, prepare(self, prediction, like)) if known is None else known

    @kept_property
    def _prepared(self) -> Bounded[Hashable, Prepared]:
        return Bounded(PLACES)

    @kept_property
    def _has_gradients(self) -> bool:
        return any(t.requires_grad for t in _tensors(self))


def _numbers(value: LinearMap | PerCondition | Tensor) -> Tensor:
    return (
        value.coefficients
        if isinstance(value, LinearMap)
        else value.table
        if isinstance(value, PerCondition)
        else value
    )


def _lines(plan: Plan) -> Iterator[str]:
    """One line for each instruction."""
    for k, ins in enumerate(plan.code, start=1):
        if isinstance(ins, Evaluate):
            yield f"  v{k} = {ins.form}(v{ins.state}, t = {ins.t:.6g})"
        else:
            note = "" if ins.step is None else f"        # state {ins.step}, t = {plan.grid[ins.step]:.6g}"
            yield f"  v{k} = {format_terms(ins.terms, ins.constant)}{note}"


def _tensors(plan: Plan) -> Iterator[Tensor]:
    for ins in plan.code:
        for value in (*(w for _, w in ins.terms), ins.constant) if isinstance(ins, Combine) else ():
            if isinstance(value, LinearMap | PerCondition | Tensor):
                yield _numbers(value)
