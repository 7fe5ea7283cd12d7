"""Errors of final states: root mean square differences, peak signal-to-noise ratios, and their standard errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["flat", "paired_ratio", "psnr", "psnr_with_error", "rmse", "rmse_with_error"]


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


def psnr(x: Tensor, reference: Tensor, peak: float = 2.0) -> float:
    """Compute the peak signal-to-noise ratio 20 log10(peak / RMSE) in decibels, over all samples.

    The RMSE is :func:`rmse`, one for the whole batch. The mean of the ratios of single images is another number, and is
    larger.

    Parameters
    ----------
    x, reference : states [B, ...] of one shape, any dtype and device.
    peak : range of the values; 2 for images in [-1, 1].

    Returns
    -------
    The ratio in decibels, infinite for equal states.

    Raises
    ------
    InputError : the shapes differ, or `peak` is not positive.
    """
    return psnr_with_error(x, reference, peak)[0]


def psnr_with_error(x: Tensor, reference: Tensor, peak: float = 2.0) -> tuple[float, float]:
    """Compute the peak signal-to-noise ratio of :func:`psnr` and its standard error over samples, to first order.

    Parameters
    ----------
    x, reference : states [B, ...] of one shape, any dtype and device.
    peak : range of the values; 2 for images in [-1, 1].

    Returns
    -------
    The ratio and its standard error in decibels. For equal states they are infinite and 0. With a single sample, the
    standard error is NaN.

    Raises
    ------
    InputError : as for :func:`rmse_with_error`, or `peak` is not positive.
    """
    if not peak > 0 or math.isinf(peak):
        raise InputError(f"the peak of a signal is a positive number, 2 for images in [-1, 1]; got {peak!r}.")
    value, error = rmse_with_error(x, reference)
    if value == 0:
        return math.inf, 0.0
    return 20 * math.log10(peak / value), 20 / math.log(10) * error / value


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
