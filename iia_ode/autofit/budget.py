"""Budgets: what a search may spend, and its options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import check_flag, check_whole
from ..errors import InputError, unknown_name
from .search import check_rounds, samples_of

__all__ = ["AGAIN", "BUDGETS", "Budget", "budget_of"]

AGAIN = 2
"""Iterations of the last refinement, which starts from a refined plan and uses all samples."""

_WARM = 2  # kinds of warm start, where any is tried


@dataclass(frozen=True)
class Budget:
    """What :func:`iia_ode.fit` may spend, and how it splits and runs the samples.

    Parameters
    ----------
    draws : minimum number of initial states where no teacher is given. Missing ones are drawn as sigma N(0, I), reusing the
        given conditions evenly. Each costs a trajectory of the teacher, in memory too, and the work of the fits on it.
    teacher_steps : minimum number of steps of the accurate trajectories; see :meth:`steps`.
    rounds, descent : of the search for a grid; see :func:`~iia_ode.autofit.search_grid`.
    levels : passes of :func:`~iia_ode.autofit.search_levels` over the levels of the best grid.
    warm_starts : whether pipelines with a :class:`~iia_ode.WarmStart` are tried.
    starts : number of closed-form fits that are refined. From 2 on, the best with and the best without a warm start are among
        them; from 3 on also the best with a warm start per class, where there is one.
    iterations, probes : iterations, and Rademacher probes per sample, of each refinement.
    finals : fresh samples for the final choice, as a multiple of the number of draws; drawn under held-out conditions. Each
        costs a trajectory, of which the end is kept.
    held_out : share of the samples, the last ones, that decide between solvers.
    chunk_size : number of samples that go through the model at once, in all processes together.
    checkpointed : whether refinements recompute each evaluation on the backward pass: the memory of one evaluation of a
        chunk instead of all, for half as much work again. For models with large graphs.

    Raises
    ------
    InputError : a value is not usable.
    """

    draws: int = 0
    teacher_steps: int = 60
    rounds: tuple[tuple[float, int], ...] = ((0.125, 8), (0.5, 3), (1.0, 1))
    descent: int = 1
    levels: int = 0
    warm_starts: bool = False
    starts: int = 0
    iterations: int = 6
    probes: int = 2
    finals: float = 0.0
    held_out: float = 0.5
    chunk_size: int = 64
    checkpointed: bool = False

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        least = dict.fromkeys(("draws", "descent", "levels", "starts", "finals"), 0)
        least |= {"teacher_steps": 2, "iterations": 1, "probes": 1}
        if wrong := [f"{k} = {getattr(self, k)!r}" for k, n in least.items() if not n <= getattr(self, k) < math.inf]:
            raise InputError(f"this is no budget: {', '.join(wrong)}; it needs finite numbers of at least {least}.")
        if isinstance(self.held_out, bool) or not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share of the samples between 0 and 1, got {self.held_out!r}.")
        check_whole("chunk_size", self.chunk_size, least=1)
        check_flag("warm_starts", self.warm_starts)
        check_flag("checkpointed", self.checkpointed)

    def steps(self, nfe: int) -> int:
        """Steps of the teacher of fits with `nfe` evaluations, four per evaluation at least.

        The teacher judges the fits, so its error must stay far below theirs.
        """
        return max(self.teacher_steps, 4 * nfe)

    def cost(self, nfe: int, candidates: int, batch: int, train: int) -> int:
        """Estimate of the sample evaluations of a search.

        Parameters
        ----------
        nfe : evaluations of the solver.
        candidates : leap grids of the first round.
        batch, train : number of draws, and of training samples among them.
        """
        search, alive = 0, candidates if nfe > 1 else 0
        for share, keep in self.rounds:
            search, alive = search + alive * 2 * samples_of(share, train), min(alive, keep)
        if nfe > 1:
            search += 6 * self.descent * 2 * samples_of(self.rounds[-1][0], train)
            # Two trials per level, half of whose evaluations are in the cache.
            search += (nfe - 1) * self.levels * 2 * train
        searches = search * (_WARM * self.warm_starts + 1 - 1 / nfe)  # a cold start's first evaluation is in the cache
        fits = 7 * batch  # two fits per kind of weights on a half; then the chosen one on that half and on all
        passes = 2 * self.probes + 4 + (self.probes + 1) * self.checkpointed
        refinement = self.starts * self.iterations * (train * passes + batch - train)
        refinement += AGAIN * batch * passes if self.starts else 0
        made = 2 + 2 * (1 + _WARM * self.warm_starts) + self.starts
        finals = self.finals_of(batch)
        return (self.steps(nfe) + 1) * (batch + finals) + round(nfe * (searches + fits + refinement + made * finals))

    def finals_of(self, batch: int) -> int:
        """Number of fresh samples for the final choice."""
        return round(self.finals * batch)


BUDGETS: dict[str, Budget] = {
    "closed-form": Budget(teacher_steps=40, rounds=((0.125, 6), (0.5, 2))),
    "standard": Budget(levels=1, starts=1, iterations=6, probes=2),
    "thorough": Budget(
        draws=512,
        teacher_steps=80,
        levels=1,
        warm_starts=True,
        starts=3,
        iterations=12,
        probes=2,
        finals=2.0,
    ),
}
"""Budgets by name: without gradients; with one refinement; and with more of everything and fresh samples to choose by."""


def budget_of(budget: str | Budget) -> Budget:
    """The budget, or the budget of that name."""
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, str):
        raise InputError(f"budget must be one of {', '.join(map(repr, BUDGETS))} or a Budget(...), got {budget!r}.")
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return BUDGETS[budget]
