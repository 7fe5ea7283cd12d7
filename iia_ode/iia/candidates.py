"""What the one call makes and chooses from, and the entry that its report has for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..plan import Plan
from .endpoint import robust_mean
from .provenance import Ingredient
from .refine import Refinement
from .routes import Route
from .warm_start import WarmStart

__all__ = ["Candidate", "Cost"]


@dataclass
class Cost:
    """What a stage spent.

    Attributes
    ----------
    samples : sample evaluations.
    seconds : of the clock on the wall.
    """

    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that was made, and how.

    Attributes
    ----------
    name : what reports call it.
    plan : what it is.
    errors : at the end, of each sample of the noise that it is judged by.
    cost : what it took to make.
    route : how it was made; None is no fit at all.
    refinement, warm : what moved its weights at last, and the map that it starts with, if any.
    """

    name: str
    plan: Plan
    errors: Tensor
    cost: Cost
    route: Route | None = None
    refinement: Refinement | None = None
    warm: WarmStart | None = None

    def __str__(self) -> str:
        error = self.error
        found = "not finite" if error is None else f"error {error:.4g}, median {float(self.errors.median()):.4g}"
        return f"{self.name}: {found}"

    @property
    def error(self) -> float | None:
        """Root mean square over the samples; None where that is not finite."""
        error = robust_mean(self.errors, math.inf)
        return error if math.isfinite(error) else None

    def judged(self, errors: Tensor) -> Candidate:
        """The same with the errors of more samples."""
        return replace(self, errors=torch.cat([self.errors, errors]))

    def ingredient(self, *, chosen: bool) -> Ingredient:
        """Its entry in the report."""
        return Ingredient(self.name, self.error, self.cost.samples, self.cost.seconds, chosen)
