"""One call: the lowest error per evaluation that a budget can buy, every ingredient chosen by noise that it did not see."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_seed, check_whole
from ..errors import InputError
from ..files import bytes_of
from ..ode import ProbabilityFlowODE
from ..plan import check_start
from .budgets import Budget, budget_of
from .chunks import device_of
from .fitted import FittedSolver
from .gather import ranks_of
from .initial import distinct, initial_states, more_states, smallest_level, start_time, warn_of_copies
from .job import Job
from .origin import Origin, conditions_digest
from .remembered import RememberedODE
from .shared import SharedODE
from .teacher import Teacher

__all__ = ["fit"]


def fit(
    ode: ProbabilityFlowODE,
    nfe: int,
    noise: Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    samples: int = 256,
    budget: str | Budget = "standard",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    held_out: float = 0.5,
    teacher: Teacher | None = None,
    chunk_size: int = 64,
    checkpointed: bool = False,
    group: Any = None,
    seed: int = 0,
    report: Callable[[str], None] | None = print,
    progress: bool = False,
) -> FittedSolver:
    """A solver with `nfe` evaluations for this model, as accurate as the budget can make it.

    Accurate trajectories are made once, from the noise. Grids that leap from the noisiest level are searched, each
    with weights in closed form (:class:`IIA` over DDIM with ``terms="window"`` and ``target="trajectory"``); with a budget
    above ``"closed-form"`` the weights and grids of the best are then refined together (:func:`refine`); with
    ``"thorough"`` of each kind the best: without a warm start, with one, with one per class. Grids and kinds of
    weights are chosen by two-fold cross-validation on the first part of the noise, and among what was made of them by the
    endpoint error on the rest, which is held out; the solver that the model would have had without a fit is among the
    candidates. Last, what was chosen is fitted to all of the noise, where there is enough of it and it helps there; the
    errors that are reported are those from before. ``"thorough"`` makes the last choice on the held-out noise and on
    :attr:`Budget.finals` times as many draws as there are, made for that; these alone say whether the last fit is better.

    Where ``torch.distributed`` is initialised, this is a collective call: every process passes the same noise, conditions and
    options, each runs the model on its share of the samples of every evaluation, and all get the same fit. Unlike in
    :meth:`IIA.fit`, the whole noise is given to each process, and each holds all trajectories.

    Parameters
    ----------
    ode : the model, with conditions for each noise or one for all. Guidance is part of it.
    nfe : evaluations of a run, at least 1.
    noise : draws of standard normal noise [B, ...], float32 or float64; 64 or more, 256 are good; a budget may add to them
        (:attr:`Budget.draws`; ``"thorough"`` does). Initial states are recognised by their size and taken as they are where
        the noisiest level is far from 1; those of a `teacher` always. A draw that is there twice counts once
        (:class:`DuplicateWarning`).
    shape : instead of `noise`, the shape of one sample: `samples` draws are made from `seed`, in float32; a budget may add to
        them too.
    budget : ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`Budget`.
    sigma_max : level sigma/alpha to start from; by default the noisiest of the schedule, or 80 where its model says nothing
        of the data there (noise or score where alpha = 0).
    sigma_min : level whose data estimate the teacher takes for the data: the smallest that the model was trained on. By
        default 0.002, or the level of the first timestep of a :class:`~iia_ode.Discrete` schedule if that is higher.
    held_out : share of the noise, its last part, that decides. Noise that a budget adds goes to the part whose sample has
        given it its condition: none of those that decide is fitted to, but for such as both parts have, as class labels.
    teacher : of these very initial states, if there is one already; no noise is added to them.
    chunk_size : samples that go through the model at once, in all processes together.
    checkpointed : in refinements, forget the inside of each evaluation and make it again on the way back: the memory of one
        evaluation of a chunk instead of all, for half as much work again. For models whose graphs are large.
    group : processes that fit together; by default all of ``torch.distributed``, if that is initialised.
    seed : of `shape`'s draws, of those that a budget adds, and of the refinement's signs; recorded.
    report : is told what it will cost, how far it is and what it found, in the first process; None for silence.
    progress : show bars, there.

    Returns
    -------
    A :class:`FittedSolver` that starts from ``sigma * noise`` at ``fit.grid[0]`` and ends at the data. Its
    ``record.search`` has the list of ingredients with their errors and costs; ``fit.explain()`` says it in words.

    Raises
    ------
    InputError, GridError, MismatchError : an argument is not usable.
    NonFiniteError : the model is not finite.
    RankError : a process of the group failed, was asked for another fit, or came to other decisions than the others.
    """
    chosen = budget_of(budget)
    for name, value in (("nfe", nfe), ("chunk_size", chunk_size), ("samples", samples)):
        check_whole(name, value, least=1)
    check_seed(seed)
    start = start_time(ode, sigma_max)
    x = noise if teacher is not None and noise is not None else initial_states(ode, noise, shape, samples, start, seed)
    if teacher is not None and not torch.equal(teacher.initial, x.detach().cpu().to(teacher.initial.dtype)):
        x = initial_states(ode, noise, shape, samples, start, seed)
    check_start(ode, x)
    x = x.detach().to(device_of(ode, x))
    sigma_min = smallest_level(ode.schedule) if sigma_min is None else sigma_min
    if (ranks := ranks_of(group)) is not None:
        task = nfe, start, sigma_min, chosen, held_out, chunk_size, checkpointed, seed, _digest(ode, x, teacher)
        ranks.agree(len(x), task, "the same noise, conditions, model, options and teacher, if any")
        ode = SharedODE(ode, ranks)
        report, progress = (report, progress) if ranks.rank == 0 else (None, False)
    if noise is not None and len(own := distinct(ode, x).nonzero()[:, 0]) < len(x):
        warn_of_copies(len(x) - len(own), len(x), stacklevel=3)
        if teacher is not None:
            teacher.check(ode, x, stacklevel=4)
            teacher = teacher.subset(own)
        ode, x = ode.subset(own, len(x)), x[own]
    if len(x) < 8:
        raise InputError(f"a fit needs at least 8 different draws of noise, better 256, got {len(x)}.")
    given, say = len(x), report or (lambda _: None)
    if teacher is None:
        ode, x = more_states(ode, x, start, chosen.draws, held_out, seed)
    elif chosen.draws > given:
        say(f"the teacher has {given} trajectories: no noise is added, though the budget asks for {chosen.draws} draws")
    job = Job(
        RememberedODE(ode), nfe, x, given=given, start=start, sigma_min=sigma_min, budget=chosen, held_out=held_out,
        chunk_size=chunk_size, checkpointed=checkpointed, seed=seed, say=say, progress=progress,
    )  # fmt: skip
    found = job.run(teacher)
    if ranks is not None:
        errors = [candidate.error or math.nan for candidate in job.found]
        ranks.check_same(torch.tensor([*found.plan.grid, *errors], dtype=torch.float64, device="cpu"))
    return found


def _digest(ode: ProbabilityFlowODE, x: Tensor, teacher: Teacher | None) -> tuple[object, ...]:
    """What must be the same in every process that takes part."""
    digest, path = hashlib.sha256(), None if teacher is None else teacher.path
    known = () if path is None else (path.knots, path.states, path.slopes, path.data)
    for values in (x, *(v for v in known if v is not None)):
        digest.update(bytes_of(values))
    return Origin.of(ode, x), conditions_digest(ode), digest.hexdigest(), None if teacher is None else teacher.about
