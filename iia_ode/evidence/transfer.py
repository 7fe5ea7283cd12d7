"""How much of the gain of a fit survives where the fit is used outside of its own domain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import FingerprintWarning, MismatchWarning
from ..iia import FittedSolver
from ..integrate import sample
from ..metrics import rmse
from .measurements import Estimate, Measurements, estimated
from .models import Unseen

__all__ = ["moved_error", "survival"]


def moved_error(batch: Unseen, fit: FittedSolver) -> float:
    """Endpoint error of a fit on unseen noise, for a fit to any model: scalar weights suit samples of every shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MismatchWarning)
        warnings.simplefilter("ignore", FingerprintWarning)
        final: Tensor = sample(batch.ode, batch.x, solver=fit.plan)
    return rmse(final, batch.final)


def survival(
    found: Measurements, moved: Mapping[str, Any], own: Mapping[str, Any], base: Mapping[str, Any], **columns: Any
) -> Estimate:
    """Share of a gain that survives: log(moved / base) / log(own / base) of endpoint errors, a mean over seeds.

    The share is 1 if the moved fit is as good as the own fit, 0 if the moved fit is as good as the base, and negative if the
    base is better. The estimate has no seeds if the own fit is not better than the base in every seed: then there is no gain.

    Parameters
    ----------
    found : measurements with a column ``rmse``.
    moved, own, base : columns that name the moved fit, the fit of the domain itself, and the base.
    columns : columns that all three have.
    """
    errors = [found.by_seed("rmse", **columns, **named) for named in (moved, own, base)]
    triples = [[by[seed] for by in errors] for seed in errors[0] if all(seed in by for by in errors)]
    if not all(b < c for _, b, c in triples):
        return estimated([])
    return estimated([math.log(a / c) / math.log(b / c) for a, b, c in triples])
