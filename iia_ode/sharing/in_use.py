"""The sampler that is in use for a model without a fit: its errors beside the errors of the fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..iia.batch import Batch, per_sample
from ..iia.provenance import finite, raised
from ..schedules import Schedule
from .records import InUse

__all__ = ["Sampled", "at_fit", "beside", "is_noise"]

_NOISE = 2.0  # level sigma/alpha from which initial states are those of a scheduler, pure noise


class Sampled(NamedTuple):
    """Samples of a scheduler in use: its name, its evaluations, and the final states [B, ...]."""

    name: str
    evaluations: int
    final: Tensor


def at_fit(batch: Batch, t: float, nfe: int, fit_error: float | None) -> tuple[InUse, ...]:
    """Errors of the scheduler in use on the held-out samples of a fit that starts at time t.

    Empty where the ODE has no scheduler in use, for images with noise, and where the scheduler cannot run.
    """
    schedule = batch.ode.schedule
    if not hasattr(batch.ode, "sampled_in_use") or batch.signal is not None or not is_noise(schedule, t):
        return ()
    try:
        return beside(batch, nfe, fit_error)
    except InputError as error:
        logging.getLogger("iia_ode").info("the scheduler in use was not measured: %s", error)
        return ()


def is_noise(schedule: Schedule, t: float) -> bool:
    """Whether a scheduler's initial states, pure noise, may stand for states at time t."""
    return schedule.sigma(t) >= _NOISE * schedule.alpha(t)


def beside(batch: Batch, nfe: int, fit_error: float | None, schedulers: Sequence[Any] = (None,)) -> tuple[InUse, ...]:
    """Errors of schedulers with at most `nfe` evaluations, on the samples of a batch with true final states.

    The errors are raised to the error of the true final states where they are below it, as all errors of a record.

    Parameters
    ----------
    batch : samples with an ODE that has a method ``sampled_in_use(x, nfe, scheduler) -> Sampled``.
    nfe : evaluations of the fit.
    fit_error : root mean square endpoint error of the fit on the samples.
    schedulers : schedulers; None for the scheduler in use.

    Raises
    ------
    InputError : a scheduler cannot run.
    """
    found, least = [], None if batch.teacher is None else batch.teacher.record.error
    for scheduler in schedulers:
        errors = []
        for part in batch.chunks():
            sampled: Sampled = part.ode.sampled_in_use(part.x, nfe, scheduler)  # type: ignore[operator]
            errors.append(per_sample(sampled.final.cpu().double() - part.target.cpu().double()))
        error = raised(finite(float(torch.cat(errors).square().mean().sqrt())), least)
        found.append(InUse(sampled.name, sampled.evaluations, error, raised(fit_error, least), len(batch)))
    return tuple(found)
