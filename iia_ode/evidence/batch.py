"""Gain of IIA against the number of samples of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, ClassVar

from ..grids import karras
from ..iia import IIA, preset
from ..teacher import Teacher
from .drawing import lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import drawn, endpoint, fitting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Batch"]

METHODS = {
    "iia-ddim": preset("iia-ddim"),
    "iia-edm": preset("iia-edm"),
    "window": IIA("ddim", "window", target="trajectory", ridge="auto", guard=False),
}
BATCHES = {"mixture64": (4, 8, 16, 32, 64, 128, 256, 512, 1024), "digits": (4, 16, 64, 256)}
BLOCKS = {"mixture64": {4: 8, 8: 6, 16: 4, 32: 4, 64: 3, 128: 2, 256: 2}, "digits": {4: 2, 16: 2}}
"""Number of fits to disjoint batches of a size; larger batches have one."""
CASES = (
    ("mixture64", 9, ("iia-ddim", "iia-edm", "window")),
    ("digits", 5, ("iia-ddim", "iia-edm")),
)
SAMPLES = {"mixture64": 256, "digits": 32}
STEPS = {"mixture64": 200, "digits": 40}
LEAST = 1.02
"""More samples help while the error is clearly above this multiple of the error of the largest batch."""


class Batch(Experiment):
    """Errors of fits to 4 up to 1024 samples on unseen noise."""

    name = "batch"
    title = "Gain against the batch size of the fit"
    question = "From how many samples on do more samples of the fit not lower the error on unseen noise?"
    keys = ("setting", "method", "nfe", "batch")
    values = ("rmse",)
    seeds = (0, 1, 2)
    again = (100, 101, 102)
    base_batch: ClassVar[int] = 0

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each model, method and number of evaluations."""
        if quick:
            return [Cell("mixture64, iia-ddim, 5", partial(measured, "mixture64", "iia-ddim", 5, (4, 16), 32))]
        return [
            Cell(f"{s}, {method}, {nfe}", partial(measured, s, method, nfe, BATCHES[s], SAMPLES[s]))
            for s, nfe, methods in CASES
            for method in methods
        ]

    def curves(self, found: Measurements) -> dict[tuple[str, str, int], Measurements]:
        """The rows of each case, by (model, method, evaluations)."""
        names = dict.fromkeys((str(r["setting"]), str(r["method"]), int(r["nfe"])) for r in found.rows)
        return {name: found.where(setting=name[0], method=name[1], nfe=name[2]) for name in names}

    def excess(self, curve: Measurements) -> dict[int, Estimate]:
        """The error relative to the largest batch, by batch size."""
        batches = [n for n in sorted(curve.distinct("batch")) if n]
        return {n: curve.ratio("rmse", {"batch": n}, {"batch": batches[-1]}) for n in batches}

    def gain(self, curve: Measurements, batch: int) -> Estimate:
        """The error relative to the base."""
        return curve.ratio("rmse", {"batch": batch}, {"batch": self.base_batch})

    def enough(self, curve: Measurements) -> int:
        """The smallest batch from which on more samples do not clearly help by more than 2%."""
        excess = self.excess(curve)
        short = [n for n, e in excess.items() if e.mean > LEAST and e.above(1)]
        return min(n for n in excess if n > max(short, default=0))

    def answer(self, found: Measurements) -> str:
        """Enough samples, and the error of the smallest batch."""
        sentences = []
        for (setting, method, nfe), curve in self.curves(found).items():
            excess, enough = self.excess(curve), self.enough(curve)
            least, most = min(excess), max(excess)
            sentences.append(
                f"{method} on {setting} at {nfe} evaluations: more than {enough} samples do not clearly help by over "
                f"{LEAST - 1:.0%}; {least} samples leave {self.gain(curve, least)} of the base's error, {most} samples "
                f"{self.gain(curve, most)}."
            )
        return " ".join(sentences)

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The open question on the batch size."""
        curves = self.curves(found)
        enough = {name: self.enough(curve) for name, curve in curves.items()}
        few = [self.excess(curve)[min(self.excess(curve))] for curve in curves.values()]
        told = "; ".join(f"{m} on {s} at {n}: {k}" for (s, m, n), k in enough.items())
        return [
            Claim(
                "Open question: how many samples does a fit need?",
                f"samples after which more give less than {LEAST - 1:.0%} or nothing clear: {told}; the smallest batch has "
                f"between {min(few, key=lambda e: e.mean)} and {max(few, key=lambda e: e.mean)} of the error of the largest",
                f"{min(enough.values())} to {max(enough.values())} samples",
            )
        ]

    def tables(self, found: Measurements) -> Sequence[Part]:
        """A table for each model and number of evaluations."""
        tables = []
        for (setting, method, nfe), curve in self.curves(found).items():
            excess = self.excess(curve)
            lines = [
                [n, curve.estimate("rmse", batch=n), self.gain(curve, n), e, curve.estimate("spread", batch=n)]
                for n, e in excess.items()
            ]
            base = curve.estimate("rmse", batch=self.base_batch)
            caption = (
                f"{method} on {setting}, {nfe} evaluations: RMSE per component on unseen noise (base {base}), relative to the "
                "base, relative to the largest batch, and the relative standard deviation over fits of one seed to disjoint "
                "batches."
            )
            head = ["samples", "RMSE", "of base", "of largest batch", "spread of fits"]
            tables.append(Part(caption, markdown(head, lines)))
        return tables

    def figure(self, found: Measurements) -> Figure:
        """Error relative to the largest batch, and relative to the base."""
        settings = found.distinct("setting")
        figure, axes = panels(len(settings), 2, width=4.2)
        for row, setting in zip(axes, settings, strict=True):
            lines = {f"{m}, {n} evaluations": c for (s, m, n), c in self.curves(found).items() if s == setting}
            for ax, under, label in (
                (row[0], 0, "error relative to the base"),
                (row[1], -1, "relative to the largest batch"),
            ):
                drawn_lines = {name: _relative(curve, under) for name, curve in lines.items()}
                lines_with_bands(ax, drawn_lines, "batch", "ratio", logarithmic="x")
                ax.axhline(1, color="#999999", linewidth=0.8)
                ax.set(title=setting, xlabel="samples of the fit", ylabel=label)
                ax.tick_params(axis="x", labelsize="small")
        return figure

    @property
    def method(self) -> str:
        """Methods and numbers of samples."""
        sizes = ", ".join(f"{n} on {s}" for s, n in SAMPLES.items())
        blocks = "; ".join(
            f"{s}: {', '.join(f'{k} of {n} samples' for n, k in by_batch.items())}" for s, by_batch in BLOCKS.items()
        )
        return (
            "`iia-ddim` and `iia-edm` have the paper's terms, target and settings, without a guard. `window` is "
            '`IIA("ddim", "window", target="trajectory", ridge="auto")` without a guard. Grids have Karras levels from '
            f"80 to 0.002. Unseen samples: {sizes}. Small batches are fitted several times per seed, to disjoint batches "
            f"({blocks}), and the error is the root mean square over these fits. A batch is enough if no batch of its size or "
            f"above has an error clearly above the error of the largest batch and above {LEAST} of it."
        )


def measured(
    setting: str, method: str, nfe: int, batches: Sequence[int], samples: int, seed: int, folder: Path
) -> list[Row]:
    """Errors of fits to batches of several sizes on unseen noise."""
    blocks = {n: BLOCKS[setting].get(n, 1) for n in batches}
    known = METHODS[method]
    unseen = drawn(setting, samples, seed, unseen=True, steps=STEPS[setting])
    ode, x = fitting(setting, max(n * k for n, k in blocks.items()), seed)
    place, base = unseen.setting, known.base_solver
    levels = partial(karras, sigma_min=place.sigma_min, sigma_max=place.sigma_max, schedule=place.schedule)
    grid = base.grid_for(nfe, levels, place.schedule)
    teacher = None
    if known.target == "trajectory":
        end, steps = place.schedule.t_data, STEPS[setting]
        teacher = Teacher.solve(ode, x, unseen.start, end, steps=steps, sigma_min=place.sigma_min)
    about: Row = {"setting": setting, "method": method, "nfe": nfe}
    rows: list[Row] = [{**about, "batch": Batch.base_batch, "rmse": endpoint(unseen, base, grid)}]
    for n, k in blocks.items():
        errors = []
        for i in range(k):
            own = slice(i * n, (i + 1) * n)
            taught = None if teacher is None else teacher.subset(own)
            fit = known.fit(ode.subset(own, len(x)), x[own], grid, teacher=taught)
            errors.append(endpoint(unseen, fit))
        row: Row = {**about, "batch": n, "rmse": fmean(e * e for e in errors) ** 0.5}
        rows.append({**row, "spread": pstdev(errors) / fmean(errors)} if k > 1 else row)
    return rows


def _relative(curve: Measurements, under: int) -> Measurements:
    """Errors of each seed relative to one batch size: 0 for the base, -1 for the largest."""
    batches = sorted(curve.distinct("batch"))
    bottom = curve.by_seed("rmse", batch=batches[under])
    return Measurements({**r, "ratio": float(r["rmse"]) / bottom[r["seed"]]} for r in curve.rows if r["batch"])


EXPERIMENT = Batch()
