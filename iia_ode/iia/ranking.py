"""Paired comparison of solvers by the errors of their final states: rankings by Cauchy means, and the guard of a fit.

Endpoint errors have heavy tails: the few samples that end in another mode of the data can make up nearly the whole mean
square. A comparison of plain means would depend on these few samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import scipy  # a subpackage is imported at its first use
import torch
from torch import Tensor

from ..metrics import paired_ratio

__all__ = ["Range", "Verdict", "cauchy_mean", "ranked", "samples_against", "shrunk_ratio", "too_few", "verdict"]

T = TypeVar("T")

_SPREAD = 0.25  # prior standard deviation of the logarithm of a ratio of plain means
_MEAN_ERRORS = 3.0  # standard errors by which the mean square must be lower; heavy tails want more than the usual two
_SIGN_CHANCE = NormalDist().cdf(-2.0)  # level of the sign test; counts have no tails
_UNSEEN = 3.0  # rule of three: a failure of rate 3/n is missed by n samples with probability 5%
_FAR = 9.0  # squared distance from the judged final states, relative to their largest, beyond which a final state is a stray


# ---- rankings --------------------------------------------------------------------------------------------------------


def cauchy_mean(errors: Tensor, scale: float) -> float:
    """Root of the mean Cauchy loss, scale^2 log(1 + error^2 / scale^2), of errors [B]; infinite if an error is not finite.

    Errors far below `scale` count by their squares, errors beyond it logarithmically. An infinite scale gives the root mean
    square.
    """
    squares = errors.double().square()
    if not bool(torch.isfinite(squares).all()):
        return math.inf
    if math.isfinite(scale):
        squares = scale * scale * (squares / (scale * scale)).log1p()
    return math.sqrt(float(squares.mean()))


def ranked(items: Sequence[T], errors: Sequence[Tensor], *, outliers_too: bool = False) -> list[T]:
    """The items, best first, by the Cauchy mean of their errors.

    The scale of the Cauchy loss is four times the lowest median of all items.

    Parameters
    ----------
    items : solvers, grids or any other candidates.
    errors : errors of each item on the same samples, [B] each.
    outliers_too : multiply each Cauchy mean by the item's RMSE ratio to the item with the lowest Cauchy mean. The ratio is
        shrunk towards 1 according to its standard error; see :func:`shrunk_ratio`. For a last choice: a solver with more
        outliers must then be much better on the other samples.
    """
    if not items:
        return []
    medians = [float(e.median()) for e in errors]
    scale = 4 * min((m for m in medians if math.isfinite(m)), default=math.inf)
    scale = scale if scale > 0 else math.inf
    means = [cauchy_mean(e, scale) for e in errors]
    order = sorted(range(len(items)), key=means.__getitem__)
    if outliers_too:
        best = errors[order[0]]
        scores = [m * shrunk_ratio(e, best) if math.isfinite(m) else m for m, e in zip(means, errors, strict=True)]
        order = sorted(order, key=scores.__getitem__)
    return [items[i] for i in order]


def shrunk_ratio(errors: Tensor, to: Tensor) -> float:
    """RMSE ratio of paired errors [B], shrunk towards 1 according to its standard error.

    A single sample in another mode may make up most of a plain mean, and says little about how rare such samples are. The
    shrinkage corresponds to a normal prior on the logarithm of the ratio, with standard deviation 0.25.
    """
    squares, others = errors.double().square(), to.double().square()
    if not float(squares.sum()) > 0 or not float(others.sum()) > 0:
        return 1.0 if float(squares.sum()) == float(others.sum()) else math.sqrt(float(squares.sum() / others.sum()))
    ratio, error = paired_ratio(squares, others)
    return float(ratio ** (_SPREAD**2 / (_SPREAD**2 + (error / ratio) ** 2)))


# ---- the guard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Finding of the guard.

    Attributes
    ----------
    base, fit : root mean square errors on held-out samples; NaN without any.
    kept : whether the fit is kept.
    why : the statistics and their limits, for the middle of a message.
    needed : number of samples at which the gain would be clear, if all samples have the statistics of the judged samples; None
        for a clear gain, and where no number is enough.
    """

    base: float
    fit: float
    kept: bool
    why: str
    needed: int | None = None


def verdict(squares: Tensor, held_out: int, relative: float) -> Verdict:
    """Decide whether a fit is clearly better than its base.

    A fit is kept if its mean square error on held-out samples is no larger than the base's, and if, over all samples,

    - the final states of the fit are nearer on more samples than chance explains: an exact sign test at 2.3%, in which ties
      count for the base;
    - the mean square error of the fit is lower by three standard errors of the paired difference (for few samples, by the
      quantile of Student's t with the same probability); and
    - the sum of squares of the fit is lower by more than three times the largest square of one sample, of fit or base. With
      this margin the fit stays better even if a share 3/n of new samples is as bad as the worst sample seen.

    There are two exceptions. A fit with errors of the size of rounding over all samples is kept. Where the base is not finite
    on every sample, a finite fit is kept if the fit ends nearer on at least half of all samples; samples without a finite base
    count for the fit.

    All samples include the training samples, which favor the fit a little.

    Parameters
    ----------
    squares : per sample, the mean square over components of the base's error, of the fit's error and of the true final state,
        float64 [n, 3] on the host.
    held_out : number of held-out samples, the last ones, at least 1. The same samples may have chosen ridges and steps.
    relative : size of rounding, relative to the true final states.
    """
    n = len(squares)
    base, fit, _ = squares[n - held_out :].mean(dim=0).sqrt().tolist()
    by_base, by_fit, exact = squares.unbind(dim=1)
    rounding = relative * float(exact.mean().sqrt())
    gaps = by_base - by_fit
    nearer = int((gaps.where(by_base.isfinite(), torch.inf) > 0).sum())
    needed = _fewest(n)
    gain, largest = float(gaps.sum()), float(squares[:, :2].max())
    error = math.sqrt(n) * float(gaps.std()) if n > 1 else math.inf
    doubt = -float(scipy.special.stdtrit(n - 1, NormalDist().cdf(-_MEAN_ERRORS))) if n > 1 else math.inf
    clear = nearer >= needed and gain > doubt * error and gain > _UNSEEN * largest and fit <= base + rounding
    exact_already = float(by_fit.mean().sqrt()) <= rounding
    finite, base_finite = (bool(v.isfinite().all()) for v in (by_fit, by_base))
    kept = clear or exact_already or (finite and not base_finite and 2 * nearer >= n)
    if n < needed:
        why = _cannot_say(n)
    elif not (finite and base_finite):
        why = "not all errors are finite"
    else:
        why = (
            f"of {n} samples {nearer} end nearer (at least {needed} needed); over all samples the sum of squared errors "
            f"changes by {_ratio(-gain, error)} standard errors (limit {-doubt:.3g}), and by {_ratio(-gain, largest)} times "
            f"the largest square (limit {-_UNSEEN:g})"
        )
    told = None if kept or fit > base + rounding else _to_tell(n, nearer, gain, error, largest)
    return Verdict(base, fit, kept, why, told)


def too_few(n: int) -> Verdict:
    """The verdict on n samples, too few to hold any out: the base is kept."""
    return Verdict(math.nan, math.nan, False, _cannot_say(n))


def _to_tell(n: int, nearer: int, gain: float, error: float, largest: float) -> int | None:
    """Samples for which the three tests would pass at the share and the means of n samples; None if none are enough."""
    if not (gain > 0 and 2 * nearer > n and math.isfinite(error + largest)):
        return None
    sign = (2 / (2 * nearer / n - 1)) ** 2
    return max(n + 1, math.ceil(max(sign, n * (_MEAN_ERRORS * error / gain) ** 2, n * _UNSEEN * largest / gain)))


def samples_against(gain: float, reach: float) -> int | None:
    """Samples that show every kind of failure that would undo a gain, each with a probability of at least 95%.

    A failure at rate p with squared errors up to `reach` raises the mean square error by at most p reach. Only a rate of at
    least gain / reach can undo the gain. By the rule of three, 3 / rate samples show such a failure.

    Parameters
    ----------
    gain : decrease of the mean square error.
    reach : largest squared error of a failure.

    Returns
    -------
    The number; None without a gain, or where a value is not finite.
    """
    return math.ceil(_UNSEEN * max(reach / gain, 1.0)) if 0 < gain < math.inf and reach < math.inf else None


@dataclass(frozen=True)
class Range:
    """Extent of the final states of a batch.

    Attributes
    ----------
    reach : largest mean square per component between a final state and the final state farthest from the judged mean.
    strays : number of final states farther from the judged mean than any judged final state, by a factor of three in distance.
    """

    reach: float
    strays: int

    @classmethod
    def of(cls, ends: Tensor, judged: int) -> Range:
        """The range of final states [B, ...], of which the last `judged` were judged."""
        flat = ends.reshape(len(ends), -1)

        def gaps(centre: Tensor) -> Tensor:
            return torch.cat([(part.double() - centre).square().mean(1) for part in torch.split(flat, 256)])

        own = gaps(flat[len(flat) - judged :].double().mean(0))
        reach = float(gaps(flat[int(own.argmax())].double()).max())
        return cls(reach, int((own > _FAR * own[len(own) - judged :].max()).sum()))


def _cannot_say(n: int) -> str:
    return f"{n} sample{'s' * (n > 1)} cannot tell a gain from chance, which takes at least six"


def _fewest(n: int) -> int:
    """Fewest of n samples that must end nearer: the critical value of the sign test."""
    # scipy.stats.binom.isf, without the import of all of scipy.stats.
    return int(np.argmax(scipy.special.bdtrc(np.arange(n + 1), n, 0.5) <= _SIGN_CHANCE)) + 1


def _ratio(a: float, b: float) -> str:
    """A signed ratio; infinite where b alone is 0."""
    a += 0.0  # no minus before a zero
    return f"{a / b:+.3g}" if b else f"{math.copysign(math.inf, a) if a else 0.0:+g}"
