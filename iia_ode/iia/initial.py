"""Where a fit starts from: the time, the states, and the smallest level that a model may be asked at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import GridError, InputError
from ..ode import ProbabilityFlowODE
from ..plan import check_start
from ..schedules import Discrete, Schedule

__all__ = ["initial_states", "more_states", "smallest_level", "start_time"]

_NOISIEST = 80.0  # where a run starts on a schedule that has no noisiest state of its own
_OWN = 0x9E3779B9  # added to the seed of noise that nobody gave: far from those people count up from 0, within 32 bits


def smallest_level(schedule: Schedule) -> float:
    """The smallest level that a model of this schedule may be asked at."""
    first = (
        schedule.noise_to_signal(0.0) if isinstance(schedule, Discrete) else schedule.noise_to_signal(schedule.t_data)
    )
    return max(0.002, first)


def start_time(ode: ProbabilityFlowODE, sigma_max: float | None) -> float:
    """The time to start from."""
    schedule = ode.schedule
    if sigma_max is not None:
        if not (isinstance(sigma_max, int | float) and 0 < sigma_max < math.inf):
            raise GridError(f"sigma_max is a positive level sigma/alpha, got {sigma_max!r}.")
        return schedule.t_of_noise_to_signal(float(sigma_max))
    if schedule.alpha(schedule.t_noise) == 0 and ode.prediction in ("noise", "score"):
        return schedule.t_of_noise_to_signal(_NOISIEST)
    return schedule.t_noise


def initial_states(
    ode: ProbabilityFlowODE, noise: Tensor | None, shape: tuple[int, ...] | None, samples: int, t: float, seed: int
) -> Tensor:
    """Initial states from noise, or from a shape."""
    if (noise is None) == (shape is None):
        raise InputError("a fit needs either noise=, draws of standard normal noise, or shape=, of one sample.")
    sigma = ode.schedule.sigma(t)
    if noise is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((samples, *(shape or ())), generator=generator, device="cpu")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise InputError(f"noise must be a float tensor [B, ...], got {getattr(noise, 'shape', type(noise).__name__)}.")
    size = float(noise.double().square().mean().sqrt())
    if 0.5 < size < 2.0:
        noise = sigma * noise
    elif not 0.8 * sigma < size < 1.25 * sigma + 1:
        raise InputError(
            f"noise must be draws of the standard normal distribution, or states at the noisiest level {sigma:g}: its root "
            f"mean square is {size:.3g}."
        )
    check_start(ode, noise)
    return noise


def more_states(
    ode: ProbabilityFlowODE, x: Tensor, t: float, draws: int, seed: int
) -> tuple[ProbabilityFlowODE, Tensor]:
    """The ODE and the states of `draws` samples: the given ones, and then new noise under the same conditions in turn."""
    missing = draws - len(x)
    if missing <= 0:
        return ode, x
    # The generator drops what a seed has above 32 bits.
    generator = torch.Generator("cpu").manual_seed((_OWN + seed) % 2**32)
    noise = torch.randn((missing, *x.shape[1:]), generator=generator, dtype=x.dtype, device="cpu")
    index = torch.arange(draws, device="cpu") % len(x)
    return ode.subset(index, len(x)), torch.cat([x, ode.schedule.sigma(t) * noise.to(x.device)])
