"""The stages of a search, as functions of a context: rival, closed-form fits, refinements, choice, last fit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import IIAError, InputError, RankError, first_line
from ..grids import karras
from ..iia.batch import Batch
from ..iia.method import IIA
from ..iia.provenance import Ingredient, StageCost
from ..iia.ranking import ranked
from ..iia.refinement import Refinement, refine
from ..iia.stepwise import StepwiseFit
from ..ode.distributed import ranks_of
from ..plan import Plan, trace
from ..solvers import get_solver
from ..warm_starts import WarmStart
from .budget import AGAIN, Budget
from .grid_search import search_grid
from .grids import LeapGrid, Levels
from .nearby import Watched, watched
from .pipeline import RIDGE, SCALARS, Contender, Pipeline, Start, Weights, joined, weights_of

__all__ = ["RIVAL", "Context", "Last", "choose", "closed_form", "last_fit", "refined", "rival", "worth_refining"]

RIVAL = "ipndm3"
"""The unfitted solver among the candidates of a search."""

_ENOUGH = 10  # training components per weight, below which there is no last fit
_SAMPLES = 10  # training samples, below which there is no last fit: an intercept is a mean over samples

# Range of the grid of the unfitted solver, relative to the size of the data.
_HIGH, _LOW = 400.0, 0.04

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Context:
    """Shared data of the stages of a search.

    Attributes
    ----------
    batch : all samples with their teacher. The ODE of the batch memoizes evaluations.
    held_out : number of held-out samples, the last of the batch.
    nfe : evaluations of the solver.
    budget, seed, progress : as for :func:`iia_ode.fit`.
    leads : whether this process logs; in a group, only the first process does.
    weights : ``"auto"``, or ``"scalars"`` for scalar weights alone.
    """

    batch: Batch
    held_out: int
    nfe: int
    budget: Budget
    seed: int
    progress: bool
    leads: bool
    weights: str = "auto"

    @cached_property
    def train(self) -> Batch:
        """The training samples."""
        return self.batch.split(self.held_out)[0]

    @cached_property
    def held(self) -> Batch:
        """The held-out samples."""
        return self.batch.split(self.held_out)[1]

    @property
    def method(self) -> IIA:
        """The method of all closed-form fits; pipelines change terms and intercept."""
        return IIA(
            "ddim", terms="window", target="trajectory", history=2, ridge="auto", guard=False, name=f"iia-{self.nfe}"
        )

    @property
    def levels(self) -> Levels:
        """The range of levels."""
        return Levels.of(self.batch)

    @property
    def scale(self) -> float:
        """Root mean square of all true final states."""
        return float(self.batch.target.double().square().mean().sqrt()) or 1.0

    def judged(self, plan: Plan) -> Watched:
        """Errors of a plan on the held-out samples, and changes of data estimates."""
        return watched(plan, self.held)

    def ample(self, weights: Weights = SCALARS) -> bool:
        """Whether the training samples have many components per weight of a fit; see :func:`enough`."""
        return enough(len(self.train), self.train.x[0].numel(), self.nfe, weights)

    def say(self, text: str) -> None:
        """Log a finding at level INFO."""
        if self.leads:
            _log.info(text)

    @contextmanager
    def stage(self) -> Iterator[StageCost]:
        """The cost of a ``with`` block, filled in at the end of the block."""
        cost, begun = StageCost(), time.perf_counter()
        with self.batch.ode.counting() as spent:
            yield cost
        cost.seconds, cost.sample_evaluations = time.perf_counter() - begun, spent.samples


def rival(context: Context) -> list[Contender]:
    """The unfitted solver on a Karras grid; an empty list where the solver has no grid with `nfe` evaluations."""
    schedule, levels = context.batch.ode.schedule, context.levels
    solver = get_solver(RIVAL)
    with context.stage() as cost:
        try:
            top = min(levels.highest, _HIGH * context.scale)
            low = max(context.batch.taught.sigma_min, min(_LOW * context.scale, top / 10))
            grid = solver.grid_for(context.nfe, lambda n: karras(n, low, top, schedule=schedule), schedule)
            grid[0] = context.batch.taught.t_start
            plan = trace(solver, schedule, grid, consistent=False)
        except IIAError:
            return []  # it cannot make so many evaluations, or not on this schedule
        errors = context.held.errors(plan)
    return [_said(context, Contender(f"{RIVAL}, not fitted", plan, errors, cost))]


def closed_form(
    context: Context, start: Start | None, grids: Sequence[LeapGrid], kinds: Sequence[Weights] | None = None
) -> list[Contender]:
    """Closed-form fits after a warm start or a cold start: a grid is searched with scalar weights, then each kind is fitted.

    Parameters
    ----------
    context : the search.
    start : the warm start; None for a cold start.
    grids : leap grids to start from; empty for a single evaluation.
    kinds : kinds of weights; by default all that suit the samples.
    """
    budget, train = context.budget, context.train
    method = context.method.stepwise(train.x.shape[1:])
    pipeline = Pipeline(method, context.nfe, context.batch.taught.t_start, start)
    with context.stage() as spent:
        if grids:
            judged = train[: budget.judges]
            found = search_grid(pipeline.plan, judged, pipeline.levels, grids, trials=budget.trials, thin=start is None)
            family = next((g for g in found.ranking if isinstance(g, LeapGrid)), None)
            pipeline = replace(pipeline, grid=found.best, family=family)
            context.say(f"{pipeline.name}: {len(found.trials)} grids; {found.best}")
    made: list[Contender] = []
    kinds = _kinds(context, start) if kinds is None else kinds
    # The fits hardly follow their own samples: those count too, for all kinds or for none.
    ample = all(context.ample(kind) for kind in kinds)
    for kind in kinds:
        own = replace(pipeline, weights=kind)
        with context.stage() as cost:
            parts = own.fit(train)
            held = context.judged(parts.plan)
            risks = [held.risk]
            if ample:
                risks.append(watched(parts.plan, train).risk)  # memoized evaluations
        if not made:  # the first solver on a grid bears the cost of finding it
            cost.sample_evaluations += spent.sample_evaluations
            cost.seconds += spent.seconds
        risk = math.sqrt(sum(r * r for r in risks))
        made.append(
            _said(
                context, Contender(own.name, parts.plan, held.errors, cost, own, parts.fit, warm=parts.warm, risk=risk)
            )
        )
    return made


def _kinds(context: Context, start: Start | None) -> list[Weights]:
    """The kinds of weights of the closed-form fits after a start."""
    if start is not None and start.moments is not None:
        return [SCALARS]  # a plan cannot mix maps over directions of the data with maps over bands
    if context.weights == "scalars" or len(context.train) < 4:
        return [SCALARS]
    return weights_of(context.train.x.shape[1:], intercepts=start is None)


def enough(samples: int, components: int, nfe: int, weights: Weights = SCALARS) -> bool:
    """Whether training samples have many components per weight of a fit.

    Parameters
    ----------
    samples, components : number of training samples, and of components of a sample.
    nfe : number of evaluations.
    weights : the kind of weights.
    """
    return samples >= _SAMPLES and samples * components >= _ENOUGH * nfe * (nfe + 3) // 2 * weights.groups


def candidates(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders without closed-form fits of other kinds of weights than the one of lowest risk, for each start."""
    best: dict[str, float] = {}
    for c in contenders:
        if c.risk is not None and c.pipeline is not None:
            best[c.pipeline.start_name] = min(c.risk, best.get(c.pipeline.start_name, math.inf))
    return [c for c in contenders if c.risk is None or c.pipeline is None or c.risk <= best[c.pipeline.start_name]]


def refined(context: Context, contenders: Sequence[Contender]) -> list[Contender | Ingredient]:
    """Gauss-Newton refinements of the best closed-form fits. A failed refinement becomes an ingredient without an error."""
    fits = [c for c in candidates(contenders) if c.pipeline is not None]
    order = ranked(fits, [c.errors for c in fits], outliers_too=True)
    usable = [c for c in order if bool(torch.isfinite(c.errors).all())] or order
    made: list[Contender | Ingredient] = []
    for fit in worth_refining(usable, context.budget.starts):
        name, found = f"{fit.name}, refined", None
        with context.stage() as cost:
            try:
                parts = fit.pipeline.fit(context.train, ridge=RIDGE)  # type: ignore[union-attr]
            except RankError:
                raise
            except IIAError as error:
                context.say(f"{name}: not possible ({first_line(error)})")
            else:
                share = context.held_out / len(context.batch)
                found = _refined(context, name, parts.warm, parts.fit.plan, share, context.budget.iterations)
            if found is not None:
                plan = joined(parts.warm, found.plan)
                errors = context.held.errors(plan)
        if found is None:
            made.append(Ingredient(name, None, cost.sample_evaluations, cost.seconds))
            continue
        cost.sample_evaluations += found.backward
        made.append(_said(context, Contender(name, plan, errors, cost, fit.pipeline, None, found, parts.warm)))
    return made


def worth_refining(contenders: Sequence[Contender], count: int) -> list[Contender]:
    """The first `count` fits: the best with and the best without a warm start, the best with a warm start per class, the rest.

    Refinement gains different amounts on the kinds of start, and a few samples that end in another mode may rank all fits of a
    kind last. Therefore each kind is refined before the choice.

    Parameters
    ----------
    contenders : closed-form fits, best first.
    count : number of fits to return.
    """
    kinds = [c.pipeline.kind for c in contenders if c.pipeline is not None]
    by_start = {kind[:1]: c for kind, c in zip(reversed(kinds), reversed(contenders), strict=True)}
    by_kind = {kind: c for kind, c in zip(reversed(kinds), reversed(contenders), strict=True)}
    leading = [c for firsts in (by_start, by_kind) for c in contenders if c in firsts.values()]
    return list(dict.fromkeys([*leading, *contenders]))[:count]


def _refined(
    context: Context, name: str, warm: WarmStart | None, rest: Plan, held_out: float, iterations: int
) -> Refinement | None:
    """The refinement of a plan from the end of its warm start, if any; None where the refinement failed."""
    batch, budget = context.batch, context.budget
    try:
        return refine(
            batch.ode,
            batch.x if warm is None else warm.apply(batch.x, batch.ode),
            rest,
            batch.target.to(batch.x),
            held_out=held_out,
            sigma_min=batch.taught.sigma_min,
            iterations=iterations,
            minibatch=budget.minibatch,
            probes=budget.probes,
            chunk_size=budget.chunk_size,
            checkpointed=budget.checkpointed,
            seed=context.seed,
            progress=context.progress,
        )
    except RankError:
        raise
    except (IIAError, RuntimeError) as error:
        less = "; Budget(checkpointed=True) or a smaller chunk_size takes less memory" if "memory" in str(error) else ""
        everywhere = isinstance(error, IIAError | torch.linalg.LinAlgError)  # type: ignore[attr-defined]
        if ranks_of(batch.ode) is not None and not everywhere:  # the other processes wait for this one
            raise RankError(f"{name} failed in this process: {first_line(error)}{less}") from error
        context.say(f"{name}: not possible ({first_line(error)}{less})")
        return None


def choose(context: Context, contenders: Sequence[Contender]) -> Contender:
    """The best contender, by :func:`~iia_ode.iia.ranking.ranked`; an InputError if no contender has finite errors.

    Few held-out samples do not show samples that rarely end in another mode. Without fresh samples, a refinement or the rival
    therefore also has to be better than the best closed form on all samples, where these are many per weight.
    """
    usable = [c for c in candidates(contenders) if c.error is not None]
    if not usable:
        raise InputError("nothing could be fitted: the model is not finite on this noise.")
    best, *others = ranked(usable, [c.errors for c in usable], outliers_too=True)
    plain = next((c for c in others if c.pipeline is not None and c.refinement is None), None)
    if plain is None or plain.pipeline is None or context.budget.finals or (best.pipeline and best.refinement is None):
        return best
    if not context.ample(plain.pipeline.weights):
        return best
    pair = [best, plain]
    return ranked(pair, [torch.cat([c.errors, context.train.errors(c.plan)]) for c in pair], outliers_too=True)[0]


@dataclass(frozen=True, eq=False)
class Last:
    """Result of the last fit.

    Attributes
    ----------
    plan : the solver.
    fit : the closed-form fit of the weights; None for a refined solver, and for a solver without a fit.
    backward : sample evaluations of backward passes.
    """

    plan: Plan
    fit: StepwiseFit | None
    backward: int = 0


def last_fit(context: Context, best: Contender, fresh: Batch | None) -> Last:
    """The chosen solver, fitted once more to all samples instead of the training samples alone.

    There is no new fit where the samples are too few for the number of weights, and with mini-batches. The new fit replaces
    the chosen solver if the new fit is better on all samples, or on the fresh samples if there are any.
    """
    pipeline, train = best.pipeline, context.train
    if pipeline is None or context.budget.minibatch is not None:
        return Last(best.plan, best.fit)
    if not context.ample(pipeline.weights):
        return Last(best.plan, best.fit)
    fit, backward = None, 0
    if best.refinement is None:
        parts = pipeline.fit(context.batch)
        fit, plan = parts.fit, parts.plan
    else:
        again = _refined(context, best.name, best.warm, best.refinement.plan, 0.0, AGAIN)
        if again is None or again.best == 0:
            return Last(best.plan, None, 0 if again is None else again.backward)
        backward, plan = again.backward, joined(best.warm, again.plan)
    if fresh is None:
        before = torch.cat([train.errors(best.plan), context.held.errors(best.plan)])  # memoized evaluations
        errors = [context.batch.errors(plan), before]
    else:
        errors = [fresh.errors(plan), best.errors[-len(fresh) :]]
    kept = ranked([plan, best.plan], errors, outliers_too=True)[0]
    return Last(kept, fit if kept is plan else best.fit, backward)


def _said(context: Context, made: Contender) -> Contender:
    context.say(
        f"{made}, on held-out samples ({made.cost.sample_evaluations} sample evaluations, {made.cost.seconds:.1f} s)"
    )
    return made
