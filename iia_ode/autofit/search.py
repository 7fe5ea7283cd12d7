"""Coordinate descent over any kind of candidate, judged by errors per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from ..iia.ranking import ranked

__all__ = ["Move", "Objective", "coordinate_descent"]

G = TypeVar("G", bound=Hashable)

Objective: TypeAlias = Callable[[G], Tensor]
"""Maps a candidate to its errors per sample, float64 [samples]; infinite for a failure."""

Move: TypeAlias = Callable[[G, float], G | None]
"""Maps a candidate and a factor to the candidate with a scaled coordinate; None if the result is no candidate."""


def coordinate_descent(
    objective: Objective[G], start: G, moves: Sequence[Move[G]], *, passes: int, step: float
) -> tuple[G, dict[G, Tensor]]:
    """Coordinate descent: each pass scales every coordinate up and down by a factor, and keeps the best candidate.

    The factor falls to its square root after each pass. The descent ends early where a pass changes nothing.

    Parameters
    ----------
    objective : errors of a candidate.
    start : the first candidate.
    moves : a function per coordinate, which scales the coordinate of a candidate by a factor.
    passes : number of passes, from 0.
    step : the first factor, above 1.

    Returns
    -------
    The best candidate, and the errors of every candidate that was tried, in order.

    Raises
    ------
    InputError : `step` or `passes` is not usable.
    """
    check_whole("passes", passes, least=0)
    if not step > 1:
        raise InputError(f"step must be a factor above 1, got {step!r}.")
    made: dict[G, Tensor] = {}
    best = start
    for _ in range(passes):
        before = best
        for move in moves:
            near = [best, *(m for m in (move(best, step), move(best, 1 / step)) if m is not None)]
            made |= {candidate: objective(candidate) for candidate in near if candidate not in made}
            best = ranked(near, [made[candidate] for candidate in near], outliers_too=True)[0]
        if best == before:
            break
        step = math.sqrt(step)
    return best, made
