"""Refinement of a plan by Adam, for comparison with the library's Gauss-Newton.

Stretches of Adam start from the lowest training error so far, each at half the rates of the stretch before. The rates that
suit a plan depend on the model and on the number of evaluations; rates that are too large throw a plan off for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from iia_ode import ProbabilityFlowODE
from iia_ode.iia.batch import Batch
from iia_ode.iia.plan_parameters import Parameters
from iia_ode.iia.refinement import EndpointError, Iteration, Refinement, Status
from iia_ode.plan import Plan

_RATES = (5e-3, 2e-2)  # for weights, and for log sigma/alpha
_STRETCHES = 12
_WORSE = 1.5  # a stretch ends at this multiple of its first training error
_STALLED = 12  # a stretch ends after this many iterations without a lower training error


def refine_by_adam(
    ode: ProbabilityFlowODE, x: Tensor, plan: Plan, target: Tensor, *, iterations: int, chunk_size: int
) -> Refinement:
    """As :func:`iia_ode.iia.refine`, with a quarter of the samples [B, ...] held out to choose the iteration by."""
    parameters, n = Parameters(plan), len(x)
    cut = n - max(1, round(0.25 * n))
    batch = Batch(ode, x, chunk_size=chunk_size, final=target)
    train, judge = (EndpointError(parameters, part, probes=0) for part in (batch[:cut], batch[cut:]))
    with ode.counting() as spent:
        train.scale = judge.scale = 4 * float(train.errors(parameters.initial).median())
        found, best, kept = [], 0, parameters.initial
        for theta, error in _adam(train):
            found.append(Iteration(error, judge.loss(theta), 0.0))
            if found[-1].held_out < found[best].held_out:
                best, kept = len(found) - 1, theta
            if len(found) > iterations:
                break
    result = plan if best == 0 else parameters.plan(kept, plan.name)
    return Refinement(result, tuple(found), best, Status.ITERATIONS, spent.samples + train.backward, train.backward)


def _adam(objective: EndpointError) -> Iterator[tuple[Tensor, float]]:
    """The start, then each iteration: parameters and training error."""
    parameters, size = objective.parameters, objective.batch.x.numel()
    first = parameters.weights
    best, lowest = parameters.initial, objective.loss(parameters.initial)
    yield best, lowest
    steepest = objective.derivatives(best)[0] / size
    for stretch in range(_STRETCHES):
        groups = [best[:first].clone().requires_grad_(True), best[first:].clone().requires_grad_(True)]
        optimizer = torch.optim.Adam(
            [{"params": [g], "lr": r / 2**stretch} for g, r in zip(groups, _RATES, strict=True)]
        )
        gradient, begun, since = steepest, lowest, 0
        while bool(torch.isfinite(gradient).all()):
            for group, part in zip(groups, (gradient[:first], gradient[first:]), strict=True):
                group.grad = part
            optimizer.step()
            theta = torch.cat([group.detach() for group in groups])
            error, since = objective.loss(theta), since + 1
            if not math.isfinite(error):
                break
            yield theta, error
            if error >= lowest and (since == _STALLED or error > _WORSE * begun):
                break
            gradient = objective.derivatives(theta)[0] / size
            if error < lowest:
                best, lowest, steepest, since = theta, error, gradient, 0
