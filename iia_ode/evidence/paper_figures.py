"""What figures 2, 3 and 4 of the paper have in common: methods and their IIA forms against evaluations, on three denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..iia import IIA
from ..solvers import Solver
from .drawing import lines_with_bands, panels
from .experiment import Cell, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import compared, frechet, has_frechet, unseen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PaperFigure"]

SAMPLES = {"digits": 192, "fashion": 128, "patches": 48}
FIT_SAMPLES = 96
CONVERGED = "converged"


class PaperFigure(Experiment):
    """Endpoint error and Frechet distance of methods on the packaged denoisers.

    Attributes
    ----------
    solvers : the methods by name: registered solvers and presets, each base before its fitted forms.
    pairs : pairs (better, worse) that the paper's figure shows, in this order.
    nfes : numbers of evaluations.
    bound : the paper's ordering is judged below this number of evaluations.
    """

    keys = ("setting", "solver", "nfe")
    values = ("rmse", "frechet")
    seeds = (0, 1, 2)
    again = (100, 101, 102)
    solvers: ClassVar[dict[str, str | Solver | IIA]]
    pairs: ClassVar[tuple[tuple[str, str], ...]]
    nfes: ClassVar[dict[str, tuple[int, ...]]]
    bound: ClassVar[int] = 25

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each denoiser."""
        if quick:
            return [Cell("digits", partial(self._measured, "digits", (self.nfes["digits"][0],), 16, 16))]
        return [Cell(s, partial(self._measured, s, nfes, SAMPLES[s], FIT_SAMPLES)) for s, nfes in self.nfes.items()]

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
        """(denoiser, evaluations, better, worse, ratio) of each pair of the paper, below the bound."""
        return [
            (setting, nfe, better, worse, ratio)
            for setting in found.distinct("setting")
            for better, worse in self.pairs
            for nfe in sorted(n for n in found.where(setting=setting).distinct("nfe") if 0 < n < self.bound)
            if (
                ratio := found.ratio(value, over={"solver": better}, under={"solver": worse}, setting=setting, nfe=nfe)
            ).seeds
        ]
