"""What the one call ends with: the solver that was chosen, and the account of how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..plan import Plan
from .budgets import Budget
from .candidates import Candidate, Cost, Ingredient
from .fitted import FittedSolver

__all__ = ["Outcome"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of one call of :func:`iia_ode.fit`.

    Attributes
    ----------
    best : what was chosen.
    plan : that, or its last fit to all of the noise.
    fitted : the fit behind the plan; None where nothing that was fitted is better than what was not.
    found, failed : everything that was tried.
    costs : of what is no ingredient's own.
    evaluations, samples : model calls, and sample evaluations less the backward passes of refinements that were judged.
    seconds : in all.
    """

    best: Candidate
    plan: Plan
    fitted: FittedSolver | None
    found: tuple[Candidate, ...]
    failed: tuple[Ingredient, ...]
    costs: Mapping[str, Cost]
    evaluations: int
    samples: int
    seconds: float

    def solver(
        self, name: str, *, budget: Budget, base: str, batch: int, held_out: int, seed: int, **options: Any
    ) -> FittedSolver:
        """The fitted solver of that name, which knows how it was found; `options` are recorded as they are."""
        best, fitted = self.best, self.fitted
        ladder = [*(f.ingredient(chosen=f is best) for f in self.found), *self.failed]
        closed = best.refinement is None and fitted is not None
        samples = self.samples + sum(f.refinement.backward for f in self.found if f.refinement is not None)
        # Whatever is not fitted is described like a fit over it that changes nothing.
        about = fitted or next(f.route.fitted for f in self.found if f.route is not None and f.route.fitted is not None)
        reports = about.reports if closed else ()
        recipe = {
            "rival": base,
            "budget": asdict(budget) | {"rounds": [list(r) for r in budget.rounds]},
            "ingredients": [asdict(i) for i in ladder],
            "refinement": None if best.refinement is None else best.refinement.about(),
            "steps": {k: about.about[k] for k in ("batch", "held_out")} if reports else None,
            **{k: {"sample_evaluations": c.samples, "seconds": c.seconds} for k, c in self.costs.items()},
            "fitted_to_all": self.plan is not best.plan,
            **options,
            "evaluations": self.evaluations,
            "sample_evaluations": samples,
            "seconds": self.seconds,
        }
        unfitted = next((i.error for i in ladder if i.name.startswith(base)), None)
        more = {
            "batch": batch,
            "held_out": held_out,
            "endpoint": about.about["endpoint"]
            | {"base": unfitted, "fit": best.error, "fell_back": best.route is None},
            "seed": seed,
            "evaluations": self.evaluations,
            "sample_evaluations": samples,
            "recipe": recipe,
        }
        if best.route is None:
            more["base"] = {"name": base, "options": {}}
        return FittedSolver(replace(self.plan, name=name), reports, about.about | more)
