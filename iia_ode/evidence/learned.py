"""Published learned solvers beside :func:`iia_ode.fit`: error on unseen noise, and the cost of each fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .drawing import COLORS, MARKERS, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements
from .rivals.side_by_side import CLASSIC, LONG, LONG_DRAWS, POINTS, SIZES, THOROUGH, TUNED, Size, measured, thorough

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "LearnedSolvers"]

RIVALS = ("gits ddim", "gits ipndm", "gits ipndm, tuned", "ays dpmpp_2m", "ays dpmpp_2m, tuned", "dpm_solver_v3", "bns")
FITS = (LONG, "iia closed-form", "iia standard", "iia thorough")
STANDARD = "iia standard"
EQUAL = 1.1  # a rival has an equal or lower cost up to this multiple of the cost of "standard"
IDEAS = {
    "gits": "times chosen by dynamic programming over local errors",
    "ays": "times that minimize a bound on the divergence of the stochastic process",
    "dpm_solver_v3": "a linear part per component, from the Jacobian of the model",
    "bns": "gradient descent on all weights and times in mini-batches",
}
_TICKS = (1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)


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
    seeds = (0, 1)
    again = (100, 101)
    fits_of = "03617d6"

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each model and number of evaluations, and a cell for the budget "thorough"."""
        if quick:
            return [Cell("mixture64, 5", partial(measured, "mixture64", Size(32, 16, 8, (5,)), 5))]
        cells = [Cell(f"{s}, {n}", partial(measured, s, z, n)) for s, z in SIZES.items() for n in z.nfes]
        return [*cells, *(Cell(f"{s}, {n}, thorough", partial(thorough, s, SIZES[s], n)) for s, n in THOROUGH)]

    # ---- the page ----------------------------------------------------------------------------------------------------

    def _ratio(self, found: Measurements, method: str, value: str = "rmse") -> Estimate:
        """Error of "standard" over the error of a method: geometric mean over models and numbers of evaluations."""
        over, under = {"method": STANDARD}, {"method": method}
        return found.pooled(lambda own: [own.ratio(value, over, under, setting=s, nfe=n) for s, n in _places(own)])

    def _decided(self, found: Measurements) -> dict[str, tuple[list[str], list[str], list[str]]]:
        """For each rival the cases in which it is worse than "standard", better, and neither."""
        table = {}
        for method in RIVALS:
            worse: list[str] = []
            better: list[str] = []
            neither: list[str] = []
            for setting, nfe in _places(found):
                ratio = found.ratio("rmse", {"method": STANDARD}, {"method": method}, setting=setting, nfe=nfe)
                into = worse if ratio.below(1) else better if ratio.above(1) else neither
                into.append(f"{setting} at {nfe}")
            table[method] = (worse, better, neither)
        return table

    def answer(self, found: Measurements) -> str:
        """Mean ratios to the nearest rival and to BNS, and the cases won and lost by the budget "standard"."""
        ratios = {m: self._ratio(found, m) for m in RIVALS}
        nearest, decided, cases = max(ratios, key=lambda m: ratios[m].mean), self._decided(found), len(_places(found))
        won = sum(all(place in decided[m][0] for m in RIVALS) for place in map(_named, _places(found)))
        lost = {case for better in self._lost(found).values() for case in better}
        return (
            f"Over {cases} cases (model and number of evaluations), the error of `iia_ode.fit` with the budget "
            f'"standard" is {ratios[nearest]} times the error of the nearest rival, {nearest}, and {ratios["bns"]} times '
            f"the error of BNS at equal cost (geometric means). It is clearly better than every rival in {won} of "
            f"{cases} cases, and a rival of equal or lower cost is clearly better in {len(lost)}."
        )

    def _lost(self, found: Measurements) -> dict[str, list[str]]:
        """For each rival the cases in which it is better than "standard" at equal or lower cost."""
        return {
            m: own
            for m, (_, better, _) in self._decided(found).items()
            if (own := [c for c in better if _affordable(found, m, *_case(c))])
        }

    def notes(self, found: Measurements) -> Sequence[str]:
        """The ratio in the typical error, and the ideas of rivals that are better at equal cost."""
        typical = self._ratio(found, "bns", "typical")
        return [
            f'"standard" has {typical} times the typical error of BNS, the aim of BNS (geometric mean over cases).',
            *(
                f'{m} ({IDEAS[m.split()[0]]}) is clearly better than "standard" at equal or lower cost in {", ".join(cases)}.'
                for m, cases in self._lost(found).items()
            ),
        ]

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
                    options: dict[str, Any] = {
                        "color": color,
                        "marker": marker,
                        "markersize": 6,
                        "capsize": 2,
                        "linestyle": "none",
                    }
                    ax.errorbar([cost.mean], [error.mean], yerr=[spread], label=method, **options)
            best = min(part.estimate("rmse", method=m).mean for m in CLASSIC)
            ax.axhline(best, color="#999999", linestyle="--", linewidth=1, label="best classic, not tuned")
            ax.set(xscale="log", yscale="log", title=f"{setting}, {nfe} evaluations")
            ax.set(xlabel="sample evaluations of the fit", ylabel="endpoint RMSE")
            ax.set_xticks(_TICKS, [f"{v:g}" for v in _TICKS], fontsize="x-small")
            spent = [v for m in styles if (v := part.estimate("evaluations", method=m).mean) > 0]
            ax.set_xlim(min(spent) / 1.6, max(spent) * 1.6)
            ax.yaxis.set_major_formatter("{x:.2g}")
            ax.yaxis.set_minor_formatter("{x:.2g}")
            ax.tick_params(axis="y", which="both", labelsize="x-small")
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            ax.grid(alpha=0.3)
        handles: dict[str, Any] = {}
        for ax in flat:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
        return figure

    @property
    def method(self) -> str:
        """Models, budgets, and the choices made for the rivals."""
        sizes = "; ".join(f"{s}: {z.unseen} unseen samples, {z.draws} draws for each fit" for s, z in SIZES.items())
        statistics = ", ".join(f"{z.statistics} on {s}" for s, z in SIZES.items())
        return f"{sizes}. {_METHOD}\nDraws for the statistics: {statistics}. *Clearly* means by the 95% interval over seeds."


_METHOD = f"""
All fits see the same draws, and no measurement sees these draws. Final states for the fits come from 60 steps of the
teacher's method. Their cost is part of the cost of every fit that uses them, and a backward pass counts as two evaluations.
Seconds are processor time on a busy machine. The rivals are written from their papers. Choices that the papers leave open
were made on mixture64, in part on seed 0, for the rivals' benefit.

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


EXPERIMENT = LearnedSolvers()
