"""The lowest error of all registered solvers, each on all grids of the Karras family: exact, though few pairs run to the end.

A pair of solver and grid is run on one block of draws after another, always the pair whose sum of square errors is lowest so
far. A sum only grows, so the first pair that has been through all draws is the best of all: what running every pair on every
draw would find, at a fraction of the evaluations. Nor does the model make an evaluation twice: on one grid many solvers begin
with the same step.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from common import KARRAS, Batch, grid_of, levels_for, plan_of, setting_of, squares
from torch import Tensor

import iia_ode as iia
from iia_ode.ode import cached
from iia_ode.plan import Plan

BLOCKS = 16
Pair = tuple[str, tuple[float, float]]
"""A solver, and (rho, sigma_min) of its grid."""


def able(name: str, nfe: int) -> list[str]:
    """Registered solvers that make exactly this many evaluations."""
    return [solver for solver in iia.solver_names() if levels_for(solver, name, nfe) is not None]


def classic_plan(solver: str, name: str, nfe: int, rho: float, level: float) -> Plan:
    """A registered solver on a Karras grid."""
    return plan_of(solver, setting_of(name), grid_of(solver, name, nfe, (rho, level)))


@torch.no_grad()
def _losses(plan: Plan, batch: Batch, index: Tensor) -> Tensor:
    """Mean square error of each of these samples; infinite where the run is not finite."""
    final = plan.run(batch.ode.subset(index, len(batch.x)), batch.x[index], check_finite=False)
    own = squares(final, batch.final[index])
    return torch.where(own.isfinite(), own, torch.inf)


@dataclass(frozen=True)
class Best:
    """What the search found.

    Attributes
    ----------
    pair, rmse : the best pair, and its error on all draws.
    pairs, finished : how many pairs there were, and how many had to be run to the end.
    sample_evaluations : what it took.
    """

    pair: Pair
    rmse: float
    pairs: int
    finished: int
    sample_evaluations: int


def lowest(plans: Mapping[Pair, Plan], batch: Batch) -> Best:
    """The pair with the lowest error on a batch, exactly.

    All pairs run on the first block. The other draws are taken in the order of the errors that the best pair of that block
    makes on them, the largest first: the sooner a sum grows, the sooner a pair is out. The order decides how many evaluations
    it takes, not what is found, up to rounding: a network in single precision gives another last bit in another batch.
    """
    own, n = Batch(batch.setting, cached(batch.ode), batch.x, batch.final, batch.about), len(batch.x)
    before = own.ode.ledger.samples
    first, *others = torch.arange(n).chunk(BLOCKS)
    sums = {pair: float(_losses(plan, own, first).sum()) for pair, plan in plans.items()}
    blocks: Sequence[Tensor] = [first]
    if others:
        rest = torch.cat(others)
        pilot = plans[min(sums, key=sums.__getitem__)]
        hard = torch.cat([_losses(pilot, own, block) for block in others]).argsort(descending=True, stable=True).cpu()
        blocks = [first, *rest[hard].chunk(BLOCKS - 1)]
    queue = [(total, k, 1, pair) for k, (pair, total) in enumerate(sums.items())]
    heapq.heapify(queue)
    while True:
        total, k, done, pair = heapq.heappop(queue)
        if done == len(blocks):
            break
        total += float(_losses(plans[pair], own, blocks[done]).sum())
        heapq.heappush(queue, (total, k, done + 1, pair))
    finished = 1 + sum(reached == len(blocks) for _, _, reached, _ in queue)
    return Best(pair, math.sqrt(total / n), len(plans), finished, own.ode.ledger.samples - before)


def classic_search(name: str, nfe: int, own: Batch) -> Best:
    """The best of all registered solvers on all grids of the family, on these draws."""
    plans: dict[Pair, Plan] = {}
    # Grid by grid: solvers share their first steps on a grid, and what is remembered longest ago is forgotten first.
    for grid, solver in product(KARRAS, able(name, nfe)):
        try:
            plans[solver, grid] = classic_plan(solver, name, nfe, *grid)
        except iia.IIAError:  # this pair makes no plan
            continue
    return lowest(plans, own)
