"""Observed orders: slopes of error against evaluations, by least squares on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Slope", "slope_of"]


@dataclass(frozen=True)
class Slope:
    """The observed order of a line of a comparison.

    Attributes
    ----------
    solver : name of the line.
    order : minus the slope of log(error) against log(evaluations), by least squares.
    standard_error : standard error of `order` from the scatter about the straight line; NaN for two points.
    nfes : numbers of evaluations behind the slope, in increasing order.
    """

    solver: str
    order: float
    standard_error: float
    nfes: tuple[int, ...]

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.2f}"
        return f"{self.solver}: order {self.order:.2f}{error} over {self.nfes[0]} to {self.nfes[-1]} evaluations"


def slope_of(solver: str, nfes: Sequence[int], errors: Sequence[float]) -> Slope:
    """The slope of at least two points with different numbers of evaluations and positive errors."""
    x, y, n = [math.log(v) for v in nfes], [math.log(v) for v in errors], len(nfes)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(rest / (n - 2) / spread) if n > 2 else math.nan
    return Slope(solver, -slope, error, tuple(sorted(nfes)))
