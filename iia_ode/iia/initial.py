"""Where a fit starts from: the time, the states, and the smallest level that a model may be asked at."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import DuplicateWarning, GridError, InputError
from ..files import bytes_of
from ..ode import ProbabilityFlowODE
from ..plan import check_start
from ..schedules import Discrete, Schedule
from .gather import Alone, Gather
from .origin import conditions_digest

__all__ = [
    "distinct",
    "fresh_states",
    "held_out_of",
    "initial_states",
    "more_states",
    "smallest_level",
    "start_time",
    "warn_of_copies",
]

_NOISIEST = 80.0  # where a run starts on a schedule that has no noisiest state of its own
_OWN = 0x9E3779B9  # added to the seed of noise that nobody gave: far from those people count up from 0, within 32 bits
_FRESH = 0x7F4A7C15  # the same for the noise of the last choice


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
        if not isinstance(shape, tuple | list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"shape is that of one sample, a tuple of positive whole numbers, got {shape!r}.")
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((samples, *shape), generator=generator, device="cpu")
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


def distinct(
    ode: ProbabilityFlowODE, x: Tensor, first: int = 0, total: int | None = None, gather: Gather | None = None
) -> Tensor:
    """Which samples of the whole batch do not repeat an earlier one, the same state under the same conditions: [total] bool.

    Parameters
    ----------
    ode, x : the samples of this process, [B, ...].
    first, total, gather : the place of the first of them in the whole batch, the size of that, and how to hear of the other
        processes; by default this one has the whole batch.
    """
    total, gather = len(x) if total is None else total, gather or Alone()

    def shared(marks: Iterable[int]) -> Tensor:
        """Everyone's."""
        whole = torch.zeros(total, dtype=torch.float64, device="cpu")
        whole[first : first + len(x)] = torch.tensor(list(marks), dtype=torch.float64, device="cpu")
        return gather.sum(whole)

    states = shared(_mark(bytes_of(state)) for state in x.cpu())
    if len(set(states.tolist())) == total:
        return torch.ones(total, dtype=torch.bool, device="cpu")
    parts = (ode.subset(slice(i, i + 1), len(x)) for i in range(len(x)))
    conditions = shared(_mark(conditions_digest(part).encode()) for part in parts)
    earliest: dict[tuple[float, float], int] = {}
    for i, mark in enumerate(zip(states.tolist(), conditions.tolist(), strict=True)):
        earliest.setdefault(mark, i)
    found = torch.zeros(total, dtype=torch.bool, device="cpu")
    found[list(earliest.values())] = True
    return found


def _mark(data: bytes | memoryview) -> int:
    """A hash of 52 bits: float64, in which processes share numbers, holds it exactly."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big") >> 4


def warn_of_copies(copies: int, draws: int, *, stacklevel: int) -> None:
    """Say that some draws are left out."""
    warnings.warn(
        f"{copies} of {draws} draws of noise repeat others, under the same conditions, and are left out: what is fitted to "
        "one of them would be judged by its copy. Give draws that differ.",
        DuplicateWarning,
        stacklevel=stacklevel,
    )


def held_out_of(draws: int, share: float) -> int:
    """How many of the draws are held out: about that share, one at least, and not all."""
    if not 0 < share < 1:
        raise InputError(f"held_out is a share of the noise between 0 and 1, got {share!r}.")
    return min(max(1, round(share * draws)), draws - 1)


def more_states(
    ode: ProbabilityFlowODE, x: Tensor, t: float, draws: int, held_out: float, seed: int
) -> tuple[ProbabilityFlowODE, Tensor]:
    """The ODE and the states of `draws` samples: after each given one, new noise under the same condition.

    What is held out of the given ones stays so, with its conditions; so do halves of what is fitted to.
    """
    if draws <= len(x):
        return ode, x
    held, own = held_out_of(draws, held_out), held_out_of(len(x), held_out)
    index = torch.cat([_in_turn(draws - held, len(x) - own), len(x) - own + _in_turn(held, own)])
    new = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), index[1:] == index[:-1]])
    states = x.cpu()[index]
    states[new] = _drawn(ode, x, t, int(new.sum()), _OWN + seed)
    return ode.subset(index, len(x)), states.to(x.device)


def fresh_states(
    ode: ProbabilityFlowODE, x: Tensor, t: float, draws: int, first: int, seed: int
) -> tuple[ProbabilityFlowODE, Tensor]:
    """The ODE and the states of `draws` samples of new noise, under the conditions of those given from `first` on in turn."""
    index = first + _in_turn(draws, len(x) - first)
    return ode.subset(index, len(x)), _drawn(ode, x, t, draws, _FRESH + seed).to(x.device)


def _drawn(ode: ProbabilityFlowODE, x: Tensor, t: float, draws: int, seed: int) -> Tensor:
    """Noise of the level at t, like x, on the host."""
    generator = torch.Generator("cpu").manual_seed(seed % 2**32)  # which drops what a seed has above 32 bits
    return ode.schedule.sigma(t) * torch.randn((draws, *x.shape[1:]), generator=generator, dtype=x.dtype, device="cpu")


def _in_turn(n: int, own: int) -> Tensor:
    """Each of 0 ... own - 1 about n / own times, one after the other."""
    return torch.arange(n, device="cpu") * own // n
