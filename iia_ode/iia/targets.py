"""Targets: the more accurate integration that a step is fitted to."""

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
"""From a batch and its states [B, ...] at the start of the step to its target states [B, ...]."""


class Target(ABC):
    """Where the state of a step should have gone."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    """Whether the batch must have a teacher."""

    @abstractmethod
    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Vector | Numeric:
        """The target of a step: a vector whose instructions are written to `tracer`, or a function that computes it."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """JSON-ready options, the name included: what a fitted solver's file records."""


@dataclass(frozen=True)
class Substeps(Target):
    """M steps of the base solver over a uniform subdivision of the interval in t, from the fitted trajectory's own state.

    The paper's target [Zhang et al. 2024, section 4]. For DDIM the paper writes a sum; composition is meant. The first
    sub-step shares its evaluation with the step that is fitted.
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
    """The flow itself over the interval, from the fitted trajectory's own state, by adaptive high-order integration.

    Not in the paper; it separates the error of the target from the error of the fit.
    """

    rtol: float = 1e-5
    name = "local"

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Numeric:
        """A function that integrates from t to s."""

        def flow(batch: Batch, x: Tensor) -> Tensor:
            return solve(batch.ode, x, step.t, step.s, rtol=self.rtol, atol=self.rtol)

        return flow

    def options(self) -> dict[str, Any]:
        """Name and tolerance."""
        return {"name": self.name, "rtol": self.rtol}


@dataclass(frozen=True)
class TeacherTrajectory(Target):
    """The teacher's trajectory from the same initial state: a step also repairs the error of those before it.

    Not in the paper, whose targets start at the fitted trajectory's own state and leave earlier error as it is.

    Parameters
    ----------
    steps : of the :class:`Teacher` that a fit makes for itself where it is given none.
    """

    steps: int = 60
    name = "trajectory"
    needs_teacher = True

    def aim(self, tracer: Tracer, base: Steppable, step: StepRecord) -> Numeric:
        """A function that looks the states up."""

        def look_up(batch: Batch, x: Tensor) -> Tensor:
            return batch.taught.at(step.s).to(x.device)

        return look_up

    def options(self) -> dict[str, Any]:
        """Name and steps."""
        return {"name": self.name, "steps": self.steps}


def resolve_target(target: str | Target, substeps: int) -> Target:
    """The object behind a `target` argument; `substeps` is for the target of that name."""
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
