"""BNS, bespoke non-stationary solvers: all weights and times by gradient descent on the endpoint [Shaul et al. 2024].

On the path of flow matching, y = s x_0 + (1 - s) eps with the velocity v = x_0 - eps, a non-stationary solver with n
evaluations at times s_0 < ... < s_{n-1} has the states

    y_i = a_i y_0 + sum_{j < i} b_ij v_j,    i = 1, ..., n,

with the result y_n at s_n = 1. Every solver with these evaluations has this form. The weights a and b and the interior times
are learned together: the loss is the mean over samples of the logarithm of the squared error, which is the negative peak
signal-to-noise ratio up to a constant. States of EDM are x = y / s at the level (1 - s) / s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...iia.batch import per_sample
from ...ode import ProbabilityFlowODE
from ...plan import Combine, Evaluate, Instruction, Plan
from .learned import Learned, Pairs

__all__ = ["NonStationary", "bns"]

_F64 = torch.float64
STARTS = ("euler", "midpoint")


@dataclass(frozen=True)
class NonStationary:
    """The family of non-stationary solvers with n evaluations from a noise level to the data.

    A vector theta has n logarithms of time increments, then a_i and b_i0, ..., b_i,i-1 for i = 1, ..., n. Time increments are
    the softmax of the logarithms, times 1 - s_0.

    Attributes
    ----------
    nfe : number of evaluations, n.
    sigma_max : level of the initial states, (1 - s_0) / s_0.
    """

    nfe: int
    sigma_max: float

    @property
    def first(self) -> float:
        """The first time, s_0."""
        return 1 / (1 + self.sigma_max)

    def initial(self, start: str = "euler") -> Tensor:
        """Theta of a generic solver on equal steps in s.

        Parameters
        ----------
        start : ``"euler"``, which is DDIM, or ``"midpoint"`` for an even number of evaluations.

        Returns
        -------
        Theta, float64 [P].

        Raises
        ------
        UnknownNameError : no such start.
        InputError : the midpoint rule has an even number of evaluations.
        """
        n, step = self.nfe, (1 - self.first) / self.nfe
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
        if start == "midpoint" and n % 2:
            raise InputError(f"the midpoint rule has an even number of evaluations, got {n}.")
        weights: list[float] = []
        for i in range(1, n + 1):
            if start == "euler":
                row = [step] * i
            else:  # an odd state is a predictor at the middle of a step of two increments
                row = [2 * step * (j % 2) for j in range(i)]
                if i % 2:
                    row[-1] = step
            weights += [1.0, *row]
        return torch.tensor([0.0] * n + weights, dtype=_F64, device="cpu")

    def times(self, theta: Tensor) -> Tensor:
        """The times s_0, ..., s_n, [n + 1]."""
        steps = torch.softmax(theta[: self.nfe], dim=0) * (1 - self.first)
        start = torch.full((1,), self.first, dtype=_F64, device="cpu")
        return torch.cat([start, self.first + steps.cumsum(dim=0)])

    def rows(self, theta: Tensor) -> list[Tensor]:
        """Weights (a_i, b_i0, ..., b_i,i-1) of each state, [i + 1] for i = 1, ..., n."""
        sizes = [i + 1 for i in range(1, self.nfe + 1)]
        return list(torch.split_with_sizes(theta[self.nfe :], sizes))

    def run(self, ode: ProbabilityFlowODE, x: Tensor, theta: Tensor, data: Tensor | None = None) -> Tensor:
        """The final states, differentiable in theta.

        Parameters
        ----------
        ode : the model.
        x : initial states [B, ...].
        theta : float64 [P].
        data : the first data estimates [B, ...], which do not depend on theta, if known.

        Returns
        -------
        Final states [B, ...].
        """
        s = self.times(theta)
        y0 = self.first * x
        state, velocities = y0, []
        for i, row in enumerate(self.rows(theta)):
            if i or data is None:
                data = ode.evaluate(state / s[i].to(x), (1 - s[i]) / s[i]).data
            velocities.append((data - state) / (1 - s[i]).to(x))
            weights = row.to(x)
            state = weights[0] * y0
            for weight, velocity in zip(weights[1:], velocities, strict=True):
                state = state + weight * velocity
        return state

    def plan(self, ode: ProbabilityFlowODE, theta: Tensor, name: str = "bns") -> Plan:
        """The solver as a plan on states of EDM; velocities are combinations of a state and its data estimate."""
        s = self.times(theta.detach()).tolist()
        grid = (self.sigma_max, *((1 - v) / v for v in s[1:-1]), 0.0)
        code: list[Instruction] = [Evaluate(0, grid[0], "data")]
        states, estimates = [0], [1]
        for i, row in enumerate(self.rows(theta.detach()), start=1):
            end = s[i] if i < self.nfe else 1.0
            a, *b = row.tolist()
            weights = {0: a * self.first / end}
            for j, weight in enumerate(b):
                part = weight / (1 - s[j]) / end
                weights[estimates[j]] = weights.get(estimates[j], 0.0) + part
                weights[states[j]] = weights.get(states[j], 0.0) - part * s[j]
            code.append(Combine(tuple(weights.items()), step=i))
            states.append(len(code))
            if i < self.nfe:
                code.append(Evaluate(states[-1], grid[i], "data"))
                estimates.append(len(code))
        return Plan(ode.schedule, grid, tuple(code), name)


def bns(
    pairs: Pairs,
    nfe: int,
    *,
    evaluations: int,
    start: str = "euler",
    rate: float = 1e-2,
    batch: int = 16,
    held_out: float = 0.25,
    every: int = 10,
    seed: int = 0,
) -> Learned:
    """Learn all weights and times by Adam, with rates that fall to zero like a cosine.

    Parameters
    ----------
    pairs : the training pairs.
    nfe : evaluations of the solver.
    evaluations : sample evaluations to spend, with those of the pairs; a backward pass counts as two.
    start : the generic solver to start from; see :meth:`NonStationary.initial`.
    rate : first rate of Adam.
    batch : samples of an iteration.
    held_out : share of the pairs that chooses the best iteration.
    every : iterations between two looks at the held-out pairs.
    seed : of the order of the samples.

    Returns
    -------
    The solver of the best iteration on held-out pairs.
    """
    family = NonStationary(nfe, pairs.sigma_max)
    held = max(1, round(held_out * len(pairs)))
    train = len(pairs) - held
    per_iteration = 3 * (nfe - 1) * min(batch, train) + (nfe - 1) * held / every
    spent = (
        pairs.sample_evaluations + len(pairs) + (nfe - 1) * held
    )  # the final states, the first estimates, a first look
    iterations = max(1, int((evaluations - spent) / per_iteration))
    with torch.no_grad():
        first = pairs.ode.output(pairs.x, pairs.sigma_max)
    theta = family.initial(start).requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=rate)
    order = _order(train, batch, torch.Generator("cpu").manual_seed(seed))
    kept = slice(train, len(pairs))
    best, chosen = _judged(family, pairs, first, kept, theta), theta.detach().clone()
    for k in range(1, iterations + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (k - 1) / iterations))
        optimizer.zero_grad()
        loss = _loss(family, pairs, first, next(order), theta)
        torch.autograd.backward(loss)
        spent += 3 * (nfe - 1) * min(batch, train)
        if theta.grad is None or not bool(torch.isfinite(theta.grad).all()):
            break
        optimizer.step()
        if k % every == 0 or k == iterations:
            found = _judged(family, pairs, first, kept, theta)
            spent += (nfe - 1) * held
            if found < best:
                best, chosen = found, theta.detach().clone()
    return Learned(family.plan(pairs.ode, chosen), spent)


def _loss(family: NonStationary, pairs: Pairs, first: Tensor, index: Tensor | slice, theta: Tensor) -> Tensor:
    """Mean over samples of log of the mean squared error."""
    ode = pairs.ode.subset(index, len(pairs))
    final = family.run(ode, pairs.x[index], theta, first[index])
    return 2 * per_sample(final - pairs.final[index].to(final)).log().mean()


@torch.no_grad()
def _judged(family: NonStationary, pairs: Pairs, first: Tensor, index: slice, theta: Tensor) -> float:
    loss = float(_loss(family, pairs, first, index, theta))
    return loss if math.isfinite(loss) else math.inf


def _order(train: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices, in a new order for each pass over the samples."""
    left = torch.randperm(train, generator=generator, device="cpu")
    while True:
        if len(left) < min(batch, train):
            left = torch.cat([left, torch.randperm(train, generator=generator, device="cpu")])
        yield left[:batch]
        left = left[batch:]
