"""Sliced Wasserstein distance between two sets of samples [Rabin et al. 2012; Bonneel et al. 2015]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from ..noise import generator_of
from .endpoint import flat

__all__ = ["sliced_wasserstein"]

_TOGETHER = 256  # directions whose projections are in memory at a time


def sliced_wasserstein(x: Tensor, reference: Tensor, *, projections: int = 1024, seed: int = 0) -> float:
    """Compute the sliced 2-Wasserstein distance between two sets of samples, in float64.

    SW_2^2 is the mean over unit vectors theta of the squared 2-Wasserstein distance between the projections theta . x of both
    sets. The distance between two sets of numbers is exact, by sorting. Directions are random and orthogonal in groups of up
    to D, which lowers the variance.

    The unit is that of :func:`~iia_ode.metrics.rmse`: the distance between a set and the same set shifted by v is
    |v| / sqrt(D). If `projections` is a multiple of D, the distance is at most the RMSE of any pairing of the samples.

    The distance of finite sets is biased upwards: two sets of the same distribution have a positive distance, which falls
    with their size. The distance between two halves of a data set shows the size of this bias.

    Parameters
    ----------
    x, reference : samples [N, ...] and [M, ...] with D components each, any dtype and device.
    projections : number of directions, at least 1.
    seed : seed of the directions. Distances are comparable if they have the same seed.

    Returns
    -------
    The distance.

    Raises
    ------
    InputError : the samples differ in shape, or there are none; they are complex or no tensors; or `projections` is below 1.
    """
    for name, samples in (("samples", x), ("reference samples", reference)):
        if not isinstance(samples, Tensor) or samples.is_complex():
            raise InputError(f"{name} to compare are real torch.Tensors, got {type(samples).__name__}.")
        if samples.ndim == 0 or samples.numel() == 0:
            raise InputError(f"{name} need shape [N, ...] with components, got {list(samples.shape)}.")
    if x.shape[1:] != reference.shape[1:]:
        raise InputError(f"cannot compare samples of shapes {list(x.shape[1:])} and {list(reference.shape[1:])}.")
    check_whole("projections", projections, least=1)
    first, second = (flat(samples.cpu().double()) for samples in (x, reference))
    total = 0.0
    for directions in torch.split(_directions(first.shape[1], projections, seed), _TOGETHER):
        total += float(_squared_distances(first @ directions.T, second @ directions.T).sum())
    return math.sqrt(total / projections)


def _directions(dimension: int, count: int, seed: int) -> Tensor:
    """Draw unit vectors [count, dimension], orthogonal in groups of up to `dimension`."""
    generator, groups = generator_of(seed), []
    for start in range(0, count, dimension):
        size = min(dimension, count - start)
        normal = torch.randn((dimension, size), generator=generator, dtype=torch.float64, device="cpu")
        groups.append(torch.linalg.qr(normal).Q.T)
    return torch.cat(groups)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distances between the columns of a [N, P] and b [M, P]."""
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    n, m = len(a), len(b)
    # Quantile functions of samples are step functions, constant between neighboring multiples of 1/n and of 1/m.
    # Whole numbers, in units of 1/(n m), keep the steps exact.
    steps = torch.unique(torch.cat([m * torch.arange(n + 1), n * torch.arange(m + 1)]))
    weight = steps.diff().double() / (n * m)
    begin = steps[:-1]
    squares: Tensor = weight @ (a[begin // m] - b[begin // n]).square()
    return squares
