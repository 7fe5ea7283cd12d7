"""Table 1 of the paper: the number of sub-steps M and the history r of BIIA-EDM and IIA-EDM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .. import grids
from ..iia import preset
from ..integrate import sample
from ..metrics import rmse
from ..ode import cached
from .drawing import lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import fitting, frechet, has_frechet, unseen
from .wording import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Table1"]

BASE = "heun"
SOLVERS = ("biia-edm", "iia-edm")
PAPER = {"substeps": 3, "history": 1}
HISTORIES = (0, 1, 2, 3)
SUBSTEPS = {"digits": (2, 3, 8), "mixture64": (2, 3, 5, 8)}
NFES = (7, 11)
SAMPLES = {"digits": (64, 32), "mixture64": (256, 128)}
"""Numbers of unseen samples and of samples of a fit."""
WHAT = {"rmse": "endpoint error", "frechet": "Frechet distance"}


@dataclass(frozen=True)
class _Case:
    """The settings (M, r) beside the paper's, for a denoiser, a solver, a number of evaluations and a value.

    Attributes
    ----------
    place : the columns of the case.
    value : the measured column.
    ratios : value of each other pair (M, r) over the value of the paper's pair.
    """

    place: dict[str, object]
    value: str
    ratios: dict[tuple[int, int], Estimate]

    @property
    def best(self) -> tuple[tuple[int, int], Estimate]:
        """The pair with the lowest mean ratio, of those better by the 95% interval if there are any."""
        return min(self.ratios.items(), key=lambda pair: (not pair[1].below(1), pair[1].mean))

    @property
    def better(self) -> list[tuple[int, int]]:
        """Pairs that are better than the paper's by the 95% interval."""
        return [pair for pair, ratio in self.ratios.items() if ratio.below(1)]


class Table1(Experiment):
    """BIIA-EDM and IIA-EDM with each pair (M, r), on digits and on a mixture of Gaussians."""

    name = "table1"
    title = "Table 1: sub-steps M and history r"
    question = "Is the paper's choice (M, r) = (3, 1) the best for BIIA-EDM and IIA-EDM (table 1 of the paper)?"
    keys = ("setting", "solver", "nfe", "substeps", "history")
    values = ("rmse", "frechet")
    seeds = (0, 1, 2)
    again = (100, 101, 102)

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each denoiser and number of evaluations."""
        if quick:
            return [Cell("mixture64, 7", partial(_measured, "mixture64", 7, (2, 3), (16, 16)))]
        return [
            Cell(f"{s}, {nfe}", partial(_measured, s, nfe, SUBSTEPS[s], SAMPLES[s])) for s in SUBSTEPS for nfe in NFES
        ]

    def answer(self, found: Measurements) -> str:
        """In how many cases another pair is better, and by how much at most."""
        by_value = {what: cases for value, what in WHAT.items() if (cases := _cases(found, value))}
        counts = [f"{sum(bool(c.better) for c in cs)} of {len(cs)} cases of {what}" for what, cs in by_value.items()]
        top = min((case for cases in by_value.values() for case in cases), key=_rank)
        return (
            f"Another pair (M, r) is better than (3, 1) by the 95% interval in {' and '.join(counts)}. {_largest(top)}"
        )

    def notes(self, found: Measurements) -> Sequence[str]:
        """For each value, cases and pairs that are better, and the largest gain."""
        sentences = []
        for value, what in WHAT.items():
            if not (cases := _cases(found, value)):
                continue
            beaten = [case for case in cases if case.better]
            total = sum(len(case.ratios) for case in cases)
            top = min(cases, key=_rank)
            sentence = (
                f"In {what}, another pair (M, r) is better than (3, 1) by the 95% interval in {len(beaten)} of {len(cases)} "
                f"cases ({_by_nfe(cases)}; {sum(len(c.better) for c in cases)} of {total} pairs)"
            )
            sentences.append(f"{sentence}. {_largest(top)}")
        return sentences

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The paper's choice, a claim for each solver."""
        claims = []
        for solver in SOLVERS:
            cases = [c for value in WHAT for c in _cases(found, value) if c.place["solver"] == solver]
            if not cases:
                continue
            beaten = sum(bool(case.better) for case in cases)
            top, seeds = min(cases, key=_rank), len(found.distinct("seed"))
            verdict = "refuted" if 2 * beaten > len(cases) else "not in all cases"
            if not beaten:
                verdict = "confirmed within the error bars" if seeds > 1 else "not resolved"
            measured = f"a better pair in {beaten} of {len(cases)} cases; {_gain(top)}"
            claims.append(Claim(f"(M, r) = (3, 1) is the best choice for {solver} (table 1)", measured, verdict))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """A table of M against r for each case."""
        parts = []
        for place in _places(found):
            part = found.where(**place)
            substeps, histories = sorted(part.distinct("substeps")), sorted(part.distinct("history"))
            for value, what in (("rmse", "RMSE of the final state per component"), ("frechet", "Frechet distance")):
                if not any(value in row for row in part.rows):
                    continue
                base = found.estimate(value, **place | {"solver": BASE})
                lines = [[r, *(part.estimate(value, history=r, substeps=m) for m in substeps)] for r in histories]
                caption = (
                    f"{place['setting']}, {place['solver']}, {place['nfe']} evaluations: {what}, a line for each r. "
                    f"{BASE}, which is M = 1, has {base}."
                )
                parts.append(Part(caption, markdown(["r", *(f"M = {m}" for m in substeps)], lines)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """Endpoint errors against M, a line for each r, a row for each solver."""
        columns = list(dict.fromkeys((p["setting"], p["nfe"]) for p in _places(found)))
        solvers = [s for s in SOLVERS if s in found.distinct("solver")]
        figure, axes = panels(len(solvers), len(columns))
        for row, solver in enumerate(solvers):
            for column, (setting, nfe) in enumerate(columns):
                part, ax = found.where(setting=setting, nfe=nfe), axes[row][column]
                own = part.where(solver=solver)
                lines_with_bands(
                    ax, {f"r = {r}": own.where(history=r) for r in sorted(own.distinct("history"))}, "substeps", "rmse"
                )
                ax.axhline(part.estimate("rmse", solver=BASE).mean, color="#999999", linestyle=":", label=BASE)
                ax.legend(fontsize="x-small", ncols=2)
                ax.set(title=f"{setting}, {solver}, {nfe} evaluations", xlabel="sub-steps M", ylabel="endpoint RMSE")
                ax.title.set_fontsize("medium")
        return figure

    @property
    def method(self) -> str:
        """Denoisers and numbers of samples."""
        sizes = ", ".join(f"{n} of {s} with fits to {m} others" for s, (n, m) in SAMPLES.items())
        return (
            f"Unseen samples per seed: {sizes}. All fits of a seed see the same noise, so pairs (M, r) are compared by "
            "ratios within a seed. With M = 1 the target is the step of the base, and the fit is the base. A history r "
            "needs r earlier steps, so with 7 evaluations (three fitted steps) r ends at 2. Of 100 pairs that are as good as "
            "(3, 1), two or three pass as better by chance. The Frechet distance is on the features of the packaged "
            "classifier, from the training images; at so few images its value is biased upwards, equally for all methods."
        )


def _measured(
    setting: str, nfe: int, substeps: Sequence[int], sizes: tuple[int, int], seed: int, folder: Path
) -> list[Row]:
    """All pairs for both solvers; equal evaluations of different pairs are made once."""
    del folder
    samples, fit_samples = sizes
    batch = unseen(setting, samples, seed, steps=90)
    ode, (fit_ode, fit_x) = cached(batch.ode), fitting(setting, fit_samples, seed)
    fit_ode, grid = cached(fit_ode), preset(SOLVERS[0]).base_solver.grid_for(nfe, grids.karras, ode.schedule)
    pairs = [(m, r) for m in substeps for r in HISTORIES if r < len(grid) - 2]
    finals: list[tuple[Row, Tensor]] = [({"solver": BASE}, sample(ode, batch.x, grid, BASE))]
    for solver in SOLVERS:
        for m, r in pairs:
            fit = preset(solver, substeps=m, history=r).fit(fit_ode, fit_x, grid)
            finals.append(({"solver": solver, "substeps": m, "history": r}, sample(ode, batch.x, solver=fit)))
    rows: list[Row] = []
    for named, final in finals:
        row: Row = {"setting": setting, "nfe": nfe, **named, "rmse": rmse(final, batch.final)}
        rows.append(row | ({"frechet": frechet(setting, final)} if has_frechet(setting) else {}))
    return rows


def _places(found: Measurements) -> list[dict[str, object]]:
    """Denoiser, solver and number of evaluations of each table."""
    rows = found.where(**PAPER).rows
    triples = dict.fromkeys((r["setting"], r["solver"], r["nfe"]) for r in rows)
    return [{"setting": s, "solver": solver, "nfe": nfe} for s, solver, nfe in triples]


def _cases(found: Measurements, value: str) -> list[_Case]:
    """The cases of a value."""
    cases = []
    for place in _places(found):
        pairs = dict.fromkeys((int(r["substeps"]), int(r["history"])) for r in found.where(**place).rows if value in r)
        ratios = {
            (m, r): found.ratio(value, over={"substeps": m, "history": r}, under=PAPER, **place)
            for m, r in pairs
            if {"substeps": m, "history": r} != PAPER
        }
        if ratios:
            cases.append(_Case(place, value, ratios))
    return cases


def _by_nfe(cases: Sequence[_Case]) -> str:
    """Cases with a better pair, by number of evaluations: ``"4 of 4 with 7 evaluations, 1 of 4 with 11"``."""
    parts: list[str] = []
    for nfe in dict.fromkeys(case.place["nfe"] for case in cases):
        own = [case for case in cases if case.place["nfe"] == nfe]
        unit = "" if parts else " evaluations"
        parts.append(f"{sum(bool(case.better) for case in own)} of {len(own)} with {nfe}{unit}")
    return ", ".join(parts)


def _rank(case: _Case) -> tuple[bool, float]:
    """Order of cases: clear gains first, then by the gain."""
    _, ratio = case.best
    return not ratio.below(1), ratio.mean


def _largest(case: _Case) -> str:
    """The largest gain of another pair, in words."""
    (m, r), ratio = case.best
    if ratio.mean >= 1:
        return "No other pair has a lower mean."
    doubt = "" if ratio.below(1) else ", not resolved"
    place = f"{case.place['solver']} on {case.place['setting']} with {case.place['nfe']} evaluations"
    what = WHAT[case.value]
    return f"The largest gain over (3, 1) is by ({m}, {r}) for {place}: the {what} is {percent(ratio)}{doubt}."


def _gain(case: _Case) -> str:
    """The largest gain of another pair, for the overview."""
    (m, r), ratio = case.best
    if ratio.mean >= 1:
        return "no other pair has a lower mean"
    place = f"{case.place['setting']} at {case.place['nfe']}"
    return f"largest gain by ({m}, {r}) on {place}: {WHAT[case.value]} {percent(ratio)}"


EXPERIMENT = Table1()
