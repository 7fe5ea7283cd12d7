"""Analysis of a plan without a network: canonical form, and the exact answer on Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import PlanError, ScheduleError
from ..forms import check_prediction, conversion
from ..schedules import Schedule
from .instructions import Combine, Evaluate, Instruction, Program, originals, run_code
from .maps import LinearMap, PerCondition
from .vectors import Vector, Weight, weight_size

__all__ = [
    "CanonicalForm",
    "GaussianErrors",
    "GaussianResponse",
    "canonical_form",
    "gaussian_errors",
    "gaussian_response",
]

_F64 = torch.float64
_Model: TypeAlias = Callable[[Tensor, float, str], Tensor]


@dataclass(frozen=True, eq=False)
class CanonicalForm:
    """A plan as weights on the initial state (index 0) and on the data form of evaluation k (index k).

    Attributes
    ----------
    schedule : the noise schedule.
    times : times of the initial state and of each evaluation.
    levels : (alpha, sigma) at these times.
    states : the evaluated state of each evaluation.
    final : the final state.
    """

    schedule: Schedule
    times: tuple[float, ...]
    levels: tuple[tuple[float, float], ...]
    states: tuple[Vector, ...]
    final: Vector

    def matrix(self, form: str = "data") -> Tensor:
        """The weights as a matrix: a row per evaluated state and one for the final state (number weights only).

        Parameters
        ----------
        form : form of the evaluations that the weights multiply: ``"data"``, ``"noise"``, ``"score"``, ``"v"`` or
            ``"velocity"``.

        Returns
        -------
        Weights, float64 [nfe + 1, nfe + 1]: column 0 multiplies the initial state, column k evaluation k in the given form.

        Raises
        ------
        PlanError : a weight is a tensor of several numbers or a linear map.
        ScheduleError : an evaluation has no such form, such as the noise where alpha = 0.
        UnknownNameError : no such form.
        """
        check_prediction(form)
        n = len(self.states) + 1
        out = torch.zeros(n, n, dtype=_F64, device="cpu")
        rows: list[Tensor] = []  # the states as weights of the initial state and of the evaluations in the given form
        outputs = [torch.eye(n, dtype=_F64, device="cpu")[0]]
        for row, vector in enumerate((*self.states, self.final)):
            for column, weight in vector.weights.items():
                if isinstance(weight, LinearMap) or (isinstance(weight, Tensor) and weight.numel() != 1):
                    raise PlanError("a plan whose weights are tensors or linear maps has no matrix of numbers.")
                out[row] += float(weight) * outputs[column]
            rows.append(out[row])
            if row < len(self.states):
                p, q = conversion(self.schedule, self.times[row + 1], form, "data")
                unit = torch.eye(n, dtype=_F64, device="cpu")[row + 1]
                outputs.append(unit if form == "data" else p * rows[row] + q * unit)
        return out

    def difference(self, other: CanonicalForm) -> float:
        """Largest difference of weights, each times the size of the multiplied vector (data and noise of unit size).

        The difference of a state's weights is relative to the larger of the two states' weights, which makes the measure
        symmetric.
        """
        if len(self.levels) != len(other.levels):
            return math.inf
        angles = (torch.tensor(f.levels, dtype=_F64, device="cpu") for f in (self, other))
        a, b = (torch.atan2(v[:, 1], v[:, 0]) for v in angles)
        if not bool(((a - b).abs() <= 1e-10 * torch.maximum(a.abs(), b.abs())).all()):
            return math.inf
        start = max(math.hypot(*f.levels[0]) for f in (self, other))
        size = [start, *[1.0] * len(self.states)]
        worst = 0.0
        for u, v in zip((*self.states, self.final), (*other.states, other.final), strict=True):
            gap = u - v
            parts = [weight_size(w) * size[j] for j, w in gap.weights.items()]
            parts.append(weight_size(gap.constant) if gap.constant is not None else 0.0)
            sizes = (weight_size(w) * size[j] for row in (u, v) for j, w in row.weights.items())
            worst = max(worst, max(parts) / max(1.0, *sizes))
        return worst


def canonical_form(plan: Program) -> CanonicalForm:
    """Eliminate every vector but the initial state and the evaluations, and write evaluations as data estimates.

    An evaluation at the data is written as a noise estimate, or in its stored form where the noise does not determine it.
    """
    expressions = [Vector({0: 1.0})]
    states = []
    for ins in plan.code:
        if isinstance(ins, Evaluate):
            states.append(expressions[ins.state])
            p, q = _from_free_form(plan.schedule, ins)
            expressions.append(p * states[-1] + q * Vector({len(states): 1.0}))
        else:
            total = Vector({}, ins.constant)
            for index, weight in ins.terms:
                total = total + weight * expressions[index]
            expressions.append(total)
    times = (plan.grid[0], *plan.evaluation_times)
    levels = tuple((plan.schedule.alpha(t), plan.schedule.sigma(t)) for t in times)
    return CanonicalForm(plan.schedule, times, levels, tuple(states), expressions[-1])


def _from_free_form(schedule: Schedule, ins: Evaluate) -> tuple[float, float]:
    """(p, q) to the stored form, from the data estimate, or from the noise at the data, where a state fixes its data."""
    if schedule.sigma(ins.t) > 0:
        return conversion(schedule, ins.t, "data", ins.form)
    try:
        return conversion(schedule, ins.t, "noise", ins.form)
    except ScheduleError:  # dx/dt where the derivative of sigma is infinite
        return 0.0, 1.0


def _maps(code: Sequence[Instruction]) -> list[LinearMap]:
    return [w for i in code if isinstance(i, Combine) for _, w in i.terms if isinstance(w, LinearMap)]


def _grid_states(code: Sequence[Instruction], x: Tensor, model: _Model, exact: Tensor | None = None) -> list[Tensor]:
    """The states at the grid points after the first; with `exact`, [point, ...], each step starts from the exact state."""
    values, states, ends = {0: x}, [], {0}
    same = originals(code)
    for k, ins in run_code(code, values, model):
        if isinstance(ins, Combine) and ins.step is not None:
            states.append(values[k])
            if exact is not None:
                values[k] = exact[ins.step]
                if same[k] not in ends:  # later steps may read the vector that the state copies
                    values[same[k]] = values[k]
                ends |= {k, same[k]}
    return states


@dataclass(frozen=True, eq=False)
class GaussianResponse:
    """A plan on Gaussian data is affine in each dimension: final = gain * initial + offset, exactly.

    Attributes
    ----------
    gain, offset : of the plan, float64, the shape of the mean.
    exact_gain, exact_offset : of the exact probability flow.
    initial_mean, initial_std : of the initial state under the true marginal.
    """

    gain: Tensor
    offset: Tensor
    exact_gain: Tensor
    exact_offset: Tensor
    initial_mean: Tensor
    initial_std: Tensor

    @property
    def rmse(self) -> float:
        """Root mean square error of the final state, exactly, over initial states from the true marginal."""
        gain, offset = self.gain - self.exact_gain, self.offset - self.exact_offset
        return float(((gain * self.initial_std) ** 2 + (gain * self.initial_mean + offset) ** 2).mean().sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """The plan's final state for initial states x [..., *mean.shape]."""
        return self.gain.to(x) * x + self.offset.to(x)


def gaussian_response(plan: Program, mean: Tensor | float, variance: Tensor | float) -> GaussianResponse:
    """The response of a plan to data N(mean, diag variance), from runs on two states.

    Raises
    ------
    PlanError : the response is not a number per component, because a linear map mixes components or a constant depends
        on a condition.
    """
    m, v = as_moments(mean, variance)
    if any(isinstance(i, Combine) and isinstance(i.constant, PerCondition) for i in plan.code):
        raise PlanError(f"{plan.name} has constants per condition: its response is another one for each of them.")
    if any(bool((w.coefficients != w.coefficients[0]).any()) for w in _maps(plan.code)):
        raise PlanError(
            f"{plan.name} has weights that are linear maps, which mix components: its response to data with a diagonal "
            "covariance is no gain per component. Run it on iia_ode.problems.Gaussian instead."
        )
    code, schedule = _with_numbers(plan.code), plan.schedule

    offset = _grid_states(code, torch.zeros_like(m), _denoiser(plan, m, v, True))[-1]
    # The gain comes from the linear part alone, so that it is not the difference of two affine answers.
    gain = _grid_states(_without_constants(code), torch.ones_like(m), _denoiser(plan, m, v, False))[-1]
    exact_gain, exact_offset = gaussian_flow(schedule, m, v, plan.grid[0], plan.grid[-1])
    a, s = schedule.alpha(plan.grid[0]), schedule.sigma(plan.grid[0])
    return GaussianResponse(gain, offset, exact_gain, exact_offset, a * m, (a * a * v + s * s).sqrt())


@dataclass(frozen=True, eq=False)
class GaussianErrors:
    """Errors of a plan on Gaussian data, exactly, over initial states from the true marginal.

    Attributes
    ----------
    states : root mean square error of each component of the state at every grid point after the first, float64
        [N, *shape]; in units of the state.
    steps : the same error for each step by itself, from an exact state and with exact states at the earlier grid points,
        float64 [N, *shape].
    std : standard deviation of the exact states, float64 [N, *shape].
    """

    states: Tensor
    steps: Tensor
    std: Tensor

    @property
    def components(self) -> Tensor:
        """Root mean square error of each component of the final state, float64 [*shape]."""
        return self.states[-1]

    @property
    def per_step(self) -> Tensor:
        """Root mean square error of each step over the components, relative to the exact states there, float64 [N]."""
        flat = self.steps.flatten(1).square().mean(1).sqrt()
        return flat / self.std.flatten(1).square().mean(1).sqrt()


def gaussian_errors(plan: Program, mean: Tensor | float, variance: Tensor | float) -> GaussianErrors:
    """Errors of a plan on data N(mean, diag variance), by component and by step; no network, no sampling.

    Parameters
    ----------
    plan : the plan.
    mean, variance : moments of the data, numbers or float64 tensors [*shape] of one sample.

    Returns
    -------
    The errors.

    Raises
    ------
    PlanError : as :func:`gaussian_response`.
    """
    whole = gaussian_response(plan, mean, variance)
    m, v = as_moments(mean, variance)
    schedule, code = plan.schedule, _with_numbers(plan.code)
    a, s = (f(torch.tensor(plan.grid, dtype=_F64, device="cpu")) for f in (schedule.alpha, schedule.sigma))
    axes = [-1] + [1] * m.ndim
    std = (a.reshape(axes) ** 2 * v + s.reshape(axes) ** 2).sqrt()
    gains = std / std[0]
    offsets = (a.reshape(axes) - a[0] * gains) * m

    def errors(exact: bool) -> Tensor:
        linear = _grid_states(
            _without_constants(code), torch.ones_like(m), _denoiser(plan, m, v, False), gains if exact else None
        )
        affine = _grid_states(code, torch.zeros_like(m), _denoiser(plan, m, v, True), offsets if exact else None)
        gain, offset = torch.stack(linear) - gains[1:], torch.stack(affine) - offsets[1:]
        return ((gain * whole.initial_std) ** 2 + (gain * whole.initial_mean + offset) ** 2).sqrt()

    return GaussianErrors(errors(False), errors(True), std[1:])


def _denoiser(plan: Program, m: Tensor, v: Tensor, with_mean: bool) -> _Model:
    """The model of data N(m, diag v) in every form; without the mean, its linear part."""
    schedule = plan.schedule
    centre = m if with_mean else torch.zeros_like(m)

    def model(x: Tensor, t: float, form: str) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        if s == 0:
            return _at_data(schedule, t, form, x, (x - a * centre) / (a * a * v))
        data = centre + a * v / (a * a * v + s * s) * (x - a * centre)
        p, q = conversion(schedule, t, "data", form)
        return torch.as_tensor(p * x + q * data, device="cpu")

    return model


def _at_data(schedule: Schedule, t: float, form: str, x: Tensor, slope: Tensor) -> Tensor:
    """The exact model at the data, with minus the score as `slope`: the noise -sigma score is 0 there."""
    if form == "velocity":
        return schedule.f(t) * x + 0.5 * schedule.g2(t) * slope
    return x / schedule.alpha(t) if form == "data" else torch.zeros_like(x)


def _with_numbers(code: Sequence[Instruction]) -> list[Instruction]:
    """The code with each linear map, a multiple of the identity, replaced by its number."""

    def number(w: Weight) -> Weight:
        return float(w.coefficients[0]) if isinstance(w, LinearMap) else w

    return [replace(i, terms=tuple((j, number(w)) for j, w in i.terms)) if isinstance(i, Combine) else i for i in code]


def _without_constants(code: Sequence[Instruction]) -> list[Instruction]:
    return [replace(i, constant=None) if isinstance(i, Combine) else i for i in code]


def as_moments(mean: Tensor | float, variance: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance as float64 tensors of one shape."""
    m, v = torch.as_tensor(mean, dtype=_F64, device="cpu"), torch.as_tensor(variance, dtype=_F64, device="cpu")
    return m + torch.zeros_like(v), v + torch.zeros_like(m)


def gaussian_flow(schedule: Schedule, mean: Tensor, variance: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
    """Gain and offset of the exact flow from t to s on data N(mean, diag variance), per dimension, in float64.

    x_s = alpha_s m + sqrt((alpha_s^2 v + sigma_s^2) / (alpha_t^2 v + sigma_t^2)) (x_t - alpha_t m).
    """
    a, b = schedule.alpha(t), schedule.sigma(t)
    c, d = schedule.alpha(s), schedule.sigma(s)
    gain = ((c * c * variance + d * d) / (a * a * variance + b * b)).sqrt()
    return gain, (c - a * gain) * mean
