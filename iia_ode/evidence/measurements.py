"""Measurements of an experiment: rows by seed, and estimates with standard errors over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..errors import InputError

__all__ = ["Estimate", "Measurements", "Row", "Value"]

Value = int | float | str
Row = dict[str, Value]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes
    ----------
    mean : the mean; for a ratio, the geometric mean.
    error : its standard error; NaN for a single seed.
    seeds : number of seeds behind it.
    """

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        if not math.isfinite(self.error) or self.error == 0:
            return f"{self.mean:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        if digits > 6:
            return f"{self.mean:.3e} ± {self.error:.0e}"
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"

    @property
    def reach(self) -> float:
        """Half the width of the 95% interval, by Student's distribution for the number of seeds."""
        if self.seeds < 2:
            return math.nan
        import scipy.stats

        return float(scipy.stats.t.ppf(0.975, self.seeds - 1)) * self.error

    def below(self, bound: float) -> bool:
        """Whether the whole 95% interval lies below a bound."""
        return self.mean + self.reach < bound

    def above(self, bound: float) -> bool:
        """Whether the whole 95% interval lies above a bound."""
        return self.mean - self.reach > bound


class Measurements:
    """Rows of an experiment. Each row has its seed, the columns that name it, and the measured values.

    Parameters
    ----------
    rows : the rows, each with a column ``seed``.
    """

    def __init__(self, rows: Iterable[Mapping[str, Value]]) -> None:
        self.rows: tuple[Row, ...] = tuple(dict(row) for row in rows)
        self._places: dict[str, dict[Any, set[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self.rows)

    def where(self, **columns: Any) -> Measurements:
        """The rows with these values in these columns; a tuple or list stands for any of its members."""
        chosen = []
        for column, wanted in columns.items():
            places = self._by_value(column)
            values = wanted if isinstance(wanted, tuple | list) else (wanted,)
            chosen.append(set[int]().union(*(places.get(value, ()) for value in values)))
        return Measurements(self.rows[i] for i in sorted(set.intersection(*chosen))) if chosen else self

    def _by_value(self, column: str) -> dict[Any, set[int]]:
        """Numbers of the rows with each value of a column; the rows without the column stand under None."""
        if column not in self._places:
            places: dict[Any, set[int]] = {}
            for i, row in enumerate(self.rows):
                places.setdefault(row.get(column), set()).add(i)
            self._places[column] = places
        return self._places[column]

    def distinct(self, column: str) -> list[Any]:
        """The different values of a column, in the order of their first rows."""
        return list(dict.fromkeys(r[column] for r in self.rows if column in r))

    def by_seed(self, value: str, **columns: Any) -> dict[Value, float]:
        """The value for each seed.

        Raises
        ------
        InputError : a seed has several rows with these columns.
        """
        found: dict[Value, float] = {}
        for row in self.where(**columns).rows:
            if value not in row:
                continue
            if row["seed"] in found:
                raise InputError(f"seed {row['seed']} has several rows of {value} where {columns}: give more columns.")
            found[row["seed"]] = float(row[value])
        return found

    def estimate(self, value: str, **columns: Any) -> Estimate:
        """Mean and standard error of a value over seeds; NaN without rows."""
        return estimated(list(self.by_seed(value, **columns).values()))

    def ratio(self, value: str, over: Mapping[str, Any], under: Mapping[str, Any], **columns: Any) -> Estimate:
        """Geometric mean over seeds of a ratio of two rows of one seed, with its standard error.

        Both rows have the same noise, so the ratio varies less than either value.

        Parameters
        ----------
        value : the column.
        over, under : columns that name the numerator and the denominator.
        columns : columns that both have.
        """
        top, bottom = self.by_seed(value, **columns, **over), self.by_seed(value, **columns, **under)
        return geometric([top[s] / bottom[s] for s in top if bottom.get(s)])

    def averaged(self, ratio: Callable[[Measurements], Estimate]) -> Estimate:
        """Geometric mean over seeds of a function of the rows of one seed."""
        seeds = self.distinct("seed")
        return geometric([ratio(self.where(seed=s)).mean for s in seeds])

    def pooled(self, ratios: Callable[[Measurements], Iterable[Estimate]]) -> Estimate:
        """Geometric mean over cases and seeds of the ratios that a function finds, with its standard error over seeds."""
        return self.averaged(lambda own: geometric([r.mean for r in ratios(own) if r.seeds]))


def estimated(values: list[float]) -> Estimate:
    """Mean and standard error."""
    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else math.nan, n)


def geometric(values: list[float]) -> Estimate:
    """Geometric mean and its standard error."""
    if not all(v > 0 for v in values):
        return Estimate(math.nan, math.nan, len(values))
    logs = estimated([math.log(v) for v in values])
    mean = math.exp(logs.mean) if values else math.nan
    return Estimate(mean, mean * logs.error, logs.seeds)
