"""Targets of a fit: the more accurate state that each step of the base is fitted to."""

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
    """The state that a step should have reached.

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

    See Zhang et al. 2024, section 4. The paper writes a sum for DDIM and means the composition. The first sub-step shares
    its evaluation with the fitted step.

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
        m = self.count
        times = [step.t + j / m * (step.s - step.t) for j in range(m)] + [step.s]
        x, memory = step.x, ()
        for j, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x, memory = take_step(base, tracer, x, t, s, Past(memory, j, m - 1 - j))
        return x

    def options(self) -> dict[str, Any]:
        """Name and count."""
        return {"name": self.name, "substeps": self.count}


@dataclass(frozen=True)
class Local(Target):
    """The flow over the interval, from the fitted trajectory's own state, by adaptive high-order integration.

    The target is not in the paper. A fit to the exact flow separates the error of the target from the error of the fit.

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
    """The teacher's trajectory from the same initial state, so that a step also repairs the error of earlier steps.

    The target is not in the paper. Targets from the fitted trajectory's own state leave earlier error as it is.

    Parameters
    ----------
    steps : number of steps of the :class:`Teacher` that a fit makes where none is given.
    """

    steps: int = 60
    name = "trajectory"
    needs_teacher = True

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Numeric:
        """A function that looks the states up."""
        return lambda batch, x: batch.taught.path(step.s).to(x.device)

    def options(self) -> dict[str, Any]:
        """Name and steps."""
        return {"name": self.name, "steps": self.steps}


def resolve_target(target: str | Target, substeps: int) -> Target:
    """The object of a `target` argument; `substeps` is the count of ``"substeps"``.

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
