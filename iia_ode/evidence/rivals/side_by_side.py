"""The rivals beside the searches of this library, measured on unseen noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...autofit import fit, fit_cost
from ...estimation import ModelStatistics
from ...grids import karras, log_snr
from ...iia.batch import per_sample
from ...plan import Plan
from ...solvers import get_solver
from ...teacher import Teacher
from ..measurements import Row
from ..models import CHUNK, Unseen, fitting, one_thread, unseen
from .ays import align, squared_differences
from .bns import bns
from .gits import gits, local_costs
from .learned import Learned, Pairs

__all__ = [
    "CLASSIC",
    "LONG",
    "LONG_DRAWS",
    "POINTS",
    "SIZES",
    "THOROUGH",
    "TUNED",
    "Size",
    "Work",
    "measured",
    "thorough",
]

T = TypeVar("T")
CLASSIC = ("ddim", "dpmpp_2m", "unipc", "deis_tab3", "ipndm")
"""Classic solvers, without a search."""

LONG = "bns, long"
LONG_DRAWS = 512
RATES = {5: ("euler", 2e-2), 8: ("midpoint", 5e-3)}  # start and rate of BNS by number of evaluations
TUNED = 0.3  # lower end of the bound of AYS
POINTS = 60  # of the statistics


@dataclass(frozen=True)
class Size:
    """Sizes of the measurements on a model.

    Attributes
    ----------
    unseen : samples of a measurement.
    draws : draws of noise for each fit.
    statistics : draws for the statistics of DPM-Solver-v3.
    nfes : numbers of evaluations.
    """

    unseen: int
    draws: int
    statistics: int
    nfes: tuple[int, ...]


SIZES = {
    "mixture64": Size(512, 96, 64, (5, 8)),
    "digits": Size(48, 32, 12, (5, 8)),
    "patches": Size(24, 16, 8, (5,)),
    "fashion": Size(24, 16, 8, (5,)),
}
THOROUGH = (("mixture64", 5),)


@dataclass(eq=False)
class Work:
    """The noise of a cell, and work that several fits share; `spent` has seconds of processor time by name."""

    setting: str
    size: Size
    seed: int
    spent: dict[str, float] = field(default_factory=dict)

    @cached_property
    def batch(self) -> Unseen:
        """Unseen noise with converged final states."""
        return unseen(self.setting, self.size.unseen, self.seed)

    @cached_property
    def taught(self) -> tuple[Pairs, Teacher]:
        """Noise of the fits, with accurate final states."""
        ode, x = fitting(self.setting, self.size.draws, self.seed)
        own = self.batch.setting
        return self.timed("pairs", partial(Pairs.solve, ode, x, own.sigma_min, own.sigma_max, chunk_size=CHUNK))

    @property
    def pairs(self) -> Pairs:
        """The training pairs."""
        return self.taught[0]

    @cached_property
    def costs(self) -> dict[str, Tensor]:
        """Local errors for GITS."""
        grid = karras(60, self.pairs.sigma_min, self.pairs.sigma_max)
        return self.timed("gits", partial(local_costs, self.pairs.ode, self.pairs.x, grid))

    @cached_property
    def differences(self) -> Tensor:
        """Differences of data estimates for AYS."""
        levels = log_snr(60, self.pairs.sigma_min, self.pairs.sigma_max, to_data=False)
        call = partial(squared_differences, self.pairs.ode, self.pairs.final, levels, self.seed)
        return self.timed("ays", call)

    @cached_property
    def statistics(self) -> tuple[ModelStatistics, int]:
        """Statistics for DPM-Solver-v3, and their cost."""
        ode, x = fitting(self.setting, self.size.statistics, self.seed)
        grid = karras(10, self.pairs.sigma_min, self.pairs.sigma_max)
        with ode.counting() as spent:
            found = self.timed("statistics", partial(ModelStatistics.estimate, ode, x, grid, points=POINTS))
        backward = 2 * POINTS * len(x) if found.about["mode"] == "reverse" else 0
        return found, spent.samples + backward

    def timed(self, name: str, call: Callable[[], T]) -> T:
        """The result of a call, with its seconds under a name."""
        begun = time.process_time()
        found = call()
        self.spent[name] = time.process_time() - begun
        return found

    def row(self, method: str, nfe: int, plan: Plan, evaluations: int, *shared: str) -> Row:
        """The measurement of a solver."""
        with torch.no_grad():
            final = plan.run(self.batch.ode, self.batch.x, check_finite=False)
        errors = per_sample(final.double() - self.batch.final.double())
        return {
            "setting": self.setting,
            "nfe": nfe,
            "method": method,
            "rmse": float(errors.square().mean().sqrt()),
            "typical": float(errors.log().mean().exp()),
            "evaluations": evaluations,
            "seconds": sum(self.spent[name] for name in shared),
        }


@lru_cache(maxsize=1)
def _work(setting: str, size: Size, seed: int) -> Work:
    one_thread()
    return Work(setting, size, seed)


def measured(setting: str, size: Size, nfe: int, seed: int, folder: Path) -> list[Row]:
    """The rows of a model and a number of evaluations."""
    work = _work(setting, size, seed)
    grid, schedule = karras(nfe, work.pairs.sigma_min, work.pairs.sigma_max), work.pairs.ode.schedule
    rows = [work.row(s, nfe, get_solver(s).plan(schedule, grid), 0) for s in CLASSIC]
    rows += [work.row(m, nfe, own.plan, own.sample_evaluations, *shared) for m, own, *shared in _times(work, nfe)]
    found, cost = work.statistics
    v3 = get_solver("dpm_solver_v3", statistics=found, max_order=2)
    rows.append(work.row("dpm_solver_v3", nfe, v3.plan(schedule, grid), cost, "statistics"))
    return rows + _fits(work, nfe)


def _times(work: Work, nfe: int) -> list[tuple[Any, ...]]:
    """(name, result, names of its seconds) of the rivals that learn times alone."""
    pairs, costs, differences = work.pairs, work.costs, work.differences
    tuned: dict[str, Any] = {"solver": "ipndm", "metric": "distance", "coefficient": 1.0}
    return [
        ("gits ddim", gits(pairs, nfe, costs=costs), "gits"),
        ("gits ipndm", gits(pairs, nfe, solver="ipndm", costs=costs), "gits"),
        ("gits ipndm, tuned", gits(pairs, nfe, costs=costs, **tuned), "gits"),
        ("ays dpmpp_2m", align(pairs, nfe, differences=differences), "pairs", "ays"),
        ("ays dpmpp_2m, tuned", align(pairs, nfe, floor=TUNED, differences=differences), "pairs", "ays"),
    ]


def _fits(work: Work, nfe: int) -> list[Row]:
    """BNS, and the budgets "closed-form" and "standard"."""
    pairs, teacher = work.taught
    own: Learned = work.timed("bns", partial(_bns, pairs, nfe, "standard", work.seed))
    rows = [work.row("bns", nfe, own.plan, own.sample_evaluations, "pairs", "bns")]
    for budget in ("closed-form", "standard"):
        call = partial(fit, pairs.ode, nfe, x=pairs.x, budget=budget, teacher=teacher, seed=work.seed)
        found = work.timed(budget, call)
        cost = found.record.sample_evaluations + pairs.sample_evaluations
        rows.append(work.row(f"iia {budget}", nfe, found.plan, cost, "pairs", budget))
    return rows


def thorough(setting: str, size: Size, nfe: int, seed: int, folder: Path) -> list[Row]:
    """The rows of the budget "thorough", and of BNS with the same draws and cost."""
    work = _work(setting, size, seed)
    ode, x = fitting(setting, LONG_DRAWS, seed)
    pairs, _ = work.timed("long pairs", partial(Pairs.solve, ode, x, work.pairs.sigma_min, work.pairs.sigma_max))
    own: Learned = work.timed(LONG, partial(_bns, pairs, nfe, "thorough", seed))
    found = work.timed("thorough", partial(fit, ode, nfe, x=x, budget="thorough", sigma_min=pairs.sigma_min, seed=seed))
    return [
        work.row(LONG, nfe, own.plan, own.sample_evaluations, "long pairs", LONG),
        work.row("iia thorough", nfe, found.plan, found.record.sample_evaluations, "thorough"),
    ]


def _bns(pairs: Pairs, nfe: int, budget: str, seed: int) -> Learned:
    """BNS with the expected cost of a budget."""
    start, rate = RATES[nfe]
    expected = fit_cost(pairs.ode, nfe, budget, samples=len(pairs)).sample_evaluations
    return bns(pairs, nfe, evaluations=expected, start=start, rate=rate, seed=seed)
