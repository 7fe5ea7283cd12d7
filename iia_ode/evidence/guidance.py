"""Classifier-free guidance: IIA over DPM-Solver++(2M), and fits at one guidance scale used at others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import grids
from ..autofit import fit as find
from ..iia import FittedSolver, preset
from ..integrate import sample
from ..metrics import rmse
from .drawing import COLORS, lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import fitting, unseen
from .transfer import moved_error, survival
from .wording import ends, judged, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Guidance"]

BASE = "dpmpp_2m"
PRESET = "iia-dpmpp_2m"
FOUND = "iia.fit"
STEPS = 40
"""Steps of accurate solutions: a guided evaluation costs two passes of the network."""


@dataclass(frozen=True)
class _Size:
    """A part of the experiment: a denoiser, a number of evaluations, methods with their fitted scales, the scales of use."""

    setting: str
    nfe: int
    methods: dict[str, tuple[float, ...]]
    used: tuple[float, ...]
    samples: int
    fit_samples: int


SIDES = {"at": "at the scale of the fit", "above": "above it", "below": "below it"}
SCALES = (1.0, 2.0, 4.0)
SIZES = (
    _Size("digits", 5, {PRESET: SCALES, FOUND: (1.0, 4.0)}, SCALES, 24, 16),
    _Size("digits", 8, {PRESET: SCALES}, SCALES, 24, 16),
    _Size("fashion", 5, {PRESET: (1.0, 4.0)}, (1.0, 4.0), 12, 12),
)
QUICK = (_Size("digits", 4, {PRESET: (1.0, 2.0)}, (1.0, 2.0), 4, 4),)


class Guidance(Experiment):
    """IIA-DPM-Solver at guidance scales, and the matrix of fitted and used scales."""

    name = "guidance"
    title = "Classifier-free guidance"
    question = (
        "Is IIA over DPM-Solver++(2M) better than its base under classifier-free guidance (the ICLR version of the paper), "
        "and does a fit at one guidance scale serve other scales?"
    )
    keys = ("setting", "solver", "nfe", "fitted", "used")
    values = ("rmse",)
    seeds = (0, 1)
    again = (100, 101)
    fits_of = "03617d6"

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each denoiser and number of evaluations."""
        return [Cell(f"{s.setting}, {s.nfe}", partial(_measured, s)) for s in (QUICK if quick else SIZES)]

    def answer(self, found: Measurements) -> str:
        """For each method the mean error at, above and below the scale of the fit."""
        sentences = []
        for method in _methods(found):
            told = []
            for side, where in SIDES.items():
                ratios = _on(found, method, side)
                if not ratios:
                    continue
                mean, (better, worse) = found.pooled(partial(_on, method=method, side=side)), judged(ratios)
                told.append(f"{mean} {where} (clearly lower in {better} of {len(ratios)} cases, higher in {worse})")
            sentences.append(f"The error of {method} over that of {BASE} is in the geometric mean {', '.join(told)}.")
        return " ".join(sentences)

    def notes(self, found: Measurements) -> Sequence[str]:
        """Gains at the own scale, and what remains at others."""
        return [*(_own_gain(found, method) for method in _methods(found)), *_served(found)]

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """IIA-DPM-Solver, and the open question of other scales."""
        claims = []
        ratios = _on(found, PRESET, "at")
        if ratios:
            better, worse = judged(ratios)
            low, high = ends(ratios)
            verdict = "confirmed" if better == len(ratios) else "refuted" if worse > better else "not in all cases"
            verdict = verdict if better or worse else "not resolved"
            text = "IIA improves DPM-Solver++(2M) under classifier-free guidance (ICLR version)"
            measured = (
                f"error from {percent(low)} to {percent(high)}; clearly lower in {better} of {len(ratios)} cases, higher in "
                f"{worse}"
            )
            claims.append(Claim(text, measured, verdict))
        for method in _methods(found):
            by_side = {side: ratios for side in ("above", "below") if (ratios := _on(found, method, side))}
            moved = [r for ratios in by_side.values() for r in ratios]
            if moved:
                better, worse = judged(moved)
                told = [f"from {' to '.join(map(percent, ends(rs)))} {side}" for side, rs in by_side.items()]
                text = f"Does a fit of {method} at one guidance scale serve others (open question)?"
                verdict = f"{better} of {len(moved)} better, {worse} worse"
                claims.append(Claim(text, f"error {', '.join(told)} its scale", verdict))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Errors, and the matrices of error ratios."""
        parts = []
        for setting, nfe in _cases(found):
            part = found.where(setting=setting, nfe=nfe)
            scales = sorted(part.distinct("used"))
            head = [f"used at {s:g}" for s in scales]
            lines = [[BASE, *(part.estimate("rmse", solver=BASE, used=s) for s in scales)]]
            for method in _methods(part):
                lines.append([method, *(part.estimate("rmse", solver=method, used=s, fitted=s) for s in scales)])
            caption = f"{setting}, {nfe} evaluations: RMSE of the final state per component, each fit at its own scale."
            parts.append(Part(caption, markdown(["solver", *head], lines)))
            for method in _methods(part):
                fitted = sorted(part.where(solver=method).distinct("fitted"))
                matrix = [[f"{f:g}", *(_ratio(part, method, f, s) for s in scales)] for f in fitted]
                caption = (
                    f"{setting}, {nfe} evaluations, {method}: error of a fit at one scale (lines), used at another "
                    f"(columns), over the error of {BASE} at the scale of use. Below 1 the fit is better."
                )
                parts.append(Part(caption, markdown(["fitted at", *head], matrix)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """For each method and number of evaluations, error ratios against the scale of use, a line for each fitted scale."""
        places = [
            (setting, nfe, method)
            for setting, nfe in _cases(found)
            for method in _methods(found.where(setting=setting, nfe=nfe))
        ]
        figure, axes = panels(1, len(places))
        for ax, (setting, nfe, method) in zip(axes[0], places, strict=True):
            part = found.where(setting=setting, nfe=nfe, solver=(method, BASE))
            lines = {
                f"fitted at {f:g}": _relative(part, method, f)
                for f in sorted(part.where(solver=method).distinct("fitted"))
            }
            lines_with_bands(ax, lines, "used", "ratio")
            ax.axhline(1.0, color=COLORS[-1], linewidth=0.8)
            ax.set(xlabel="guidance scale of use", ylabel=f"error over {BASE}")
            ax.set_title(f"{setting}, {nfe} evaluations,\n{method}", fontsize="medium")
        return figure

    @property
    def method(self) -> str:
        """Denoisers, scales and numbers of samples."""
        sizes = "; ".join(
            f"{s.setting} with {s.nfe} evaluations: {s.samples} unseen samples, fits to {s.fit_samples} others"
            for s in SIZES
        )
        return (
            f"Per seed: {sizes}. Classes are drawn at random. {PRESET} has the paper's (M, r) = (3, 1); {FOUND} has the "
            "budget closed-form with scalar weights. An accurate solution at each scale is the reference of the scale, "
            f"from the same noise ({STEPS} steps). The base and the preset use the Karras grid. A guided evaluation is two "
            "passes of the network, for all methods."
        )


def _measured(size: _Size, seed: int, folder: Path) -> list[Row]:
    """All pairs of fitted and used scales."""
    del folder
    rows: list[Row] = []
    batches = {s: unseen(size.setting, size.samples, seed, guidance_scale=s, steps=STEPS) for s in size.used}
    named: Row = {"setting": size.setting, "nfe": size.nfe}
    for used, batch in batches.items():
        final = sample(batch.ode, batch.x, grids.karras(size.nfe), BASE)
        rows.append(named | {"solver": BASE, "used": used, "rmse": rmse(final, batch.final)})
    for method, scales in size.methods.items():
        for fitted in scales:
            fit = _fit(size, method, fitted, seed)
            for used, batch in batches.items():
                own: Row = {"solver": method, "fitted": fitted, "used": used, "rmse": moved_error(batch, fit)}
                rows.append(named | own)
    return rows


def _fit(size: _Size, method: str, scale: float, seed: int) -> FittedSolver:
    """A fit at a guidance scale."""
    ode, x = fitting(size.setting, size.fit_samples, seed, guidance_scale=scale)
    if method == PRESET:
        return preset(PRESET).fit(ode, x, grids.karras(size.nfe))
    return find(ode, size.nfe, x=x, budget="closed-form", weights="scalars", sigma_max=80.0, sigma_min=0.002, seed=seed)


# ---- the account -----------------------------------------------------------------------------------------------------


def _cases(found: Measurements) -> list[tuple[str, int]]:
    return list(dict.fromkeys((str(r["setting"]), int(r["nfe"])) for r in found.rows))


def _methods(found: Measurements) -> list[str]:
    return [m for m in found.distinct("solver") if m != BASE]


def _ratio(part: Measurements, method: str, fitted: float, used: float) -> Estimate:
    """The error of a fit over the error of the base at the scale of use."""
    return part.ratio("rmse", over={"solver": method, "fitted": fitted}, under={"solver": BASE}, used=used)


def _relative(part: Measurements, method: str, fitted: float) -> Measurements:
    """Rows with ratios of errors, by scale of use."""
    base = {(r["seed"], r["used"]): float(r["rmse"]) for r in part.where(solver=BASE).rows}
    rows = part.where(solver=method, fitted=fitted).rows
    return Measurements(r | {"ratio": float(r["rmse"]) / base[r["seed"], r["used"]]} for r in rows)


def _pairs(found: Measurements, method: str) -> list[tuple[Measurements, float, float]]:
    """Measurements of a denoiser and a number of evaluations, with each pair of scales (fitted, used)."""
    pairs = []
    for setting, nfe in _cases(found):
        part = found.where(setting=setting, nfe=nfe)
        own = part.where(solver=method)
        pairs += [(part, fitted, used) for fitted in own.distinct("fitted") for used in own.distinct("used")]
    return pairs


def _side(fitted: float, used: float) -> str:
    """A key of SIDES."""
    return "at" if used == fitted else "above" if used > fitted else "below"


def _on(found: Measurements, method: str, side: str) -> list[Estimate]:
    """Ratios at, above or below the scale of the fit."""
    return [_ratio(part, method, f, u) for part, f, u in _pairs(found, method) if _side(f, u) == side]


def _own_gain(found: Measurements, method: str) -> str:
    """A sentence on the gain at the own scale."""
    ratios = _on(found, method, "at")
    (better, worse), (low, high) = judged(ratios), ends(ratios)
    return (
        f"At the scale of the fit, {method} is better than {BASE} by the 95% interval in {better} of {len(ratios)} cases and "
        f"worse in {worse}; its error is from {percent(low)} to {percent(high)}."
    )


def _served(found: Measurements) -> list[str]:
    """Sentences on other scales: above and below the scale of the fit, for each method."""
    sentences = []
    for method in _methods(found):
        for side in ("above", "below"):
            pairs = [p for p in _pairs(found, method) if _side(*p[1:]) == side]
            if not pairs:
                continue
            ratios = [_ratio(part, method, fitted, used) for part, fitted, used in pairs]
            (better, worse), (low, high) = judged(ratios), ends(ratios)
            sentences.append(
                f"Used {side} the scale of the fit, {method} is better than {BASE} in {better} of {len(ratios)} cases and "
                f"worse in {worse}; its error is from {percent(low)} to {percent(high)}{_kept(pairs, method)}."
            )
    return sentences


def _kept(pairs: Sequence[tuple[Measurements, float, float]], method: str) -> str:
    """The surviving shares, where a fit at the scale of use is better than the base by the 95% interval."""
    shares = []
    for part, fitted, used in pairs:
        own = {"solver": method, "fitted": used}
        if _ratio(part, method, used, used).below(1):
            share = survival(part, {"solver": method, "fitted": fitted}, own, {"solver": BASE}, used=used)
            shares += [(share.mean, fitted, used)] if share.seeds else []
    if not shares:
        return ""
    told = [f"{share:.0%} (from {f:g} to {u:g})" for share, f, u in dict.fromkeys((min(shares), max(shares)))]
    return f", and of the gain of a fit at the scale of use {' to '.join(told)} survives"


EXPERIMENT = Guidance()
