"""Error metrics: root mean square differences of states, and their standard errors."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["flat", "paired_ratio", "rmse", "rmse_with_error"]


def rmse(x: Tensor, reference: Tensor) -> float:
    """Compute the root mean square error per component, over all samples, in float64.

    Parameters
    ----------
    x, reference : states [B, ...] of one shape, any dtype and device.

    Returns
    -------
    The RMSE, in units of the state.

    Raises
    ------
    InputError : the shapes differ.
    """
    return rmse_with_error(x, reference)[0]


def rmse_with_error(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compute the RMSE and its standard error over samples, by the delta method on the mean of squared errors.

    Parameters
    ----------
    x, reference : states [B, ...] of one shape, any dtype and device.

    Returns
    -------
    The RMSE per component and its standard error, in units of the state. With a single sample, the standard error is NaN,
    or 0 if the error is 0.

    Raises
    ------
    InputError : the shapes differ, there are no samples, or the states are complex or no tensors.
    """
    if not isinstance(x, Tensor) or not isinstance(reference, Tensor):
        raise InputError(f"states to compare are torch.Tensors, got {type(x).__name__} and {type(reference).__name__}.")
    if x.shape != reference.shape:
        raise InputError(f"cannot compare states of shapes {list(x.shape)} and {list(reference.shape)}.")
    if x.numel() == 0 or x.ndim == 0:
        raise InputError(f"states to compare need samples [B, ...] with components, got shape {list(x.shape)}.")
    if x.is_complex() or reference.is_complex():
        raise InputError("states to compare are real: pass torch.view_as_real(x) of complex ones.")
    squares = flat(x.cpu().double() - reference.cpu().double()).square().mean(dim=1)
    value = float(squares.mean().sqrt())
    spread = float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else torch.nan
    return value, spread / (2 * value) if value > 0 else 0.0


def flat(x: Tensor) -> Tensor:
    """States [B, ...] as rows [B, D]; D is 1 for a state [B] of numbers."""
    return x.unsqueeze(1).flatten(1)


def paired_ratio(squares: Tensor, others: Tensor) -> tuple[float, float]:
    """Compute the ratio of two RMSEs on the same samples, and its standard error to first order.

    The samples are paired: a sample with a large error in both does not widen the standard error.

    Parameters
    ----------
    squares, others : mean square errors of the same samples, [B], each with a positive mean over samples.

    Returns
    -------
    The ratio sqrt(sum(squares) / sum(others)) and its standard error.
    """
    squares, others = squares.cpu().double(), others.cpu().double()
    value = float((squares.sum() / others.sum()).sqrt())
    # Each sample's contribution to the logarithm of the squared ratio. The sum of their squares estimates its variance.
    return value, 0.5 * value * float((squares / squares.sum() - others / others.sum()).square().sum().sqrt())
