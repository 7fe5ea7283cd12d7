"""Budgets: limits and options of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..checks import check_flag, check_number, check_whole
from ..errors import InputError, unknown_name
from ..iia.minimizers import IncrementalGaussNewton

__all__ = ["AGAIN", "BUDGETS", "Budget", "budget_of"]

AGAIN = 2
"""Iterations of the last refinement, which starts from a refined plan and uses all samples."""

_WARM = 2  # kinds of warm start, where any is tried
_SHARED = 0.94  # share of the evaluations of a trial that no earlier trial has made
_LEAPS = 3  # evaluations of a trajectory beside its steps, at most
# Shares of the trials and of the iterations, for the first of several numbers of evaluations and for each of the others.
_FIRST, _FIRST_ITERATIONS = 0.7, 0.6
_OTHER, _OTHER_ITERATIONS = 0.25, 0.4
_KNOTS = 17  # of trajectories that would take too much memory
_SIZE = 18  # evaluations of a sample for the size of the data, about


@dataclass(frozen=True)
class Budget:
    """Limits of the work of :func:`iia_ode.fit`, and options of its samples.

    Parameters
    ----------
    draws, most : minimum and maximum number of initial states where no teacher is given; None for no maximum. Missing states
        are drawn as sigma N(0, I), plus the given images if any, reusing the given conditions evenly. Of too many states,
        a random part is used. Each state costs a trajectory of the teacher, in memory too, and the work of the fits.
    teacher_steps : minimum number of steps of the accurate trajectories; see :meth:`steps`.
    teacher_memory : bytes of trajectories in the dtype of the draws, with every step, beyond which each is stored as 17 states
        and slopes in float16; see :meth:`iia_ode.Teacher.solve`. With every step, a component takes 8 (steps + 1) bytes in
        float32, otherwise 68. None for no limit.
    trials, judges : number of grids that a search tries with the model, and number of training samples that judge them; see
        :func:`~iia_ode.autofit.search_grid`.
    warm_starts : whether pipelines with a :class:`~iia_ode.WarmStart` are tried.
    starts : number of closed-form fits that are refined. With 2 or more, the best fit with a warm start and the best fit
        without are among them; with 3 or more, also the best fit with a warm start per class, where there are classes.
    iterations, minibatch, probes : iterations, samples of a step, and random probes per sample, of each refinement; see
        :func:`~iia_ode.iia.refine`. With mini-batches an iteration has three steps, and there is no last fit to all samples.
        By default an iteration is one step with all samples.
    finals : fresh samples for the final choice, as a multiple of the number of draws, under the held-out conditions. Each
        sample costs a trajectory; only the final state is kept.
    held_out : share of held-out samples, the last of the batch. These samples decide between solvers.
    chunk_size : number of samples per model call, in all processes together.
    checkpointed : whether refinements recompute each evaluation in the backward pass. The memory of the graph falls to the
        memory of a single evaluation of a chunk, and the work of a refinement grows by half.

    Raises
    ------
    InputError : a value is not usable.
    """

    draws: int = 0
    most: int | None = None
    teacher_steps: int = 24
    trials: int = 8
    judges: int = 64
    warm_starts: bool = False
    starts: int = 0
    iterations: int = 6
    minibatch: int | None = None
    probes: int = 2
    finals: float = 0.0
    held_out: float = 0.25
    chunk_size: int = 64
    checkpointed: bool = False
    teacher_memory: int | None = 2**28

    def __post_init__(self) -> None:
        least = dict.fromkeys(("draws", "starts", "finals"), 0)
        least |= {"teacher_steps": 2, "iterations": 1, "probes": 1, "trials": 1, "judges": 2}
        for name in least.keys() - {"finals"}:
            check_whole(name, getattr(self, name))
        if wrong := [f"{k} = {getattr(self, k)!r}" for k, n in least.items() if not n <= getattr(self, k) < math.inf]:
            raise InputError(f"this is no budget: {', '.join(wrong)}; give finite numbers of at least {least}.")
        if self.most is not None:
            check_whole("most", self.most, least=max(self.draws, 8))
        if self.minibatch is not None:
            check_whole("minibatch", self.minibatch, least=1)
        check_number("held_out", self.held_out, above=0, below=1)
        check_whole("chunk_size", self.chunk_size, least=1)
        check_flag("warm_starts", self.warm_starts)
        check_flag("checkpointed", self.checkpointed)
        if self.teacher_memory is not None:
            check_whole("teacher_memory", self.teacher_memory, least=0)

    def steps(self, nfe: int) -> int:
        """Number of steps of the teacher of fits with `nfe` evaluations: `teacher_steps`, and at least four per evaluation.

        The teacher judges the fits, so the error of the teacher must stay far below the errors of the fits.
        """
        return max(self.teacher_steps, 4 * nfe)

    def shared(self, *, first: bool) -> Budget:
        """The budget of one of several numbers of evaluations of a fit: of the first, or of a later one, which has a hint."""
        trials, iterations = (_FIRST, _FIRST_ITERATIONS) if first else (_OTHER, _OTHER_ITERATIONS)
        return replace(self, trials=math.ceil(trials * self.trials), iterations=math.ceil(iterations * self.iterations))

    def used(self, given: int) -> int:
        """Number of initial states that a search uses of a given number, where it makes the teacher."""
        return max(self.draws, given if self.most is None else min(given, self.most))

    def teacher_cost(self, nfe: int, draws: int) -> int:
        """Estimate of the sample evaluations of a teacher with the estimates of its error and of the size of the data.

        Parameters
        ----------
        nfe : evaluations of the solver.
        draws : number of trajectories.

        Returns
        -------
        The number of sample evaluations.
        """
        few = min(draws, max(2, min(8, draws // 32)))
        return (self.steps(nfe) + _LEAPS) * draws + few * (round(1.5 * self.steps(nfe)) + _SIZE)

    def cost(self, nfe: int, draws: int, train: int, kinds: int = 4, *, last: bool = True) -> int:
        """Estimate of the sample evaluations of a search, without those of its teacher.

        Parameters
        ----------
        nfe : evaluations of the solver.
        draws, train : number of draws, and of training samples among them.
        kinds : kinds of weights: 4 for images, 2 for other samples, 1 for scalar weights alone.
        last : whether the samples are enough for a last fit.

        Returns
        -------
        The number of sample evaluations, with a backward pass counted as two.
        """
        held, later = draws - train, max(nfe - 1, 0)  # all solvers share the first evaluation
        warm = _WARM * self.warm_starts
        search = self.trials * min(train, self.judges) * later * _SHARED * (warm + 1)
        fits = (kinds + warm) * draws * later + 2 * draws + held * later
        again = draws * nfe if last and not self.starts else 0
        rows = train if self.minibatch is None else IncrementalGaussNewton.together * min(self.minibatch, train)
        passes = 2 * self.probes + 4 + (self.probes + 1) * self.checkpointed
        refinement = self.starts * (draws * later + self.iterations * (rows * passes + held) * nfe)
        if last and self.starts and self.minibatch is None:
            refinement += AGAIN * draws * passes * nfe
        refinement += min(self.starts, 1) * train * later * (self.finals == 0)  # of the choice
        made = 1 + kinds + warm + self.starts
        return round(search + fits + again + refinement + nfe * made * self.finals_of(draws))

    def storage(self, nfe: int, components: int, size: int = 4) -> tuple[int | None, torch.dtype | None]:
        """Knots and dtype of the accurate trajectories, for :meth:`iia_ode.Teacher.solve`: None for all steps as they are.

        Parameters
        ----------
        nfe : evaluations of the solver.
        components : components of all samples together.
        size : bytes of a component of the draws.

        Returns
        -------
        The number of knots and their dtype.
        """
        whole = components * (self.steps(nfe) + 1) * 2 * size
        if self.teacher_memory is None or whole <= self.teacher_memory:
            return None, None
        return min(_KNOTS, self.steps(nfe) + 1), torch.float16

    def memory(self, nfe: int, components: int) -> int:
        """Bytes of the accurate trajectories on the host: a state and a slope at every knot.

        Parameters
        ----------
        nfe : evaluations of the solver.
        components : components of all samples together, in float32.

        Returns
        -------
        The number of bytes.
        """
        knots, dtype = self.storage(nfe, components)
        return components * (knots or self.steps(nfe) + 1) * 2 * (4 if dtype is None else dtype.itemsize)

    def finals_of(self, batch: int) -> int:
        """Number of fresh samples for the final choice."""
        return round(self.finals * batch)


BUDGETS: dict[str, Budget] = {
    "quick": Budget(most=15, teacher_steps=16, trials=3),
    "closed-form": Budget(most=80, trials=7),
    "standard": Budget(most=152, trials=7, starts=1, iterations=5, minibatch=18, probes=1, held_out=0.2),
    "thorough": Budget(
        draws=384,
        teacher_steps=40,
        trials=12,
        judges=192,
        warm_starts=True,
        starts=3,
        iterations=12,
        minibatch=32,
        probes=1,
        finals=1.0,
        held_out=0.4,
    ),
}
"""Budgets by name. "quick" and "closed-form" need no gradients. "standard" has one refinement; "thorough" has three, warm
starts, and fresh draws for the last choice."""


def budget_of(budget: str | Budget) -> Budget:
    """The budget itself, or the budget of a name."""
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, str):
        raise InputError(f"budget must be one of {', '.join(map(repr, BUDGETS))} or a Budget(...), got {budget!r}.")
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return BUDGETS[budget]
