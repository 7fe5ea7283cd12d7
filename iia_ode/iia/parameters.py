"""A plan as a differentiable function of its weights and of its grid."""

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
from ..plan import Combine, Evaluate, LinearMap, PerCondition, Plan, Projections
from ..plan.instructions import Instruction
from ..schedules import Schedule

__all__ = ["Parameters"]

_F64 = torch.float64
_ROOM = 1e-3  # of log sigma, between times at the smallest level
_MOVE = 0.5  # of log sigma/alpha, at most, in one step of a refinement
_STEP = 1e-4  # of central differences in log sigma/alpha, whose error is about 1e-9


@dataclass(frozen=True)
class _Level:
    """What a differentiable run needs to know of a time: the values, and their derivatives in log sigma/alpha."""

    t: tuple[float, float]
    size: tuple[float, float]
    factors: tuple[tuple[float, float], tuple[float, float]]  # (p, q) of data = p x + q output


class Parameters:
    """The weights and the interior times of a plan as one vector, and the plan as a function of it.

    The plan is first written in its canonical form: every state that is evaluated, and the last one, is a combination of
    the initial state and of *all* earlier data estimates, N (N + 1) / 2 + N weights for N evaluations; those that the plan
    does not use start at zero. Weights count in units of sqrt(alpha^2 + sigma^2) at their state, so that a state keeps its
    size when its time moves. Times count as log sigma/alpha, so that steps of one size mean the same at every level. The
    first time is where the initial state is, and stays.

    Where weights are linear maps over a decomposition, a weight is a number for each of its groups. These move together, and
    what the groups differ by stays as it is: a parameter each would be too many for the samples that there are.

    Parameters
    ----------
    plan : with numbers as weights, or linear maps over one decomposition; constants are kept as they are.
    learn_grid : whether the times are parameters.
    sigma_min : level sigma/alpha below which none of them is moved.

    Raises
    ------
    InputError : the plan has weights that are tensors, maps over several decompositions, or constants per condition.
    """

    def __init__(self, plan: Plan, *, learn_grid: bool = True, sigma_min: float = 0.0) -> None:
        form = plan.canonical()
        rows = [*form.states, form.final]
        found = [w for row in rows for w in row.weights.values()]
        if any(isinstance(w, Tensor) or not isinstance(w, float | int | LinearMap) for w in found):
            raise InputError(f"{plan.name} has weights that are not numbers or linear maps: those cannot be refined.")
        maps = [w.projections for w in found if isinstance(w, LinearMap)]
        if any(p != maps[0] for p in maps):
            raise InputError(f"{plan.name} has linear maps over several decompositions: it cannot be refined.")
        self.projections: Projections | None = maps[0] if maps else None
        if any(isinstance(row.constant, PerCondition) for row in rows):
            raise InputError(f"{plan.name} has constants per condition: refine the plan that follows its warm start.")
        self.schedule, self.name, self.grid_end = plan.schedule, plan.name, plan.grid[-1]
        self.start, self.sigma_min = plan.grid[0], sigma_min
        self.constants = [row.constant for row in rows]
        times = plan.evaluation_times
        # Row 0 is the initial state itself where the plan evaluates that; such a row has nothing to learn.
        self.fixed = [k for k, row in enumerate(form.states) if row.index == 0 and times[k] == self.start]
        self.moving = sorted({t for t in times if t != self.start}, key=times.index) if learn_grid else []
        self._time_of = [self.moving.index(t) if t in self.moving else None for t in times]
        self._times = list(times)
        self._end_size = math.hypot(self.schedule.alpha(self.grid_end), self.schedule.sigma(self.grid_end))
        self.entries = [(r, j) for r in range(len(rows)) if r not in self.fixed for j in range(min(r, len(times)) + 1)]
        groups = 1 if self.projections is None else self.projections.count
        weights = torch.zeros(len(self.entries), groups, dtype=_F64, device="cpu")
        for row, (r, j) in zip(weights, self.entries, strict=True):
            weight = rows[r].weights.get(j, 0.0)
            size = (self._size(self.start) if j == 0 else 1.0) / self._row_size(r, None)
            row[:] = weight.coefficients * size if isinstance(weight, LinearMap) else float(weight) * size
        sizes = torch.ones(1, dtype=_F64, device="cpu") if self.projections is None else self.projections.sizes
        own = weights @ sizes / sizes.sum()
        self._apart = (
            weights - own[:, None]
        )  # what the groups of each weight differ by from its mean, [entries, groups]
        self.weights = len(own)
        levels = [math.log(self.schedule.noise_to_signal(t)) for t in self.moving]
        self.initial = torch.cat([own, torch.tensor(levels, dtype=_F64, device="cpu")])

    def __len__(self) -> int:
        return len(self.initial)

    @property
    def evaluations(self) -> int:
        """Model evaluations of one run."""
        return len(self._times)

    # ---- from a vector of parameters to a plan -------------------------------------------------------------------------

    def times(self, theta: Tensor) -> list[float]:
        """The times of the evaluations, in order."""
        levels = theta[self.weights :].tolist()
        found = [_time(self.schedule, level) for level in levels]
        return [t if m is None else found[m] for t, m in zip(self._times, self._time_of, strict=True)]

    def valid(self, theta: Tensor) -> bool:
        """Whether all parameters are finite and the times still run in the direction and the order of the grid."""
        if not bool(torch.isfinite(theta).all()) or bool((theta[self.weights :].abs() > 50).any()):
            return False
        times = [*self.times(theta), self.grid_end]
        sign = math.copysign(1.0, self.grid_end - self.start)
        old = [*self._times, self.grid_end]
        covered = self.schedule.covers(torch.tensor(times, dtype=_F64, device="cpu"))
        return covered and all(
            sign * (b - a) > 0 if q != p else b == a
            for (a, b), (p, q) in zip(pairwise(times), pairwise(old), strict=True)
        )

    def clipped(self, theta: Tensor, tried: Tensor) -> Tensor:
        """`tried` with no time farther from where `theta` has it than half a unit of log sigma or 0.4 of the gap beside it.

        A level that hardly matters at the end may otherwise be sent anywhere, and take every other parameter's step with it.
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

    def floored(self, theta: Tensor) -> Tensor:
        """`theta` with no time below `sigma_min`, or below where the plan had it if that is lower still.

        Times that come to lie there together keep a little room between them.
        """
        if self.sigma_min <= 0:
            return theta
        started = self.initial[self.weights :]
        rank = torch.argsort(torch.argsort(started))
        lowest = torch.minimum(started, math.log(self.sigma_min) + _ROOM * rank)
        return torch.cat([theta[: self.weights], torch.maximum(theta[self.weights :], lowest)])

    def plan(self, theta: Tensor, name: str | None = None) -> Plan:
        """The plan with these parameters: one step per distinct time of an evaluation, and one to the end."""
        times = self.times(theta)
        weights: list[dict[int, float | LinearMap]] = [{} for _ in range(len(times) + 1)]
        values = self._apart + theta[: self.weights, None]
        for (r, j), value in zip(self.entries, values, strict=True):
            value = value * (self._row_size(r, times) / (self._size(self.start) if j == 0 else 1.0))
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

    # ---- the same, differentiably --------------------------------------------------------------------------------------

    def run(
        self, ode: ProbabilityFlowODE, x: Tensor, theta: Tensor, *, checkpointed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The final states for parameters of their own for each sample, and these parameters as a leaf of the graph.

        A gradient with respect to the leaf, [B, P], is a gradient *for each sample*, from one backward pass.

        Parameters
        ----------
        ode, x : the model and B initial states.
        theta : float64 [P].
        checkpointed : forget the inside of each evaluation and make it again on the way back: memory of one evaluation
            instead of all, for half as much work again.

        Raises
        ------
        InputError : no gradient flows through the model.
        """
        leaf = theta.to(x.device).expand(len(x), -1).clone().requires_grad_(True)
        shape = (len(x),) + (1,) * (x.ndim - 1)

        def spread(values: Tensor) -> Tensor:
            return values.to(x.dtype).reshape(shape)

        host = theta[self.weights :].tolist()
        levels = [self._level(ode.prediction, v) for v in host]
        moves = [leaf[:, self.weights + m] - v for m, v in enumerate(host)]  # zero, with the gradient of the level
        by_row: list[list[tuple[int, Tensor]]] = [[] for _ in range(len(self._times) + 1)]
        own = leaf[:, : self.weights, None] + self._apart.to(leaf.device)
        for p, (r, j) in enumerate(self.entries):
            by_row[r].append((j, own[:, p]))  # [B, groups]
        values, state = [x], x
        for r, row in enumerate(by_row):
            moving = self._time_of[r] if r < len(self._times) else None
            if r not in self.fixed:
                scale = torch.full_like(
                    leaf[:, 0], self._end_size if r == len(self._times) else self._size(self._times[r])
                )
                if moving is not None:
                    size, slope = levels[moving].size
                    scale = size + slope * moves[moving]
                parts = [(values[j], w * scale[:, None] / (self._size(self.start) if j == 0 else 1.0)) for j, w in row]
                if self.projections is None:
                    state = torch.zeros_like(x)
                    for value, w in parts:
                        state = state + spread(w) * value
                else:
                    ready = [tuple(v.to(x.dtype) for v in self.projections.prepare(w)) for _, w in parts]
                    state = self.projections.combine(list(zip([v for v, _ in parts], ready, strict=True)))
                constant = self.constants[r]
                if constant is not None:
                    state = state + constant.to(x)
            else:
                state = x
            if r == len(self._times):
                break
            if moving is None:
                t: Tensor | float = self._times[r]
                p0, q0 = conversion(self.schedule, self._times[r], ode.prediction, "data")
                p_x, q_x = torch.full_like(leaf[:, 0], p0), torch.full_like(leaf[:, 0], q0)
            else:
                level = levels[moving]
                t = level.t[0] + level.t[1] * moves[moving]
                (p0, q0), (p1, q1) = level.factors
                p_x, q_x = p0 + p1 * moves[moving], q0 + q1 * moves[moving]
            call: Callable[..., Tensor] = ode.output
            with set_checkpoint_early_stop(False):  # it stops by an exception, amid what other processes wait for
                out = checkpoint(call, state, t, use_reentrant=False) if checkpointed else call(state, t)
            if state.requires_grad and not out.requires_grad:
                raise InputError("no gradient flows through the model: a plan cannot be refined through it.")
            values.append(spread(p_x) * state + spread(q_x) * out)
        return state, leaf

    def _level(self, prediction: str, log_level: float) -> _Level:
        def at(level: float) -> tuple[float, float, tuple[float, float]]:
            t = _time(self.schedule, level)
            return t, self._size(t), conversion(self.schedule, t, prediction, "data")

        (t, size, factors), (a, b, c), (d, e, f) = at(log_level), at(log_level - _STEP), at(log_level + _STEP)
        width = 2 * _STEP
        slopes = ((f[0] - c[0]) / width, (f[1] - c[1]) / width)
        return _Level((t, (d - a) / width), (size, (e - b) / width), (factors, slopes))

    def _size(self, t: float) -> float:
        return math.hypot(self.schedule.alpha(t), self.schedule.sigma(t))

    def _row_size(self, r: int, times: list[float] | None) -> float:
        return self._end_size if r == len(self._times) else self._size((times or self._times)[r])


def _time(schedule: Schedule, log_level: float) -> float:
    return schedule.t_of_noise_to_signal(math.exp(log_level))
