"""A network of diffusers as a model of this library."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..ode.clock import Time

__all__ = ["Denoiser", "denoiser"]


def denoiser(module: nn.Module, *, time: Time | None = "index") -> Denoiser:
    """Make a model of a UNet or a transformer of diffusers.

    Parameters
    ----------
    module : network, called by keywords as ``module(sample=x, timestep=t, **conditions)``, with the network's own names for
        state and time. The order of the arguments does not matter (DiT, SD3, Flux).
    time : time that the network is told, as ``time`` of :class:`~iia_ode.ProbabilityFlowODE`; by default the timestep of a
        ``Discrete`` schedule. The ODE reads the option from the model. ``time_of(scheduler)`` is the time of a scheduler.

    Returns
    -------
    A module that returns one tensor of the shape of x, without channels of a learned variance. Weights, dtype and fingerprint
    are those of `module`. A direct call takes the network's own time. In an ODE, the ODE converts the time of the schedule.

    Raises
    ------
    InputError : `module` is no network with a timestep.

    Examples
    --------
    >>> schedule = iia.diffusers.schedule_of(pipe.scheduler)
    >>> ode = iia.ProbabilityFlowODE(iia.diffusers.denoiser(pipe.unet), schedule, "noise")
    """
    return Denoiser(module, time)


class Denoiser(nn.Module):
    """See :func:`denoiser`."""

    def __init__(self, module: nn.Module, time: Time | None) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise InputError(f"denoiser takes a network of diffusers, such as pipe.unet, got {type(module).__name__}.")
        self.module = module
        self.model_time = time
        self._first, self._time = _arguments(module)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output for states x [B, ...] and its own times t [B], in the shape of x."""
        out = self.module(**{self._first: x, self._time: t}, **conditions)
        sample = getattr(out, "sample", out)
        if isinstance(sample, tuple | list):
            sample = sample[0]
        if not isinstance(sample, Tensor):
            raise InputError(f"the network returned {type(out).__name__}, which has no sample.")
        if x.ndim > 2 and sample.ndim == x.ndim and sample.shape[1] == 2 * x.shape[1]:
            sample = sample.chunk(2, dim=1)[0]  # the other half is a learned variance
        return sample


def _arguments(module: nn.Module) -> tuple[str, str]:
    """The names of the arguments of a network for the state and for the time."""
    for candidate in _unwrapped(module):
        names = list(inspect.signature(candidate.forward).parameters)
        time = next((name for name in ("timestep", "timesteps", "timestep_ratio", "t") if name in names), None)
        if time is not None:
            return names[0], time
    raise InputError(
        f"{type(module).__name__} has no argument 'timestep': write a model(x, t, **conditions) of your own around it."
    )


def _unwrapped(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and the modules inside of torch.compile, DataParallel and adapters."""
    yield module
    for name in ("_orig_mod", "module", "base_model", "model"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            yield from _unwrapped(inner)
