"""Gain of IIA as a function of the schedule (alpha, sigma), with the same data and the same noise on each schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..experiments import Setting
from ..grids import karras, log_snr, uniform
from ..iia import preset
from ..integrate import sample
from ..metrics import rmse
from ..ode import ProbabilityFlowODE
from ..schedules import EDM, VE, VP, Cosine, FlowMatching, Schedule
from ..solvers import get_solver
from .drawing import lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import Unseen, drawn, fitting
from .wording import ends, judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Schedules"]

SCHEDULES: dict[str, Schedule] = {
    "EDM": EDM(),
    "VE": VE(),
    "VP": VP(),
    "cosine": Cosine(),
    "flow": FlowMatching(),
}
METHODS = {"ddim": "iia-ddim", "dpmpp_2m": "iia-dpmpp_2m", "heun": "iia-edm", "dpmpp_2s": ""}
"""Bases and their fitted forms; the last base only shows the invariance of another exponential method."""
COUNTS = (5, 9, 15)
SAMPLES, FIT_SAMPLES, STEPS = 384, 96, 200
SAME, USUAL = "same levels", "usual grid"
EXACT = 1e-6
"""A change of the final states of this size, relative to the error of the base, counts as rounding."""


class Schedules(Experiment):
    """The base and its fitted form on five schedules, on the same levels and on the usual grid of each schedule."""

    name = "schedules"
    title = "Gain on each noise schedule"
    question = "How does the gain depend on (alpha, sigma): on EDM's schedule, VE, VP, cosine and flow matching?"
    keys = ("grid", "schedule", "method", "nfe")
    values = ("rmse",)
    seeds = (0, 1, 2)
    again = (100, 101, 102)
    pairs: ClassVar[dict[str, str]] = {fit: base for base, fit in METHODS.items() if fit}

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each schedule."""
        if quick:
            return [Cell(s, partial(measured, s, (5,), 48, 32)) for s in ("EDM", "flow")]
        return [Cell(s, partial(measured, s, COUNTS, SAMPLES, FIT_SAMPLES)) for s in SCHEDULES]

    def gain(self, found: Measurements, grid: str, schedule: str, fit: str, nfe: int) -> Estimate:
        """The error of a fit relative to its base."""
        own = found.where(grid=grid, schedule=schedule, nfe=nfe)
        return own.ratio("rmse", {"method": fit}, {"method": self.pairs[fit]})

    def invariant(self, found: Measurements) -> dict[str, float]:
        """The largest difference of final states from those on EDM's schedule, relative to the error, by base."""
        part = found.where(grid=SAME)
        return {m: max(float(r["moved"]) for r in part.where(method=m).rows) for m in METHODS if part.where(method=m)}

    def answer(self, found: Measurements) -> str:
        """The number of clear gains on each grid, and the range of gains over schedules on the same levels."""
        counted = [f"{_clear(self.cases(found, grid))} on the {grid}" for grid in found.distinct("grid")]
        told, nfe = [], self._middle(found)
        for fit in self.pairs:
            gains = {self.gain(found, SAME, s, fit, nfe): s for s in found.where(grid=SAME).distinct("schedule")}
            told.append(f"{' to '.join(f'{g} ({gains[g]})' for g in ends(list(gains)))} for {fit}")
        return (
            f"The fit is clearly better than its base in {' and in '.join(counted)}; on the same levels with {nfe} "
            f"evaluations its error over that of the base is {', '.join(told)}."
        )

    def notes(self, found: Measurements) -> Sequence[str]:
        """Invariance, and the errors of the bases behind the ratios."""
        moved = self.invariant(found)
        exact = [m for m, d in moved.items() if d < EXACT]
        other = [m for m, d in moved.items() if d >= EXACT]
        sentences = []
        if exact:
            sentences.append(
                f"On the same levels the final states of {', '.join(exact)} do not depend on (alpha, sigma), to "
                f"{max(moved[m] for m in exact):.0e} of the error."
            )
        if other:
            sentences.append(f"The final states of {', '.join(other)}, a method in the time t, do.")
        return [*sentences, *(self._range(found, fit) for fit in self.pairs)]

    @staticmethod
    def _middle(found: Measurements) -> int:
        """The middle number of evaluations."""
        counts: list[int] = sorted(found.distinct("nfe"))
        return counts[len(counts) // 2]

    def cases(self, found: Measurements, grid: str) -> list[Estimate]:
        """The gains on a grid, over schedules, fits and numbers of evaluations."""
        names, counts = found.distinct("schedule"), found.distinct("nfe")
        return [self.gain(found, grid, s, fit, n) for fit in self.pairs for s in names for n in counts]

    def _range(self, found: Measurements, fit: str) -> str:
        """The gains of a fit at the middle number of evaluations, on the same levels."""
        nfe, base = self._middle(found), self.pairs[fit]
        own = found.where(grid=SAME, method=base, nfe=nfe)
        gains = {s: self.gain(found, SAME, s, fit, nfe) for s in own.distinct("schedule")}
        told = " to ".join(
            f"{gains[s]} ({s}, {base} {own.estimate('rmse', schedule=s)})"
            for s in (min(gains, key=lambda s: gains[s].mean), max(gains, key=lambda s: gains[s].mean))
        )
        return f"{fit} at {nfe} evaluations on the same levels has from {told} of the error of {base}."

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The open question on other schedules."""
        cases = [gain for grid in found.distinct("grid") for gain in self.cases(found, grid)]
        few = min(found.distinct("nfe"))
        flow = [f"{fit} {self.gain(found, SAME, 'flow', fit, few)}" for fit in self.pairs]
        clear, lost = judged(cases)
        return [
            Claim(
                "Open question: does IIA help on other schedules (alpha, sigma)?",
                f"flow at {few}: {', '.join(flow)} of the base's error; {lost} of {len(cases)} cases clearly higher",
                "confirmed" if clear == len(cases) else f"clear in {_clear(cases)}",
            )
        ]

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Errors and gains for each grid and method, and the invariance."""
        tables = []
        counts = sorted(found.distinct("nfe"))
        for grid in found.distinct("grid"):
            for fit, base in self.pairs.items():
                lines = []
                for s in found.where(grid=grid).distinct("schedule"):
                    errors = [found.estimate("rmse", grid=grid, schedule=s, method=base, nfe=n) for n in counts]
                    lines.append([s, *errors, *(self.gain(found, grid, s, fit, n) for n in counts)])
                head = ["schedule", *(f"{base}, {n}" for n in counts), *(f"ratio, {n}" for n in counts)]
                caption = f"{grid}: RMSE of {base} by evaluations, and the error of {fit} relative to {base}."
                tables.append(Part(caption, markdown(head, lines)))
        lines = [[m, f"{d:.1e}"] for m, d in self.invariant(found).items()]
        caption = "Same levels: largest RMS difference of final states from EDM's schedule, relative to the error."
        tables.append(Part(caption, markdown(["base", "difference"], lines)))
        return tables

    def figure(self, found: Measurements) -> Figure:
        """The gain by evaluations, a line for each schedule."""
        grids = found.distinct("grid")
        figure, axes = panels(len(grids), len(self.pairs), width=3.6, height=2.9)
        counts = sorted(found.distinct("nfe"))
        for row, grid in zip(axes, grids, strict=True):
            for ax, (fit, base) in zip(row, self.pairs.items(), strict=True):
                lines = {}
                for s in found.where(grid=grid).distinct("schedule"):
                    own = found.where(grid=grid, schedule=s)
                    under = {n: own.by_seed("rmse", method=base, nfe=n) for n in counts}
                    rows = own.where(method=fit).rows
                    lines[s] = Measurements(
                        {**r, "ratio": float(r["rmse"]) / under[int(r["nfe"])][r["seed"]]} for r in rows
                    )
                lines_with_bands(ax, lines, "nfe", "ratio", logarithmic="xy" if _wide(lines) else "x")
                ax.axhline(1, color="#999999", linewidth=0.8)
                ax.set(title=f"{fit}, {grid}", xlabel="model evaluations (NFE)", ylabel=f"error relative to {base}")
                if ax is not axes[0][0] and (legend := ax.get_legend()) is not None:
                    legend.remove()
        return figure

    @property
    def method(self) -> str:
        """Data, noise and grids."""
        return (
            "The data are mixture64's, with the closed-form denoiser of each schedule. The initial states are the same noise "
            "at sigma/alpha = 80, scaled by alpha, so the exact final states are the same on all schedules. *Same levels* has "
            "Karras levels of sigma/alpha from 80 to 0.002 on each schedule. *Usual grid* has Karras levels on EDM, geometric "
            "levels on VE, and equal steps in t from sigma/alpha = 80 to the data on VP, cosine and flow matching. `iia-edm` "
            "is fitted to Heun's method in the time of the schedule, in the library's form on slopes. The targets are the "
            "paper's: three sub-steps, equal in the time of the schedule. So the target of a fit depends on the schedule even "
            f"where the base does not. Fits see {FIT_SAMPLES} samples, without a guard; unseen samples: {SAMPLES}."
        )


def _clear(gains: Sequence[Estimate]) -> str:
    """The number of clear gains among all."""
    return f"{sum(g.below(1) for g in gains)} of {len(gains)} cases"


def _wide(lines: Mapping[str, Measurements]) -> bool:
    """Whether ratios of lines reach below a tenth."""
    return any(float(r["ratio"]) < 0.1 for found in lines.values() for r in found.rows)


def usual(name: str, setting: Setting) -> Callable[[int], Tensor]:
    """The usual family of grids of a schedule, from the first level of a setting."""
    schedule = SCHEDULES[name]
    ends: dict[str, Any] = {"sigma_min": setting.sigma_min, "sigma_max": setting.sigma_max, "schedule": schedule}
    if name in ("EDM", "VE"):
        return partial(karras if name == "EDM" else log_snr, **ends)
    start = schedule.t_of_noise_to_signal(setting.sigma_max)
    return partial(uniform, t_start=start, t_end=schedule.t_data)


def on_schedule(setting: Setting, schedule: Schedule, x: Tensor) -> tuple[ProbabilityFlowODE, Tensor]:
    """The data of a setting under another schedule, and the states at the same level of noise."""
    start = schedule.t_of_noise_to_signal(setting.sigma_max)
    return setting.problem.ode(schedule), schedule.alpha(start) * x  # type: ignore[attr-defined]


def measured(name: str, counts: Sequence[int], samples: int, fit_samples: int, seed: int, folder: Path) -> list[Row]:
    """Errors of bases and fits on a schedule."""
    unseen = drawn("mixture64", samples, seed, unseen=True, steps=STEPS)
    fit_x = fitting("mixture64", fit_samples, seed)[1]
    setting, schedule, rows = unseen.setting, SCHEDULES[name], list[Row]()
    ode, x = on_schedule(setting, schedule, unseen.x)
    fit_ode, fit_x = on_schedule(setting, schedule, fit_x)
    same = partial(karras, sigma_min=setting.sigma_min, sigma_max=setting.sigma_max, schedule=schedule)
    for grid_name, family in ((SAME, same), (USUAL, usual(name, setting))):
        for base, fit in METHODS.items():
            for nfe in counts:
                solver = get_solver(base)
                about: Row = {"grid": grid_name, "schedule": name, "nfe": nfe}
                grid = solver.grid_for(nfe, family, schedule)
                final = sample(ode, x, grid, solver)
                row: Row = {**about, "method": base, "rmse": rmse(final, unseen.final)}
                if grid_name == SAME:
                    row["moved"] = _moved(unseen, base, nfe, final)
                rows.append(row)
                if fit:
                    fitted = preset(fit).fit(fit_ode, fit_x, grid)
                    error = rmse(sample(ode, x, solver=fitted), unseen.final)
                    rows.append({**about, "method": fit, "rmse": error})
    return rows


def _moved(unseen: Unseen, base: str, nfe: int, final: Tensor) -> float:
    """RMS difference of final states from those on EDM's schedule, relative to the error of the latter."""
    setting, solver = unseen.setting, get_solver(base)
    family = partial(karras, sigma_min=setting.sigma_min, sigma_max=setting.sigma_max, schedule=setting.schedule)
    other = sample(unseen.ode, unseen.x, solver.grid_for(nfe, family, setting.schedule), solver)
    return rmse(final, other) / rmse(other, unseen.final)


EXPERIMENT = Schedules()
