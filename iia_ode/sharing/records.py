"""Records for the reader of a shared fit: versions and hardware, and errors at guidance scales and of schedulers in use."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

__all__ = ["InUse", "Served", "surroundings"]


@dataclass(frozen=True)
class Served:
    """Errors of a fit at a guidance scale.

    Attributes
    ----------
    scale : the guidance scale.
    error : root mean square endpoint error of the fit; None if not finite.
    rival : name of the best solver without a fit at the same number of evaluations; empty without one.
    rival_error : root mean square endpoint error of the rival; None without one.
    """

    scale: float
    error: float | None
    rival: str
    rival_error: float | None

    @property
    def good(self) -> bool:
        """Whether the fit is at least as good as the best solver without a fit."""
        return self.error is not None and (self.rival_error is None or self.error <= self.rival_error)


@dataclass(frozen=True)
class InUse:
    """Errors of a fit and of the scheduler in use, at no more evaluations, on the same samples.

    Attributes
    ----------
    name : name of the scheduler, with its options.
    evaluations : evaluations of the scheduler.
    error : root mean square endpoint error of the scheduler; None if not finite.
    fit_error : root mean square endpoint error of the fit; None if not finite.
    samples : number of samples.
    """

    name: str
    evaluations: int
    error: float | None
    fit_error: float | None
    samples: int


def surroundings(device: torch.device) -> dict[str, str]:
    """Versions and hardware of a fit on a device, by name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": f"{device.type} ({name})"}
