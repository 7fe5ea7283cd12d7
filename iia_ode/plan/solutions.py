"""Runs of a plan on the solutions that consistent solvers keep, and on disturbances of its states.

The solutions are those of constant data (alpha_t D + c sigma_t), of constant noise (c alpha_t + sigma_t eps), and of constant
velocity (a straight line in t). Two solutions span the solutions of each problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..schedules import Schedule
from ..transforms import may_write
from .instructions import Combine, Evaluate, Program, last_uses, originals
from .maps import LinearMap

__all__ = ["VANISHING", "Answer", "Array", "answers"]

Array = npt.NDArray[np.float64]

_F64 = torch.float64
VANISHING = 1e-6  # size of a disturbance that counts as gone at a singular end, relative to its size before


@dataclass(frozen=True)
class Answer:
    """Errors and disturbances of a run on the three problems.

    Attributes
    ----------
    gaps : largest relative error of the solutions, float64 [problem, state after the first].
    growth : size of each disturbance, 1 where it has its exact size, float64 [problem, state after the first, disturbance];
        0 before the disturbance.
    """

    gaps: Array
    growth: Array


@torch.no_grad()
def answers(plan: Program, kicks: Sequence[int], *, exact: bool, least: Array | None = None) -> Answer:
    """Run a plan on two basis solutions of each problem, and on disturbances of some of the states.

    Parameters
    ----------
    plan : the plan.
    kicks : grid points whose states are disturbed, each in a row of its own.
    exact : replace the state at every grid point by the exact state: errors are those of single steps.
    least : smallest sizes to which errors are relative, float64 [problem, solution].
    """
    times = torch.tensor(plan.grid, dtype=_F64, device="cpu")
    t, a, s = times.numpy(), plan.schedule.alpha(times).numpy(), plan.schedule.sigma(times).numpy()
    one = np.ones_like(t)
    solutions = np.stack([a, s, a, s, t - t[0], one], axis=1).reshape(-1, 3, 2)
    sizes = np.maximum(np.abs(solutions[1:]), np.abs(solutions[:-1]))
    scales = np.stack([s, a, one], axis=1)
    # A disturbance that should vanish at a singular end is relative to its size before.
    scales[1:] = np.where(scales[1:] > 0, scales[1:], VANISHING * scales[:-1])
    added = np.zeros((len(t), 3, 2 + len(kicks)))
    if exact:
        added[:, :, :2] = solutions
    for i, k in enumerate(kicks):
        added[k, :, 2 + i] = scales[k]
    sample = _sample(plan)
    states = _states(plan, solutions[0], added, sample, keep=not exact)
    y = states.reshape(len(states), 3, 2 + len(kicks), -1)
    gap = np.abs(y[:, :, :2] - solutions[1:, ..., None] * sample.reshape(-1)).max(-1)
    sizes = sizes if least is None else np.maximum(sizes, least)
    with np.errstate(all="ignore"):
        growth = np.abs(y[:, :, 2:]).max(-1) / scales[1:, :, None]
        return Answer((gap / sizes).max(-1).T, growth.swapaxes(0, 1))


def _states(plan: Program, start: Array, added: Array, sample: Array, *, keep: bool) -> Array:
    """States after the first, [point, row, *sample], before `added` is put in place of the solutions, or is added to them."""
    width, axes = added.shape[-1], (1,) * sample.ndim
    rows = added.reshape(len(added), -1, *axes) * sample
    kept = np.ones((3, width))
    kept[:, :2] = float(keep)
    kept = kept.reshape(-1, *axes)
    asked = [ins for ins in plan.code if isinstance(ins, Evaluate)]
    p, q = _factors(plan.schedule, asked) if asked else (np.zeros((0, 3)), np.zeros((0, 3, 2)))
    slopes = iter(np.repeat(p, width, axis=1).reshape(len(p), 3 * width, *axes))
    offset = np.zeros((len(q), 3, width))
    offset[:, :, :2] = q
    offsets = iter(offset.reshape(len(q), 3 * width, *axes))
    first = np.zeros((3, width))
    first[:, :2] = start
    first = first.reshape(-1, *axes) * sample
    values, states, ends = {0: first}, [], {0}
    same, last = originals(plan.code), last_uses(plan.code)
    with np.errstate(all="ignore"):
        for k, ins in enumerate(plan.code, start=1):
            if isinstance(ins, Evaluate):
                values[k] = next(slopes) * values[ins.state] + next(offsets) * sample
            else:
                values[k] = _sum(ins, values, first)
                if ins.step is not None:
                    states.append(values[k])
                    values[k] = values[k] * kept + rows[ins.step]
                    if (
                        same[k] in values and same[k] not in ends
                    ):  # later steps may read the vector that the state copies
                        values[same[k]] = values[k]
                    ends |= {k, same[k]}
            for j in (*ins.reads, k):
                if last[j] == k and k < len(plan.code):
                    values.pop(j, None)
    return np.stack(states)


def _sum(ins: Combine, values: dict[int, Array], first: Array) -> Array:
    """The combination of an instruction: in NumPy where the weights are numbers, otherwise as a run computes it."""
    if ins.terms and ins.constant is None and all(type(w) is float for _, w in ins.terms):
        (j, weight), *rest = ins.terms
        total: Array = weight * values[j]
        for j, weight in rest:
            total += weight * values[j]
        return total
    like = torch.from_numpy(first)
    vectors = {j: torch.from_numpy(values[j]) for j, _ in ins.terms}
    return ins.ready(like)(vectors, like, may_write()).numpy()


def _factors(schedule: Schedule, asked: Sequence[Evaluate]) -> tuple[Array, Array]:
    """The output of each evaluation in its form, as p x + q: p [evaluation, problem], q [evaluation, problem, solution]."""
    t = torch.tensor([ins.t for ins in asked], dtype=_F64, device="cpu")
    a, s, da, ds = (f(t).numpy() for f in (schedule.alpha, schedule.sigma, schedule.alpha_prime, schedule.sigma_prime))
    zero, one = np.zeros(len(t)), np.ones(len(t))
    with np.errstate(all="ignore"):
        # The outputs for (data, noise) = (1, 0) and (0, 1), the two solutions of the first two problems.
        forms = {"data": (one, zero), "noise": (zero, one), "score": (zero, -1 / s), "v": (-s, a), "velocity": (da, ds)}
        of = [list(forms).index(ins.form) for ins in asked]
        g, h = (np.stack(parts)[of, range(len(t))] for parts in zip(*forms.values(), strict=True))
        slope = a * ds - s * da
        p = np.stack([h / s, g / a, (g * ds - h * da) / slope], axis=1)
        q = np.stack([g - a * h / s, zero, zero, h - s * g / a, (a * h - s * g) / slope, zero], axis=1).reshape(
            -1, 3, 2
        )
    for k, (form, pair) in enumerate((("data", (1.0, 0.0)), ("noise", (0.0, 1.0)), ("velocity", (1.0, 0.0)))):
        own = [ins.form == form for ins in asked]  # exactly, also where a product above is 0 times infinity
        p[own, k], q[own, k] = 0.0, pair
    for k, end in ((0, s == 0), (1, a == 0)):  # x does not determine the output there; the solutions do
        p[end, k], q[end, k] = 0.0, np.stack([g, h], axis=1)[end]
    return p, q


def _sample(plan: Program) -> Array:
    """A sample of the shape of the weights: all one for tensors, with components in every group for linear maps."""
    shapes = []
    for ins in plan.code:
        for v in (*(w for _, w in ins.terms), ins.constant) if isinstance(ins, Combine) else ():
            if isinstance(v, LinearMap):
                return np.sin(np.arange(1.0, math.prod(v.shape) + 1) * math.pi * math.e).reshape(v.shape)
            if v is not None and not isinstance(v, float | int):
                shapes.append(tuple(v.shape))
    return np.ones(np.broadcast_shapes(*shapes))
