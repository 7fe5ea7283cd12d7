"""Warm starts: an affine map x_1 = L x_T + c over the first interval, in closed form and without an evaluation.

At high noise the flow is nearly the flow of the Gaussian with the mean and covariance of the data, which is affine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, InputError, MismatchError
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Evaluate, LinearMap, PerCondition, Plan, Projections, Vector, check_grid
from ..plan.vectors import Constant, Weight, combine
from ..schedules import Schedule
from .moments import Moments, centred, estimate_moments, exact_moments

__all__ = ["WarmStart"]

_F64 = torch.float64
_PRIORS = (0.0, 1.0, 10.0, 100.0, 1000.0, math.inf)


@dataclass(frozen=True, eq=False)
class WarmStart:
    """The affine map x_1 = weight x_T + constant from states at `t_start` to states at `t_1`.

    Parameters
    ----------
    schedule : noise schedule of the ODE.
    t_start, t_1 : times in order of decreasing noise; equal times make the map the identity.
    weight : a number, a tensor that broadcasts against a sample, or a linear map of a sample.
    constant : a tensor that broadcasts against a sample, a tensor for each value of a condition, or None.
    about : how the map was made, JSON-ready.

    Raises
    ------
    GridError : the times are not usable.
    PlanError : a weight is not finite.
    """

    schedule: Schedule
    t_start: float
    t_1: float
    weight: Weight
    constant: Constant | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.t_1 != self.t_start:
            t, s = check_grid(self.schedule, [self.t_start, self.t_1])
            if not _angle(self.schedule, s) < _angle(self.schedule, t):
                raise GridError(f"a warm start goes from noise to less noise, and not from t = {t:g} to {s:g}.")
            Plan(self.schedule, (t, s), (self._instruction,))  # checks the weights

    @classmethod
    def gaussian(
        cls,
        schedule: Schedule,
        t_start: float,
        t_1: float,
        *,
        mean: Tensor | None = None,
        covariance: Tensor | None = None,
        samples: Tensor | None = None,
        labels: Tensor | None = None,
        per: str | None = None,
        rank: int | None = None,
        shrink: float | str = "auto",
    ) -> WarmStart:
        """The exact flow of a Gaussian, from given moments or from samples of the data.

        Parameters
        ----------
        schedule, t_start, t_1 : the interval.
        mean, covariance : moments: a mean [*shape], and a covariance [d, d], variances [*shape] or a number.
        samples : in place of moments, samples [n, *shape] of the data, such as the endpoints of a teacher.
        labels, per : integer conditions [n] of the samples, and the name of the condition. There is a mean for each value,
            and a common covariance.
        rank : principal directions to keep; the remainder is isotropic.
        shrink : estimator of the covariance; see :func:`~iia_ode.warm_starts.estimate_moments`.

        Returns
        -------
        The warm start.

        Raises
        ------
        InputError : the moments or samples are not usable.
        """
        given = mean is not None and covariance is not None
        if given == (samples is not None) or (given and (labels is not None or per is not None)):
            raise InputError("a Gaussian warm start takes mean and covariance, or samples (with labels and per).")
        if mean is not None and covariance is not None:
            return cls.of_moments(exact_moments(mean, covariance, rank), schedule, t_start, t_1)
        level = schedule.noise_to_signal(t_1)
        moments = estimate_moments(
            torch.as_tensor(samples, device="cpu"), labels=labels, key=per, rank=rank, shrink=shrink, level=level
        )
        return cls.of_moments(moments, schedule, t_start, t_1)

    @classmethod
    def of_moments(cls, moments: Moments, schedule: Schedule, t_start: float, t_1: float) -> WarmStart:
        """The exact flow of a Gaussian, x_1 = alpha_1 m + L (x_T - alpha_T m).

        The gain for an eigenvalue v is sqrt((alpha_1^2 v + sigma_1^2) / (alpha_T^2 v + sigma_T^2)).

        Parameters
        ----------
        moments : mean [*shape] or a mean per condition, and variances of the data, float64.
        schedule, t_start, t_1 : the interval.

        Returns
        -------
        The warm start.
        """
        gains = _gaussian_gains(moments.variances, schedule, t_start, t_1)
        weight = LinearMap(moments.projections, gains)
        constant = _scaled(moments.mean, schedule.alpha(t_1) - schedule.alpha(t_start) * weight)
        return cls(schedule, t_start, t_1, weight, constant, {"map": "gaussian", **moments.about})

    @classmethod
    def affine(
        cls,
        schedule: Schedule,
        t_start: float,
        t_1: float,
        x_start: Tensor,
        x_1: Tensor,
        *,
        labels: Tensor | None = None,
        per: str | None = None,
        over: Projections | Moments | None = None,
        prior: float | str = "auto",
    ) -> WarmStart:
        """Least squares on pairs of states: a gain, or a gain per group of a decomposition, and a constant.

        Parameters
        ----------
        schedule, t_start, t_1 : the interval.
        x_start, x_1 : states of a teacher at both times, [n, *shape].
        labels, per : integer conditions [n], and the name of the condition, for a constant per value.
        over : None for a single gain; projections for a gain per group, shrunk towards the single gain; moments for a gain
            per eigenvalue, shrunk towards the gain of the Gaussian.
        prior : weight of the shrinkage target, as a number of observed values; ``"auto"`` chooses by 4-fold
            cross-validation.

        Returns
        -------
        The warm start.

        Raises
        ------
        InputError : the states do not fit together, or `prior` is not usable.
        """
        if x_start.shape != x_1.shape or x_1.ndim < 1 or len(x_1) < 2:
            raise InputError(
                f"pairs of states are two tensors [n, *shape], n > 1: {list(x_start.shape)}, {list(x_1.shape)}."
            )
        (before, x, _), (after, y, _) = (centred(v, labels, per) for v in (x_start, x_1))
        gain = float((x * y).sum() / x.square().sum())
        about: dict[str, Any] = {"map": "affine", "pairs": len(x)}
        weight: Weight = gain
        if over is not None:
            projections = over.projections if isinstance(over, Moments) else over
            prior_gains = torch.full((projections.count,), gain, dtype=_F64, device="cpu")
            if isinstance(over, Moments):
                prior_gains = _gaussian_gains(over.variances, schedule, t_start, t_1)
            gains, strength = _shrunk_gains(projections, x, y, prior_gains, prior)
            weight = LinearMap(projections, gains)
            about |= {"map": "diagonal", "groups": projections.count, "prior": str(strength)}
        constant = after + -1.0 * _scaled(before, weight)
        return cls(schedule, t_start, t_1, weight, constant, about)

    @property
    def level(self) -> float:
        """sigma / alpha at `t_1`."""
        return self.schedule.noise_to_signal(self.t_1)

    @cached_property
    def _instruction(self) -> Combine:
        return Combine(((0, self.weight),), self.constant, step=1)

    def apply(self, x: Tensor, ode: ProbabilityFlowODE | None = None) -> Tensor:
        """Map states to `t_1`.

        Parameters
        ----------
        x : states [B, *shape] at `t_start`.
        ode : the ODE with the conditions of x; needed where there is a constant per condition.

        Returns
        -------
        States [B, *shape] at `t_1`, in the dtype and on the device of x.

        Raises
        ------
        MismatchError : there is a constant per condition, and `ode` is not given or lacks the condition.
        """
        if self.t_1 == self.t_start:
            return x.clone()
        terms, constant = self._instruction.on(x)
        if isinstance(constant, PerCondition):
            constant = constant.rows({} if ode is None else ode.conditioning, x)
        return combine(terms, constant, lambda _: x, x)

    def then(self, plan: Plan) -> Plan:
        """The plan of the map followed by `plan`, with the same number of evaluations.

        Parameters
        ----------
        plan : a plan whose grid starts at `t_1`.

        Returns
        -------
        A plan whose grid starts at `t_start`.

        Raises
        ------
        MismatchError : the plan has another schedule, or starts at another time.
        """
        if plan.schedule.config() != self.schedule.config():
            raise MismatchError(f"this warm start is for {self.schedule}, and {plan.name} for {plan.schedule}.")
        if not math.isclose(plan.grid[0], self.t_1, rel_tol=1e-9):
            raise MismatchError(
                f"this warm start ends at t = {self.t_1:g}, and {plan.name} starts at {plan.grid[0]:g}."
            )
        if self.t_1 == self.t_start:
            return plan
        code: list[Combine | Evaluate] = [self._instruction]
        for ins in plan.code:
            if isinstance(ins, Evaluate):
                code.append(replace(ins, state=ins.state + 1))
            else:
                step = None if ins.step is None else ins.step + 1
                code.append(Combine(tuple((j + 1, w) for j, w in ins.terms), ins.constant, step))
        return Plan(self.schedule, (self.t_start, *plan.grid), tuple(code), f"{plan.name}, warm start")

    def __str__(self) -> str:
        return f"{self.about.get('map', 'affine map')} to sigma/alpha = {self.level:.4g}"


def _angle(schedule: Schedule, t: float) -> float:
    return math.atan2(schedule.sigma(t), schedule.alpha(t))


def _gaussian_gains(variances: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
    a, b, c, d = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    return ((c * c * variances + d * d) / (a * a * variances + b * b)).sqrt()


def _scaled(constant: Constant, weight: Weight) -> Any:
    product = (Vector({}, constant) * weight).constant
    return constant * 0.0 if product is None else product


def _shrunk_gains(
    projections: Projections, x: Tensor, y: Tensor, prior: Tensor, strength: float | str
) -> tuple[Tensor, float]:
    """A gain per group by least squares of y on x, shrunk towards `prior`, and the strength of the shrinkage."""
    folds = min(4, len(x))
    parts = [
        (projections.inner(u, u), projections.inner(u, v))
        for u, v in ((x[i::folds], y[i::folds]) for i in range(folds))
    ]
    xx, xy = (torch.stack(values) for values in zip(*parts, strict=True))
    sizes = projections.sizes

    def gains(a: Tensor, b: Tensor, n: float, k: float) -> Tensor:
        trust = torch.where((sizes > 0) & (a > 0), n * sizes / (n * sizes + k), 0.0)
        return torch.lerp(prior, b / a.clamp(min=1e-300), trust)

    if strength != "auto":
        if isinstance(strength, str) or not strength >= 0:
            raise InputError(f"prior is 'auto' or a number of values from 0, got {strength!r}.")
        return gains(xx.sum(0), xy.sum(0), len(x), strength), strength

    def loss(k: float) -> float:
        total, n = 0.0, len(x) * (folds - 1) / folds
        for i in range(folds):
            g = gains(xx.sum(0) - xx[i], xy.sum(0) - xy[i], n, k)
            total += float((g * g * xx[i] - 2 * g * xy[i]).sum())
        return total

    best = min(_PRIORS, key=loss)
    return gains(xx.sum(0), xy.sum(0), len(x), best), best
