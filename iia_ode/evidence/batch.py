"""Gain of IIA against the number of samples of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..grids import karras
from ..iia import IIA, preset
from ..teacher import Teacher
from .drawing import lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import drawn, fitting, squares

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
TYPICAL = ("mixture64",)
"""Models with the error of a typical sample: few samples end in another component and dominate the RMSE."""
LEAST = 1.05
"""A batch is enough up to this multiple of the error of the largest batch."""


class Batch(Experiment):
    """Errors of fits to 4 up to 1024 samples on unseen noise."""

    name = "batch"
    title = "Gain against the batch size of the fit"
    question = "From how many samples on do more samples of the fit not lower the error on unseen noise?"
    keys = ("setting", "method", "nfe", "batch")
    values = ("rmse", "typical")
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

    def measure(self, curve: Measurements) -> str:
        """The error that decides: of a typical sample where measured, else the RMSE."""
        return "typical" if any("typical" in row for row in curve.rows) else "rmse"

    def excess(self, curve: Measurements, value: str = "rmse") -> dict[int, Estimate]:
        """The error relative to the largest batch, by batch size."""
        batches = [n for n in sorted(curve.distinct("batch")) if n]
        return {n: curve.ratio(value, {"batch": n}, {"batch": batches[-1]}) for n in batches}

    def gain(self, curve: Measurements, batch: int, value: str = "rmse") -> Estimate:
        """The error relative to the base."""
        return curve.ratio(value, {"batch": batch}, {"batch": self.base_batch})

    def enough(self, curve: Measurements) -> int:
        """The smallest batch from which on the mean RMSE is within 5% of the RMSE of the largest batch."""
        excess = self.excess(curve)
        short = [n for n, e in excess.items() if not e.mean < LEAST]
        return min((n for n in excess if n > max(short, default=0)), default=max(excess))

    def answer(self, found: Measurements) -> str:
        """Enough samples, and the excess of the smallest batch."""
        told = []
        for (setting, method, _), curve in self.curves(found).items():
            few, excess = next(iter(self.excess(curve).items()))
            told.append(f"{self.enough(curve)} for {method} on {setting} ({excess})")
        return (
            f"The RMSE is within {LEAST - 1:.0%} of the RMSE of the largest batch from this number of samples on (in "
            f"brackets, the RMSE of {few} samples over that of the largest batch): {', '.join(told)}."
        )

    def notes(self, found: Measurements) -> Sequence[str]:
        """Each case, relative to the base, and for a typical sample."""
        return [self._told(*name, curve) for name, curve in self.curves(found).items()]

    def _told(self, setting: str, method: str, nfe: int, curve: Measurements) -> str:
        """A sentence on a case."""
        batches = list(self.excess(curve))
        few, most = batches[0], batches[-1]
        text = (
            f"{method} on {setting} at {nfe} evaluations: from {self.enough(curve)} samples on the RMSE is within "
            f"{LEAST - 1:.0%} of the RMSE with {most}; {few} samples have {self.excess(curve)[few]} of it, and "
            f"{self.gain(curve, few)} of the base's error, {most} samples {self.gain(curve, most)}."
        )
        if self.measure(curve) == "typical":
            typical = self.excess(curve, "typical")[few]
            side = "clearly lower" if typical.below(1) else "clearly higher" if typical.above(1) else "not resolved"
            text += f" The error of a typical sample with {few} samples is {typical} of the error with {most} ({side})."
        return text

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The open question on the batch size, for each case."""
        claims = []
        for (setting, method, nfe), curve in self.curves(found).items():
            (few, excess), *_, (most, _) = self.excess(curve).items()
            text = (
                f"Open question: from how many samples on is {method} on {setting} within {LEAST - 1:.0%} of the RMSE of the "
                "largest batch?"
            )
            measured = f"with {few} samples {excess} times the RMSE with {most}, at {nfe} evaluations"
            claims.append(Claim(text, measured, f"from {self.enough(curve)} samples on"))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """A table for each model and number of evaluations."""
        tables = []
        for (setting, method, nfe), curve in self.curves(found).items():
            value = self.measure(curve)
            lines = [
                [
                    n,
                    curve.estimate("rmse", batch=n),
                    self.gain(curve, n),
                    e,
                    *([self.gain(curve, n, value), self.excess(curve, value)[n]] if value != "rmse" else []),
                    curve.estimate("spread", batch=n),
                ]
                for n, e in self.excess(curve).items()
            ]
            base = curve.estimate("rmse", batch=self.base_batch)
            caption = (
                f"{method} on {setting}, {nfe} evaluations: RMSE per component on unseen noise (base {base}), relative to the "
                "base, relative to the largest batch"
                + (", the last two for a typical sample" if value != "rmse" else "")
                + ", and the relative standard deviation of the RMSE over fits of one seed to disjoint batches."
            )
            typical = ["typical, of base", "typical, of largest"] if value != "rmse" else []
            head = ["samples", "RMSE", "of base", "of largest batch", *typical, "spread of fits"]
            tables.append(Part(caption, markdown(head, lines)))
        return tables

    def figure(self, found: Measurements) -> Figure:
        """Errors relative to the base: RMSE, and of a typical sample."""
        settings = found.distinct("setting")
        figure, axes = panels(len(settings), 2, width=4.2)
        for row, setting in zip(axes, settings, strict=True):
            lines = {f"{m}, {n} evaluations": c for (s, m, n), c in self.curves(found).items() if s == setting}
            both = self.measure(found.where(setting=setting)) == "typical"
            for ax, error, label in ((row[0], "rmse", "RMSE"), (row[1], "typical", "typical sample")):
                if error == "typical" and not both:
                    ax.set_axis_off()
                    continue
                lines_with_bands(
                    ax, {k: _relative(c, error) for k, c in lines.items()}, "batch", "ratio", logarithmic="x"
                )
                ax.axhline(1, color="#999999", linewidth=0.8)
                ax.set(title=f"{setting}, {label}", xlabel="samples of the fit", ylabel="error relative to the base")
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
            f"({blocks}), and the error is the root mean square over these fits. The error of a typical sample is the "
            "geometric mean of the RMS errors of single samples; on mixture64 few samples end in another component and "
            "make up the RMSE. A fit to many samples serves these few by the mean square, at the cost of the others. A batch "
            f"is enough if its mean RMSE and those of all larger batches are below {LEAST} of the largest batch's."
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
        end = place.schedule.t_data
        teacher = Teacher.solve(ode, x, unseen.start, end, steps=60, sigma_min=place.sigma_min)
    about: Row = {"setting": setting, "method": method, "nfe": nfe}
    rows: list[Row] = [{**about, "batch": Batch.base_batch, **_errors([squares(unseen, base, grid)], setting)}]
    for n, k in blocks.items():
        found = []
        for i in range(k):
            own = slice(i * n, (i + 1) * n)
            taught = None if teacher is None else teacher.subset(own)
            fit = known.fit(ode.subset(own, len(x)), x[own], grid, teacher=taught)
            found.append(squares(unseen, fit))
        row: Row = {**about, "batch": n, **_errors(found, setting)}
        errors = [float(e.mean().sqrt()) for e in found]
        rows.append({**row, "spread": pstdev(errors) / fmean(errors)} if k > 1 else row)
    return rows


def _errors(found: Sequence[Tensor], setting: str) -> Row:
    """The RMSE over samples and fits; on the mixture also the geometric mean of the errors of single samples."""
    together = torch.cat(list(found))
    rmse = float(together.mean().sqrt())
    return (
        {"rmse": rmse, "typical": float(together.log().mean().mul(0.5).exp())} if setting in TYPICAL else {"rmse": rmse}
    )


def _relative(curve: Measurements, value: str) -> Measurements:
    """Errors of each seed relative to the base."""
    bottom = curve.by_seed(value, batch=Batch.base_batch)
    return Measurements({**r, "ratio": float(r[value]) / bottom[r["seed"]]} for r in curve.rows if r["batch"])


EXPERIMENT = Batch()
