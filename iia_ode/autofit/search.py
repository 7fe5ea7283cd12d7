"""Search over any kind of candidate, judged by errors per sample: coordinate descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from ..iia.ranking import cauchy_mean, ranked

__all__ = ["Objective", "Search", "Trial", "coordinate_descent"]

G = TypeVar("G", bound=Hashable)

Objective: TypeAlias = Callable[[G, int], Tensor]
"""Maps a candidate and a number n to the candidate's errors on the first n samples, float64 [n]; infinite for a failure."""

Move: TypeAlias = Callable[[G, float], G | None]
"""Maps a candidate and a factor to the candidate with a scaled coordinate; None if the result is no candidate."""


@dataclass(frozen=True, eq=False)
class Trial(Generic[G]):
    """A candidate that was tried.

    Attributes
    ----------
    candidate : the candidate.
    errors : its errors per sample, float64 [samples].
    samples : number of samples.
    changes : largest change of the data estimate along the run, per sample, from the estimate on the accurate trajectory; root
        mean square over components, float64 [samples]. None where it is not known.
    """

    candidate: G
    errors: Tensor
    samples: int
    changes: Tensor | None = None

    @property
    def error(self) -> float:
        """Root mean square over the samples; infinite if an error is infinite."""
        return cauchy_mean(self.errors, math.inf)

    @property
    def risk(self) -> float:
        """Root mean square of the errors and of the changes.

        Few samples do not show how many end in another mode. Those near the border between two modes are more, and their data
        estimates change, whichever mode they end in.
        """
        return self.error if self.changes is None else math.hypot(self.error, cauchy_mean(self.changes, math.inf))


@dataclass(frozen=True, eq=False)
class Search(Generic[G]):
    """Result of a search.

    Attributes
    ----------
    trials : every trial, in order.
    ranking : the remaining candidates, best first.
    """

    trials: tuple[Trial[G], ...]
    ranking: tuple[G, ...]

    @property
    def best(self) -> G:
        """The winner."""
        return self.ranking[0]


def coordinate_descent(
    objective: Objective[G], start: G, moves: Sequence[Move[G]], *, passes: int, step: float, samples: int
) -> Search[G]:
    """Coordinate descent: each pass scales every coordinate up and down by a factor, and keeps the best candidate.

    The factor falls to its square root after each pass. The descent ends early where a pass changes nothing.

    Parameters
    ----------
    objective : errors of a candidate.
    start : the first candidate.
    moves : a function per coordinate, which scales the coordinate of a candidate by a factor.
    passes : number of passes, from 0.
    step : the first factor, above 1.
    samples : number of samples to judge by.

    Returns
    -------
    The trials, and the best candidate.

    Raises
    ------
    InputError : `step` or `passes` is not usable.
    """
    check_whole("passes", passes, least=0)
    if not step > 1:
        raise InputError(f"step must be a factor above 1, got {step!r}.")
    made: dict[G, Trial[G]] = {}
    best = start
    for _ in range(passes):
        before = best
        for move in moves:
            near = [best, *(m for m in (move(best, step), move(best, 1 / step)) if m is not None)]
            for candidate in near:
                if candidate not in made:
                    made[candidate] = Trial(candidate, objective(candidate, samples), samples)
            best = ranked(near, [made[candidate].errors for candidate in near], outliers_too=True)[0]
        if best == before:
            break
        step = math.sqrt(step)
    return Search(tuple(made.values()), (best,))
