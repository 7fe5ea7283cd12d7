"""Conditioning, guidance and the views of an ODE: what reaches the model, and how often it is called."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import EPS, F64, close, every_prediction, normal
from torch import Tensor, nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE


class Recorder(nn.Module):
    """A linear conditional network that keeps what it was called with."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.calls: list[dict[str, object]] = []

    def forward(self, x: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        self.calls.append({"x": x.detach(), "t": t, **conditioning})
        y = self.scale * x
        c = conditioning.get("c")
        return y + c.reshape(-1, 1).to(y) if isinstance(c, Tensor) else y
