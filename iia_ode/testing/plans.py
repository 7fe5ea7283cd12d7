"""Certificates of plans and fitted solvers: measurements on their single grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import PlanError
from ..iia import FittedSolver
from ..plan import Plan, gaussian_errors
from ..plan.consistency import EXACT, step_errors

__all__ = ["PlanCertificate", "plan_certificate"]

BOUNDED = 10.0  # times a disturbance may grow beyond its exact size over a run


@dataclass(frozen=True)
class PlanCertificate:
    """Measured properties of a plan or a fitted solver on its grid. ``str()`` is a table, :meth:`as_dict` is JSON-ready.

    The certificate has no order, because a plan has a single grid and an order needs a family of grids. A fit gives up the
    exact sums of its weights for a smaller error on its model: the inconsistency of a fit is reported, but is no fault.

    Attributes
    ----------
    name : of the plan.
    fitted : whether the value is a fitted solver. The weights of a fit belong to its model, so its numbers are reported
        without a verdict.
    steps, nfe : intervals of the grid and model evaluations.
    times : grid points after the first, the ends of the steps.
    evaluations : model evaluations of each step.
    inconsistency : for each step, the smallest of the relative errors on constant data, constant noise and constant velocity;
        of the size of rounding for weights with exact sums.
    growth : for each step, the size of the largest disturbance of earlier states, relative to its exact size.
    gaussian : root mean square error of the state after each step on Gaussian data, relative to the size of the exact state;
        () for weights that mix components.
    gaussian_steps : the same for each step by itself, from an exact state.
    """

    name: str
    fitted: bool
    steps: int
    nfe: int
    times: tuple[float, ...]
    evaluations: tuple[int, ...]
    inconsistency: tuple[float, ...]
    growth: tuple[float, ...]
    gaussian: tuple[float, ...]
    gaussian_steps: tuple[float, ...]

    @property
    def consistent(self) -> bool:
        """Whether every step keeps constant data, constant noise or constant velocity, up to rounding."""
        return max(self.inconsistency) <= EXACT

    @property
    def passed(self) -> bool:
        """Whether a fit has finite numbers, or a plan bounded disturbances and an error below the size of Gaussian data."""
        if self.fitted:
            return all(map(math.isfinite, (*self.inconsistency, *self.growth, *self.gaussian)))
        return max(self.growth) <= BOUNDED and not any(not error < 1.0 for error in self.gaussian[-1:])

    @property
    def diagnosis(self) -> str:
        """The verdict and the first fault, as a sentence without a full stop."""
        if self.fitted:
            grown = f"disturbances of its states grow up to {max(1.0, *self.growth):.3g}-fold on its grid"
            return f"finite; {grown}" if self.passed else "FAILED, a number is not finite"
        if not max(self.growth) <= BOUNDED:
            return f"FAILED, a disturbance grows {max(self.growth):.3g}-fold on its grid"
        final = (
            f"a relative error of {self.gaussian[-1]:.2g} on Gaussian data" if self.gaussian else "bounded disturbances"
        )
        if not self.passed:
            return f"FAILED, {final}"
        off = max(self.inconsistency)
        kept = (
            "consistent"
            if self.consistent
            else f"steps off by up to {off:.2g} on the solutions that weights of sum 1 keep"
        )
        return f"passed, {kept}, {final}"

    def as_dict(self) -> dict[str, Any]:
        """The certificate in JSON's own types; None stands for numbers that are not finite."""
        values = asdict(self) | {"passed": self.passed, "consistent": self.consistent}
        return {k: _plain(v) for k, v in values.items()}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.diagnosis}"
        yield ""
        yield f"{self.nfe} evaluations over {self.steps} steps"
        yield f"  {'step to t':>12}{'evaluations':>13}{'inconsistency':>15}{'growth':>9}{'Gaussian':>11}{'by itself':>11}"
        missing = (math.nan,) * self.steps
        rows = (self.times, self.evaluations, self.inconsistency, self.growth)
        for t, n, gap, size, error, own in zip(
            *rows, self.gaussian or missing, self.gaussian_steps or missing, strict=True
        ):
            shown = [f"{v:>11.2g}" if not math.isnan(v) else f"{'-':>11}" for v in (error, own)]
            yield f"  {t:>12.5g}{n:>13}{gap:>15.1e}{size:>9.3g}{''.join(shown)}"


def plan_certificate(value: Plan | FittedSolver) -> PlanCertificate:
    """Measure a plan or a fitted solver on its grid; no network and no sampling.

    Parameters
    ----------
    value : the plan, or the fitted solver.

    Returns
    -------
    The certificate. The Gaussian data have mean 0.5 and variances from the square of the lowest noise level of the grid to the
    square of the highest.
    """
    plan = value.plan if isinstance(value, FittedSolver) else value
    gaps, growth = step_errors(plan)
    levels = [plan.schedule.noise_to_signal(t) for t in plan.grid]
    inside = [level for level in levels if 0 < level < math.inf] or [1.0]
    low, high = math.log(min(inside)), math.log(max(inside))
    stds = [math.exp(low + part * (high - low)) for part in (0.25, 0.5, 0.75)]
    states: tuple[float, ...] = ()
    own: tuple[float, ...] = ()
    try:
        found = [gaussian_errors(plan, 0.5 * std, std * std) for std in stds]
        pairs = [((one.states / one.std).tolist(), (one.steps / one.std).tolist()) for one in found]
        states, own = (
            tuple(math.hypot(*row) / math.sqrt(len(row)) for row in zip(*p, strict=True))
            for p in zip(*pairs, strict=True)
        )
    except PlanError:  # weights that mix components, or constants per condition
        pass
    return PlanCertificate(
        name=plan.name,
        fitted=isinstance(value, FittedSolver),
        steps=plan.steps,
        nfe=plan.nfe,
        times=plan.grid[1:],
        evaluations=plan.evaluations_per_step,
        inconsistency=tuple(gaps),
        growth=tuple(growth),
        gaussian=states,
        gaussian_steps=own,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
