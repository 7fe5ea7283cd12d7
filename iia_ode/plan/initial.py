"""The size of an initial state against the noise level of its time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import StateSizeWarning, warn
from ..schedules import Schedule

__all__ = ["check_size", "root_mean_square", "warn_of_size"]

_FACTOR = 2.0  # between the size of a state and of its noise, from which on the state is wrong
_CERTAIN = 20.0  # -log of the probability of that size by chance, from which on it is no chance


def root_mean_square(x: Tensor) -> Tensor:
    """The root mean square of all components of x, as a tensor [] on the device of x."""
    norm: Tensor = torch.linalg.vector_norm(x.detach())
    return norm / math.sqrt(x.numel())


def check_size(schedule: Schedule, t: float, x: Tensor) -> None:
    """Warn if states x [B, ...] cannot be states at time t; reads one number from the device. See :func:`warn_of_size`."""
    warn_of_size(schedule, t, float(root_mean_square(x)), x.numel())


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
    sigma, alpha = schedule.sigma(t), schedule.alpha(t)
    ratio = size / sigma if sigma > 0 else 1.0
    low, high = ratio < 1 / _FACTOR, ratio > _FACTOR and alpha == 0
    if not (low or high) or not math.isfinite(ratio):
        return
    # Chernoff's bound on a mean of `count` squares of normal numbers.
    if ratio > 0 and count / 2 * (ratio * ratio - 1 - 2 * math.log(ratio)) < _CERTAIN:
        return
    level = schedule.noise_to_signal(t)
    warn(
        f"the initial states have root mean square {size:.3g}, and states at t = {t:g} (level sigma/alpha {level:.4g}) "
        f"{'carry noise of standard deviation' if low else 'are noise of standard deviation'} {sigma:.4g}: start from "
        "sigma * torch.randn(...), with sigma = ode.schedule.sigma(grid[0]), or from alpha * x_0 + sigma * noise.",
        StateSizeWarning,
    )
