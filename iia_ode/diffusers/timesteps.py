"""The clock of a pipeline: times of a schedule as the timesteps and sigmas that a pipeline reads from its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, InputError, MismatchError
from ..ode.clock import Rounding, Time, told
from ..plan import Plan
from ..schedules import EDM, VE, FlowMatching, Schedule
from .translation import grid_of, schedule_of, time_of

__all__ = ["Clock", "Order", "check_given", "check_told", "order_of"]


@dataclass(frozen=True)
class Clock:
    """The map from times of a schedule to the timesteps of a pipeline.

    Attributes
    ----------
    schedule : the schedule of the pipeline's states.
    time : the told time, as for :class:`~iia_ode.ProbabilityFlowODE`.
    scale : timesteps per unit of time, for schedulers whose timesteps are multiples of the time; None for ``"c_noise"``.
    rounding : ``"nearest"`` or ``"floor"`` for whole timesteps; None without rounding.
    """

    schedule: Schedule
    time: Time | None
    scale: float | None
    rounding: Rounding | None = None

    @classmethod
    def of(cls, scheduler: Any, whole: bool) -> Clock:
        """The clock of a scheduler of diffusers.

        Raises
        ------
        InputError : the pipeline's states are no states alpha x_0 + sigma noise of unit size.
        """
        schedule, time = schedule_of(scheduler), time_of(scheduler)
        if isinstance(schedule, EDM | VE):
            raise InputError(
                f"{type(scheduler).__name__} scales the states and the outputs of its network by rules of its own, and a plan "
                "cannot take its place: use iia_ode.sample on an ODE of the network, see iia_ode.diffusers.denoiser."
            )
        flow = isinstance(schedule, FlowMatching)
        total = float(scheduler.config.get("num_train_timesteps", 1000))
        scale = None if time == "c_noise" else total if flow and time is not None else 1.0
        return cls(schedule, time, scale, None if not whole else "floor" if flow else "nearest")

    def timestep(self, t: float) -> float:
        """The timestep at time t."""
        return float(told(self.time, self.rounding, self.schedule, t))

    def time_of(self, timestep: Tensor) -> Tensor:
        """The times of timesteps, without rounding."""
        return self.schedule.t_of_lam(-4.0 * timestep) if self.scale is None else timestep / self.scale

    def timesteps(self, times: Sequence[float], device: Any = None) -> Tensor:
        """The timesteps at the times of evaluations [N]: whole numbers with a rounding, else float32."""
        values = [self.timestep(t) for t in times]
        return torch.tensor(values, dtype=torch.float32 if self.rounding is None else torch.int64, device=device)

    def sigmas(self, times: Sequence[float]) -> Tensor:
        """The levels at times [N], float32 on the host: sigma of a flow, else sigma/alpha."""
        flow = isinstance(self.schedule, FlowMatching)
        level = self.schedule.sigma if flow else self.schedule.noise_to_signal
        return torch.tensor([abs(level(t)) for t in times], dtype=torch.float32, device="cpu")

    def noised(self, x: Tensor, noise: Tensor, timesteps: Tensor, times: Sequence[float]) -> Tensor:
        """alpha x + sigma noise at timesteps [B] or [1]; nothing is read from a device.

        Parameters
        ----------
        x, noise : data and noise [B, ...].
        timesteps : timesteps. A timestep of an entry of `times` stands for this entry; another timestep is converted.
        times : times of the evaluations.

        Raises
        ------
        InputError : no timestep.
        """
        if timesteps.numel() == 0:
            raise InputError(
                "the pipeline has left no timestep to noise an image for, because strength times num_inference_steps is "
                "below 1. Raise strength."
            )
        told = timesteps.to(x.device, torch.float32).reshape(-1)
        own = self.timesteps(times, x.device).to(torch.float32)
        distance, index = (told[:, None] - own).abs().min(dim=1)
        factors = []
        for level in (self.schedule.alpha, self.schedule.sigma):
            known = torch.tensor([level(t) for t in times], dtype=torch.float32).to(x.device)
            factor = torch.where(distance < _NEAR, known[index], level(self.time_of(told)).to(torch.float32))
            factors.append(factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)))
        return factors[0] * x + factors[1] * noise


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the timesteps of a run. For entries of `timesteps`, nothing is read from a device.

    Attributes
    ----------
    timesteps : the timesteps on the device of the pipeline [N].
    values : the same numbers on the host.
    """

    timesteps: Tensor
    values: tuple[float, ...]

    def index(self, timestep: Tensor | float) -> int:
        """The index of a timestep: its own index for an entry of `timesteps`, else the index of the first nearest value."""
        found = self._found(timestep)
        return self._nearest(float(timestep)) if found is None else found

    def check(self, timestep: Tensor | float, k: int, name: str) -> None:
        """Raise InputError if the timestep is known to differ from timestep k; `name` is the subject of the message."""
        if k >= len(self.values):
            raise InputError(
                f"{name} has made its {len(self.values)} evaluations: call set_timesteps before the next run."
            )
        found = self._found(timestep)
        if found is not None and self.values[found] != self.values[k] and not self._is_rounded(timestep, k):
            raise InputError(
                f"a step out of order: {name} expects timestep {self.values[k]:g} at evaluation {k}, got {float(timestep):g}. "
                "Run all timesteps in order, and call set_timesteps before each run."
            )

    def _is_rounded(self, timestep: Tensor | float, k: int) -> bool:
        """Whether a timestep is timestep k in half precision, where several timesteps may be one number."""
        if not isinstance(timestep, Tensor) or timestep.dtype not in (torch.bfloat16, torch.float16):
            return False
        return float(torch.tensor(self.values[k], device="cpu").to(timestep.dtype)) == float(timestep)

    def _found(self, timestep: Tensor | float) -> int | None:
        """The index of a timestep, or None where only a read from the device could tell."""
        if isinstance(timestep, Tensor):
            own, size = self.timesteps, self.timesteps.element_size()
            if timestep.numel() != 1:
                return None
            offset = timestep.data_ptr() - own.data_ptr()
            if timestep.dtype == own.dtype and timestep.device == own.device and 0 <= offset < size * len(own):
                return offset // size
            if not timestep.is_cpu:
                return None
        return self._nearest(float(timestep))

    def _nearest(self, timestep: float) -> int:
        return min(range(len(self.values)), key=lambda k: abs(self.values[k] - timestep))


_NEAR = 1e-3  # between timesteps that are one, rounded to float32
_SAME = 1e-4  # relative difference of levels that are one, rounded by a user
_WHOLE = 2e-3  # relative difference from equidistant values, in timesteps cut to whole numbers


def check_given(given: Mapping[str, Any], timesteps: Tensor, sigmas: Tensor, name: str, clock: Clock) -> None:
    """Raise MismatchError if a pipeline hands over other timesteps or sigmas than the plan `name` has.

    Most flow pipelines hand over sigmas that nobody asked for. Sigmas that are equidistant, or equidistant in log-SNR or in
    its quantiles, count as the default of a pipeline. The defaults of pipelines with ``invert_sigmas`` (Mochi) have no such
    form, and are not checked.

    Parameters
    ----------
    given : the timesteps and sigmas of the pipeline, by name.
    timesteps, sigmas : of the plan, [N] and [N + 1].
    name : subject of the message.
    clock : clock of the pipeline.
    """
    schedule = clock.schedule
    flow = isinstance(schedule, FlowMatching)
    if isinstance(schedule, FlowMatching) and schedule.reverse:
        return
    for key, own in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given.get(key) is None:
            continue
        theirs = torch.as_tensor(given[key], dtype=torch.float64, device="cpu").flatten()
        mine = own[: len(theirs)].to("cpu", torch.float64)
        if theirs.shape == mine.shape and torch.allclose(theirs, mine, rtol=_SAME, atol=_SAME):
            continue
        if flow and _is_default(theirs / (clock.scale or 1.0) if key == "timesteps" else theirs):
            continue
        shown = ", ".join(f"{v:.4g}" for v in own.tolist())
        raise MismatchError(
            f"{name} has the {key} {shown}, and the pipeline asks for {', '.join(f'{v:.4g}' for v in theirs.tolist())}: "
            f"omit {key}, and pass num_inference_steps={len(timesteps)}."
        )


def check_told(scheduler: Any, given: Mapping[str, Any], clock: Clock) -> None:
    """Raise MismatchError if a pipeline tells its network other timesteps than those of the noise levels.

    CogView4 and GLM-Image pass both timesteps and sigmas. The scheduler shifts the sigmas alone.

    Parameters
    ----------
    scheduler : the scheduler of the pipeline, which stays as it is.
    given : arguments of ``set_timesteps``.
    clock : clock of the scheduler.
    """
    if not {"sigmas", "timesteps"} <= given.keys():
        return
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**given)
    except Exception as error:  # of any kind: the scheduler is not ours
        raise GridError(f"{type(own).__name__}.set_timesteps failed: {type(error).__name__}: {error}") from error
    told, ours = own.timesteps.double().cpu(), clock.timesteps(grid_of(own).tolist()[:-1]).double()
    if told.shape != ours.shape or not torch.allclose(told, ours, rtol=_WHOLE, atol=_WHOLE * float(told.abs().max())):
        raise MismatchError(
            f"this pipeline tells its network the timesteps {', '.join(f'{t:.4g}' for t in told.tolist())}, and the noise "
            f"levels of {type(own).__name__} have the timesteps {', '.join(f'{t:.4g}' for t in ours.tolist())}: a plan cannot "
            "take the place of this scheduler. Use iia_ode.sample on an ODE of the network, see iia_ode.diffusers.denoiser."
        )


def _is_default(sigmas: Tensor) -> bool:
    """Whether sigmas [N] of a flow look like the default of a pipeline."""
    steps = torch.arange(len(sigmas), dtype=torch.float64, device="cpu") / len(sigmas)
    inside = sigmas[1:].clamp(1e-12, 1 - 1e-12)  # the first is 1, or a bound
    return _is_affine(sigmas, steps) or any(
        _is_affine(torch.logit(inside), base[1:]) for base in (steps, torch.special.ndtri(steps))
    )


def _is_affine(values: Tensor, base: Tensor) -> bool:
    """Whether values [N] are an affine function of `base` [N]."""
    columns = torch.stack([torch.ones_like(base), base], dim=1)
    fitted = columns @ torch.linalg.lstsq(columns, values[:, None]).solution
    return bool((fitted[:, 0] - values).abs().max() <= _WHOLE * values.abs().max()) if len(values) > 2 else True


def order_of(plan: Plan) -> int:
    """The number of evaluations per step, if all steps agree (the last step may have fewer); otherwise 1.

    Pipelines count ``num_inference_steps`` in units of this order.
    """
    *rest, last = plan.evaluations_per_step
    order = max(rest, default=last)
    return order if order > 1 and set(rest) <= {order} and 0 < last <= order else 1
