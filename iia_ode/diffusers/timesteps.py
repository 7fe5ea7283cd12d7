"""The clock of a pipeline: times of a schedule as the timesteps and sigmas that a pipeline reads from its scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ode.clock import Rounding, told
from ..plan import Plan
from ..schedules import Discrete, FlowMatching, Schedule

__all__ = ["Clock", "Order", "order_of"]


@dataclass(frozen=True)
class Clock:
    """The map from times of a schedule to the timesteps of a pipeline.

    Attributes
    ----------
    schedule : the schedule of the pipeline's states.
    time : name of the map: ``"index"`` for the timesteps of a table, ``"1000 sigma"`` for flows.
    rounding : ``"nearest"`` or ``"floor"`` for whole timesteps; None without rounding.
    """

    schedule: Schedule
    time: str
    rounding: Rounding | None = None

    @classmethod
    def of(cls, schedule: Schedule, config: Any, whole: bool) -> Clock:
        """The clock of the scheduler with a configuration.

        Raises
        ------
        InputError : states on the schedule have another scale than the states of a pipeline, or a flow has not 1000 timesteps.
        """
        if isinstance(schedule, Discrete):
            return cls(schedule, "index", "nearest" if whole else None)
        if isinstance(schedule, FlowMatching) and config.get("num_train_timesteps", 1000) == 1000:
            return cls(schedule, "1000 sigma", "floor" if whole else None)
        raise InputError(
            f"a pipeline's state is alpha x_0 + sigma noise on a table of timesteps or on a flow of 1000 timesteps, and the "
            f"schedule of {config.get('_class_name', 'this scheduler')} is {schedule}: use iia_ode.sample on an ODE of the "
            "network, see iia_ode.diffusers.denoiser."
        )

    def timestep(self, t: float) -> float:
        """The timestep at time t."""
        return float(told(self.time, self.rounding, self.schedule, t))

    def time_of(self, timestep: Tensor) -> Tensor:
        """The times of timesteps, without rounding."""
        return timestep if self.time == "index" else timestep / 1000.0

    def timesteps(self, times: Sequence[float], device: Any = None) -> Tensor:
        """The timesteps at the times of evaluations [N]: whole numbers with a rounding, else float32."""
        values = [self.timestep(t) for t in times]
        return torch.tensor(values, dtype=torch.float32 if self.rounding is None else torch.int64, device=device)

    def sigmas(self, times: Sequence[float]) -> Tensor:
        """The levels at times [N], float32 on the host: sigma of a flow, else sigma/alpha."""
        flow = isinstance(self.schedule, FlowMatching)
        level = self.schedule.sigma if flow else self.schedule.noise_to_signal
        return torch.tensor([level(t) for t in times], dtype=torch.float32, device="cpu")

    def noised(self, x: Tensor, noise: Tensor, timesteps: Tensor, times: Sequence[float]) -> Tensor:
        """alpha x + sigma noise at timesteps [B] or [1]; nothing is read from a device.

        Parameters
        ----------
        x, noise : data and noise [B, ...].
        timesteps : timesteps; the nearest time of `times` with this timestep counts, or else the time of the timestep.
        times : times of the evaluations.
        """
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
    """The order of the timesteps of a run, without reads from a device wherever the pipeline hands back entries of `timesteps`.

    Attributes
    ----------
    timesteps : the timesteps on the device of the pipeline [N].
    values : the same numbers on the host.
    """

    timesteps: Tensor
    values: tuple[float, ...]

    def index(self, timestep: Tensor | float) -> int:
        """The index of a timestep: of this very entry of `timesteps`, or else of the first nearest value."""
        found = self._found(timestep)
        return self._nearest(float(timestep)) if found is None else found

    def check(self, timestep: Tensor | float, k: int, name: str) -> None:
        """Raise InputError if the timestep is known to be another one than number k; `name` is the subject of the message."""
        if k >= len(self.values):
            raise InputError(
                f"{name} has made its {len(self.values)} evaluations: call set_timesteps before the next run."
            )
        found = self._found(timestep)
        if found is not None and self.values[found] != self.values[k]:
            raise InputError(
                f"a step out of order: {name} expects timestep {self.values[k]:g} at evaluation {k}, got {float(timestep):g}. "
                "Run all timesteps in order, and call set_timesteps before each run."
            )

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


def order_of(plan: Plan) -> int:
    """Evaluations in every step but the last, which may have fewer; 1 for a plan with other counts.

    Pipelines count ``num_inference_steps`` in steps of this many evaluations.
    """
    *rest, last = plan.evaluations_per_step
    order = max(rest, default=last)
    return order if order > 1 and set(rest) <= {order} and 0 < last <= order else 1
