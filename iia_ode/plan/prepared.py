"""What the runs of a plan share: conversion factors, and weights in the dtype and on the device of the states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..forms import check_prediction
from .checks import check_weights, factors_at
from .instructions import Evaluate, Program
from .maps import PerCondition
from .vectors import Sum, sum_of_numbers

__all__ = ["Prepared", "Runnable", "Stage", "Step", "prepare"]


@dataclass(frozen=True)
class Step:
    """A sum of a plan, ready for a run.

    Attributes
    ----------
    index : index of the new vector.
    sum : the sum, with its tensors in place.
    numbers : the same for a sum with numbers alone, as a function of the vectors; else None.
    drops : the vectors without a later use.
    point : k if the vector is the state at grid point k, else None.
    """

    index: int
    sum: Sum
    numbers: Callable[[Mapping[int, Tensor]], Tensor] | None
    drops: tuple[int, ...]
    point: int | None


@dataclass(frozen=True)
class Stage:
    """An evaluation of a plan with the sums up to the next evaluation, ready for a run.

    Attributes
    ----------
    state, t, form : index of the evaluated vector, the time, and the form of the stored output.
    factors : the pair (p, q) of :func:`~iia_ode.forms.conversion`, from the prediction type to the stored form.
    drops : the vectors without a use after the evaluation.
    sums : the sums, in order.
    passes : whether the stored output is read by these sums alone, and is none of the new vectors: a run without previews
        then reads the output in the memory of the model.
    """

    state: int
    t: float
    form: str
    factors: tuple[float, float]
    drops: tuple[int, ...]
    sums: tuple[Step, ...]
    passes: bool


@dataclass(frozen=True)
class Prepared:
    """The part of a run shared by all runs of a plan with equal prediction type, sample shape, dtype and device.

    Attributes
    ----------
    first : the sums before the first evaluation.
    stages : each evaluation by the number of instructions before it.
    """

    first: tuple[Step, ...]
    stages: Mapping[int, Stage]

    def with_rows(self, rows: Mapping[int, Tensor]) -> Prepared:
        """The same with constants of a batch, by the index of the vector."""

        def own(sums: tuple[Step, ...]) -> tuple[Step, ...]:
            return tuple(replace(s, sum=replace(s.sum, constant=rows[s.index])) if s.index in rows else s for s in sums)

        return Prepared(own(self.first), {k: replace(s, sums=own(s.sums)) for k, s in self.stages.items()})


class Runnable(Program, Protocol):
    """The part of a :class:`~iia_ode.Plan` read by a run."""

    @property
    def nfe(self) -> int:
        """Model evaluations of one run."""

    @property
    def steps(self) -> int:
        """Intervals of the grid."""

    @property
    def last_use(self) -> tuple[int, ...]:
        """For each vector, the last instruction to read the vector."""

    @property
    def same(self) -> tuple[int, ...]:
        """For each vector, the original of the copy; the vector itself where it is no copy."""

    @property
    def tables(self) -> tuple[tuple[int, PerCondition], ...]:
        """Pairs (index of the vector, constant) of the constants per condition."""

    def prepared(self, prediction: str, like: Tensor) -> Prepared:
        """Factors and weights for states like `like`."""


def prepare(plan: Runnable, prediction: str, like: Tensor) -> Prepared:
    """Check a plan against the samples of `like` [B, ...] and put its weights in place.

    Raises
    ------
    UnknownNameError : no such prediction type.
    InputError : a weight does not fit the samples.
    GridError : the prediction does not determine a stored form at the data.
    ScheduleError : the prediction does not determine a stored form at another time.
    """
    check_prediction(prediction)
    check_weights(plan, tuple(like.shape[1:]))
    code, last, stages = plan.code, plan.last_use, {}
    with torch.inference_mode(False):  # made in the first run, and used by later runs with gradients
        sums: list[Step] = []
        for k in range(len(code), 0, -1):
            ins = code[k - 1]
            drops = tuple(j for j in {*ins.reads, k} if last[j] == k) if k < len(code) else ()
            if isinstance(ins, Evaluate):
                factors = factors_at(plan.schedule, ins.t, prediction, ins.form)
                after = tuple(reversed(sums))
                passes = last[k] <= k + len(after) and all(s.numbers is not None and s.sum.copies != k for s in after)
                stages[k - 1] = Stage(ins.state, ins.t, ins.form, factors, drops, after, passes)
                sums = []
            else:
                ready = ins.ready(like)
                numbers = None if ready.numbers is None else sum_of_numbers(ready.terms, like)
                sums.append(Step(k, ready, numbers, drops, ins.step))
    return Prepared(tuple(reversed(sums)), stages)
