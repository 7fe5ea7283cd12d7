"""The guard: whether a fit is clearly better than its base, by the errors of both on the same samples.

Final errors have heavy tails. Where a sample in a thousand ends in another mode of the data, a few samples make nearly the
whole mean square, and a plain comparison of means hangs on them. So several things are asked for, each a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binom
from scipy.stats import norm as normal
from scipy.stats import t as student_t
from torch import Tensor

__all__ = ["Verdict", "verdict"]

_MEAN_ERRORS = 3.0  # standard errors by which the mean square has to be lower; heavy tails want more than the usual two
_SIGN_ERRORS = 2.0  # chance allowed to the number of samples that end nearer; that has no tails


@dataclass(frozen=True)
class Verdict:
    """What the guard found.

    Attributes
    ----------
    base, fit : root mean square errors of held-out samples.
    kept : whether the fit stays.
    why : what was found and what was asked for, as half a sentence.
    """

    base: float
    fit: float
    kept: bool
    why: str


def verdict(squares: Tensor, held_out: int, relative: float) -> Verdict:
    """Whether a fit stays.

    It stays if, on the held-out samples, it ends no farther from the truth than its base in the mean; and if, of all samples
    whose true ends are known,

    - more end nearer than two standard errors of a fair coin would make (an exact sign test),
    - the mean square error is lower by three standard errors of the paired difference (Student's t for few samples), and
    - the sum of squares is lower by more than the largest square of one sample, of fit or base: one more sample like the
      worst that was seen, had it gone the other way, would not turn the outcome.

    It also stays where its errors are rounding, and where the base's are not finite and its own are. What befalls fewer than
    one sample in as many as there are stays unseen.

    Parameters
    ----------
    squares : of each sample the mean squares over components of the error of the base, of the error of the fit, and of the
        true end, float64 [n, 3] on the host.
    held_out : how many of them, from the end, neither weights nor options were chosen by.
    relative : error relative to the true ends that is rounding.
    """
    n = len(squares)
    base, fit, _ = squares[n - held_out :].mean(dim=0).sqrt().tolist()
    by_base, by_fit, exact = squares.unbind(dim=1)
    rounding = relative * float(exact.mean().sqrt())
    gaps = by_base - by_fit
    nearer, needed = int((gaps > 0).sum()), int(binom.isf(normal.sf(_SIGN_ERRORS), n, 0.5)) + 1
    gain, largest = float(gaps.sum()), float(squares[:, :2].max())
    error = math.sqrt(n) * float(gaps.std()) if n > 1 else math.inf
    doubt = float(student_t.isf(normal.sf(_MEAN_ERRORS), n - 1)) if n > 1 else math.inf
    clear = nearer >= needed and gain > doubt * error and gain > largest and fit <= base + rounding
    exact_already = float(by_fit.mean().sqrt()) <= rounding
    lost = not math.isfinite(float(by_base.sum()))  # the base has nowhere to fall back to
    kept = clear or exact_already or (lost and math.isfinite(float(by_fit.sum())))
    found = (
        f"of {n} samples {nearer} end nearer ({needed} are asked for), their mean square is lower by {_ratio(gain, error)} "
        f"standard errors ({doubt:.3g}), and its sum by {_ratio(gain, largest)} times the largest square of one (1)"
        if n >= needed
        else f"of {n} sample{'s' * (n > 1)} even all would not say what is chance"
    )
    return Verdict(base, fit, kept, found)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3g}" if b else "no"
