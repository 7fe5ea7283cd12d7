"""Published tables of grids, each optimized for one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import GridError, UnknownNameError, unknown_name
from ..schedules import Discrete, Schedule
from .base import as_count, as_grid, as_schedule, times_of
from .origin import made_for

__all__ = ["ALIGN_YOUR_STEPS", "PublishedGrid", "align_your_steps"]


@dataclass(frozen=True)
class PublishedGrid:
    """Noise levels sigma/alpha of a grid of ten steps, and its integer timesteps where the model has them."""

    levels: tuple[float, ...]
    timesteps: tuple[int, ...] = ()


ALIGN_YOUR_STEPS = {
    "deepfloyd": PublishedGrid(
        (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
        (995, 920, 811, 686, 555, 418, 315, 174, 109, 12, 0),
    ),
    "sd15": PublishedGrid(
        (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    ),
    "sdxl": PublishedGrid(
        (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
        (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
    ),
    "svd": PublishedGrid((700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)),
}
"""Levels: Sabour et al. [2024, table 3]. Timesteps: their quickstart guide; DeepFloyd's are the nearest to its levels."""

# The tables are rounded: 0.006 is 0.0064 at DeepFloyd's timestep 0. Another model's schedule is off by factors.
_ROUNDING = 0.1


def align_your_steps(
    n: int = 10, model: str = "sd15", *, schedule: Schedule | None = None, to_data: bool = True
) -> Tensor:
    """n steps of Align Your Steps, levels optimized for one model [Sabour et al. 2024, table 3].

    Parameters
    ----------
    n : steps. The published grids have 10; other counts interpolate the logarithm of the levels at equal distances in the
        index, as the authors do.
    model : ``"sd15"`` (Stable Diffusion 1.5), ``"sdxl"``, ``"deepfloyd"`` (DeepFloyd IF, first stage) or ``"svd"`` (Stable
        Video Diffusion).
    schedule : schedule of the returned times; by default EDM, where the time is the level. On the model's own ``Discrete``
        schedule, a grid of 10 steps has exactly the published timesteps.
    to_data : end at the data, as diffusers does; else at the last published level, as the authors do.

    Returns
    -------
    float64 [n + 1] times.

    Raises
    ------
    UnknownNameError : no levels are published for that model.
    GridError : n < 1, or a discrete schedule that is not the model's.
    """
    n, published = as_count(n, "step"), _of_model(model)
    knots, timesteps = published.levels, published.timesteps if isinstance(schedule, Discrete) else ()
    if isinstance(schedule, Discrete) and timesteps:
        knots = _levels_of_timesteps(published, schedule, model)
    places = [divmod(i * (len(knots) - 1), n) for i in range(n if to_data else n + 1)]
    levels = [knots[k] * (knots[k + 1] / knots[k]) ** (r / n) if r else knots[k] for k, r in places]
    times = times_of(levels, schedule, to_data).tolist()
    for i, (k, r) in enumerate(places):
        if timesteps and r == 0:  # without the rounding of the way through the levels
            times[i] = float(timesteps[k])
    return made_for(as_grid(times), as_schedule(schedule))


def _of_model(model: str) -> PublishedGrid:
    if model not in ALIGN_YOUR_STEPS:
        error = unknown_name("model with published Align Your Steps levels", model, ALIGN_YOUR_STEPS)
        raise UnknownNameError(f"{error} The levels do not carry over to other models: use karras or log_snr there.")
    return ALIGN_YOUR_STEPS[model]


def _levels_of_timesteps(published: PublishedGrid, schedule: Discrete, model: str) -> tuple[float, ...]:
    """The schedule's levels at the published timesteps; GridError unless the schedule is the published model's."""
    total = len(schedule.alphas_cumprod)
    if published.timesteps[0] < total:
        levels = tuple(schedule.noise_to_signal(float(t)) for t in published.timesteps)
        if all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(levels, published.levels, strict=True)):
            return levels
    first, last = (schedule.noise_to_signal(float(t)) for t in (total - 1, 0))
    raise GridError(
        f"the timesteps published for {model!r} stand on its own schedule, sigma/alpha from {published.levels[0]:g} to "
        f"{published.levels[-1]:g}; this one has {total} timesteps from {first:g} to {last:g}. Pass that model's "
        "alphas_cumprod, or use discrete(...)."
    )
