"""The size (root mean square) of the data behind a model: the unit of noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ode import ProbabilityFlowODE
from .schedules import Schedule
from .schedules.levels import lowest_level
from .solvers.transfer import ddim_step

__all__ = ["few", "size_of_data", "size_of_noise", "smallest_level"]

_FLOOR = 0.004  # smallest level of a model, relative to the size of the data: EDM's 0.002 for data of size 0.5
_FIRST = 160.0  # EDM's largest level, 80, relative to the same size
_START = 400.0  # level where the integration from alpha = 0 goes first, relative to the size of the data
_CLEAN = 0.1  # level relative to the data estimate, below which the data estimate has the size of the data
_MOST = 40  # evaluations of an integration: 12 orders of magnitude
_PASSES = 12  # integrations from alpha = 0, each from a better level
_SETTLED = 1e-4  # relative change of the size in a pass; the next pass would change a hundredth of that


def few(x: Tensor) -> Tensor:
    """Indices of two to eight samples of x [B, ...], one in 32: int64 [n], on the host.

    The samples are quantiles of the norm, and do not depend on the order of the batch.
    """
    count = len(x)
    order = torch.linalg.vector_norm(x.reshape(count, -1), dim=1).cpu().argsort(stable=True)
    n = min(count, max(2, min(8, count // 32)))
    found: Tensor = order[(2 * torch.arange(n, device="cpu") + 1) * count // (2 * n)]
    return found


def size_of_data(ode: ProbabilityFlowODE, x: Tensor, t: float, lowest: float = 0.0) -> float:
    """The root mean square of the data at the end of the trajectories from states x at time t.

    DDIM integrates a few of the samples coarsely, each step to half the noise level, until the data estimate is far above
    the noise. The size is proportional to the data: a model of scaled data at scaled levels has the scaled size.

    Parameters
    ----------
    ode : the model, with the conditions of x.
    x : states [B, ...] at time t, float32 or float64.
    t : time of the states; alpha may be 0.
    lowest : level sigma/alpha below which the model is not evaluated.

    Returns
    -------
    The size, positive. For a model whose data estimate is 0 or not finite, the size is 1/160 of the level at t, or 1.
    """
    schedule, index = ode.schedule, few(x)
    part, states = ode.subset(index, len(x)), x[index.to(x.device)]
    with torch.no_grad():
        if schedule.sigma(t) == 0:
            return _usable(_rms(states) / schedule.alpha(t), 1.0)
        if schedule.alpha(t) > 0:
            level = schedule.noise_to_signal(t)
            return _usable(_followed(part, states, t, lowest), level / _FIRST)
        return _from_noise(part, states, t, lowest)


def size_of_noise(ode: ProbabilityFlowODE, noise: Tensor) -> float:
    """The size of the data at the end of the trajectories from standard normal noise [B, ...] of unstated level."""
    index, t = few(noise), ode.schedule.t_noise
    with torch.no_grad():
        states = ode.schedule.sigma(t) * noise[index.to(noise.device)]
        return _from_noise(ode.subset(index, len(noise)), states.to(ode.device or noise.device), t, 0.0)


def smallest_level(schedule: Schedule, size: float) -> float:
    """The smallest level sigma/alpha at which a model of this schedule is evaluated, for data of a size."""
    return max(lowest_level(schedule, _FLOOR * size), schedule.noise_to_signal(schedule.t_data))


def _from_noise(ode: ProbabilityFlowODE, x: Tensor, t: float, lowest: float) -> float:
    """The size by integrations from alpha = 0, where the first level must be far above a size that is not known yet."""
    schedule, size = ode.schedule, 1.0
    # Noise and score say nothing about the data where alpha is 0.
    mean = torch.zeros_like(x) if ode.prediction in ("noise", "score") else ode.data(x, t)
    for _ in range(_PASSES):
        s = schedule.t_of_noise_to_signal(_START * size)
        found = _usable(_followed(ode, ddim_step(schedule, x, mean, t, s), s, lowest), size)
        size, last = found, size
        if abs(size - last) <= _SETTLED * size:
            break
    return size


def _followed(ode: ProbabilityFlowODE, x: Tensor, t: float, lowest: float) -> float:
    """Root mean square of the data estimate at the end of a coarse integration from x at time t."""
    schedule = ode.schedule
    for _ in range(_MOST):
        data, level = ode.data(x, t), schedule.noise_to_signal(t)
        size = _rms(data)
        if not math.isfinite(size) or level <= max(_CLEAN * size, lowest):
            break
        s = schedule.t_of_noise_to_signal(max(level / 2, lowest))
        x, t = ddim_step(schedule, x, data, t, s), s
    return size


def _rms(x: Tensor) -> float:
    # Relative to the largest component: squares of small numbers would underflow in float32.
    largest = float(x.abs().max())
    return largest * float((x / largest).square().mean().sqrt()) if 0 < largest < math.inf else largest


def _usable(size: float, otherwise: float) -> float:
    return size if 0 < size < math.inf else otherwise
