"""The guard: whether a fit is clearly better than its base, by the errors of both on the same samples.

Final errors have heavy tails: where a sample in a thousand ends in another mode of the data, a few samples make nearly the
whole mean square, and a plain comparison of means hangs on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import bdtrc, ndtr, stdtrit
from torch import Tensor

__all__ = ["Verdict", "too_few", "verdict"]

_MEAN_ERRORS = 3.0  # standard errors by which the mean square has to be lower; heavy tails want more than the usual two
_SIGN_CHANCE = float(ndtr(-2.0))  # of as many samples ending nearer by chance; a count has no tails
_UNSEEN = 3.0  # what befalls so many samples in n goes unseen in n with a chance of at most 5% (the rule of three)


@dataclass(frozen=True)
class Verdict:
    """What the guard found.

    Attributes
    ----------
    base, fit : root mean square errors of held-out samples; not numbers where there are none.
    kept : whether the fit stays.
    why : what was found and what was asked for, as half a sentence.
    """

    base: float
    fit: float
    kept: bool
    why: str


def verdict(squares: Tensor, held_out: int, relative: float) -> Verdict:
    """Whether a fit stays.

    It stays if, on the held-out samples, its mean square error is no larger than that of its base; and if, of all samples
    whose true ends are known,

    - more end nearer than chance would make of as good a base: an exact sign test at 2.3%, in which ties are not nearer;
    - the mean square error is lower by three standard errors of the paired difference (as unlikely by chance as that under
      Student's t, where samples are few); and
    - the sum of squares is lower by more than three times the largest square of one sample, of fit or base. What befalls
      three samples in n goes unseen in n samples with a chance of at most 5% (the rule of three); so often the fit alone
      might send samples as far astray as the worst that was seen, and its mean square would still be the lower.

    Where weights were fitted to some of these samples, those are a little kinder to the fit than new ones are.

    Two exceptions: a fit whose error over all samples is rounding stays; and where the base is not finite on every sample, so
    that there is not much to fall back to, a fit that is and that ends nearer on at least half of all, broken ones counted as
    nearer.

    Parameters
    ----------
    squares : of each sample the mean squares over components of the error of the base, of the error of the fit, and of the
        true end, float64 [n, 3] on the host.
    held_out : how many of them, from the end, at least one, no weights were fitted to; ridges and steps may have been chosen
        by them.
    relative : error relative to the true ends that is rounding.
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
    doubt = -float(stdtrit(n - 1, ndtr(-_MEAN_ERRORS))) if n > 1 else math.inf
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
            f"of {n} samples {nearer} end nearer, at least {needed} have to; over all of them the sum of squared errors "
            f"changes by {_ratio(-gain, error)} standard errors, and has to by less than {-doubt:.3g}, and by "
            f"{_ratio(-gain, largest)} of the largest, and has to by less than {-_UNSEEN:g}"
        )
    return Verdict(base, fit, kept, why)


def too_few(n: int) -> Verdict:
    """The verdict on n samples of which none can be held out: the base."""
    return Verdict(math.nan, math.nan, False, _cannot_say(n))


def _cannot_say(n: int) -> str:
    return f"{n} sample{'s' * (n > 1)} cannot say what is chance, six are the fewest that can"


def _fewest(n: int) -> int:
    """How many of n samples have to end nearer: as many do by chance, of as good a base, less often than `_SIGN_CHANCE`."""
    # What scipy.stats.binom.isf computes, without the import of all of scipy.stats.
    return int(np.argmax(bdtrc(np.arange(n + 1), n, 0.5) <= _SIGN_CHANCE)) + 1


def _ratio(a: float, b: float) -> str:
    """Its sign always, infinite where only b is 0."""
    a += 0.0  # no minus before a zero
    return f"{a / b:+.3g}" if b else f"{math.copysign(math.inf, a) if a else 0.0:+g}"
