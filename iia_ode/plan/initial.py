"""The size of an initial state against the noise level of its time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StateSizeWarning, warn
from ..ode.mode import check_mode
from ..schedules import Schedule
from .checks import check_samples, check_start

__all__ = ["check_size", "check_states", "root_mean_square", "warn_of_size", "warn_of_sizes"]

_FACTOR = 2.0  # between the size of a state and of its noise, from which on the state is wrong
_CERTAIN = 20.0  # -log of the probability of that size by chance, from which on it is no chance


def root_mean_square(x: Tensor) -> Tensor:
    """The root mean square of all components of x, as a tensor [] on the device of x."""
    norm: Tensor = torch.linalg.vector_norm(x.detach())
    return norm / math.sqrt(x.numel())


def check_size(schedule: Schedule, t: float, x: Tensor) -> None:
    """Warn if states x [B, ...] cannot be states at time t; reads one number from the device. See :func:`warn_of_size`."""
    warn_of_size(schedule, t, float(root_mean_square(x)), x.numel())


def check_states(ode: object, x: object, t: float) -> None:
    """Check a model and its states x [B, ...] at time t before a fit or a measurement; reads B + 1 numbers from the device.

    Raises
    ------
    InputError : `ode` is no ProbabilityFlowODE, or x is no state for its shape and conditions.
    NonFiniteError : some states hold NaN or infinity; the message names the samples.

    Warns
    -----
    TrainModeWarning : the model is in train mode, and its output depends on the mode.
    StateSizeWarning : the states are too small for the noise at time t.
    """
    found, state = check_start(ode, x)
    check_mode(found)
    check_samples(state)
    check_size(found.schedule, t, state)


def warn_of_size(schedule: Schedule, t: float, size: float, count: int) -> None:
    """Warn if states cannot be states at time t, by their size.

    A state alpha x_0 + sigma eps has a root mean square of at least about sigma, whatever the data. Where alpha = 0, the root
    mean square is about sigma. A smaller state lacks noise, as ``randn`` does on EDM at level 80; a larger state is allowed
    wherever alpha > 0, because data may have any unit.

    Parameters
    ----------
    schedule : the noise schedule.
    t : time of the states.
    size : root mean square of all components of all states.
    count : number of components. The warning needs a size that chance explains with a probability below e^-20.

    Warns
    -----
    StateSizeWarning : the states are smaller than half of sigma, or at alpha = 0 larger than twice sigma.
    """
    if _is_wrong(schedule, t, size, count):
        _warn(schedule, t, size, "the initial states have")


def warn_of_sizes(schedule: Schedule, times: Sequence[float], x: Tensor) -> None:
    """Warn if states x [B, ...], each at its own time, cannot be states at these times; reads [B] numbers from the device.

    Warns
    -----
    StateSizeWarning : as by :func:`warn_of_size`, for a single state, or for all states relative to their noise.
    """
    count = x.numel() // len(x)
    sizes = torch.linalg.vector_norm(x.detach().reshape(len(x), -1), dim=1).div(math.sqrt(count)).tolist()
    for i, (t, size) in enumerate(zip(times, sizes, strict=True)):
        if _is_wrong(schedule, t, size, count):
            _warn(schedule, t, size, f"the initial state of sample {i} has")
            return
    sigmas = [schedule.sigma(t) for t in times]
    if min(sigmas) > 0:
        together = math.hypot(*(size / sigma for size, sigma in zip(sizes, sigmas, strict=True))) / math.sqrt(len(x))
        if together < 1 and _is_wrong(schedule, times[0], together * sigmas[0], x.numel()):
            _warn(schedule, times[0], together * sigmas[0], "relative to their noise, the initial states have")


def _is_wrong(schedule: Schedule, t: float, size: float, count: int) -> bool:
    """Whether no chance explains states of `count` components and this size at time t."""
    sigma = schedule.sigma(t)
    ratio = size / sigma if sigma > 0 else 1.0
    low, high = ratio < 1 / _FACTOR, ratio > _FACTOR and schedule.alpha(t) == 0
    if not (low or high) or not math.isfinite(ratio):
        return False
    # Chernoff's bound on a mean of `count` squares of normal numbers.
    return not (ratio > 0 and count / 2 * (ratio * ratio - 1 - 2 * math.log(ratio)) < _CERTAIN)


def _warn(schedule: Schedule, t: float, size: float, subject: str) -> None:
    sigma, level = schedule.sigma(t), schedule.noise_to_signal(t)
    carry = "carry noise of standard deviation" if size < sigma else "are noise of standard deviation"
    warn(
        f"{subject} root mean square {size:.3g}, and states at t = {t:g} (level sigma/alpha {level:.4g}) "
        f"{carry} {sigma:.4g}: start from "
        "sigma * torch.randn(...), with sigma = ode.schedule.sigma(grid[0]), or from alpha * x_0 + sigma * noise.",
        StateSizeWarning,
    )
