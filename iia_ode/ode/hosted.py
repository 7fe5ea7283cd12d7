"""States in float64 on the host for a model on a device without float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ProbabilityFlowODE
from .wrapped import Wrapped

__all__ = ["Hosted", "in_float64"]


def in_float64(ode: ProbabilityFlowODE, x: Tensor) -> tuple[ProbabilityFlowODE, Tensor]:
    """The ODE and a copy of the states x [B, ...] for arithmetic in float64: on the device of x if the device has float64.

    Otherwise the states are on the host, and the ODE carries each evaluation to the device and back.
    """
    if _has_float64(x.device):
        return ode, x.to(torch.float64, copy=True)
    return Hosted(ode, x.device, x.dtype), x.cpu().to(torch.float64)


class Hosted(Wrapped):
    """See :func:`in_float64`."""

    def __init__(self, inner: ProbabilityFlowODE, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(inner)
        self.at = device, dtype

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The output on the device, for states x [B, ...] on the host; on the host."""
        return self.inner.output(x.to(*self.at), t).cpu().to(x.dtype)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the model's arithmetic on the device."""
        return self.inner.compute_dtype(x.to(self.at[1]))


def _has_float64(device: torch.device) -> bool:
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype == torch.float64
    except (TypeError, RuntimeError):  # which of the two depends on the device
        return False
