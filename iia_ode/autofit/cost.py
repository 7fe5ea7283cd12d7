"""The expected cost of a search, computed before the search."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..checks import check_choice, check_shape, check_whole
from ..errors import InputError
from ..iia.batch import Batch, held_out_of
from ..ode import ProbabilityFlowODE
from ..ode.distributed import ranks_of
from ..plan.checks import check_ode
from .budget import Budget, budget_of
from .pipeline import weights_of
from .stages import Context, enough

__all__ = ["FitCost", "announce", "fit_cost"]

_USUAL = 256  # draws of a fit whose budget has no maximum
_FEW = 15  # draws, below which the log warns that a choice is uncertain

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitCost:
    """The expected cost of a fit.

    Attributes
    ----------
    sample_evaluations : evaluations of single samples, with a backward pass counted as two.
    teacher : the part of `sample_evaluations` for accurate trajectories, of the teacher and of the last choice.
    draws : number of draws.
    memory : bytes of the accurate trajectories on the host; None where the shape of a sample is not known.
    """

    sample_evaluations: int
    teacher: int
    draws: int
    memory: int | None

    def seconds(self, per_evaluation: float) -> float:
        """Seconds of the evaluations, at `per_evaluation` seconds for one sample, guidance included."""
        return self.sample_evaluations * per_evaluation

    def __str__(self) -> str:
        kept = "" if self.memory is None else f", {self.memory / 2**20:.0f} MiB of trajectories"
        return (
            f"about {self.sample_evaluations} sample evaluations for {self.draws} draws ({self.teacher} for the teacher)"
            f"{kept}: {self.seconds(0.05) / 60:.3g} minutes at 50 ms each"
        )


def fit_cost(
    ode: ProbabilityFlowODE,
    nfe: int | Sequence[int],
    budget: str | Budget = "standard",
    *,
    samples: int | None = None,
    shape: tuple[int, ...] | None = None,
    weights: Literal["auto", "scalars"] = "auto",
) -> FitCost:
    """The expected cost of :func:`iia_ode.fit` with the same arguments and without a teacher; the model is not called.

    A refinement that converges before its last iteration costs less.

    Parameters
    ----------
    ode : the model with its schedule.
    nfe : number of evaluations of the solver, at least 1, or several.
    budget : a name or a :class:`~iia_ode.Budget`.
    samples : number of draws that the fit is given, or makes for `shape`; by default the most that the budget uses.
    shape : shape of one sample, for the memory and the kinds of weights; by default the ODE's ``state_shape``, if any. Without
        a shape, the kinds are those of images.
    weights : as for the fit.

    Returns
    -------
    The cost. ``print`` it, or read ``cost.sample_evaluations``; ``cost.seconds(0.05)`` is the time at 50 ms per sample.

    Raises
    ------
    InputError, UnknownNameError : an argument is not usable.

    Examples
    --------
    >>> print(iia.fit_cost(ode, 8, "closed-form", samples=64))
    """
    chosen = budget_of(budget)
    check_ode(ode)
    first, *others = sorted(numbers_of(nfe), reverse=True)
    draws = chosen.used(default_samples(chosen) if samples is None else check_whole("samples", samples, least=1))
    size = ode.state_shape if shape is None else check_shape("shape", shape)
    train = draws - held_out_of(draws, chosen.held_out) if draws > 1 else draws
    teacher = chosen.teacher_cost(first, draws) + chosen.teacher_cost(first, chosen.finals_of(draws))
    scalars = check_choice("weights", weights, ("auto", "scalars")) == "scalars"
    if scalars:
        chosen = replace(chosen, warm_starts=False)
    kinds = 1 if scalars else 4 if size is None else len(weights_of(size))
    last = {n: size is None or enough(train, math.prod(size), n) for n in (first, *others)}
    total = teacher + (chosen.shared(first=True) if others else chosen).cost(
        first, draws, train, kinds, last=last[first]
    )
    total += sum(chosen.shared(first=False).cost(n, draws, train, 1, last=last[n]) for n in others)
    return FitCost(total, teacher, draws, None if size is None else chosen.memory(first, draws * math.prod(size)))


def numbers_of(nfe: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of evaluations: one, or several different ones."""
    if not isinstance(nfe, list | tuple | range):
        return (check_whole("nfe", nfe, least=1),)
    numbers = tuple(check_whole("each nfe", n, least=1) for n in nfe)
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"nfe must be a number of evaluations, or different ones such as (4, 5, 6, 8), got {nfe!r}.")
    return numbers


def default_samples(budget: Budget) -> int:
    """Number of draws that a fit makes where none is given."""
    return budget.most or max(budget.draws, _USUAL)


def announce(context: Context, batch: Batch, given: int, finals: int, start: float) -> None:
    """Log the expected cost in seconds, by the time of the model's second call; without a listener the model is not called."""
    listens, ranks = context.leads and _log.isEnabledFor(logging.INFO), ranks_of(batch.ode)
    if ranks is not None:  # a call of a distributed model is one in every process
        flag = torch.tensor([listens], dtype=torch.int64, device="cpu")
        listens = any(bool(other) for other in ranks.gathered(flag, "listening"))
    if not listens:
        return
    part, budget, nfe = batch[: context.budget.chunk_size], context.budget, context.nfe
    with torch.no_grad():
        for _ in range(2):  # the first call may allocate or compile
            began = time.perf_counter()
            part.ode.output(part.x, start).sum().item()
            seconds = (time.perf_counter() - began) / len(part)
    kinds = 1 if context.weights == "scalars" else len(weights_of(batch.x.shape[1:]))
    cost = budget.cost(nfe, len(batch), len(context.train), kinds, last=context.ample()) + budget.teacher_cost(
        nfe, finals
    )
    cost += budget.teacher_cost(nfe, len(batch)) if batch.teacher is None else 0
    draws = f"{given} draws of noise" if len(batch) >= given else f"{len(batch)} of {given} draws of noise"
    more = f" and {len(batch) - given} more" if len(batch) > given else ""
    more += f", {finals} for the last choice" if finals else ""
    context.say(
        f"{nfe} evaluations, {draws}{more}: about {cost} sample evaluations, {cost * seconds:.0f} s at "
        f"{1e3 * seconds:.2g} ms each"
    )
    if batch.teacher is not None and budget.draws > len(batch):
        context.say(f"the teacher has {len(batch)} trajectories: the budget's {budget.draws} draws are not made")
    if len(batch) < _FEW:
        context.say(
            f"only {len(batch)} draws of noise: on other noise the chosen solver may be worse than an unfitted solver; give "
            f"{_FEW} or more, {budget.used(256)} are good"
        )
