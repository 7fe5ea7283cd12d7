"""The account of a teacher, written into its file and into the fits made with it."""

from __future__ import annotations

from dataclasses import dataclass

from ..ode.origin import Origin

__all__ = ["TeacherOptions", "TeacherRecord"]


@dataclass(frozen=True)
class TeacherOptions:
    """How the accurate trajectories were made.

    Attributes
    ----------
    solver : name of the solver.
    sigma_min : level sigma/alpha at which the data estimate replaces the data.
    steps : number of steps.
    """

    solver: str
    sigma_min: float
    steps: int

    def __str__(self) -> str:
        return f"solver {self.solver}, steps {self.steps}, sigma_min {self.sigma_min:g}"


@dataclass(frozen=True)
class TeacherRecord:
    """The account of a teacher.

    Attributes
    ----------
    origin : the ODE and the states.
    options : how its trajectories were made.
    t_start, t_end : times of the initial and of the final states.
    conditions : digest of the conditions' values; None for a part of a batch.
    evaluations, sample_evaluations : cost of the trajectories, in model calls and in samples.
    data_size : root mean square of the data, the unit of noise levels.
    error : estimate of the root mean square error of the final states per component, without the error of the step between
        `sigma_min` and the data; None where it is not finite.
    """

    origin: Origin
    options: TeacherOptions
    t_start: float
    t_end: float
    conditions: str | None
    evaluations: int
    sample_evaluations: int
    data_size: float = 1.0
    error: float | None = None
