"""What the one call may spend, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputError, unknown_name
from .search import check_rounds, samples_of

__all__ = ["AGAIN", "BUDGETS", "Budget", "budget_of"]

AGAIN = 2
"""Iterations of the last refinement, to all of the noise, from where the one to a part of it ended."""

_WARM = 2  # ways to start without an evaluation, where those are tried


@dataclass(frozen=True)
class Budget:
    """What a fit may spend.

    Attributes
    ----------
    draws : of noise to have at least, where no teacher is given. What is missing is made under the conditions that were given,
        each about as often: sigma times standard normal noise, as runs start from, also where states that have more in them
        were given. Each costs a trajectory of the teacher, in memory too, and what the fits spend on it.
    teacher_steps : of the accurate trajectories that everything is fitted to, at least; four to an evaluation where that is
        more, see :meth:`steps`.
    rounds, descent : of the search for a grid; see :func:`~iia_ode.iia.search.search_grid`.
    levels : passes over every level of the best grid on its own; see :func:`~iia_ode.iia.search.search_levels`.
    warm_starts : whether routes that take the first interval without an evaluation (:class:`WarmStart`) are tried.
    starts : how many of the best routes are refined; from 2 on, the best with and the best without a warm start among them,
        from 3 on also the best with a warm start per class, where there is one.
    iterations, probes : of each refinement.
    finals : for each of all these draws so many more, made like them under the conditions that were held out, for the last
        choice only: everything that was made runs on them. Each costs a trajectory, of which the end is kept.
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

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        least = dict.fromkeys(("draws", "descent", "levels", "starts", "finals"), 0)
        least |= {"teacher_steps": 2, "iterations": 1, "probes": 1}
        if wrong := [f"{k} = {getattr(self, k)!r}" for k, n in least.items() if not n <= getattr(self, k) < math.inf]:
            raise InputError(f"this is no budget: {', '.join(wrong)}; it needs finite numbers of at least {least}.")

    def steps(self, nfe: int) -> int:
        """Steps of the teacher of fits with `nfe` evaluations: its error must stay far below theirs, which it also judges."""
        return max(self.teacher_steps, 4 * nfe)

    def cost(self, nfe: int, candidates: int, batch: int, train: int, *, checkpointed: bool = False) -> int:
        """About how many sample evaluations a fit with `nfe` evaluations spends, `train` of its `batch` draws fitted to.

        Refinements that are `checkpointed` make each evaluation again on every way back.
        """
        search, alive = 0, candidates if nfe > 1 else 0
        for share, keep in self.rounds:
            search, alive = search + alive * 2 * samples_of(share, train), min(alive, keep)
        if nfe > 1:
            search += 6 * self.descent * 2 * samples_of(self.rounds[-1][0], train)
            # Two trials a level, half of whose evaluations are remembered.
            search += (nfe - 1) * self.levels * 2 * train
        searches = search * (_WARM * self.warm_starts + 1 - 1 / nfe)  # without a warm start the first one is remembered
        fits = 7 * batch  # what weights may be, two times on a half; then what is chosen, to that half and to all
        passes = 2 * self.probes + 4 + (self.probes + 1) * checkpointed
        refinement = self.starts * self.iterations * (train * passes + batch - train)
        refinement += AGAIN * batch * passes if self.starts else 0
        made = 2 + 2 * (1 + _WARM * self.warm_starts) + self.starts
        finals = self.finals_of(batch)
        return (self.steps(nfe) + 1) * (batch + finals) + round(nfe * (searches + fits + refinement + made * finals))

    def finals_of(self, batch: int) -> int:
        """How many draws the last choice has of its own."""
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
"""The budgets by name: no gradients; one refinement; more of everything, and a last choice on noise of its own."""


def budget_of(budget: str | Budget) -> Budget:
    """The budget, or the one of that name."""
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, str):
        raise InputError(f"budget is one of {', '.join(map(repr, BUDGETS))} or a Budget(...), got {budget!r}.")
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return BUDGETS[budget]
