"""The record of a teacher, written into the file of the teacher and into the fits made with the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..ode.origin import Origin

__all__ = ["TeacherOptions", "TeacherRecord"]


@dataclass(frozen=True)
class TeacherOptions:
    """Options of the accurate trajectories.

    Attributes
    ----------
    solver : name of the solver.
    sigma_min : level sigma/alpha at which the data estimate replaces the data.
    steps : number of steps.
    knots : number of stored states per sample; None for all `steps` + 1.
    dtype : dtype of the stored states; None for the dtype of the initial states.
    """

    solver: str
    sigma_min: float
    steps: int
    knots: int | None = None
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None

    def __str__(self) -> str:
        kept = "" if self.knots is None else f", {self.knots} knots"
        kept += "" if self.dtype is None else f" in {self.dtype}"
        return f"solver {self.solver}, steps {self.steps}, sigma_min {self.sigma_min:g}{kept}"


@dataclass(frozen=True)
class TeacherRecord:
    """The record of a teacher.

    Attributes
    ----------
    origin : the ODE and the states.
    options : options of the trajectories.
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
