"""`iia_ode.fit`: the search for the most accurate solver with a given number of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_choice, check_seed, check_whole
from ..errors import InputError, one_run
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
from ..ode.guidance import recorded
from ..ode.mode import check_mode
from ..schedules.levels import known_level
from ..sharing.in_use import at_fit
from ..sharing.serving import at_scale, checked_scales
from ..teacher.teacher import Teacher, check_teacher
from .budget import Budget, budget_of
from .cost import announce, default_samples, numbers_of
from .draws import check_additions, initial_states, levels_of
from .grids import leap_grids
from .pipeline import SCALARS, Contender, Hint
from .stages import RIVAL, Context, Last, candidates, choose, closed_form, last_fit, refined, rival
from .thorough import ends_of, fresh_states, judged, more_states, warm_started

__all__ = ["fit"]

_FEWEST = 8  # draws, below which a search is refused
_MEASURED, _SERVED = 64, 7919  # draws for the measured guidance scales, and the distance of their seed


@overload
def fit(
    ode: ProbabilityFlowODE,
    nfe: int,
    *,
    noise: Tensor | None = ...,
    x: Tensor | None = ...,
    shape: tuple[int, ...] | None = ...,
    images: Tensor | None = ...,
    samples: int | None = ...,
    budget: str | Budget = ...,
    weights: Literal["auto", "scalars"] = ...,
    sigma_max: float | None = ...,
    sigma_min: float | None = ...,
    teacher: Teacher | None = ...,
    scales: Sequence[float] | None = ...,
    seed: int = ...,
    progress: bool = ...,
) -> FittedSolver: ...


@overload
def fit(
    ode: ProbabilityFlowODE,
    nfe: Sequence[int],
    *,
    noise: Tensor | None = ...,
    x: Tensor | None = ...,
    shape: tuple[int, ...] | None = ...,
    images: Tensor | None = ...,
    samples: int | None = ...,
    budget: str | Budget = ...,
    weights: Literal["auto", "scalars"] = ...,
    sigma_max: float | None = ...,
    sigma_min: float | None = ...,
    teacher: Teacher | None = ...,
    scales: Sequence[float] | None = ...,
    seed: int = ...,
    progress: bool = ...,
) -> dict[int, FittedSolver]: ...


@one_run()
def fit(
    ode: ProbabilityFlowODE,
    nfe: int | Sequence[int],
    *,
    noise: Tensor | None = None,
    x: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    images: Tensor | None = None,
    samples: int | None = None,
    budget: str | Budget = "standard",
    weights: Literal["auto", "scalars"] = "auto",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    teacher: Teacher | None = None,
    scales: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FittedSolver | dict[int, FittedSolver]:
    """Search for the most accurate solver with `nfe` evaluations, within a budget.

    A :class:`~iia_ode.Teacher` integrates the samples accurately, once. The search tries grids that leap from the noisiest
    level, each with weights in closed form (:class:`~iia_ode.IIA` over DDIM with ``terms="window"`` and
    ``target="trajectory"``). The budget ``"standard"`` then refines weights and times of the best solver together
    (:func:`~iia_ode.iia.refine`). ``"thorough"`` refines the best solver of each kind: without a warm start, with a warm
    start, and with a warm start per class.

    Errors and changes of data estimates along runs on the training samples choose the grid, and on all samples the kind of
    weights. The endpoint error on held-out samples, and with ``"thorough"`` on fresh samples too, chooses among the resulting
    solvers and a classic solver without a fit. Last, the chosen solver is fitted to all samples, if the samples are enough for
    its weights and the error falls; budgets with mini-batches have no last fit. The reported errors are the errors before the
    last fit.

    The search is silent. ``progress=True`` shows bars, and the logger ``iia_ode`` has every finding at level INFO.

    Parameters
    ----------
    ode : the model. Conditions have one entry per sample, or one for all samples; guidance is part of the model. For several
        processes pass :func:`iia_ode.distributed` of the ODE, and the same arguments in each process.
    nfe : number of evaluations of a run, at least 1; or several numbers, such as ``(4, 5, 6, 8)``, for a solver each. Several
        solvers share the teacher. The search for the largest number tells the other searches where to look, so that all
        together cost about twice the cost of one.
    noise : draws of standard normal noise [B, ...], float32 or float64, at least 8. Copies are left out. A budget uses at most
        :meth:`Budget.used` of them, in a random order.
    x : initial states [B, ...] at the noisiest level, float32 or float64, instead of `noise`.
    shape : shape of one sample, instead of `noise` and `x`: the search makes `samples` draws in float32.
    images : clean samples [B, ...], float32 or float64, instead of `noise`, for a solver that starts in the middle, as
        image-to-image does: the search adds noise of level `sigma_max` to them.
    samples : number of draws for `shape`; by default as many as the budget uses.
    budget : ``"quick"``, ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`~iia_ode.Budget`. A budget may add
        draws, or use some of the given draws only.
    weights : ``"scalars"`` for one number per direction, which serves samples of every shape. ``"auto"`` also tries weights
        per frequency band, constants and the budget's warm starts, which are for samples of one shape.
    sigma_max : level sigma/alpha of the initial states; by default the noisiest level of the schedule. Where the output of the
        model does not determine the data there (noise or score prediction at alpha = 0), the default is 160 times the root
        mean square of the data, estimated by a coarse integration of a few samples.
    sigma_min : level sigma/alpha at which the teacher stops; its data estimate there is the final state. Use the smallest
        level of the model's training. By default 0.004 times the root mean square of the data, or the lowest of the schedule's
        ``known_levels`` if that is higher.
    teacher : accurate trajectories from these initial states, if available. All of them are used, and a budget adds no draws
        but those of the last choice.
    scales : guidance scales at which the result is measured on new draws, to record the range that it serves; see
        :meth:`iia_ode.FittedSolver.serves`. By default only the scale of the ODE.
    seed : seed of the draws for `shape`, of added draws and of the probes of refinements.
    progress : show bars.

    Returns
    -------
    The solver, from ``sigma * noise`` at ``fit.grid[0]`` to the data. For several numbers of evaluations, a dict from each
    number to its solver; the cost of the shared teacher is in the record of the largest number. ``fit.record.search`` lists
    all solvers of the search with errors and costs; ``fit.explain()`` puts the record into words.

    Raises
    ------
    InputError, GridError, MismatchError : an argument is not usable.
    NonFiniteError : the model is not finite.
    RankError : for a distributed ODE: another process failed, has other arguments, or came to other decisions.

    Warns
    -----
    DuplicateWarning : copies among the draws are left out.
    """
    chosen, numbers = budget_of(budget), numbers_of(nfe)
    first, *others = sorted(numbers, reverse=True)
    samples = default_samples(chosen) if samples is None else check_whole("samples", samples, least=1)
    check_seed(seed)
    if sigma_min is not None:
        sigma_min = known_level(ode.schedule, sigma_min, "sigma_min")
    if check_choice("weights", weights, ("auto", "scalars")) == "scalars":
        chosen = replace(chosen, warm_starts=False)
    if scales is not None:
        scales = checked_scales(scales, recorded(ode.guidance_scale, ode.schedule))
        at_scale(ode, scales[0])
    check_mode(ode)
    sources = {"noise": noise, "x": x, "shape": shape, "images": images}
    options = numbers, sigma_max, sigma_min, chosen, weights, seed, samples, scales
    agree(ode, "fit", options, getattr(teacher, "record", teacher), list(sources.values()))
    initial = initial_states(ode, sources, samples=samples, sigma_max=sigma_max, seed=seed)
    start, states = initial.t, initial.x
    if teacher is not None:
        check_teacher(teacher, ode, states, start)
    device = ode.device or states.device
    batch = Batch(ode, states.detach().to(device), teacher, chosen.chunk_size, signal=initial.signal)
    batch = batch if shape is not None else batch.without_copies()
    given = len(batch)
    if teacher is None and chosen.used(given) < given:
        order = torch.randperm(given, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        batch = batch[order[: chosen.used(given)]]
    if len(batch) < _FEWEST:
        better = f"better {chosen.used(256)}"
        raise InputError(f"a fit needs at least {_FEWEST} different draws of noise, {better}, got {len(batch)}.")
    begun = time.perf_counter()
    with ode.counting() as spent:
        levels = levels_of(batch, start, sigma_min)
        more = max(0, chosen.draws - len(batch)) if teacher is None else 0
        check_additions(batch, start, levels["data_size"], more + chosen.finals_of(len(batch) + more))
        if more:
            batch = more_states(batch, start, chosen.draws, chosen.held_out, seed)
        shared = chosen.shared(first=True) if others else chosen
        context, costs, fresh = _prepared(batch, given, first, shared, start, levels, seed, progress, weights)
        plain = batch.split(context.held_out)[1]
        made = _searched(context, costs, plain, fresh, None)
    found = {first: _result(made, context, costs, spent, given, time.perf_counter() - begun)}
    for n in others:
        begun, hint = time.perf_counter(), made.hint
        own, own_costs = replace(context, nfe=n, budget=chosen.shared(first=False)), {"teacher": StageCost()}
        with ode.counting() as spent:
            made = _searched(own, own_costs, plain, fresh, hint)
        found[n] = _result(made, own, own_costs, spent, given, time.perf_counter() - begun)
    if scales is not None:
        new = fresh_states(batch, start, min(_MEASURED, len(batch)), 0, seed + _SERVED)
        served = {"sigma_min": levels["sigma_min"], "progress": progress}
        found = {n: one.serves(new.ode, new.x, scales, **served) for n, one in found.items()}  # type: ignore[arg-type]
    return {n: found[n] for n in numbers} if isinstance(nfe, list | tuple | range) else found[first]


# ---- before the search -----------------------------------------------------------------------------------------------


def _prepared(
    batch: Batch,
    given: int,
    nfe: int,
    budget: Budget,
    start: float,
    levels: dict[str, float],
    seed: int,
    progress: bool,
    weights: str,
) -> tuple[Context, dict[str, StageCost], Batch | None]:
    """The context with its teacher, the costs of the stages so far, and fresh samples with their final states."""
    held, finals = held_out_of(len(batch), budget.held_out), budget.finals_of(len(batch))
    ranks = ranks_of(batch.ode)
    memoized = replace(batch, ode=cached(batch.ode))
    context = Context(memoized, held, nfe, budget, seed, progress, ranks is None or ranks.rank == 0, weights)
    announce(context, batch, given, finals, start)
    fresh = None
    with context.stage() as cost:
        if batch.teacher is None:
            knots, dtype = budget.storage(nfe, batch.x.numel(), batch.x.element_size())
            teacher = Teacher.solve(
                batch.ode,  # not memoized: only the trajectory's first evaluation recurs
                batch.x,
                start,
                batch.ode.schedule.t_data,
                steps=budget.steps(nfe),
                chunk_size=budget.chunk_size,
                knots=knots,
                dtype=dtype,
                progress=progress,
                **levels,
            )
            context = replace(context, batch=replace(memoized, teacher=teacher))
        if finals:  # before the search, so that a failure on these draws comes early
            drawn, fresh = (fresh_states(b, start, finals, len(batch) - held, seed) for b in (batch, memoized))
            fresh = replace(fresh, final=ends_of(drawn, start, budget.steps(nfe), progress, **levels))
    context.say(f"teacher: {cost.sample_evaluations} sample evaluations, {cost.seconds:.1f} s")
    return context, {"teacher": cost}, fresh


def _contenders(made: list[Contender | Ingredient]) -> list[Contender]:
    return [m for m in made if isinstance(m, Contender)]


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Made:
    """What a search made: contenders, failures, choice, the fresh samples that judged, errors of the solver in use, a hint."""

    contenders: list[Contender]
    failed: list[Ingredient]
    best: Contender
    last: Last
    fresh: Batch | None
    in_use: Any
    hint: Hint | None


def _searched(
    context: Context, costs: dict[str, StageCost], plain: Batch, fresh: Batch | None, hint: Hint | None
) -> _Made:
    """The stages of a search, from the rival to the last fit; `plain` are the held-out samples with an ODE without a memo."""
    budget = context.budget
    made: list[Contender | Ingredient] = [*rival(context)]
    if context.nfe == 1:
        grids = []
    else:
        grids = leap_grids(context.levels.highest, context.scale) if hint is None else hint.near(context.levels)
    made += closed_form(context, None, grids, None if hint is None else [hint.weights])
    if budget.warm_starts:
        cold = next(c.pipeline for c in _contenders(made) if c.pipeline is not None)
        made += warm_started(context, cold.family)
    if budget.starts:
        made += refined(context, _contenders(made))
    contenders = _contenders(made)
    fits = [c.pipeline for c in candidates(contenders) if c.pipeline is not None and c.pipeline.start is None]
    found_hint = Hint(fits[0].family, fits[0].weights) if fits and fits[0].family is not None else None
    if fresh is not None:
        with context.stage() as costs["finals"]:
            found = judged(context, contenders, fresh)
        contenders, fresh = (contenders, None) if found is None else (found, fresh)
    with context.stage() as costs["last"]:
        best = choose(context, contenders)
        last = last_fit(context, best, fresh)
    costs["last"].sample_evaluations += last.backward
    held = replace(plain, final=context.batch.target[-context.held_out :])
    in_use = at_fit(held, context.batch.taught.t_start, context.nfe, best.error)
    return _Made(contenders, [m for m in made if isinstance(m, Ingredient)], best, last, fresh, in_use, found_hint)


# ---- after the search ------------------------------------------------------------------------------------------------


def _result(
    made: _Made, context: Context, costs: dict[str, StageCost], spent: Ledger, given: int, seconds: float
) -> FittedSolver:
    """The solver of a search with its record; `spent` is the ledger of the search."""
    context.say(f"chosen: {made.best.name}, error {made.best.error:.4g}; {seconds:.0f} s in all")
    if (ranks := ranks_of(context.batch.ode)) is not None:
        errors = [c.error or math.nan for c in made.contenders]
        ranks.check_same(torch.tensor([*made.last.plan.grid, *errors], dtype=torch.float64, device="cpu"))
    spent.samples += made.last.backward + sum(c.refinement.backward for c in made.contenders if c.refinement)
    sizes = {"given": given, "final_draws": 0 if made.fresh is None else len(made.fresh)}
    search = _search(context, made.contenders, made.failed, made.best, made.last, costs=costs, seconds=seconds, **sizes)
    solver = _solver(context, made.contenders, made.best, made.last, search, spent)
    return replace(solver, record=replace(solver.record, in_use=made.in_use))


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
        from_images=context.batch.signal is not None,
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
