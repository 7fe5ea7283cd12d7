"""A plan as a differentiable function of its weights and times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..errors import InputError
from ..forms import conversion
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Evaluate, Instruction, LinearMap, PerCondition, Plan, Projections, Vector
from ..schedules import Schedule
from ..schedules.levels import lowest_level

__all__ = ["Parameters"]

_F64 = torch.float64
_MOVE = 0.5  # largest change of log sigma/alpha in a step of a refinement
_STEP = 1e-4  # step of central differences in log sigma/alpha; the error is about 1e-9


class Parameters:
    """The weights and the interior times of a plan as a vector theta, and the plan as a function of theta.

    The plan is first written in canonical form. Every evaluated state, and the final state, is a combination of the initial
    state and of *all* earlier data estimates: N (N + 1) / 2 + N weights for N evaluations. Weights absent from the plan
    start at zero. A weight is divided by the size sqrt((alpha data_size)^2 + sigma^2) of its state, so that a state keeps its
    size when its time moves, whatever the unit of the data. The parameter of a time is log sigma/alpha, so that a step of the
    parameter is a relative change of the level. The first time is fixed at the time of the initial state.

    A weight may be a linear map over a decomposition. Its parameter is then the mean over the groups; differences between
    groups stay fixed, because a parameter per group would be too many for the samples of a fit.

    Parameters
    ----------
    plan : a plan whose weights are numbers, or linear maps over a single decomposition; constants stay fixed.
    learn_grid : whether the times are parameters.
    sigma_min : level sigma/alpha below which :meth:`clipped` moves no time; no lower than the model knows.
    data_size : size of the data in the sizes of states; its root mean square or a share of that.

    Attributes
    ----------
    initial : theta of the given plan, float64 [P], on the host: first the weights, then the times.
    weights : number of weights in theta.

    Raises
    ------
    InputError : the plan has tensors as weights, maps over several decompositions, or constants per condition.
    """

    def __init__(self, plan: Plan, *, learn_grid: bool = True, sigma_min: float = 0.0, data_size: float = 1.0) -> None:
        form = plan.canonical()
        rows = [*form.states, form.final]
        self.projections = _decomposition(plan.name, rows)
        self.schedule, self.name, self.grid_end = plan.schedule, plan.name, plan.grid[-1]
        self.start, self.sigma_min = plan.grid[0], lowest_level(plan.schedule, sigma_min)
        self.data_size = data_size
        self.constants = [row.constant for row in rows]
        times = plan.evaluation_times
        self._times = list(times)
        # An evaluation of the initial state itself has nothing to learn.
        self.fixed = [k for k, row in enumerate(form.states) if row.index == 0 and times[k] == self.start]
        self.moving = sorted({t for t in times if t != self.start}, key=times.index) if learn_grid else []
        self._time_of = [self.moving.index(t) if t in self.moving else None for t in times]
        self.entries = [(r, j) for r in range(len(rows)) if r not in self.fixed for j in range(min(r, len(times)) + 1)]
        groups = 1 if self.projections is None else self.projections.count
        weights = torch.zeros(len(self.entries), groups, dtype=_F64, device="cpu")
        for row, (r, j) in zip(weights, self.entries, strict=True):
            weight = rows[r].weights.get(j, 0.0)
            size = self._source_size(j) / self._row_size(r, self._times)
            row[:] = weight.coefficients * size if isinstance(weight, LinearMap) else float(weight) * size
        sizes = torch.ones(1, dtype=_F64, device="cpu") if self.projections is None else self.projections.sizes
        own = weights @ sizes / sizes.sum()
        self._apart = weights - own[:, None]  # differences of the groups from their mean, [entries, groups]
        self.weights = len(own)
        levels = [math.log(self.schedule.noise_to_signal(t)) for t in self.moving]
        self.initial = torch.cat([own, torch.tensor(levels, dtype=_F64, device="cpu")])

    def __len__(self) -> int:
        return len(self.initial)

    @property
    def evaluations(self) -> int:
        """Number of model evaluations of a run."""
        return len(self._times)

    def times(self, theta: Tensor) -> list[float]:
        """The times of the evaluations, in order."""
        found = [_time(self.schedule, level) for level in theta[self.weights :].tolist()]
        return [t if m is None else found[m] for t, m in zip(self._times, self._time_of, strict=True)]

    def valid(self, theta: Tensor) -> bool:
        """Whether all parameters are finite and the times keep the direction and the order of the grid."""
        if not bool(torch.isfinite(theta).all()) or bool((theta[self.weights :].abs() > 50).any()):
            return False
        times = [*self.times(theta), self.grid_end]
        sign = math.copysign(1.0, self.grid_end - self.start)
        old = [*self._times, self.grid_end]
        covered = self.schedule.covers(torch.tensor(times, dtype=_F64, device="cpu"))
        known = self.schedule.knows(torch.tensor(times[:-1], dtype=_F64, device="cpu"))
        return (
            covered
            and known
            and all(
                sign * (b - a) > 0 if q != p else b == a
                for (a, b), (p, q) in zip(pairwise(times), pairwise(old), strict=True)
            )
        )

    def clipped(self, theta: Tensor, tried: Tensor) -> Tensor:
        """The step from `theta` to `tried` with bounded moves of the times; weights are not bounded.

        A time moves by at most 0.5 in log sigma/alpha and by at most 0.4 of the gap to its neighbor. Without the bound, a
        time with little influence on the final state could make a long move, and the loss would reject the whole step. No
        time moves below `sigma_min`.
        """
        first = self.weights
        if first == len(theta):
            return tried
        levels = theta[first:]
        order = torch.argsort(levels)
        gaps = 0.4 * levels[order].diff()
        wide = torch.full((1,), _MOVE, dtype=_F64, device="cpu")
        below, above = torch.empty_like(levels), torch.empty_like(levels)
        below[order], above[order] = torch.cat([wide, gaps]), torch.cat([gaps, wide])
        if self.schedule.alpha(self.start) > 0:
            top = math.log(self.schedule.noise_to_signal(self.start))
            above[order[-1]] = min(_MOVE, 0.4 * max(top - float(levels[order[-1]]), 0.0))
        moved = torch.clamp(tried[first:], levels - below.clamp(max=_MOVE), levels + above.clamp(max=_MOVE))
        if self.sigma_min > 0:
            moved = torch.maximum(moved, levels.clamp(max=math.log(self.sigma_min)))
        return torch.cat([tried[:first], moved])

    def plan(self, theta: Tensor, name: str | None = None) -> Plan:
        """The plan with parameters `theta`: a step to each distinct time of an evaluation, and a step to the end."""
        times = self.times(theta)
        weights: list[dict[int, float | LinearMap]] = [{} for _ in range(len(times) + 1)]
        values = self._apart + theta[: self.weights, None]
        for (r, j), value in zip(self.entries, values, strict=True):
            value = value * (self._row_size(r, times) / self._source_size(j))
            weights[r][j] = float(value[0]) if self.projections is None else LinearMap(self.projections, value)
        code: list[Instruction] = []
        outputs: list[int] = [0]  # the vector of the initial state, then of each data estimate
        grid = [self.start]
        for r, row in enumerate(weights):
            if r in self.fixed:
                code.append(Evaluate(0, times[r], "data"))
                outputs.append(len(code))
                continue
            last = r == len(times)
            lands = last or (times[r] != self.start and (r + 1 == len(times) or times[r + 1] != times[r]))
            if lands:
                grid.append(self.grid_end if last else times[r])
            terms = tuple((outputs[j], w) for j, w in row.items() if isinstance(w, LinearMap) or w != 0.0)
            code.append(Combine(terms, self.constants[r], len(grid) - 1 if lands else None))
            if not last:
                code.append(Evaluate(len(code), times[r], "data"))
                outputs.append(len(code))
        return Plan(self.schedule, tuple(grid), tuple(code), name or self.name)

    def run(
        self, ode: ProbabilityFlowODE, x: Tensor, theta: Tensor, *, checkpointed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the plan differentiably, with a copy of the parameters for each sample.

        Parameters
        ----------
        ode : the model.
        x : initial states [B, ...].
        theta : float64 [P].
        checkpointed : recompute each evaluation in the backward pass. The memory falls to the memory of a single evaluation,
            and the work grows by half.

        Returns
        -------
        The final states [B, ...], and the copies of `theta` as a leaf of the graph, float64 [B, P] on the host. A
        gradient with respect to the leaf holds the gradient of each sample, from a single backward pass.

        Raises
        ------
        InputError : no gradient flows through the model.
        """
        leaf = theta.expand(len(x), -1).clone().requires_grad_(True)
        knots = self._knots(ode.prediction, theta, leaf)
        weights = leaf[:, : self.weights, None] + self._apart  # [B, entries, groups]
        values, state = [x], x
        for r, knot in enumerate(knots):
            if r not in self.fixed:
                state = self._state(r, values, weights, knot.size)
            t, p, q = knot.time, _spread(knot.p, x), _spread(knot.q, x)
            values.append(p * state + q * _output(ode, state, t, checkpointed))
        end = torch.full_like(leaf[:, 0], self._size(self.grid_end))
        return self._state(len(knots), values, weights, end), leaf

    def _knots(self, prediction: str, theta: Tensor, leaf: Tensor) -> list[_Knot]:
        """The evaluations of a differentiable run."""
        host = theta[self.weights :].tolist()
        levels = [self._level(prediction, v) for v in host]
        moves = [leaf[:, self.weights + m] - v for m, v in enumerate(host)]  # zero, with the gradient of the level
        found = []
        for t, m in zip(self._times, self._time_of, strict=True):
            if m is None:
                values = (t, self._size(t), *conversion(self.schedule, t, prediction, "data"))
                found.append(_Knot([(v, 0.0) for v in values], leaf))
            else:
                found.append(_Knot(levels[m], leaf, moves[m]))
        return found

    def _state(self, r: int, values: list[Tensor], weights: Tensor, size: Tensor) -> Tensor:
        """The combination of row r, [B, ...], at states of the given sizes [B]."""
        x, parts = values[0], []
        for p, (row, j) in enumerate(self.entries):
            if row == r:
                parts.append((values[j], weights[:, p] * size[:, None] / self._source_size(j)))
        if self.projections is None:
            state = torch.zeros_like(x)
            for value, w in parts:
                state = state + _spread(w, x) * value
        else:
            ready = [tuple(v.to(x) for v in self.projections.prepare(w)) for _, w in parts]
            state = self.projections.combine(list(zip([v for v, _ in parts], ready, strict=True)))
        constant = self.constants[r]
        return state if constant is None else state + constant.to(x)

    def _level(self, prediction: str, log_level: float) -> list[tuple[float, float]]:
        """Time, size and the two factors of the conversion at a level: values, with their derivatives in log sigma/alpha."""

        def at(level: float) -> tuple[float, ...]:
            t = _time(self.schedule, level)
            return t, self._size(t), *conversion(self.schedule, t, prediction, "data")

        below, above, width = at(log_level - _STEP), at(log_level + _STEP), 2 * _STEP
        return [(v, (b - a) / width) for v, a, b in zip(at(log_level), below, above, strict=True)]

    def _source_size(self, j: int) -> float:
        """The size that weights of source j are relative to: of the initial state, or of a data estimate."""
        return self._size(self.start) if j == 0 else self.data_size

    def _row_size(self, r: int, times: list[float]) -> float:
        return self._size(self.grid_end if r == len(times) else times[r])

    def _size(self, t: float) -> float:
        """The size of a state at time t."""
        return math.hypot(self.data_size * self.schedule.alpha(t), self.schedule.sigma(t))


@dataclass(frozen=True, eq=False)
class _Knot:
    """An evaluation of a differentiable run: each number is [B], a function of the move of log sigma/alpha.

    Properties, because the order of the graph decides the rounding of gradients.
    """

    pairs: list[tuple[float, float]]  # value and derivative of: time, size, p, q of data = p x + q output
    leaf: Tensor
    move: Tensor | None = None

    @property
    def time(self) -> Tensor | float:
        return self.pairs[0][0] if self.move is None else self._number(0)

    size = property(lambda self: self._number(1))
    p = property(lambda self: self._number(2))
    q = property(lambda self: self._number(3))

    def _number(self, k: int) -> Tensor:
        value, slope = self.pairs[k]
        return torch.full_like(self.leaf[:, 0], value) if self.move is None else value + slope * self.move


def _decomposition(name: str, rows: list[Vector]) -> Projections | None:
    """The decomposition of the linear maps among all weights; None where all weights are numbers."""
    found = [w for row in rows for w in row.weights.values()]
    if any(isinstance(w, Tensor) or not isinstance(w, float | int | LinearMap) for w in found):
        raise InputError(f"{name} has weights that are not numbers or linear maps: those cannot be refined.")
    maps = [w.projections for w in found if isinstance(w, LinearMap)]
    if any(p != maps[0] for p in maps):
        raise InputError(f"{name} has linear maps over several decompositions: it cannot be refined.")
    if any(isinstance(row.constant, PerCondition) for row in rows):
        raise InputError(f"{name} has constants per condition: refine the plan that follows its warm start.")
    return maps[0] if maps else None


def _output(ode: ProbabilityFlowODE, state: Tensor, t: Tensor | float, checkpointed: bool) -> Tensor:
    """The model's output, with a graph."""
    call: Callable[..., Tensor] = ode.output
    # Stopping early raises an exception inside the model, where other processes would wait for this one.
    with set_checkpoint_early_stop(False):
        out: Tensor = checkpoint(call, state, t, use_reentrant=False) if checkpointed else call(state, t)
    if state.requires_grad and not out.requires_grad:
        raise InputError("no gradient flows through the model: a plan cannot be refined through it.")
    return out


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] in the dtype and on the device of x, in a shape that broadcasts over x."""
    return values.to(x).reshape(len(x), *[1] * (x.ndim - 1))


def _time(schedule: Schedule, log_level: float) -> float:
    return schedule.t_of_noise_to_signal(math.exp(log_level))
