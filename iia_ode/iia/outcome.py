"""Result of a search: the chosen solver with its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..plan import Plan
from .budgets import Budget
from .candidates import Candidate, Cost
from .fitted import FittedSolver
from .provenance import (
    UNJUDGED,
    Ingredient,
    Record,
    RefinementRecord,
    SearchRecord,
    Split,
    StageCost,
    finite,
    to_json,
)
from .refine import Refinement

__all__ = ["Outcome"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of one call of :func:`iia_ode.fit`.

    Attributes
    ----------
    best : the chosen candidate.
    plan : the plan of `best`, or its last fit to all samples.
    fitted : the closed-form fit behind `plan`; None if the rival, a solver without a fit, was chosen.
    unfitted : record of a fit over the rival with zero corrections, with the batch and held-out samples of the search.
    found, failed : candidates, and attempts that failed.
    costs : cost of each stage outside the candidates.
    evaluations, samples : model calls, and sample evaluations without the backward passes of candidates.
    seconds : wall-clock time of the call.
    """

    best: Candidate
    plan: Plan
    fitted: FittedSolver | None
    unfitted: Record
    found: tuple[Candidate, ...]
    failed: tuple[Ingredient, ...]
    costs: Mapping[str, Cost]
    evaluations: int
    samples: int
    seconds: float

    def solver(
        self, name: str, *, budget: Budget, given: int, final_draws: int, checkpointed: bool, seed: int
    ) -> FittedSolver:
        """The chosen solver under the given name, with its record; the options go into the record."""
        best, fitted = self.best, self.fitted
        closed = fitted if best.refinement is None else None
        own = self.unfitted if fitted is None else fitted.record
        search = SearchRecord(
            rival=self.unfitted.base.name,
            budget=to_json(budget),
            ingredients=(*(f.ingredient(chosen=f is best) for f in self.found), *self.failed),
            refinement=None if best.refinement is None else _account(best.refinement),
            steps=Split(closed.record.batch, closed.record.held_out) if closed and closed.reports else None,
            costs={k: StageCost(c.samples, c.seconds) for k, c in self.costs.items()},
            fitted_to_all=self.plan is not best.plan,
            given=given,
            final_draws=final_draws,
            checkpointed=checkpointed,
            seconds=self.seconds,
        )
        record = replace(
            own,
            batch=self.unfitted.batch,
            held_out=self.unfitted.held_out,
            endpoint=replace(
                UNJUDGED,
                base=next((f.error for f in self.found if f.route is None), None),
                fit=best.error,
                fell_back=best.route is None,
            ),
            evaluations=self.evaluations,
            sample_evaluations=self.samples + sum(f.refinement.backward for f in self.found if f.refinement),
            seed=seed,
            search=search,
        )
        return FittedSolver(replace(self.plan, name=name), closed.reports if closed else (), record)


def _account(refinement: Refinement) -> RefinementRecord:
    return RefinementRecord(
        train=tuple(finite(i.train) for i in refinement.iterations),
        held_out=tuple(finite(i.held_out) for i in refinement.iterations),
        best=refinement.best,
        reason=refinement.reason,
    )
