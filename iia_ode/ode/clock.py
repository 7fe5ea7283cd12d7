"""The time that a model is told: the time of the schedule, a timestep, a noise level, or a function of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from ..errors import InputError, UnknownNameError, unknown_name
from ..schedules import Discrete, Schedule
from ..transforms import number_of

__all__ = ["TIMES", "Told", "checked_rounding", "checked_time", "probe_times", "recorded_time", "same_time", "told"]

Rounding: TypeAlias = Literal["nearest", "floor"]
Time: TypeAlias = str | Callable[[Tensor], Tensor]
"""A name, or a function of times [B]."""

TIMES: dict[str, Callable[[Schedule, Any], Any]] = {
    "index": lambda schedule, t: t,
    "sigma": lambda schedule, t: schedule.sigma(t),
    "1000 sigma": lambda schedule, t: 1000.0 * schedule.sigma(t),
    "1 - sigma": lambda schedule, t: 1.0 - schedule.sigma(t),
    "c_noise": lambda schedule, t: -0.25 * schedule.lam(t),
}
"""The told time as a function of schedule and time, by name."""

_ROUNDINGS = ("nearest", "floor")
_SLACK = 1e-4  # a time just below a whole number is the whole number, rounded on its way through a level
_PROBES = 9  # times at which a function is recorded
_FARTHEST = 6.0  # log-SNR beyond which a function is not recorded


@dataclass(frozen=True)
class Told:
    """The record of the time that a model is told.

    Attributes
    ----------
    name : a name such as ``"1000 sigma"``; ``"t"`` for the time itself, and ``"function"`` for a function.
    rounding : ``"nearest"`` or ``"floor"`` for whole numbers; None without rounding.
    values : of a function, the values at nine levels of the schedule before any rounding; None where the function failed.
    """

    name: str
    rounding: Literal["nearest", "floor"] | None = None
    values: tuple[float | None, ...] = ()

    def __str__(self) -> str:
        shown = self.name
        if self.values:
            low, high = (f"{v:.4g}" if v is not None else "?" for v in (self.values[-1], self.values[0]))
            shown = f"a function from {high} at the noise to {low} at the data"
        return shown if self.rounding is None else f"{shown}, whole numbers"


def checked_time(time: object, schedule: Schedule) -> Time | None:
    """Return `time`, the option of an ODE, after a check.

    Raises
    ------
    UnknownNameError : no such name.
    InputError : neither a name nor a function; or ``"index"`` on a schedule without timesteps.
    """
    if time is None or (callable(time) and not isinstance(time, type)):
        return cast("Time | None", time)
    if not isinstance(time, str):
        raise InputError(
            f"time must be None, one of {', '.join(map(repr, TIMES))}, or a function of a tensor of times [B], got {time!r}."
        )
    if time not in TIMES:
        raise unknown_name("time of a model", time, list(TIMES))
    if time == "index" and not isinstance(schedule, Discrete):
        raise InputError(
            f"time='index' is the timestep of a Discrete schedule, and the schedule is {type(schedule).__name__}: use "
            "Discrete(alphas_cumprod), time='1000 sigma' for a flow model, or a function of the time."
        )
    return time


def checked_rounding(rounding: object) -> Rounding | None:
    """Return `rounding`, if None or the name of a rounding; otherwise raise UnknownNameError."""
    if rounding is not None and rounding not in _ROUNDINGS:
        raise unknown_name("time_rounding", rounding, _ROUNDINGS)
    return cast("Rounding | None", rounding)


def told(time: Time | None, rounding: Rounding | None, schedule: Schedule, t: Tensor | float) -> Tensor | float:
    """The time that a model is told at time t of the schedule.

    Parameters
    ----------
    time, rounding : checked; see :class:`~iia_ode.ProbabilityFlowODE`.
    schedule : the schedule.
    t : a number, or a tensor [] or [B].

    Returns
    -------
    A number, or a tensor [], [1] or [B] on the device of t. Nothing on a device is read. A derivative by t passes through the
    rounding unchanged.
    """
    value: Tensor | float
    if isinstance(t, Tensor):
        t = _wide(t)
    if time is None:
        value = t
    elif isinstance(time, str):
        value = TIMES[time](schedule, t)
    else:
        value = _called(time, t)
    return value if rounding is None else _rounded(value, rounding)


def exact_time(schedule: Schedule, t: Tensor | float) -> Tensor | float:
    """A time on the host in full precision: as a number if no derivative passes through it or through the schedule."""
    found = number_of(t)
    if isinstance(found, float) and isinstance(t, Tensor) and not schedule.is_of_numbers:
        return torch.tensor(found, dtype=torch.float64, device="cpu")
    return found


def _wide(t: Tensor) -> Tensor:
    """Times in float64 on the host. On another device, float64 times stay float64 and other times become float32."""
    return t.to(torch.float64 if t.is_cpu or t.dtype == torch.float64 else torch.float32)


def _called(function: Callable[[Tensor], Tensor], t: Tensor | float) -> Tensor | float:
    """The value of a function at time t. The function always receives a tensor with a batch axis."""
    times = torch.tensor([t], dtype=torch.float64, device="cpu") if not isinstance(t, Tensor) else t.reshape(-1)
    try:
        value: object = function(times)
    except Exception as error:  # of any kind: the function is the caller's
        raise InputError(f"the function time failed at t = {t}: {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.shape not in ((), times.shape) or value.is_complex():
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"the function time must map a tensor of times [B] to a tensor [B] of real numbers, got {found} for "
            f"{list(times.shape)}."
        )
    if isinstance(t, Tensor):
        return value.reshape(t.shape) if value.numel() == t.numel() else value
    on_host = value.is_cpu and not value.requires_grad and value.is_floating_point()
    return float(value) if on_host else value


def _rounded(value: Tensor | float, rounding: Rounding) -> Tensor | float:
    if not isinstance(value, Tensor):
        return float(round(value)) if rounding == "nearest" else float(math.floor(value + _SLACK))
    if not value.is_floating_point():
        return value
    whole = value.round() if rounding == "nearest" else (value + _SLACK).floor()
    return value + (whole - value).detach()  # exact, and the derivative is that of the smooth time


# ---- records ---------------------------------------------------------------------------------------------------------


def recorded_time(time: Time | None, rounding: Rounding | None, schedule: Schedule) -> Told:
    """The record of the time that a model is told."""
    if time is None or isinstance(time, str):
        return Told(time or "t", rounding)
    return Told("function", rounding, _values(time, schedule))


def same_time(one: Told, other: Told, schedule: Schedule) -> bool:
    """Whether two records tell a model the same time, apart from rounding."""
    if one.name == other.name != "function":
        return True
    ours, theirs = (
        v.values or _values(None if v.name == "t" else v.name, schedule) if v.name in {"t", "function", *TIMES} else ()
        for v in (one, other)
    )
    return len(ours) == len(theirs) and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9))
        for a, b in zip(ours, theirs, strict=True)
    )


def _values(time: Time | None, schedule: Schedule) -> tuple[float | None, ...]:
    """The told times at nine levels of the schedule, equidistant in log-SNR from noise to data."""
    return tuple(_value(time, schedule, t) for t in probe_times(schedule, _PROBES, _FARTHEST))


def probe_times(schedule: Schedule, n: int, farthest: float) -> list[float]:
    """Times at which a function of time is recorded: n, equidistant in log-SNR from noise to data.

    Parameters
    ----------
    schedule : the schedule.
    n : number of times.
    farthest : log-SNR beyond which there is no time.
    """
    noise, data = (max(-farthest, min(farthest, schedule.lam(t))) for t in (schedule.t_noise, schedule.t_data))
    lams = torch.linspace(noise, data, n, dtype=torch.float64, device="cpu").tolist()
    return [schedule.t_of_lam(lam) for lam in lams]


def _value(time: Time | None, schedule: Schedule, t: float) -> float | None:
    try:
        value = float(told(time, None, schedule, t))
    except (InputError, UnknownNameError):
        return None
    return value if math.isfinite(value) else None
