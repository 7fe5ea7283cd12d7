"""How far samples are from what they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["rmse", "rmse_with_error"]


def rmse(x: Tensor, reference: Tensor) -> float:
    """Root mean square difference per component, over all samples; computed in float64."""
    return rmse_with_error(x, reference)[0]


def rmse_with_error(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """The RMSE, and its standard error over samples [B, ...] (by the delta method on the mean of squared errors).

    Raises
    ------
    InputError : the shapes differ.
    """
    if x.shape != reference.shape:
        raise InputError(f"cannot compare states of shapes {list(x.shape)} and {list(reference.shape)}.")
    squares = (x.double() - reference.to(x.device).double()).square().flatten(1).mean(dim=1)
    value = float(squares.mean().sqrt())
    spread = float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else torch.nan
    return value, spread / (2 * value) if value > 0 else 0.0
