"""The initial states of a search: pure noise, images with noise, or states as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, InputError
from ..iia.batch import Batch
from ..ode import ProbabilityFlowODE
from ..plan import check_start
from ..plan.checks import check_samples
from ..schedules.levels import default_levels, known_level
from ..sizes import size_of_data, size_of_noise, smallest_level

__all__ = ["Initial", "check_additions", "initial_states", "levels_of", "start_time"]

# Level of the start where the output does not determine the data at the schedule's noisiest time, relative to the size of
# the data: EDM's 80 for data of size 0.5.
_NOISIEST = 160.0
_PURE = 10.0  # level relative to the size of the data, below which states are not pure noise


@dataclass(frozen=True, eq=False)
class Initial:
    """Initial states.

    Attributes
    ----------
    t : their time.
    x : the states [B, ...], float32 or float64.
    signal : part alpha x_0 of the states, [B, ...]; None for pure noise, and for states given as `x`.
    """

    t: float
    x: Tensor
    signal: Tensor | None = None


def initial_states(
    ode: ProbabilityFlowODE,
    given: dict[str, Any],
    *,
    samples: int,
    sigma_max: float | None,
    seed: int,
) -> Initial:
    """The initial states of a search.

    Parameters
    ----------
    ode : the ODE with the conditions of the samples.
    given : the arguments `noise`, `x`, `shape` and `images` of :func:`iia_ode.fit`, one of which is not None.
    samples : number of draws for a shape.
    sigma_max : level of the states; None for the noisiest.
    seed : seed of the noise.

    Raises
    ------
    InputError : none or several of the four are given, or an argument is not usable.
    GridError : the level is not usable, or not known.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise InputError(
            "a fit takes exactly one of noise= (standard normal draws), x= (initial states), shape= (of a sample) or images= "
            f"(clean samples, with sigma_max= for the level of their noise), got {', '.join(named) or 'none of them'}."
        )
    ((kind, value),) = named.items()
    if kind == "shape":
        if not isinstance(value, tuple | list) or not all(type(n) is int and n > 0 for n in value):
            raise InputError(f"shape must be that of one sample, a tuple of positive whole numbers, got {value!r}.")
        kind, value = "noise", _randn((samples, *value), seed, torch.float32)
    if kind != "noise":
        check_start(ode, value)
        check_samples(value)
    if kind == "x":
        return Initial(start_time(ode, sigma_max), value)
    if kind == "images":
        if sigma_max is None:
            raise InputError(
                "images= needs sigma_max=, the level sigma/alpha of the noise on them, such as "
                "ode.schedule.noise_to_signal(t) for a start at time t."
            )
        t = start_time(ode, sigma_max)
        signal = ode.schedule.alpha(t) * value.detach()
        noise = _randn(tuple(value.shape), seed, value.dtype).to(value.device)
        return Initial(t, signal + ode.schedule.sigma(t) * noise, signal)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 1:
        raise InputError(f"noise must be a float tensor [B, ...], got {getattr(value, 'shape', type(value).__name__)}.")
    check_start(ode, value)
    size = float(value.cpu().double().square().mean().sqrt())
    if not 0.5 < size < 2.0:
        raise InputError(
            f"noise must be standard normal, and its root mean square is {size:.3g}: pass initial states as x=."
        )
    t = start_time(ode, sigma_max, value)
    return Initial(t, ode.schedule.sigma(t) * value)


def _randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def start_time(ode: ProbabilityFlowODE, sigma_max: float | None, noise: Tensor | None = None) -> float:
    """The time of the initial states: of level `sigma_max`, or by default the noisiest usable time of the schedule.

    At the noisiest time of the schedule, noise and score prediction may say nothing about the data. The level is then 160
    times the size of the data, which is estimated from `noise`.
    """
    schedule = ode.schedule
    if sigma_max is not None:
        return schedule.t_of_noise_to_signal(known_level(schedule, sigma_max, "sigma_max"))
    if not schedule.knows(schedule.t_noise):
        return schedule.t_of_noise_to_signal(default_levels(schedule)[1])
    if schedule.alpha(schedule.t_noise) > 0 or ode.prediction not in ("noise", "score"):
        return schedule.t_noise
    if noise is None:
        raise GridError(
            f"{ode.prediction} prediction says nothing about the data where alpha = 0, so the states x do not tell their "
            "level: give sigma_max, their level sigma/alpha, or noise= instead of x=."
        )
    return schedule.t_of_noise_to_signal(_NOISIEST * size_of_noise(ode, noise))


def levels_of(batch: Batch, start: float, sigma_min: float | None) -> dict[str, float]:
    """The smallest level and the size of the data, as options of a teacher."""
    if batch.teacher is not None:
        size = batch.teacher.record.data_size
    else:
        lowest = smallest_level(batch.ode.schedule, 0.0) if sigma_min is None else sigma_min
        size = size_of_data(batch.ode, batch.x, start, lowest)
    level = smallest_level(batch.ode.schedule, size) if sigma_min is None else sigma_min
    return {"sigma_min": level, "data_size": size}


def check_additions(batch: Batch, start: float, data_size: float, added: int) -> None:
    """Raise InputError if a budget would add draws of pure noise to states that contain images.

    `added` is the number of draws that the budget adds, fresh samples for the last choice included.
    """
    level = batch.ode.schedule.noise_to_signal(start)
    if added and batch.signal is None and level < _PURE * data_size:
        raise InputError(
            f"the budget adds {added} draws, and states at level {level:.3g} carry data of size {data_size:.3g}, so no noise "
            "alone is like them: give the clean samples as images=, or a budget with draws=0 and finals=0."
        )
