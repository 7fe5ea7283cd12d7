"""The fits of a comparison: IIA on a grid, or the solver found by :func:`iia_ode.fit`, all on one batch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..autofit import Budget
from ..autofit import fit as find
from ..autofit.budget import budget_of
from ..autofit.draws import start_time
from ..iia import IIA, FittedSolver
from ..ode import ProbabilityFlowODE
from ..teacher import Teacher
from .task import Task

__all__ = ["Fits", "Spent"]


@dataclass(frozen=True)
class Spent:
    """The cost of a fit: samples, batched evaluations, sample evaluations, and seconds of wall-clock time."""

    samples: int = 0
    evaluations: int = 0
    sample_evaluations: int = 0
    seconds: float = 0.0


class Fits:
    """The fits of a comparison, all on one batch. Fits to accurate trajectories share the trajectories."""

    def __init__(
        self,
        task: Task,
        ends: tuple[float, float],
        most: int,
        count: int,
        seed: int,
        budget: str | Budget,
        progress: bool,
    ) -> None:
        self.task, self.ends, self.most, self.count = task, ends, most, count
        self.seed, self.budget, self.progress = seed, budget_of(budget), progress

    @cached_property
    def states(self) -> tuple[ProbabilityFlowODE, Tensor]:
        """The ODE and the states to fit on."""
        return self.task.states(self.count, self.ends[0], self.seed)

    @property
    def highest(self) -> float | None:
        """Level of the initial states for :func:`iia_ode.fit`; None where it is infinite."""
        level = self.states[0].schedule.noise_to_signal(self.ends[0])
        return level if math.isfinite(level) else None

    @cached_property
    def _teacher(self) -> tuple[Teacher, float]:
        """Accurate trajectories for IIA, and their wall-clock time in seconds."""
        begun = time.perf_counter()
        teacher = Teacher.solve(*self.states, *self.ends, sigma_min=self.task.lowest(self.ends[0]))
        return teacher, time.perf_counter() - begun

    @cached_property
    def _found_teacher(self) -> tuple[Teacher | None, float]:
        """Accurate trajectories for :func:`iia_ode.fit`, shared by all numbers of evaluations, and their time in seconds.

        The trajectories are None if :func:`iia_ode.fit` must make its own, because it adds noise samples.
        """
        begun, (ode, x) = time.perf_counter(), self.states
        if self.budget.draws > len(x):
            return None, 0.0
        start, end, steps = start_time(ode, self.highest), ode.schedule.t_data, self.budget.steps(self.most)
        low, chunk = self.task.lowest(start), self.budget.chunk_size
        teacher = Teacher.solve(ode, x, start, end, steps=steps, sigma_min=low, chunk_size=chunk)
        return teacher, time.perf_counter() - begun

    def make(self, nfe: int, method: IIA | None, grid: Tensor | None) -> tuple[FittedSolver, Spent]:
        """Fit by IIA on a grid, or by :func:`iia_ode.fit` if there is no method; return the fit and its cost."""
        (ode, x), teacher, shared = self.states, None, 0.0
        if method is None:
            teacher, shared = self._found_teacher
        elif method.target == "trajectory":
            teacher, shared = self._teacher
        begun = time.perf_counter()
        if method is not None and grid is not None:
            fit = method.fit(ode, x, grid, teacher=teacher)
        else:
            fit = find(
                ode,
                nfe,
                x=x,
                budget=self.budget,
                sigma_max=self.highest,
                sigma_min=self.task.lowest(self.ends[0]),
                teacher=teacher,
                seed=self.seed,
                progress=self.progress,
            )
        seconds = time.perf_counter() - begun + shared
        evaluations, samples = fit.record.evaluations, fit.record.sample_evaluations
        if teacher is not None:
            evaluations, samples = evaluations + teacher.evaluations, samples + teacher.sample_evaluations
        return fit, Spent(fit.record.batch, evaluations, samples, seconds)
