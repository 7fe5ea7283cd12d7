"""Several networks as one model, each for a range of noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..schedules import Schedule
from ..transforms import readable, transformed

__all__ = ["ByLevel", "by_level"]

_SLACK = 1e-6  # relative rounding of a level on the way through a time and back


def by_level(networks: Mapping[float, Callable[..., Tensor]]) -> ByLevel:
    """Make one model of several networks, each for a range of noise levels: experts such as Wan 2.2, or a refiner.

    Parameters
    ----------
    networks : networks by the lowest level sigma/alpha of their range; the lowest range begins at 0. A range includes its
        lowest level. ``schedule.noise_to_signal(t)`` is the level of a time.

    Returns
    -------
    A model for :class:`~iia_ode.ProbabilityFlowODE`. The ODE chooses the network. All networks have the same prediction type,
    conditions and told time. The fingerprint covers all networks and their ranges. For times in a tensor on a device, or with
    several ranges in one batch, every network is evaluated on the whole batch.

    Raises
    ------
    InputError : the levels are not finite numbers with 0 as the lowest, a network is not callable, or the networks differ in
        the told time or in the shape of a state.

    Examples
    --------
    >>> flow = iia.FlowMatching()
    >>> model = iia.ode.by_level({0.0: low_noise, flow.noise_to_signal(0.875): high_noise})
    >>> ode = iia.ProbabilityFlowODE(model, flow, "velocity", time="1000 sigma")
    """
    return ByLevel(networks)


class ByLevel(nn.Module):
    """See :func:`by_level`."""

    def __init__(self, networks: Mapping[float, Callable[..., Tensor]]) -> None:
        super().__init__()
        if not isinstance(networks, Mapping) or not all(callable(network) for network in networks.values()):
            raise InputError("by_level takes networks by the lowest level of each: {0.0: low_noise, 7.0: high_noise}.")
        try:
            found = sorted(((float(level), network) for level, network in networks.items()), key=lambda pair: pair[0])
        except (TypeError, ValueError) as error:
            raise InputError(f"the levels of by_level are numbers sigma/alpha: {error}.") from error
        self.levels = tuple(level for level, _ in found)
        if not found or self.levels[0] != 0.0 or not all(map(math.isfinite, self.levels)):
            raise InputError(f"the levels of by_level begin at 0 and are finite, got {list(networks)}.")
        self.networks = tuple(network for _, network in found)
        for k, network in enumerate(self.networks):
            if isinstance(network, nn.Module):
                self.add_module(str(k), network)
        self.model_time = self._common("model_time")
        self.state_shape = self._common("state_shape")

    def _common(self, name: str) -> Any:
        values = [getattr(network, name, None) for network in self.networks]
        if any(value != values[0] for value in values):
            raise InputError(f"the networks of by_level have different values of {name}: {values}.")
        return values[0]

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Raise InputError: an ODE chooses the network, because the level of a told time t [B] is not known here."""
        raise InputError(
            "an ODE chooses the network of by_level: pass this model to ProbabilityFlowODE, and wrap the networks inside."
        )

    def at(self, schedule: Schedule, t: Tensor | float) -> Callable[..., Tensor]:
        """The network for time t of the schedule, a number or a tensor [] or [B]; for several ranges, all networks joined."""
        if isinstance(t, Tensor):
            level = schedule.noise_to_signal(t)
            if transformed() or not level.is_cpu or not readable(level):
                return self._joined(level)
            found = {self._index(v) for v in level.flatten().tolist()}
            return self.networks[found.pop()] if len(found) == 1 else self._joined(level)
        return self.networks[self._index(schedule.noise_to_signal(t))]

    def _index(self, level: float) -> int:
        return sum(level >= start * (1 - _SLACK) for start in self.levels[1:])

    def _joined(self, level: Tensor) -> Callable[..., Tensor]:
        def every(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
            rows = (level.expand(len(x)) if not level.ndim else level.repeat(len(x) // len(level))).to(x.device)
            rows = rows.reshape(-1, *[1] * (x.ndim - 1))
            out = self.networks[0](x.clone(), t.clone(), **conditions)
            for start, network in zip(self.levels[1:], self.networks[1:], strict=True):
                out = torch.where(rows >= start * (1 - _SLACK), network(x.clone(), t.clone(), **conditions), out)
            return out

        return every
