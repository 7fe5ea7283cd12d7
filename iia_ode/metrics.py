"""How far samples are from what they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["paired_ratio", "rmse", "rmse_with_error"]


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


def paired_ratio(squares: Tensor, others: Tensor) -> tuple[float, float]:
    """The ratio of two root mean squares of the same samples, and its standard error to first order.

    Parameters
    ----------
    squares, others : mean square errors [B] of the same samples, each with a positive mean; what is hard for both does not
        count as noise.
    """
    squares, others = squares.double(), others.double()
    value = float((squares.sum() / others.sum()).sqrt())
    # What each sample adds to the logarithm of the ratio: the sum of its squares estimates the variance.
    return value, 0.5 * value * float((squares / squares.sum() - others / others.sum()).square().sum().sqrt())
