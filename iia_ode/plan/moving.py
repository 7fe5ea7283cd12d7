"""Plans on another schedule: the same levels sigma/alpha, with rescaled states.

Two schedules reach the same level at times t and t' with states x and x' = c x, where c = |(alpha', sigma')| / |(alpha,
sigma)|. Data and noise are the same on both.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..errors import GridError
from ..forms import conversion
from ..schedules import Schedule
from .instructions import Combine, Evaluate, Instruction, Program
from .vectors import Vector

__all__ = ["moved"]

_SLACK = 1e-6  # relative rounding of a level beyond an end of the schedule
_KEPT = ("data", "noise")  # forms with equal values on both schedules


def moved(plan: Program, schedule: Schedule) -> tuple[tuple[float, ...], tuple[Instruction, ...]]:
    """Grid and instructions of a plan on another schedule; see :meth:`iia_ode.Plan.on`."""
    return _Move(plan, schedule).result()


class _Move:
    """The translation of a program, instruction by instruction.

    Attributes
    ----------
    values : each vector of the old program, as a combination of vectors of the new program.
    code : the new instructions.
    """

    def __init__(self, plan: Program, schedule: Schedule) -> None:
        self.plan, self.old, self.new = plan, plan.schedule, schedule
        self.values: list[Vector] = [Vector({0: 1.0 / self._scale(plan.grid[0])})]
        self.code: list[Instruction] = []
        # A state is stored at the scale of its grid point, or of its first evaluation.
        self.times: dict[int, float] = {}
        for k, ins in enumerate(plan.code, start=1):
            if isinstance(ins, Evaluate):
                self.times.setdefault(ins.state, ins.t)
            elif ins.step is not None:
                self.times[k] = plan.grid[ins.step]

    def result(self) -> tuple[tuple[float, ...], tuple[Instruction, ...]]:
        for ins in self.plan.code:
            if isinstance(ins, Evaluate):
                self._evaluate(ins)
            else:
                self._combine(ins)
        return tuple(self._time(t) for t in self.plan.grid), tuple(self.code)

    def _time(self, t: float) -> float:
        """The time with the level of t."""
        if self.old.sigma(t) == 0:
            return self.new.t_data
        if self.old.alpha(t) > 0:
            level = self.old.noise_to_signal(t)
            found = self.new.t_of_noise_to_signal(level)
            low, high = sorted((self.new.t_data, self.new.t_noise))
            kept = min(max(found, low), high) if self.new._ends_at_noise else found
            if math.isclose(self.new.noise_to_signal(kept), level, rel_tol=_SLACK):
                return kept
            raise GridError(
                f"{self.plan.name} has the level sigma/alpha = {level:.6g} (t = {t:g}), which the schedule "
                f"{type(self.new).__name__} does not reach: make the plan on another grid."
            )
        if self.new.alpha(self.new.t_noise) == 0:
            return self.new.t_noise
        raise GridError(
            f"{self.plan.name} has a time without signal (t = {t:g}, alpha = 0), which no time of the schedule "
            f"{type(self.new).__name__} has: start its grid a little inside."
        )

    def _scale(self, t: float) -> float:
        """The factor from old states to new ones."""
        return self.new.size(self._time(t)) / self.old.size(t)

    def _evaluate(self, ins: Evaluate) -> None:
        state, scale = self.values[ins.state], self._scale(ins.t)
        form = ins.form if ins.form in _KEPT else "data"
        self.code.append(replace(ins, state=self._stored(state * scale), t=self._time(ins.t), form=form))
        output = Vector({len(self.code): 1.0})
        if form != ins.form:
            p, q = conversion(self.old, ins.t, form, ins.form)
            output = state * p + output * q
        self.values.append(output)

    def _combine(self, ins: Combine) -> None:
        total = Vector({}, ins.constant)
        for j, weight in ins.terms:
            total = total + self.values[j] * weight
        time = self.times.get(len(self.values))
        scale = 1.0 if time is None else self._scale(time)
        self.code.append(_instruction(total * scale, ins.step))
        self.values.append(Vector({len(self.code): 1.0 / scale}))

    def _stored(self, value: Vector) -> int:
        """The index of a vector of the new program with this value; a scaled copy is made where there is none."""
        made = _instruction(value, None)
        if made.copies is not None:
            return made.copies
        self.code.append(made)
        return len(self.code)


_ROUNDING = 1e-12


def _instruction(value: Vector, step: int | None) -> Combine:
    """The instruction that stores a value; a factor of 1 up to rounding is a copy."""
    terms: tuple[tuple[int, Any], ...] = tuple(value.weights.items())
    if len(terms) == 1 and isinstance(terms[0][1], float) and abs(terms[0][1] - 1.0) < _ROUNDING:
        terms = ((terms[0][0], 1.0),)
    return Combine(terms, value.constant, step)
