"""`iia_ode.fit`: the search for the most accurate solver with a given number of evaluations."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_seed, check_whole
from ..errors import GridError, InputError, one_run
from ..files import to_json
from ..iia.batch import Batch, held_out_of
from ..iia.fitted import FittedSolver
from ..iia.method import record_of
from ..iia.provenance import (
    UNJUDGED,
    Ingredient,
    RefinementRecord,
    SearchRecord,
    StageCost,
    finite,
    later,
    raised,
)
from ..iia.ranking import Range, samples_against
from ..iia.refinement import Refinement
from ..ode import Ledger, ProbabilityFlowODE, cached
from ..ode.distributed import agree, ranks_of
from ..ode.mode import check_mode
from ..plan import check_start
from ..plan.checks import check_samples
from ..schedules.levels import default_levels, known_level
from ..sizes import size_of_data, size_of_noise, smallest_level
from ..teacher.teacher import Teacher, check_teacher
from .budget import Budget, budget_of
from .grids import leap_grids
from .pipeline import SCALARS, Contender
from .stages import RIVAL, Context, Last, choose, closed_form, last_fit, refined, rival
from .thorough import ends_of, fresh_states, judged, more_states, warm_started

__all__ = ["fit", "start_time"]

# Level of the start where the output does not determine the data at the schedule's noisiest time, relative to the size of
# the data: EDM's 80 for data of size 0.5.
_NOISIEST = 160.0
_FEW = 64  # draws, below which the log warns that a choice is uncertain
_FEWEST = 8  # draws, below which a search is refused

_log = logging.getLogger(__name__)


@one_run()
def fit(
    ode: ProbabilityFlowODE,
    nfe: int,
    *,
    noise: Tensor | None = None,
    x: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    samples: int = 256,
    budget: str | Budget = "standard",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    teacher: Teacher | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FittedSolver:
    """Search for the most accurate solver with `nfe` evaluations, within a budget.

    A :class:`~iia_ode.Teacher` integrates the samples accurately, once. The search tries grids that leap from the noisiest
    level, each with weights in closed form (:class:`~iia_ode.IIA` over DDIM with ``terms="window"`` and
    ``target="trajectory"``). The budget ``"standard"`` then refines weights and times of the best solver together
    (:func:`~iia_ode.iia.refine`). ``"thorough"`` refines the best solver of each kind: without a warm start, with a warm
    start, and with a warm start per class.

    Two-fold cross-validation on the training samples chooses grids and kinds of weights. The endpoint error on held-out
    samples, and with ``"thorough"`` on fresh samples too, chooses among the resulting solvers and a classic solver without a
    fit. Last, the chosen solver is fitted to all samples, if the samples are enough for its weights and the error falls. The
    reported errors are the errors before this last fit.

    The search is silent. ``progress=True`` shows bars, and the logger ``iia_ode`` has every finding at level INFO.

    Parameters
    ----------
    ode : the model. Conditions have one entry per sample, or one for all samples; guidance is part of the model. For several
        processes pass :func:`iia_ode.distributed` of the ODE, and the same arguments in each process.
    nfe : number of evaluations of a run, at least 1.
    noise : draws of standard normal noise [B, ...], float32 or float64. At least 8 draws; 64 or more are advisable, and 256
        are good. Copies are left out.
    x : initial states [B, ...] at the noisiest level, float32 or float64, instead of `noise`.
    shape : shape of one sample, instead of `noise` and `x`: the search makes `samples` draws in float32.
    samples : number of draws for `shape`.
    budget : ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`~iia_ode.Budget`. A budget may add draws.
    sigma_max : level sigma/alpha of the initial states; by default the noisiest level of the schedule. Where the output of the
        model does not determine the data there (noise or score prediction at alpha = 0), the default is 160 times the root
        mean square of the data, estimated by a coarse integration of a few samples.
    sigma_min : level sigma/alpha at which the teacher stops; its data estimate there is the final state. Use the smallest
        level of the model's training. By default 0.004 times the root mean square of the data, or the lowest of the schedule's
        ``known_levels`` if that is higher.
    teacher : accurate trajectories from these initial states, if available. A budget then adds no draws.
    seed : seed of the draws for `shape`, of added draws and of the Rademacher probes of refinements.
    progress : show bars.

    Returns
    -------
    The solver, from ``sigma * noise`` at ``fit.grid[0]`` to the data. ``fit.record.search`` lists all solvers of the search
    with errors and costs; ``fit.explain()`` puts the record into words.

    Raises
    ------
    InputError, GridError, MismatchError : an argument is not usable.
    NonFiniteError : the model is not finite.
    RankError : for a distributed ODE: another process failed, has other arguments, or came to other decisions.

    Warns
    -----
    DuplicateWarning : copies among the draws are left out.
    """
    chosen = budget_of(budget)
    for name, value in (("nfe", nfe), ("samples", samples)):
        check_whole(name, value, least=1)
    check_seed(seed)
    if sigma_min is not None:
        sigma_min = known_level(ode.schedule, sigma_min, "sigma_min")
    check_mode(ode)
    draws = _draws(ode, noise, x, shape, samples, seed)
    agree(ode, "fit", nfe, sigma_max, sigma_min, chosen, seed, getattr(teacher, "record", teacher), x is None, draws)
    start = start_time(ode, sigma_max, None if x is not None else draws)
    states = draws if x is not None else ode.schedule.sigma(start) * draws
    if teacher is not None:
        check_teacher(teacher, ode, states, start)
    batch = Batch(ode, states.detach().to(ode.device or states.device), teacher, chosen.chunk_size)
    batch = batch if shape is not None else batch.without_copies()
    if len(batch) < _FEWEST:
        raise InputError(f"a fit needs at least {_FEWEST} different draws of noise, better 256, got {len(batch)}.")
    begun, given = time.perf_counter(), len(batch)
    with ode.counting() as spent:
        levels = _levels(batch, start, sigma_min)
        if teacher is None and chosen.draws > given:
            batch = more_states(batch, start, chosen.draws, chosen.held_out, seed)
        context, costs, fresh = _prepared(batch, given, nfe, chosen, start, levels, seed, progress)
        made: list[Contender | Ingredient] = [*rival(context)]
        grids = leap_grids(context.levels.highest, context.scale) if nfe > 1 else []
        made += closed_form(context, None, grids)
        if chosen.warm_starts:
            cold = next(c.pipeline for c in _contenders(made) if c.pipeline is not None)
            made += warm_started(context, cold.family)
        if chosen.starts:
            made += refined(context, _contenders(made))
        contenders = _contenders(made)
        if fresh is not None:
            with context.stage() as costs["finals"]:
                found = judged(context, contenders, fresh)
            contenders, fresh = (contenders, None) if found is None else (found, fresh)
        best = choose(contenders)
        with context.stage() as costs["last"]:
            last = last_fit(context, best, fresh)
        costs["last"].sample_evaluations += last.backward
    seconds = time.perf_counter() - begun
    context.say(f"chosen: {best.name}, error {best.error:.4g}; {seconds:.0f} s in all")
    if (ranks := ranks_of(ode)) is not None:
        errors = [c.error or math.nan for c in contenders]
        ranks.check_same(torch.tensor([*last.plan.grid, *errors], dtype=torch.float64, device="cpu"))
    spent.samples += last.backward + sum(c.refinement.backward for c in contenders if c.refinement)
    failed = [m for m in made if isinstance(m, Ingredient)]
    sizes = {"given": given, "final_draws": 0 if fresh is None else len(fresh)}
    search = _search(context, contenders, failed, best, last, costs=costs, seconds=seconds, **sizes)
    return _solver(context, contenders, best, last, search, spent)


# ---- before the search -----------------------------------------------------------------------------------------------


def start_time(ode: ProbabilityFlowODE, sigma_max: float | None, noise: Tensor | None = None) -> float:
    """The time of the initial states: of level `sigma_max`, or by default the noisiest usable time of the schedule.

    The size of the data behind `noise` decides where the noisiest time of the schedule is not usable.
    """
    schedule = ode.schedule
    if sigma_max is not None:
        return schedule.t_of_noise_to_signal(known_level(schedule, sigma_max, "sigma_max"))
    if not schedule.knows(schedule.t_noise):
        return schedule.t_of_noise_to_signal(default_levels(schedule)[1])
    if schedule.alpha(schedule.t_noise) > 0 or ode.prediction not in ("noise", "score"):
        return schedule.t_noise
    if noise is None:
        raise GridError(
            f"{ode.prediction} prediction says nothing about the data where alpha = 0, so the states x do not tell their "
            "level: give sigma_max, their level sigma/alpha, or noise= instead of x=."
        )
    return schedule.t_of_noise_to_signal(_NOISIEST * size_of_noise(ode, noise))


def _draws(
    ode: ProbabilityFlowODE,
    noise: Tensor | None,
    x: Tensor | None,
    shape: tuple[int, ...] | None,
    samples: int,
    seed: int,
) -> Tensor:
    """Standard normal noise, given or drawn for the shape of one sample; the initial states where they are given."""
    if sum(v is not None for v in (noise, x, shape)) != 1:
        raise InputError(
            "a fit takes exactly one of noise= (standard normal draws), x= (initial states) or shape= (of a sample)."
        )
    if x is not None:
        check_start(ode, x)
        check_samples(x)
        return x
    if shape is not None:
        if not isinstance(shape, tuple | list) or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"shape must be that of one sample, a tuple of positive whole numbers, got {shape!r}.")
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((samples, *shape), generator=generator, device="cpu")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 1:
        raise InputError(f"noise must be a float tensor [B, ...], got {getattr(noise, 'shape', type(noise).__name__)}.")
    check_start(ode, noise)
    size = float(noise.cpu().double().square().mean().sqrt())
    if not 0.5 < size < 2.0:
        raise InputError(
            f"noise must be standard normal, and its root mean square is {size:.3g}: pass initial states as x=."
        )
    return noise


def _levels(batch: Batch, start: float, sigma_min: float | None) -> dict[str, float]:
    """The smallest level and the size of the data, as options of a teacher."""
    if batch.teacher is not None:
        size = batch.teacher.record.data_size
    else:
        lowest = smallest_level(batch.ode.schedule, 0.0) if sigma_min is None else sigma_min
        size = size_of_data(batch.ode, batch.x, start, lowest)
    level = smallest_level(batch.ode.schedule, size) if sigma_min is None else sigma_min
    return {"sigma_min": level, "data_size": size}


def _prepared(
    batch: Batch,
    given: int,
    nfe: int,
    budget: Budget,
    start: float,
    levels: dict[str, float],
    seed: int,
    progress: bool,
) -> tuple[Context, dict[str, StageCost], Batch | None]:
    """The context with its teacher, the costs of the stages so far, and fresh samples with their final states."""
    held, finals = held_out_of(len(batch), budget.held_out), budget.finals_of(len(batch))
    ranks = ranks_of(batch.ode)
    memoized = replace(batch, ode=cached(batch.ode))
    context = Context(memoized, held, nfe, budget, seed, progress, ranks is None or ranks.rank == 0)
    _announce(context, batch, given, finals, start)
    fresh = None
    with context.stage() as cost:
        if batch.teacher is None:
            teacher = Teacher.solve(
                batch.ode,  # not memoized: only the trajectory's first evaluation recurs
                batch.x,
                start,
                batch.ode.schedule.t_data,
                steps=budget.steps(nfe),
                chunk_size=budget.chunk_size,
                progress=progress,
                **levels,
            )
            context = replace(context, batch=replace(memoized, teacher=teacher))
        if finals:  # before the search, so that a failure on these draws comes early
            drawn, fresh = (fresh_states(b, start, finals, len(batch) - held, seed) for b in (batch, memoized))
            fresh = replace(fresh, final=ends_of(drawn, start, budget.steps(nfe), progress, **levels))
    context.say(f"teacher: {cost.sample_evaluations} sample evaluations, {cost.seconds:.1f} s")
    return context, {"teacher": cost}, fresh


def _announce(context: Context, batch: Batch, given: int, finals: int, start: float) -> None:
    """Log the expected cost, from the time of the model's second call; without a listener nothing is timed."""
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
    cost = budget.cost(nfe, len(leap_grids(math.inf, 1.0)), len(batch), len(batch) - context.held_out)
    cost -= (budget.steps(nfe) + 1) * len(batch) if batch.teacher is not None else 0
    more = f" and {len(batch) - given} more" if len(batch) > given else ""
    more += f", {finals} for the last choice" if finals else ""
    context.say(
        f"{nfe} evaluations, {given} draws of noise{more}: about {cost} sample evaluations, {cost * seconds:.0f} s at "
        f"{1e3 * seconds:.2g} ms each"
    )
    if batch.teacher is not None and budget.draws > len(batch):
        context.say(f"the teacher has {len(batch)} trajectories: the budget's {budget.draws} draws are not made")
    if len(batch) < _FEW:
        context.say(
            f"only {len(batch)} draws of noise: on other noise the chosen solver may be worse than an unfitted solver; give "
            f"{_FEW} or more, 256 are good"
        )


def _contenders(made: list[Contender | Ingredient]) -> list[Contender]:
    return [m for m in made if isinstance(m, Contender)]


# ---- after the search ------------------------------------------------------------------------------------------------


def _search(
    context: Context, contenders: list[Contender], failed: list[Ingredient], best: Contender, last: Last, **rest: Any
) -> SearchRecord:
    """The account of a search; `rest` has the remaining fields of the record."""
    least = context.batch.taught.record.error
    tried = (*(c.ingredient(chosen=c is best) for c in contenders), *failed)
    return SearchRecord(
        rival=RIVAL,
        budget=to_json(context.budget),
        ingredients=tuple(replace(i, error=raised(i.error, least)) for i in tried),
        refinement=None if best.refinement is None else _account(best.refinement, least),
        steps=last.fit.split if last.fit and last.fit.reports else None,
        fitted_to_all=last.plan is not best.plan,
        checkpointed=context.budget.checkpointed,
        **rest,
    )


def _solver(
    context: Context, contenders: list[Contender], best: Contender, last: Last, search: SearchRecord, spent: Ledger
) -> FittedSolver:
    """The chosen solver with its record."""
    # A solver without a fit has the record of a fit with zero corrections.
    weights, base = (SCALARS, RIVAL) if best.pipeline is None else (best.pipeline.weights, context.method.base)
    method = replace(context.method, base=base, terms=weights.terms, intercept=weights.intercept)
    rival_error = next((c.error for c in contenders if c.pipeline is None), None)
    reach = Range.of(context.batch.target, context.held_out).reach
    against = samples_against((rival_error or math.inf) ** 2 - (best.error or math.inf) ** 2, reach)
    endpoint = replace(
        UNJUDGED,
        base=rival_error,
        fit=best.error,
        fell_back=best.pipeline is None,
        judged=len(best.errors),
        needed=against,
    )
    record = record_of(method, context.batch, context.held_out, endpoint, spent, seed=context.seed, search=search)
    reports = later(last.fit.reports, last.plan.steps - last.fit.plan.steps) if last.fit else ()
    return FittedSolver(replace(last.plan, name=context.method.name or last.plan.name), reports, record)


def _account(refinement: Refinement, least: float | None) -> RefinementRecord:
    return RefinementRecord(
        train=tuple(raised(finite(i.train), least) for i in refinement.iterations),
        held_out=tuple(raised(finite(i.error), least) for i in refinement.iterations),
        best=refinement.best,
        reason=refinement.status.value,
    )
