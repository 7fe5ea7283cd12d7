"""Targets of a fit: accurate states at the end of each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from ..errors import InputError, unknown_name
from ..plan import Past, Tracer, Vector
from ..plan.tracer import Steppable, take_step
from ..reference import solve
from .batch import Batch
from .directions import StepRecord

__all__ = ["Local", "Numeric", "Substeps", "Target", "TeacherTrajectory", "resolve_target"]


Numeric: TypeAlias = Callable[[Batch, Tensor], Tensor]
"""A function from a batch and its states [B, ...] at the start of a step to target states [B, ...]."""


class Target(ABC):
    """The accurate state at the end of a step, for the least squares of the step.

    Attributes
    ----------
    name : name in reports and files.
    needs_teacher : whether the batch must have a teacher.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Vector | Numeric:
        """The target of a step: a vector with its instructions in `tracer`, or a function that computes states."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The name and the options, JSON-ready, for a fitted solver's file."""


@dataclass(frozen=True)
class Substeps(Target):
    """The target of the paper: M base steps over a uniform subdivision in t, from the fitted trajectory's own state.

    See Zhang et al. 2024, section 4. The paper's formula for DDIM is written as a sum; the composition of the sub-steps is
    meant. The first sub-step shares an evaluation with the fitted step. In a step to the data, no sub-step starts below the
    levels that the model knows.

    Parameters
    ----------
    count : M, at least 1.

    Raises
    ------
    InputError : `count` is below 1.
    """

    count: int = 3
    name = "substeps"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"a target needs at least one sub-step, got {self.count}.")

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Vector:
        """The composition of `count` base steps."""
        inner = (step.t + j / self.count * (step.s - step.t) for j in range(1, self.count))
        times = [step.t, *filter(tracer.schedule.knows, inner), step.s]
        m = len(times) - 1
        x, memory = step.x, ()
        for j, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x, memory = take_step(base, tracer, x, t, s, Past(memory, j, m - 1 - j))
        return x

    def options(self) -> dict[str, Any]:
        """Name and count."""
        return {"name": self.name, "substeps": self.count}


@dataclass(frozen=True)
class Local(Target):
    """The exact flow over the interval, from the fitted trajectory's own state, by adaptive high-order integration.

    The target is not in the paper. The exact flow adds no error of the target to the fit.

    Parameters
    ----------
    rtol : relative and absolute tolerance of the integration.
    """

    rtol: float = 1e-5
    name = "local"

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Numeric:
        """A function that integrates from t to s."""
        return lambda batch, x: solve(batch.ode, x, step.t, step.s, rtol=self.rtol, atol=self.rtol)

    def options(self) -> dict[str, Any]:
        """Name and tolerance."""
        return {"name": self.name, "rtol": self.rtol}


@dataclass(frozen=True)
class TeacherTrajectory(Target):
    """The teacher's trajectory from the same initial state: a step also repairs the errors of earlier steps.

    The target is not in the paper. Targets from the fitted trajectory's own state leave earlier errors as they are.

    Parameters
    ----------
    steps : number of steps of the :class:`Teacher`, for fits without a given teacher.
    """

    steps: int = 60
    name = "trajectory"
    needs_teacher = True

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Numeric:
        """A function that looks the states up."""
        return lambda batch, x: batch.taught.at(step.s).to(x.device)

    def options(self) -> dict[str, Any]:
        """Name and steps."""
        return {"name": self.name, "steps": self.steps}


def resolve_target(target: str | Target, substeps: int) -> Target:
    """The target of a name, or a given target itself; `substeps` is the count of ``"substeps"``.

    Raises
    ------
    UnknownNameError : there is no target of this name.
    """
    if isinstance(target, Target):
        return target
    known: dict[str, Target] = {
        "substeps": Substeps(substeps),
        "local": Local(),
        "trajectory": TeacherTrajectory(),
    }
    if target not in known:
        raise unknown_name("target", target, known)
    return known[target]
