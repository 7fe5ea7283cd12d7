"""Agreement of two runs of an experiment on different seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .experiment import Experiment
from .measurements import Estimate, Measurements, estimated

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """How two runs agree.

    Attributes
    ----------
    total : number of values that both runs have.
    inside : number of values whose two estimates differ by no more than the 95% interval of the difference.
    together : the same with intervals that hold for all values at once with 95% (Bonferroni).
    worst : name of the value with the largest difference, in widths of its interval.
    ratio : that difference over half the width of its interval.
    """

    total: int
    inside: int
    together: int
    worst: str
    ratio: float

    def __str__(self) -> str:
        share = (
            f"{self.inside} of {self.total} values agree within the 95% interval of their difference, and {self.together} "
            "within intervals that hold for all values at once"
        )
        if self.ratio <= 1:
            return share
        return (
            f"{share}. The worst, {self.worst}, is off by {self.ratio:.1f} half-widths. Values of a run share their noise, so "
            "they fall outside together"
        )


def agreement(experiment: Experiment, first: Measurements, second: Measurements) -> Agreement:
    """Compare two runs, value by value; the interval of a difference is Welch's.

    Parameters
    ----------
    experiment : the experiment.
    first, second : runs on different seeds.

    Returns
    -------
    The :class:`Agreement`. Of independent values, one in twenty is expected outside.
    """
    own, other = _estimates(experiment, first), _estimates(experiment, second)
    pairs = {name: (a, other[name]) for name, a in own.items() if name in other}
    pairs = {name: (a, b) for name, (a, b) in pairs.items() if min(a.seeds, b.seeds) > 1}
    ratios = {name: _ratio(a, b, 0.05) for name, (a, b) in pairs.items()}
    worst = max(ratios, key=lambda name: ratios[name], default="")
    return Agreement(
        total=len(ratios),
        inside=sum(r <= 1 for r in ratios.values()),
        together=sum(_ratio(a, b, 0.05 / len(pairs)) <= 1 for a, b in pairs.values()),
        worst=worst,
        ratio=ratios.get(worst, 0.0),
    )


def _estimates(experiment: Experiment, run: Measurements) -> dict[str, Estimate]:
    """The estimate of each value over the rows with equal keys, by the name of the value."""
    found: dict[str, list[float]] = {}
    for row in run.rows:
        name = ", ".join(f"{row[k]}" for k in experiment.keys if k in row)
        for value in experiment.values:
            if value in row:
                found.setdefault(f"{value} of {name}", []).append(float(row[value]))
    return {name: estimated(values) for name, values in found.items()}


def _ratio(a: Estimate, b: Estimate, level: float) -> float:
    """The difference over half the width of its interval, which misses with the probability `level`, by Welch's test."""
    import scipy.stats

    difference, spread = abs(a.mean - b.mean), math.hypot(a.error, b.error)
    if difference <= 1e-5 * abs(a.mean):  # results have six digits
        return 0.0
    if not spread:
        return math.inf
    freedom = spread**4 / (a.error**4 / (a.seeds - 1) + b.error**4 / (b.seeds - 1))
    return difference / (float(scipy.stats.t.ppf(1 - level / 2, freedom)) * spread)
