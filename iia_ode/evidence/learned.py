"""Published learned solvers beside :func:`iia_ode.fit`: error on unseen noise, and the cost of each fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autofit import fit, fit_cost
from ..estimation import ModelStatistics
from ..grids import karras, log_snr
from ..iia.batch import per_sample
from ..plan import Plan
from ..solvers import get_solver
from ..teacher import Teacher
from .drawing import COLORS, MARKERS, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import CHUNK, Unseen, fitting, one_thread, unseen
from .rivals import Learned, Pairs, align, bns, gits, local_costs, squared_differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "LearnedSolvers"]

CLASSIC = ("ddim", "dpmpp_2m", "unipc", "deis_tab3", "ipndm")
RIVALS = ("gits ddim", "gits ipndm", "gits ipndm, tuned", "ays dpmpp_2m", "ays dpmpp_2m, tuned", "dpm_solver_v3", "bns")
LONG = "bns, long"
LONG_DRAWS = 512
FITS = (LONG, "iia closed-form", "iia standard", "iia thorough")
STANDARD = "iia standard"
EQUAL = 1.1  # a rival has an equal or lower cost up to this multiple of the cost of "standard"
RATES = {5: ("euler", 2e-2), 8: ("midpoint", 5e-3)}
TUNED = 0.3
POINTS = 60
IDEAS = {
    "gits": "times chosen by dynamic programming over local errors",
    "ays": "times that minimize a bound on the divergence of the stochastic process",
    "dpm_solver_v3": "a linear part per component, from the Jacobian of the model",
    "bns": "gradient descent on all weights and times in mini-batches",
}


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

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
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


class LearnedSolvers(Experiment):
    """BNS, GITS, AYS and DPM-Solver-v3, written from their papers, beside the budgets of :func:`iia_ode.fit`."""

    name = "learned"
    title = "Published learned solvers"
    question = (
        "How do published learned solvers of the same form (BNS, GITS, AYS, DPM-Solver-v3) compare with `iia_ode.fit`, in "
        "error on unseen noise and in the cost of the fit?"
    )
    keys = ("setting", "nfe", "method")
    values = ("rmse", "typical")
    seeds = (0, 1, 2)
    again = (100, 101, 102)

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each model and number of evaluations, and a cell for the budget "thorough"."""
        if quick:
            return [Cell("mixture64, 5", partial(_measured, "mixture64", Size(32, 16, 8, (5,)), 5))]
        cells = [Cell(f"{s}, {n}", partial(_measured, s, z, n)) for s, z in SIZES.items() for n in z.nfes]
        return [*cells, *(Cell(f"{s}, {n}, thorough", partial(_thorough, s, SIZES[s], n)) for s, n in THOROUGH)]

    # ---- the page ----------------------------------------------------------------------------------------------------

    def _ratio(self, found: Measurements, method: str, value: str = "rmse") -> Estimate:
        """Error of "standard" over the error of a method: geometric mean over models and numbers of evaluations."""
        return found.averaged(
            lambda own: _geometric(
                own.ratio(value, {"method": STANDARD}, {"method": method}, setting=s, nfe=n).mean
                for s, n in _places(own)
            )
        )

    def _decided(self, found: Measurements) -> dict[str, tuple[list[str], list[str], list[str]]]:
        """For each rival the cases in which it is worse than "standard", better, and neither."""
        table = {}
        for method in RIVALS:
            worse, better, neither = [], [], []
            for setting, nfe in _places(found):
                ratio = found.ratio("rmse", {"method": STANDARD}, {"method": method}, setting=setting, nfe=nfe)
                into = worse if ratio.below(1) else better if ratio.above(1) else neither
                into.append(f"{setting} at {nfe}")
            table[method] = (worse, better, neither)
        return table

    def answer(self, found: Measurements) -> str:
        """Cases won and lost by the budget "standard", and the ideas of rivals that are better at equal cost."""
        ratios = {m: self._ratio(found, m) for m in RIVALS}
        nearest = min(ratios, key=lambda m: abs(ratios[m].mean - 1) if ratios[m].mean < 1 else -ratios[m].mean)
        decided, cases = self._decided(found), len(_places(found))
        text = (
            f"Over {cases} cases (model and number of evaluations), the error of `iia_ode.fit` with the budget "
            f'"standard" is {ratios[nearest]} times the error of the nearest rival, {nearest}, and '
            f"{ratios['bns']} times the error of BNS at equal cost (geometric means). "
        )
        lost = [
            f"{m} ({IDEAS[m.split()[0]]}) in {', '.join(better)}"
            for m, (_, better, _) in decided.items()
            if better and all(_affordable(found, m, *_case(c)) for c in better)
        ]
        won = sum(all(place in decided[m][0] for m in RIVALS) for place in map(_named, _places(found)))
        text += f"It is better than every rival, at the 95% level, in {won} of {cases} cases. "
        text += (
            f"At equal or lower cost, rivals are better at that level: {'; '.join(lost)}."
            if lost
            else "No rival of equal or lower cost is better at that level in any case."
        )
        return text

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """A verdict for each rival: whether the search of this library is better, over all cases."""
        claims = []
        for method in RIVALS:
            ratio = self._ratio(found, method)
            verdict = "fit better" if ratio.below(1) else "rival better" if ratio.above(1) else "not resolved"
            text = f'`iia_ode.fit` ("standard") against {method}'
            claims.append(Claim(text, f"error {ratio} times that of the rival", verdict))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Errors, costs and seconds of all methods for each case, and the ratio to "standard"."""
        parts = []
        for setting, nfe in _places(found):
            part = found.where(setting=setting, nfe=nfe)
            lines = []
            for method in part.distinct("method"):
                ratio = part.ratio("rmse", {"method": method}, {"method": STANDARD})
                cost, seconds = (part.estimate(v, method=method).mean for v in ("evaluations", "seconds"))
                errors = [part.estimate(v, method=method) for v in ("rmse", "typical")]
                spent = [f"{cost:.0f}", f"{seconds:.0f}"] if cost else ["-", "-"]
                lines.append([method, *errors, "1" if method == STANDARD else ratio, *spent])
            head = ["solver", "RMSE", "typical error", "RMSE / standard", "sample evaluations", "seconds"]
            caption = (
                f"{setting}, {nfe} evaluations: error per component on unseen noise, cost of the fit, and seconds of one "
                "thread. The typical error is the geometric mean over samples."
            )
            parts.append(Part(caption, markdown(head, lines)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """Error against the cost of the fit, a panel for each case; the best untuned classic solver as a line."""
        places = _places(found)
        columns = min(3, len(places))
        figure, axes = panels(-(-len(places) // columns), columns, height=3.2)
        flat = [ax for row in axes for ax in row]
        for ax in flat[len(places) :]:
            ax.set_axis_off()
        styles = {m: (COLORS[k % 8], MARKERS[(k + k // 8) % 8]) for k, m in enumerate((*RIVALS, *FITS))}
        for ax, (setting, nfe) in zip(flat, places, strict=False):
            part = found.where(setting=setting, nfe=nfe)
            for method, (color, marker) in styles.items():
                error, cost = part.estimate("rmse", method=method), part.estimate("evaluations", method=method)
                if error.seeds:
                    spread = error.error if error.seeds > 1 else 0.0
                    options = {"color": color, "marker": marker, "markersize": 6, "capsize": 2, "linestyle": "none"}
                    ax.errorbar([cost.mean], [error.mean], yerr=[spread], label=method, **options)
            best = min(part.estimate("rmse", method=m).mean for m in CLASSIC)
            ax.axhline(best, color="#999999", linestyle="--", linewidth=1, label="best classic, not tuned")
            ax.set(xscale="log", yscale="log", title=f"{setting}, {nfe} evaluations")
            ax.set(xlabel="sample evaluations of the fit", ylabel="endpoint RMSE")
            ax.yaxis.set_minor_formatter("{x:.2g}")
            ax.tick_params(axis="y", which="both", labelsize="x-small")
            ax.grid(alpha=0.3)
        handles: dict[str, Any] = {}
        for ax in flat:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
        return figure

    @property
    def method(self) -> str:
        """Models, budgets, and the choices made for the rivals."""
        sizes = "; ".join(f"{s}: {z.unseen} unseen samples, {z.draws} draws for each fit" for s, z in SIZES.items())
        statistics = ", ".join(f"{z.statistics} on {s}" for s, z in SIZES.items())
        return f"{sizes}. {_METHOD}\nDraws for the statistics: {statistics}."


_METHOD = f"""
All fits see the same draws, and no measurement sees these draws. Final states for the fits come from 60 steps of the
teacher's method. Their cost is part of the cost of every fit that uses them, and a backward pass counts as two evaluations.
Seconds are processor time on a busy machine. The rivals are written from their papers. Choices that the papers leave open
were made on other seeds of mixture64, for the rivals' benefit.

**BNS**: all weights and times on the path of flow matching, from Euler's method (5 evaluations) or the midpoint rule (8), by
Adam in batches of 16, with first rates of 0.02 and 0.005 that fall like a cosine. The loss is the log of the squared error,
and a quarter of the draws chooses the iteration. BNS spends as many sample evaluations as the budget "standard" is expected
to spend. BNS, long, has {LONG_DRAWS} draws and the cost of the budget "thorough" instead.

**GITS**: times out of a teacher's 60 levels by dynamic programming, with the metric "deviation" and the coefficient 1.15 of
the authors; "tuned" has the metric "distance" and the coefficient 1.

**AYS**: the bound on 60 levels, and coordinate search from the Karras grid. The lower end of the bound is the smallest level
of the model, or {TUNED:g} in "tuned".

**DPM-Solver-v3**: statistics at {POINTS} points, order 2, on the Karras grid. Classic solvers run on the Karras grid, without
a search.
"""


@lru_cache(maxsize=1)
def _work(setting: str, size: Size, seed: int) -> Work:
    one_thread()
    return Work(setting, size, seed)


def _measured(setting: str, size: Size, nfe: int, seed: int, folder: Path) -> list[Row]:
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


def _thorough(setting: str, size: Size, nfe: int, seed: int, folder: Path) -> list[Row]:
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


def _places(found: Measurements) -> list[tuple[str, int]]:
    """Models with numbers of evaluations."""
    return list(dict.fromkeys((str(row["setting"]), int(row["nfe"])) for row in found.rows))


def _named(place: tuple[str, int]) -> str:
    return f"{place[0]} at {place[1]}"


def _case(name: str) -> tuple[str, int]:
    setting, nfe = name.split(" at ")
    return setting, int(nfe)


def _affordable(found: Measurements, method: str, setting: str, nfe: int) -> bool:
    """Whether a rival costs at most as much as the budget "standard"."""
    own = found.estimate("evaluations", method=method, setting=setting, nfe=nfe).mean
    return own <= EQUAL * found.estimate("evaluations", method=STANDARD, setting=setting, nfe=nfe).mean


def _geometric(values: Any) -> Estimate:
    from .measurements import geometric

    return geometric(list(values))


EXPERIMENT = LearnedSolvers()
