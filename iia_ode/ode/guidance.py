"""The scale of classifier-free guidance: a number, a number per sample, or a function of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_number
from ..errors import InputError
from ..schedules import Schedule
from .clock import probe_times
from .conditions import check_tree

__all__ = [
    "Interval",
    "Scale",
    "Scales",
    "check_branches",
    "check_guidance",
    "check_scales",
    "checked_scale",
    "guided",
    "recorded",
    "scale_at",
]

Function: TypeAlias = Callable[[Any], Any]
Scale: TypeAlias = float | Tensor | Function
"""A number, a tensor [B] or [1], or a function of the time."""

_PROBES = 33  # times at which a function is recorded
_FARTHEST = 12.0  # log-SNR beyond which a function is not recorded


@dataclass(frozen=True)
class Scales:
    """The record of a guidance scale that is no single number.

    Attributes
    ----------
    kind : ``"per sample"`` or ``"per time"``.
    values : the smallest and the largest scale of the samples; or the scale at 33 times of the schedule, equidistant in
        log-SNR from noise to data, None where the function failed.
    """

    kind: Literal["per sample", "per time"]
    values: tuple[float | None, ...]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest scale."""
        known = [v for v in self.values if v is not None] or [math.nan]
        return min(known), max(known)

    def __str__(self) -> str:
        low, high = self.range
        return f"{low:g} to {high:g} {self.kind}"


@dataclass(frozen=True)
class Interval:
    """A guidance scale within an interval of noise levels, and 1 outside [Kynkaanniemi et al. 2024].

    At a single time outside of the interval, only the condition is evaluated, and guidance costs nothing.

    Parameters
    ----------
    scale : w within the interval.
    low, high : the interval, levels sigma/alpha with low < level <= high. EDM's levels are the levels of the paper.
    schedule : the schedule of the ODE, for the conversion of times to levels.

    Raises
    ------
    InputError : the scale is not finite, or the levels are not 0 <= low < high.

    Examples
    --------
    >>> ode = iia.ProbabilityFlowODE(..., guidance_scale=iia.ode.Interval(2.0, 0.28, 2.9, schedule))
    """

    scale: float
    low: float
    high: float
    schedule: Schedule

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        low = check_number("low", self.low, least=0)
        if not isinstance(self.high, Real) or not low < self.high:
            raise InputError(f"an interval of guidance needs 0 <= low < high, got {self.low!r} and {self.high!r}.")
        if not isinstance(self.schedule, Schedule):
            raise InputError(f"schedule must be the schedule of the ODE, got {type(self.schedule).__name__}.")

    def __call__(self, t: Tensor | float) -> Tensor | float:
        """The scale at time t, a number or a tensor [] or [B]."""
        if isinstance(t, Tensor):
            levels = self.schedule.noise_to_signal(t)
            inside = (levels > self.low) & (levels <= self.high)
            return torch.where(inside, torch.full_like(levels, self.scale), torch.ones_like(levels))
        return self.scale if self.low < self.schedule.noise_to_signal(t) <= self.high else 1.0


def guided(condition: Tensor, null: Tensor, scale: float | Tensor, rescale: float) -> Tensor:
    """The guided output [B, ...] of two branches, by ``null + scale (condition - null)`` with a share of rescaling.

    In the dtype of the state: a half-precision model must not lose the difference of its two branches.
    """
    found = torch.lerp(null, condition, scale)
    return _rescaled(found, condition, rescale) if rescale else found


def _rescaled(guided: Tensor, condition: Tensor, share: float) -> Tensor:
    """Move the standard deviation of each sample of `guided` [B, ...] to the standard deviation of `condition`, by a share."""
    if guided.ndim < 2:
        return guided
    axes = tuple(range(1, guided.ndim))
    ours, theirs = (
        torch.linalg.vector_norm(v - v.mean(axes, True), dim=axes, keepdim=True) for v in (guided, condition)
    )
    ratio = theirs / torch.where(ours > 0, ours, torch.ones_like(ours))
    found: Tensor = guided * (1 - share + share * ratio)
    return found


def checked_scale(value: object) -> Scale:
    """Return `value` as a guidance scale, after a check.

    Raises
    ------
    InputError : neither a finite number, nor a tensor [B] of finite numbers, nor a function.
    """
    value = _as_tensor(value)
    if isinstance(value, Tensor):
        numeric = not (value.is_complex() or value.dtype == torch.bool) and value.ndim <= 1 and value.numel() > 0
        if not numeric or (not value.is_meta and not bool(torch.isfinite(value).all())):
            raise _unusable(f"a tensor {list(value.shape)} of {value.dtype}" if not numeric else f"{value}")
        if isinstance(value, nn.Parameter):  # an ODE does not own the parameter
            with torch.enable_grad():
                value = value.view_as(value)
        return value if value.ndim or value.requires_grad else float(value)
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if callable(value) and not isinstance(value, type):
        return value
    raise _unusable(repr(value))


def check_guidance(conditioning: Mapping[str, Any], unconditional: Mapping[str, Any], scale: Scale) -> None:
    """Raise InputError if a condition cannot be split with the samples, or if guidance lacks a null condition."""
    check_tree(conditioning)
    check_tree(unconditional)
    if not isinstance(scale, Real) or scale != 1.0:
        check_branches(conditioning, unconditional)


def check_branches(conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> None:
    """Raise InputError unless the null condition has the keywords of the condition."""
    if not unconditional or unconditional.keys() != conditioning.keys():
        raise InputError(
            "guidance needs conditioning= and unconditional= with the same keywords, got "
            f"{sorted(conditioning)} and {sorted(unconditional)}."
        )


def check_scales(scale: Scale, batch: int) -> None:
    """Raise InputError unless a scale per sample has `batch` entries, or a single entry."""
    if isinstance(scale, Tensor) and scale.ndim and len(scale) not in (1, batch):
        raise InputError(f"the guidance scale has {len(scale)} entries for a batch of {batch}: give one per sample.")


def _unusable(found: str) -> InputError:
    return InputError(
        "the guidance scale must be a finite number, a tensor [B] of finite numbers (one per sample), or a function of the "
        f"time, got {found}."
    )


def scale_at(scale: Scale, t: Tensor | float, x: Tensor) -> float | Tensor:
    """The scale at time t for states x [B, ...]: a number, or a tensor like x that broadcasts against x.

    Nothing on a device is read. A function receives t itself, a number or a tensor [] or [B]; a function that cannot take a
    tensor [B] is called for each entry.
    """
    if isinstance(scale, float):  # nearly always, and asking for numbers in general takes far longer
        return scale
    if isinstance(scale, Real):
        return float(scale)
    value = scale if isinstance(scale, Tensor) else _called(scale, t)
    if isinstance(value, float):
        return value
    value = value.to(x.dtype).to(x.device, non_blocking=True)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


def _called(scale: Function, t: Tensor | float) -> float | Tensor:
    """A function's scale at time t: a number, or a tensor [], [1] or [B] where t is a tensor."""
    try:
        value = _of_each(scale, t) if isinstance(t, Tensor) and t.ndim else scale(t)
    except Exception as error:  # of any kind: the function is the caller's
        raise InputError(
            f"the guidance scale {_name(scale)} failed at t = {t}: {type(error).__name__}: {error}"
        ) from error
    value = _as_tensor(value)
    if isinstance(value, Tensor) and (value.shape in ((), (1,)) or (isinstance(t, Tensor) and value.shape == t.shape)):
        on_host = not isinstance(t, Tensor) and value.is_cpu and not value.requires_grad
        return _finite(scale, t, value.item()) if on_host else value
    return _finite(scale, t, value)


def _of_each(scale: Function, t: Tensor) -> Any:
    try:
        return scale(t)
    except (TypeError, ValueError, RuntimeError):  # it branches on the time, or takes numbers
        return torch.stack([torch.as_tensor(scale(u), dtype=t.dtype, device=t.device) for u in t])


def _as_tensor(value: Any) -> Any:
    """An array of real numbers as a tensor; any other value unchanged."""
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else value


def _finite(scale: Function, t: object, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise _odd(scale, t, f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value))
    return float(value)


def _odd(scale: Function, t: object, found: str) -> InputError:
    return InputError(f"the guidance scale {_name(scale)} must return one finite number, got {found} at t = {t}.")


def _name(scale: Function) -> str:
    return str(getattr(scale, "__qualname__", type(scale).__name__))


def recorded(scale: Scale, schedule: Schedule) -> float | Scales:
    """The record of a scale; a function is called with a number at each recorded time."""
    if isinstance(scale, Real):
        return float(scale)
    if isinstance(scale, Tensor):
        values = scale.detach().cpu().double()
        return Scales("per sample", (float(values.min()), float(values.max())))
    times = probe_times(schedule, _PROBES, _FARTHEST)
    return Scales("per time", tuple(_known(cast(Function, scale), t) for t in times))


def _known(scale: Function, t: float) -> float | None:
    try:
        value = _called(scale, t)
    except InputError:
        return None
    return float(value)
