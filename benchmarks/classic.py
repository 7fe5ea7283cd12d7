"""Exact search for the best pair of registered solver and Karras grid, by branch and bound over blocks of draws.

Pairs run on one block of draws after another. The next block always goes to the pair with the lowest sum of squared errors
so far. Sums only grow: the first pair with all draws done is the best of all, as if every pair had run on every draw, at a
fraction of the evaluations. Evaluations are memoized, since many solvers begin with the same step on a grid.
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
    """Registered solvers with exactly `nfe` evaluations."""
    return [solver for solver in iia.solver_names() if levels_for(solver, name, nfe) is not None]


def classic_plan(solver: str, name: str, nfe: int, rho: float, level: float) -> Plan:
    """A registered solver on a Karras grid."""
    return plan_of(solver, setting_of(name), grid_of(solver, name, nfe, (rho, level)))


@torch.no_grad()
def _losses(plan: Plan, batch: Batch, index: Tensor) -> Tensor:
    """Mean squared error of each sample in `index`; infinite where the run is not finite."""
    final = plan.run(batch.ode.subset(index, len(batch.x)), batch.x[index], check_finite=False)
    own = squares(final, batch.final[index])
    return torch.where(own.isfinite(), own, torch.inf)


@dataclass(frozen=True)
class Best:
    """Result of the search.

    Attributes
    ----------
    pair, rmse : the best pair, and its error on all draws.
    pairs, finished : number of pairs, and number of pairs run on all draws.
    sample_evaluations : sample evaluations of the search.
    """

    pair: Pair
    rmse: float
    pairs: int
    finished: int
    sample_evaluations: int


def lowest(plans: Mapping[Pair, Plan], batch: Batch) -> Best:
    """The pair with the lowest error on a batch, exactly.

    All pairs run on the first block. The best pair of the first block ranks the other draws, largest error first: the faster a
    sum grows, the sooner a pair is out. The order of the draws affects the number of evaluations, and the result only by
    rounding: a network in single precision gives other last bits in another batch.
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
    # Grid by grid: solvers share their first steps on a grid, and the oldest memoized evaluations are dropped first.
    for grid, solver in product(KARRAS, able(name, nfe)):
        try:
            plans[solver, grid] = classic_plan(solver, name, nfe, *grid)
        except iia.IIAError:  # the solver has no plan on this grid
            continue
    return lowest(plans, own)
