"""The plan of a pipeline's run, by its number of steps: a fitted solver, a plan, or a classic solver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..errors import InputError, MismatchError, MismatchWarning, warn
from ..grids import cut
from ..iia.fitted import FittedSolver
from ..plan import Combine, PerCondition, Plan, traced
from ..schedules import EDM, VE, Schedule
from ..schedules.stored import brief
from ..solvers import Solver
from ..solvers.base import SolverLike, as_solver
from .timesteps import order_of
from .translation import grid_of

__all__ = ["Choice", "Fixed", "chosen"]

Fixed: TypeAlias = FittedSolver | Plan
_CLOSE = 1e-6
_SIGNAL = 2.0  # level sigma/alpha below which a state of pure noise lacks much of the signal


@dataclass(frozen=True, eq=False)
class Choice:
    """The solvers of a scheduler.

    Attributes
    ----------
    schedule : the schedule of the pipeline.
    classic : a solver for the grid of the pipeline, or None.
    fixed : fitted solvers and plans, by ``num_inference_steps``.
    plans : the plans of `fixed` on the schedule of the pipeline.
    otherwise : the solver of runs that begin in the middle of a plan of `fixed`, or None.
    """

    schedule: Schedule
    classic: Solver | None
    fixed: dict[int, Fixed]
    plans: dict[int, Plan]
    otherwise: Solver | None

    @property
    def is_whole(self) -> bool:
        """Whether a fit was made for a model that is told whole timesteps."""
        fits = (own.record for own in self.fixed.values() if isinstance(own, FittedSolver))
        return any(record.origin.time.rounding is not None for record in fits)

    def plan(self, n: int, base: Any, options: Mapping[str, Any]) -> Plan:
        """The plan for ``num_inference_steps=n``, with the options that the pipeline hands to ``set_timesteps``.

        Raises
        ------
        MismatchError : no fitted solver has n steps.
        """
        if self.classic is not None:
            own = "sigmas" in options or "timesteps" in options  # schedulers take these, or a number
            return traced(self.classic, self.schedule, grid_of(base, None if own else n, **options))
        if n not in self.plans:
            raise MismatchError(self._count(n))
        return self.plans[n]

    def _count(self, n: int) -> str:
        calls = []
        for steps, plan in sorted(self.plans.items()):
            order = order_of(plan)
            note = "" if order == 1 else f" ({steps} steps of {order} evaluations)"
            calls.append(f"num_inference_steps={steps}{note}")
        names = " and ".join(dict.fromkeys(plan.name for plan in self.plans.values()))
        return f"{names} cannot run with num_inference_steps={n}: call the pipeline with {' or '.join(calls)}."

    def check_noise(self, plan: Plan) -> None:
        """Warn if a fit or a plan begins at a level of noised images, where a pipeline begins with pure noise."""
        start, schedule = plan.grid[0], self.schedule
        own = [self.fixed[n] for n, other in self.plans.items() if other is plan]
        from_images = any(isinstance(fit, FittedSolver) and fit.record.from_images for fit in own)
        if self.fixed and (from_images or schedule.sigma(start) < _SIGNAL * schedule.alpha(start)):
            warn(
                f"{plan.name} begins at level sigma/alpha = {schedule.noise_to_signal(start):.3g}, in images with noise, and "
                "the pipeline has noised no image: use an image-to-image pipeline with strength=1, or a fit from pure noise. "
                "Latents of this level may be handed in.",
                MismatchWarning,
            )

    def rest(self, plan: Plan, k: int) -> Plan:
        """The plan of the evaluations from k on, for a run that begins there, as image-to-image does.

        Raises
        ------
        MismatchError : the plan cannot begin there.
        """
        solver, point = self.classic or self.otherwise, plan.starts[k]
        if point is None:
            raise MismatchError(
                f"{plan.name} cannot begin at evaluation {k}, which lies inside a step: choose another strength, or a "
                f"solver of one evaluation per step."
            )
        if solver is None:
            raise MismatchError(
                f"{plan.name} was made to run from its first timestep on, and this pipeline begins at timestep {k}: make the "
                "scheduler with a solver for such runs, IIAScheduler.of(solver, scheduler, otherwise='dpmpp_2m'), or call the "
                "pipeline with strength=1."
            )
        grid = cut(torch.tensor(plan.grid, dtype=torch.float64, device="cpu"), plan.grid[point])
        found = traced(solver, self.schedule, grid)
        own, rest = found.evaluation_times, plan.evaluation_times[k:]
        if len(own) != len(rest) or any(abs(a - b) > _CLOSE * max(1.0, abs(b)) for a, b in zip(own, rest, strict=True)):
            raise MismatchError(
                f"{found.name} makes {len(own)} evaluations from timestep {k} of {plan.name} on, and the pipeline makes "
                f"{len(rest)} at other times: choose another solver in place of {found.name}."
            )
        return found


def chosen(
    solver: Fixed | SolverLike | list[Fixed] | tuple[Fixed, ...],
    schedule: Schedule,
    prediction: str,
    otherwise: SolverLike | None,
) -> Choice:
    """The solvers given by a user, checked against the pipeline's schedule and prediction type.

    Raises
    ------
    InputError : no solver, or two solvers with the same number of steps.
    MismatchError : a solver was made for another schedule or prediction type, or has constants per condition.
    """
    second = None if otherwise is None else as_solver(otherwise)
    if isinstance(solver, str | Solver | Mapping):
        return Choice(schedule, as_solver(solver), {}, {}, second)
    several = list(solver) if isinstance(solver, list | tuple) else [solver]
    if not several or not all(isinstance(s, FittedSolver | Plan) for s in several):
        kinds = ", ".join(type(s).__name__ for s in several) or "nothing"
        advice = " (iia_ode.load reads a file)" if any(isinstance(s, str | os.PathLike) for s in several) else ""
        raise InputError(
            f"a scheduler takes a FittedSolver, a Plan, a list of them, or a solver such as 'dpmpp_2m', got {kinds}{advice}."
        )
    fixed: dict[int, Fixed] = {}
    plans: dict[int, Plan] = {}
    for own in several:
        plan = _moved(own, schedule, prediction)
        order = order_of(plan)
        n = plan.nfe if order == 1 else plan.steps
        if n in plans:
            raise InputError(
                f"{plans[n].name} and {plan.name} both run with num_inference_steps={n}: give one of them."
            )
        fixed[n], plans[n] = own, plan
    return Choice(schedule, None, fixed, plans, second)


def _moved(solver: Fixed, schedule: Schedule, prediction: str) -> Plan:
    """The plan of a solver on the pipeline's schedule."""
    plan = solver if isinstance(solver, Plan) else solver.plan
    if any(isinstance(ins, Combine) and isinstance(ins.constant, PerCondition) for ins in plan.code):
        raise MismatchError(
            f"{plan.name} has constants per condition, and a pipeline does not tell its scheduler the conditions: fit again "
            "without a warm start per class (budget='standard'), or use iia_ode.sample."
        )
    if plan.schedule.config() != schedule.config():
        if not isinstance(plan.schedule, EDM | VE):  # noise levels alone, which every schedule has
            own, theirs = brief(plan.schedule.config()), brief(schedule.config())
            raise MismatchError(
                f"{plan.name} was made for the schedule {own}, and this scheduler has {theirs}: fit for this pipeline, or "
                "take the scheduler's configuration from the pipeline of the fit. For other states of one network, move the "
                "plan by Plan.on(schedule)."
            )
        return plan.on(schedule)
    if isinstance(solver, FittedSolver) and solver.record.origin.prediction != prediction:
        raise MismatchError(
            f"{plan.name} was fitted to a model of {solver.record.origin.prediction} prediction, and the configuration "
            f"of this scheduler says {prediction}: take the configuration of the pipeline of the fit."
        )
    return plan
