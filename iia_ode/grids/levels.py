"""Grids of noise levels: n levels between two ends, spaced by a rule, at the times where a schedule has them."""

from __future__ import annotations

import math

import scipy  # a subpackage is imported at its first use
from torch import Tensor

from ..errors import GridError
from ..schedules import Schedule
from .base import as_count, as_positive, as_range, spaced, times_of

__all__ = ["beta", "beta_quantile", "karras", "linear_log", "log_snr", "polyexponential"]


def karras(
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels equidistant in sigma^(1/rho), then 0 [Karras et al. 2022, eq. 5].

    Parameters
    ----------
    n : noise levels; a solver with one evaluation a step makes n evaluations.
    sigma_min, sigma_max : last and first level of sigma/alpha, the noise level in EDM's sense for every schedule. By default
        the ``known_levels`` of the schedule, if a user stated them; otherwise 0.002 and 80, limited to the range of the
        schedule and to the timesteps of a ``Discrete`` schedule. A level less than 1% beyond a known level is replaced by the
        known level.
    rho : exponent, 7 in EDM. A larger value puts more levels near the data; 1 makes the levels equidistant in sigma.
    schedule : schedule of the returned times; by default EDM, where the time is the level.
    to_data : append the data (sigma = 0).

    Returns
    -------
    float64 [n + 1] times ([n] without the data). For n = 1 the level is `sigma_max`.

    Raises
    ------
    GridError : n < 1, levels out of order, outside the range of the schedule or its known levels, or rho not positive.
    """
    n, (low, high), rho = as_count(n, "level"), as_range(sigma_min, sigma_max, schedule), as_positive(rho, "rho")
    try:
        a, b = high ** (1 / rho), low ** (1 / rho)
        levels = spaced(n, low, high, lambda u: (a + u * (b - a)) ** rho)
    except OverflowError:
        raise GridError(f"rho = {rho:g} is too small: sigma_max^(1/rho) is not a number. Use rho = 7.") from None
    return times_of(levels, schedule, to_data)


def log_snr(
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels equidistant in log-SNR, then 0; arguments as for :func:`karras` [Lu et al. 2022].

    The levels are a geometric sequence of sigma/alpha. Other names of the grid: exponential (k-diffusion, diffusers),
    log-linear.
    """
    n, (low, high) = as_count(n, "level"), as_range(sigma_min, sigma_max, schedule)
    a, b = math.log(high), math.log(low)
    return times_of(spaced(n, low, high, lambda u: math.exp(a + u * (b - a))), schedule, to_data)


def polyexponential(
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 1.0,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels polynomial in log sigma, then 0; the other arguments as for :func:`karras` [k-diffusion].

    With r = 1 - i / (n - 1),  log sigma_i = log sigma_min + r^rho (log sigma_max - log sigma_min).

    Parameters
    ----------
    rho : exponent; 1 gives :func:`log_snr`. A larger value puts more levels near `sigma_min`, a smaller value near
        `sigma_max`.
    """
    n, (low, high), rho = as_count(n, "level"), as_range(sigma_min, sigma_max, schedule), as_positive(rho, "rho")
    a, b = math.log(low), math.log(high)
    return times_of(spaced(n, low, high, lambda u: math.exp(a + (1 - u) ** rho * (b - a))), schedule, to_data)


def linear_log(
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    crossover: float | None = None,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels, first linear in sigma, then logarithmic, then 0; the other arguments as for :func:`karras`.

    The levels are equidistant in u(sigma) = sigma/c - 1 above the crossover c, and in u(sigma) = log(sigma/c) below it. u and
    its slope are continuous at c, so the spacing is continuous too. The name has no published definition; this definition
    has the linear and the logarithmic grid as its limits.

    Parameters
    ----------
    crossover : c, a level of sigma/alpha; by default each part has half of the intervals. A c of `sigma_max` or more gives
        :func:`log_snr`; a c of `sigma_min` or less gives the grid linear in sigma, :func:`karras` with rho = 1.
    """
    n, (low, high) = as_count(n, "level"), as_range(sigma_min, sigma_max, schedule)
    if crossover is None:
        # Equal parts: high/c - 1 = log(c/low). With y = high/c that is y + log y = 1 + log(high/low), Wright's omega.
        c = high / float(scipy.special.wrightomega(1 + math.log(high) - math.log(low)))
    else:
        c = min(max(as_positive(crossover, "crossover"), low), high)  # beyond its limits it changes nothing
    a, b = high / c - 1, math.log(low) - math.log(c)

    def level(fraction: float) -> float:
        u = a + fraction * (b - a)
        return c * (1 + u) if u > 0 else c * math.exp(u)

    return times_of(spaced(n, low, high, level), schedule, to_data)


def beta(
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    a: float = 0.6,
    b: float = 0.6,
    *,
    schedule: Schedule | None = None,
    to_data: bool = True,
) -> Tensor:
    """n noise levels at quantiles of a Beta distribution, then 0; the other arguments as for :func:`karras`.

    sigma_i = sigma_min + F^-1(1 - i / (n - 1)) (sigma_max - sigma_min), F the distribution function of Beta(a, b). diffusers
    samples in this form (``use_beta_sigmas``) after Lee et al. [2024]. The form of the paper, on integer timesteps, is
    ``discrete(n, schedule, "beta")``.

    Parameters
    ----------
    a, b : shape parameters of the distribution. Values below 1 crowd the levels at both ends; (1, 1) is linear in sigma.
    """
    n, (low, high) = as_count(n, "level"), as_range(sigma_min, sigma_max, schedule)
    a, b = as_positive(a, "a"), as_positive(b, "b")
    return times_of(spaced(n, low, high, lambda u: low + beta_quantile(1 - u, a, b) * (high - low)), schedule, to_data)


def beta_quantile(probability: float, a: float = 0.6, b: float = 0.6) -> float:
    """F^-1 of Beta(a, b), as ``scipy.stats.beta.ppf``, without the import of scipy.stats."""
    return float(scipy.special.betaincinv(a, b, probability))
