"""What figures 2, 3 and 4 of the paper have in common: methods and their IIA forms against evaluations, on three denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..iia import IIA
from ..solvers import Solver
from .drawing import lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import compared, frechet, has_frechet, unseen
from .wording import judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PaperFigure"]

SAMPLES = {"digits": 128, "fashion": 96, "patches": 32}
FIT_SAMPLES = {"digits": 64, "fashion": 32, "patches": 32}
CONVERGED = "converged"
WHAT = {"frechet": "Frechet distance", "rmse": "endpoint error"}
BOUND = 25
"""The paper's orderings are judged below this number of evaluations, as in the paper."""
FLOOR = 1.15
"""Distances up to this multiple of the distance of converged samples count as no room for a difference."""


class PaperFigure(Experiment):
    """Endpoint error and Frechet distance of methods on the packaged denoisers.

    Parameters
    ----------
    name, title, question : see :class:`Experiment`.
    solvers : the methods by name: registered solvers and presets, each base before its fitted forms.
    pairs : pairs (better, worse) that the paper's figure shows; the answer tells the first two.
    nfes : numbers of evaluations for each denoiser.
    claim : the paper's claim, with its place.
    """

    keys: tuple[str, ...] = ("setting", "solver", "nfe")
    values: tuple[str, ...] = ("rmse", "frechet")
    again = (100, 101)

    def __init__(
        self,
        name: str,
        title: str,
        question: str,
        solvers: Mapping[str, str | Solver | IIA],
        pairs: Sequence[tuple[str, str]],
        nfes: Mapping[str, tuple[int, ...]],
        claim: str,
    ) -> None:
        self.name, self.title, self.question = name, title, question
        self.solvers, self.pairs, self.nfes, self.claim = dict(solvers), tuple(pairs), dict(nfes), claim

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each denoiser."""
        if quick:
            return [Cell("digits", partial(self._measured, "digits", (self.nfes["digits"][0],), 16, 16))]
        return [Cell(s, partial(self._measured, s, nfes, SAMPLES[s], FIT_SAMPLES[s])) for s, nfes in self.nfes.items()]

    def _measured(
        self, setting: str, nfes: tuple[int, ...], samples: int, fit_samples: int, seed: int, folder: Path
    ) -> list[Row]:
        batch = unseen(setting, samples, seed)
        found = compared(batch, self.solvers, nfes, fit_samples, seed, folder)
        rows: list[Row] = [
            {"setting": setting, "solver": row.solver, "nfe": row.nfe, "rmse": row.rmse} for row in found.rows
        ]
        if not has_frechet(setting):
            return rows
        for row in rows:
            row["frechet"] = frechet(setting, found.samples[str(row["solver"]), int(row["nfe"])])
        return [*rows, {"setting": setting, "solver": CONVERGED, "nfe": 0, "frechet": frechet(setting, batch.final)}]

    def tables(self, found: Measurements) -> Sequence[Part]:
        """A table of errors and a table of distances for each denoiser."""
        parts = []
        for setting in found.distinct("setting"):
            part = found.where(setting=setting)
            nfes = sorted(n for n in part.distinct("nfe") if n)
            for value, what in (("rmse", "RMSE of the final state per component"), ("frechet", "Frechet distance")):
                names = [s for s in part.distinct("solver") if s != CONVERGED]
                if not any(value in row for row in part.rows):
                    continue
                lines = [[s, *(part.estimate(value, solver=s, nfe=n) for n in nfes)] for s in names]
                floor = part.estimate(value, solver=CONVERGED)
                note = f"; converged samples from the same noise have {floor}" if floor.seeds else ""
                parts.append(Part(f"{setting}: {what}{note}.", markdown(["solver", *map(str, nfes)], lines)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """Errors above, distances below, a column for each denoiser."""
        settings = found.distinct("setting")
        figure, axes = panels(2, len(settings))
        for column, setting in enumerate(settings):
            for row, (value, label) in enumerate((("rmse", "endpoint RMSE"), ("frechet", "Frechet distance"))):
                part, ax = found.where(setting=setting), axes[row][column]
                if not any(value in r for r in part.rows):
                    ax.set_axis_off()
                    continue
                names = [s for s in part.distinct("solver") if s != CONVERGED]
                lines = {s: part.where(solver=s) for s in names}
                lines_with_bands(ax, lines, "nfe", value, solid=[s for s in names if "iia" in s])
                if value == "frechet":
                    ax.axhline(part.estimate(value, solver=CONVERGED).mean, color="#999999", linewidth=0.8)
                ax.set(title=setting if not row else "", xlabel="model evaluations (NFE)", ylabel=label)
        return figure

    def ratios(self, found: Measurements, value: str) -> list[tuple[str, int, str, str, Estimate]]:
        """(denoiser, evaluations, better, worse, ratio) of each pair of the paper, at fewer than 25 evaluations."""
        return [
            (setting, nfe, better, worse, ratio)
            for setting in found.distinct("setting")
            for better, worse in self.pairs
            for nfe in sorted(n for n in found.where(setting=setting).distinct("nfe") if 0 < n < BOUND)
            if (
                ratio := found.ratio(value, over={"solver": better}, under={"solver": worse}, setting=setting, nfe=nfe)
            ).seeds
        ]

    def answer(self, found: Measurements) -> str:
        """Mean ratios, and in how many cases each ordering of the paper holds."""
        told = []
        for better, worse in self.pairs[:2]:
            parts = []
            for value, what in WHAT.items():
                ratios = self._of(found, value, better, worse)
                below, above = judged(ratios)
                lost = f", higher in {above}" if above else ""
                if ratios:
                    count = f"clearly lower in {below} of {len(ratios)} cases{lost}"
                    parts.append(f"{self._mean(found, value, better, worse)} times the {what} ({count})")
            told.append(f"{better} has {' and '.join(parts)} of {worse}")
        return f"Below {BOUND} evaluations, {'; '.join(told)}."

    def notes(self, found: Measurements) -> Sequence[str]:
        """The counts for further pairs, and what the endpoint error says of the undecided cases."""
        sentences = []
        for value, what in WHAT.items():
            said = []
            for better, worse in self.pairs[2:]:
                ratios = self._of(found, value, better, worse)
                below, above = judged(ratios)
                lost = f" and loses in {above}" if above else ""
                if ratios:
                    said.append(f"{better} clearly beats {worse} in {below} of {len(ratios)} cases{lost}")
            if said:
                sentences.append(f"In {what} below {BOUND} evaluations, {'; '.join(said)}.")
        undecided = [r for r in self.ratios(found, "frechet") if not r[-1].below(1) and not r[-1].above(1)]
        if undecided:
            floors = sum(
                self._at_floor(found, setting, nfe, better, worse) for setting, nfe, better, worse, _ in undecided
            )
            decided = {r[:4] for r in self.ratios(found, "rmse") if r[-1].below(1)}
            lower = sum(r[:4] in decided for r in undecided)
            sentences.append(
                f"The intervals of {len(undecided)} Frechet distances decide nothing. In {floors} of them both distances are "
                f"within {FLOOR - 1:.0%} of the distance of converged samples, so the metric has no room. The endpoint error "
                f"is clearly lower in {lower} of these cases."
            )
        return sentences

    def _at_floor(self, found: Measurements, setting: str, nfe: int, *solvers: str) -> bool:
        """Whether the distances of all these solvers are close to the distance of converged samples."""
        part = found.where(setting=setting)
        floor = part.estimate("frechet", solver=CONVERGED).mean
        return all(part.estimate("frechet", solver=s, nfe=nfe).mean <= FLOOR * floor for s in solvers)

    def _of(self, found: Measurements, value: str, better: str, worse: str) -> list[Estimate]:
        """The ratios of a pair."""
        return [r[-1] for r in self.ratios(found, value) if r[2:4] == (better, worse)]

    def _mean(self, found: Measurements, value: str, better: str, worse: str) -> Estimate:
        """The geometric mean of the ratios of a pair."""
        return found.pooled(lambda own: self._of(own, value, better, worse))

    @property
    def method(self) -> str:
        """Denoisers and numbers of samples."""
        unseen, fitted = (", ".join(f"{n} of {s}" for s, n in of.items()) for of in (SAMPLES, FIT_SAMPLES))
        return (
            f"Unseen samples per seed: {unseen}. Fits see other samples, {fitted}, with the paper's settings "
            "(M, r) = (3, 1). The endpoint error is against converged solutions from the same noise. The Frechet distance is "
            "on the features of the packaged classifiers, from the training images. With so few images its value is biased "
            "upwards, for all methods alike: all methods start from the same noise. Orderings are judged by ratios within a "
            "seed: a method clearly beats another where the 95% interval over the seeds says so. Mean ratios are geometric "
            "means over denoisers and numbers of evaluations."
        )

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The ordering of the figure, in the Frechet distance."""
        ratios = [r[-1] for r in self.ratios(found, "frechet")]
        (below, above), cases = judged(ratios), len(ratios)
        part = f"clear in {below} of {cases} cases"
        verdict = "confirmed" if below == cases else "refuted" if above > below else part
        means = [f"{b} / {w} {self._mean(found, 'frechet', b, w)}" for b, w in self.pairs[:2]]
        measured = f"mean {', '.join(means)}; {below} of {cases} cases in the paper's order, {above} reversed"
        return [Claim(self.claim, measured, verdict)]
