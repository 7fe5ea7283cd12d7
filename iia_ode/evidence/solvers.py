"""Gain of IIA over each base solver, and the number of evaluations at which the gain ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..errors import InputError
from ..iia import IIA, FittedSolver
from ..iia.directions import resolve_terms
from ..solvers import Solver, get_solver
from .drawing import panels, ratio_map
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import Unseen, drawn, fitting, karras_within, squares
from .wording import ends, judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Solvers"]

BASES = {
    "mixture64": (
        *("ddim", "dpmpp_2m", "dpm_solver_2m", "expab2", "ipndm", "spndm", "plms"),
        *("dpmpp_3m", "dpm_solver_3m", "deis_tab3", "unipc"),
        *("heun", "dpm2", "dpmpp_2s", "heun3", "dpm_solver_3s", "rk4"),
    ),
    "digits": ("ddim", "dpmpp_2m", "heun"),
}
COUNTS = {"mixture64": (5, 8, 12, 20, 32), "digits": (5, 9, 15)}
SAMPLES = {"mixture64": 256, "digits": 48}
FIT_SAMPLES = {"mixture64": 64, "digits": 32}
STEPS = {"mixture64": 200, "digits": 40}
BASE, PAPER, WINDOW = "base", "paper", "window"
WHAT = ("RMSE per component", "error of a typical sample")
LEAST = 0.95
"""A gain counts down to this ratio of the errors of fit and base."""


class Solvers(Experiment):
    """Each base on its Karras grid, with the terms of the paper and with the window."""

    name = "solvers"
    title = "Gain for each base solver"
    question = "Which base solvers gain by IIA, and from how many evaluations on is the gain gone?"
    keys = ("setting", "base", "form", "budget")
    values = ("rmse", "typical")
    seeds = (0, 1, 2)
    again = (100, 101, 102)
    forms: ClassVar[tuple[str, ...]] = (PAPER, WINDOW)

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each base on each model."""
        if quick:
            return [Cell("mixture64, ddim", partial(measured, "mixture64", "ddim", (5, 8), 64, 32))]
        return [
            Cell(f"{s}, {base}", partial(measured, s, base, COUNTS[s], SAMPLES[s], FIT_SAMPLES[s]))
            for s, bases in BASES.items()
            for base in bases
        ]

    def ratios(self, found: Measurements, setting: str, form: str, value: str) -> dict[str, dict[int, Estimate]]:
        """The error of a form relative to its base, by base and number of evaluations."""
        part = found.where(setting=setting)
        ratios: dict[str, dict[int, Estimate]] = {}
        for base in part.distinct("base"):
            own = part.where(base=base)
            by_count = {n: own.ratio(value, {"form": form}, {"form": BASE}, budget=n) for n in own.distinct("budget")}
            ratios[base] = {n: r for n, r in by_count.items() if r.seeds}
        return ratios

    def answer(self, found: Measurements) -> str:
        """The gain with few evaluations, and for how many bases the gain ends."""
        sentences = []
        for setting in found.distinct("setting"):
            rmse, typical = (self.ratios(found, setting, PAPER, value) for value in self.values)
            few, first = _first(rmse)
            low, high = ends(first)
            gone, counts = [gain_ends(line).isdigit() for line in typical.values()], found.where(setting=setting)
            sentences.append(
                f"On {setting} at {few} evaluations the paper's terms clearly lower the RMSE of {judged(first)[0]} of "
                f"{len(first)} bases, from {low} to {high} of the base, and for a typical sample the gain ends within "
                f"{max(counts.distinct('budget'))} evaluations for {sum(gone)} of {len(gone)} bases."
            )
        return " ".join(sentences)

    def notes(self, found: Measurements) -> Sequence[str]:
        """Where the gain of each base ends, for the paper's terms and for the window."""
        sentences = []
        for setting in found.distinct("setting"):
            rmse, typical = (self.ratios(found, setting, PAPER, value) for value in self.values)
            few, first = _first(rmse)
            cases = [r for line in typical.values() for r in line.values()]
            window = [gain_ends(line) for line in self.ratios(found, setting, WINDOW, "typical").values()]
            sentences.append(
                f"On {setting} the paper's terms lower the RMSE to {median(r.mean for r in first):.2f} of the base in the "
                f"median at {few} evaluations. For a typical sample {_ends_in_words(typical)} evaluations; in RMSE the gain "
                f"ends {_ends_counted(rmse)}. The fit of a typical sample is clearly worse than the base in "
                f"{sum(r.above(1) for r in cases)} of {len(cases)} cases. With the window the gain ends within these "
                f"counts for {sum(e.isdigit() for e in window)} of {len(window)} bases."
            )
        return sentences

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The open question on other high-order solvers."""
        rmse, typical = (
            {b: line for b, line in self.ratios(found, "mixture64", PAPER, value).items() if order_of(b) >= 2}
            for value in self.values
        )
        if not any(rmse.values()):
            return []
        few, gains = _first(rmse)
        (clear, _), (low, high) = judged(gains), ends(gains)
        gone = [gain_ends(line).isdigit() for line in typical.values()]
        most = max(found.where(setting="mixture64").distinct("budget"))
        return [
            Claim(
                "Open question: does IIA help other high-order solvers (order 2 or more)?",
                f"mixture64, {few} evaluations: RMSE {low} to {high} of the base; typical gain ends by {most} evaluations for "
                f"{sum(gone)} of {len(gone)}",
                "confirmed" if clear == len(gains) else f"clear for {clear} of {len(gains)} bases",
            )
        ]

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Errors of the bases, ratios of the forms, and the ends of the gain."""
        parts = []
        for setting in found.distinct("setting"):
            part = found.where(setting=setting)
            counts = sorted(part.distinct("budget"))
            bases = part.distinct("base")
            for value, what in zip(self.values, WHAT, strict=True):
                lines = [[b, *(part.estimate(value, base=b, form=BASE, budget=n) for n in counts)] for b in bases]
                caption = f"{setting}: {what} of the base, at no more than this number of evaluations."
                parts.append(Part(caption, markdown(["base", *map(str, counts)], lines)))
            for form in self.forms:
                for value, what in zip(self.values, WHAT, strict=True):
                    ratios = self.ratios(found, setting, form, value)
                    lines = [[b, *(line.get(n, "-") for n in counts), gain_ends(line)] for b, line in ratios.items()]
                    caption = (
                        f"{setting}: {what} of the fit with {form} terms relative to the base, and the end of the gain."
                    )
                    parts.append(Part(caption, markdown(["base", *map(str, counts), "gain ends at"], lines)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """A colored table of ratios for each model, form and error."""
        settings, kinds = found.distinct("setting"), [(f, v) for v in self.values for f in self.forms]
        heights = [len(found.where(setting=s).distinct("base")) + 4 for s in settings]
        figure, axes = panels(len(settings), len(kinds), 3.6, 0.26 * sum(heights) / len(settings), heights)
        for row, setting in zip(axes, settings, strict=True):
            for ax, (form, value) in zip(row, kinds, strict=True):
                ratios = self.ratios(found, setting, form, value)
                counts = sorted({n for line in ratios.values() for n in line})
                cells = [[line.get(n, Estimate(0.0, 0.0, 0)) for n in counts] for line in ratios.values()]
                ratio_map(ax, list(ratios), counts, cells)
                what = "RMSE" if value == "rmse" else "typical sample"
                ax.set(title=f"{setting}, {form} terms:\n{what}", xlabel="NFE, at most")
                ax.title.set_fontsize("medium")
        return figure

    @property
    def method(self) -> str:
        """Terms, numbers of samples and rules."""
        sizes = ", ".join(f"{FIT_SAMPLES[s]} and {SAMPLES[s]} on {s}" for s in BASES)
        return (
            "Grids have Karras levels from 80 to 0.002. A base makes the largest possible number of evaluations up to the "
            'number of the column. The paper\'s terms are those of `IIA(base, terms="paper")`; for bases without terms of '
            'their own in the paper, they are the increments of BIIA, `terms="biia-edm"`. The window has all states and data '
            'estimates of two steps, with `ridge="auto"`. The target is the paper\'s, three sub-steps of the base, and there '
            f"is no guard. Numbers of samples for fits and of unseen samples: {sizes}. The gain ends at the smallest number "
            "of evaluations from which on no error is clearly below the base's, or below 95% of it. "
            "The error of a typical sample is the geometric mean of the RMS errors of single samples. Where few samples of "
            "mixture64 end in another component, these samples make up the RMSE, and ratios of RMSEs vary between seeds. "
            "Solvers that agree with another on EDM's schedule appear once: `euler` is `ddim`, `ab2` is `deis_tab2`, "
            "`deis_rho_heun` is `heun`."
        )


def measured(
    setting: str, base: str, counts: Sequence[int], samples: int, fit_samples: int, seed: int, folder: Path
) -> list[Row]:
    """Errors of a base and of its fits on unseen noise."""
    batch = drawn(setting, samples, seed, unseen=True, steps=STEPS[setting])
    fit_ode, fit_x = fitting(setting, fit_samples, seed)
    solver, rows, done = get_solver(base), [], set[int]()
    for budget in counts:
        found = karras_within(solver, budget, batch.setting)
        if found is None or found[0] in done or budget > 1.4 * found[0]:
            continue
        nfe, grid = found
        done.add(nfe)
        about: dict[str, Any] = {"setting": setting, "base": base, "budget": budget, "nfe": nfe}
        rows.append({**about, "form": BASE, **errors(batch, solver, grid)})
        for form in (PAPER, WINDOW):
            fit = method_of(base, form).fit(fit_ode, fit_x, grid)
            rows.append({**about, "form": form, **errors(batch, fit)})
    return rows


def errors(batch: Unseen, solver: Solver | FittedSolver, grid: Tensor | None = None) -> Row:
    """The RMSE over all samples, and the geometric mean of the errors of single samples."""
    found = squares(batch, solver, grid)
    return {"rmse": float(found.mean().sqrt()), "typical": float(found.log().mean().mul(0.5).exp())}


def method_of(base: str, form: str) -> IIA:
    """The method of a form."""
    if form == WINDOW:
        return IIA(base, WINDOW, ridge="auto", guard=False)
    try:
        resolve_terms("paper", base)
    except InputError:
        return IIA(base, "biia-edm", guard=False)
    return IIA(base, guard=False)


def order_of(base: str) -> int:
    """The order of a base."""
    return int(get_solver(base).order)


def gain_ends(line: dict[int, Estimate]) -> str:
    """The smallest number of evaluations from which on a base has no clear gain of 5%."""
    gains = [n for n, r in line.items() if r.mean <= LEAST and r.below(1)]
    ends = [n for n in sorted(line) if n > max(gains, default=0)]
    return str(ends[0]) if ends else f"above {max(line)}"


def _first(ratios: dict[str, dict[int, Estimate]]) -> tuple[int, list[Estimate]]:
    """The smallest number of evaluations, and the ratios of all bases that can make it."""
    few = min(n for line in ratios.values() for n in line)
    return few, [line[few] for line in ratios.values() if few in line]


def _ends_in_words(ratios: dict[str, dict[int, Estimate]]) -> str:
    """Where the gain ends, with the names of bases."""
    ends = _ends(ratios)
    told = [f"{'at ' if e.isdigit() else ''}{e} ({', '.join(bases)})" for e, bases in ends.items()]
    return f"the gain ends {', '.join(told)}"


def _ends_counted(ratios: dict[str, dict[int, Estimate]]) -> str:
    """Where the gain ends, with numbers of bases."""
    return ", ".join(f"{'at ' if e.isdigit() else ''}{e} for {len(bases)}" for e, bases in _ends(ratios).items())


def _ends(ratios: dict[str, dict[int, Estimate]]) -> dict[str, list[str]]:
    """The bases by the end of their gain."""
    ends = {base: gain_ends(line) for base, line in ratios.items()}
    order = sorted(set(ends.values()), key=lambda e: (not e.isdigit(), int(e.split()[-1])))
    return {e: [b for b in ends if ends[b] == e] for e in order}


EXPERIMENT = Solvers()
