"""Time grids: float64 tensors from noise to data.

Any strictly monotone tensor of times is a grid. The functions of this module make the usual grids: noise levels spaced by a
rule (:data:`GRIDS`), times spaced by a rule, integer timesteps, and tables published for one model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .levels import beta, karras, linear_log, log_snr, polyexponential
from .published import ALIGN_YOUR_STEPS, align_your_steps
from .times import cut, discrete, quadratic, uniform

__all__ = [
    "ALIGN_YOUR_STEPS",
    "GRIDS",
    "align_your_steps",
    "beta",
    "cut",
    "discrete",
    "karras",
    "linear_log",
    "log_snr",
    "polyexponential",
    "quadratic",
    "uniform",
]

GRIDS: dict[str, Callable[..., Tensor]] = {
    "beta": beta,
    "karras": karras,
    "linear_log": linear_log,
    "log_snr": log_snr,
    "polyexponential": polyexponential,
}
"""Families of grids by name: functions ``make(n, sigma_min, sigma_max, schedule=...)`` of a count and two noise levels."""
