"""Agreement of two runs of an experiment on different seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .experiment import Experiment
from .measurements import Estimate, Measurements

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """How two runs agree.

    Attributes
    ----------
    total : number of values that both runs have.
    inside : number of values whose two estimates differ by no more than the 95% interval of the difference.
    worst : name of the value with the largest difference, in widths of its interval.
    ratio : that difference over half the width of its interval.
    """

    total: int
    inside: int
    worst: str
    ratio: float

    def __str__(self) -> str:
        share = f"{self.inside} of {self.total} values agree within the 95% interval of their difference"
        return share if self.ratio <= 1 else f"{share}; the worst, {self.worst}, is off by {self.ratio:.1f} half-widths"


def agreement(experiment: Experiment, first: Measurements, second: Measurements) -> Agreement:
    """Compare two runs, value by value; the interval of a difference is Welch's.

    Parameters
    ----------
    experiment : the experiment.
    first, second : runs on different seeds.

    Returns
    -------
    The :class:`Agreement`. Of independent runs, one value in twenty is expected outside.
    """
    names = list(dict.fromkeys(tuple((k, row[k]) for k in experiment.keys if k in row) for row in first.rows))
    total, inside, worst, most = 0, 0, "", 0.0
    for name in names:
        for value in experiment.values:
            a, b = (_exactly(run, value, experiment.keys, dict(name)) for run in (first, second))
            if a.seeds < 2 or b.seeds < 2:
                continue
            ratio = _ratio(a, b)
            total, inside = total + 1, inside + (ratio <= 1)
            if ratio > most:
                worst, most = f"{value} of {', '.join(str(v) for _, v in name)}", ratio
    return Agreement(total, inside, worst, most)


def _exactly(run: Measurements, value: str, keys: tuple[str, ...], name: dict[str, object]) -> Estimate:
    """The estimate over the rows with these keys and no others."""
    rows = [r for r in run.where(**name).rows if all((k in r) == (k in name) for k in keys)]
    return Measurements(rows).estimate(value)


def _ratio(a: Estimate, b: Estimate) -> float:
    """The difference over half the width of its 95% interval, by Welch's test."""
    import scipy.stats

    difference, spread = abs(a.mean - b.mean), math.hypot(a.error, b.error)
    if difference <= 1e-5 * abs(a.mean):  # results have six digits
        return 0.0
    if not spread:
        return math.inf
    freedom = spread**4 / (a.error**4 / (a.seeds - 1) + b.error**4 / (b.seeds - 1))
    return difference / (float(scipy.stats.t.ppf(0.975, freedom)) * spread)
