"""Gaussian data with image-like spectra: the error of a solver and of its fits for each eigenvalue, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..grids import karras
from ..iia import IIA, preset
from ..plan import Plan
from ..plan.analysis import gaussian_response
from ..problems import Gaussian
from ..schedules import EDM
from ..solvers import get_solver
from ..teacher import Teacher
from .drawing import COLORS, lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import one_thread
from .wording import ends, judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Spectrum", "eigenvalues"]

POWERS = {"flat": 0.0, "1/k": 1.0, "1/k^2": 2.0}
DIMENSIONS = (10, 100, 1000, 10_000, 100_000)
NFES = (5, 9)
BASES = {"iia-ddim": "ddim", "iia-edm": "heun", "window": "ddim"}
SAMPLES = 16
STD, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
PLACES = 13
_F64 = torch.float64


def eigenvalues(power: float, dimension: int) -> Tensor:
    """Eigenvalues k^-power of a covariance, k = 1, ..., d, with the mean 0.25 (EDM's standard deviation of data is 0.5).

    Parameters
    ----------
    power : the exponent.
    dimension : d.

    Returns
    -------
    Falling eigenvalues, float64 [d].
    """
    own = torch.arange(1, dimension + 1, dtype=_F64, device="cpu") ** -power
    return own * (STD**2 / own.mean())


class Spectrum(Experiment):
    """Where the gain of a fit comes from: errors per eigenvalue on Gaussian data of up to 100,000 dimensions."""

    name = "spectrum"
    title = "Gaussian data with image-like spectra"
    question = (
        "On Gaussian data with eigenvalues as in images, from which eigenvalues does the gain of IIA come, how does the gain "
        "depend on dimension and spectrum, and do fits give up small eigenvalues for large ones?"
    )
    keys = ("spectrum", "dimension", "nfe", "solver", "index")
    values = ("error", "large", "small", "worse", "relative")
    seeds = (0, 1, 2)
    again = (100, 101, 102)

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each spectrum and dimension."""
        dimensions, powers = ((10, 100), ("1/k",)) if quick else (DIMENSIONS, tuple(POWERS))
        return [Cell(f"{s}, {d}", partial(_measured, s, d)) for s in powers for d in dimensions]

    # ---- the page ----------------------------------------------------------------------------------------------------

    def _ratios(self, found: Measurements, value: str, solver: str, **columns: object) -> list[Estimate]:
        """Error of a fit over the error of its base, for each spectrum other than the flat one, dimension and count."""
        part = found.where(solver=(solver, BASES[solver]), **columns)
        return [
            part.ratio(value, {"solver": solver}, {"solver": BASES[solver]}, spectrum=s, dimension=d, nfe=n)
            for s, d, n in _cases(part)
        ]

    def _sides(self, found: Measurements, solver: str) -> tuple[int, int, int]:
        """Number of cases in which both groups gain, in which the small eigenvalues lose, and in which the large ones lose."""
        large, small = (self._ratios(found, v, solver) for v in ("large", "small"))
        pairs = list(zip(large, small, strict=True))
        both = sum(a.below(1) and b.below(1) for a, b in pairs)
        return both, sum(a.below(1) and b.above(1) for a, b in pairs), sum(a.above(1) and b.below(1) for a, b in pairs)

    def answer(self, found: Measurements) -> str:
        """The range of gains, the cases in which one group of eigenvalues loses, and the dependence on the dimension."""
        gains = [f"{_range(self._ratios(found, 'error', solver))} for {solver}" for solver in BASES]
        shares = [self._share(found, solver) for solver in BASES]
        cases = len(self._ratios(found, "error", next(iter(BASES))))
        _, small, large = zip(*(self._sides(found, solver) for solver in BASES), strict=True)
        few, many = (", ".join(map(str, lost)) for lost in (small, large))
        return (
            f"On falling spectra the error over that of the base is {', '.join(gains)}, and the large eigenvalues make up "
            f"{', '.join(shares)} of the fall of the squared error. Of {cases} cases each, small eigenvalues lose in "
            f"{few} and large ones in {many}; {self._dimension(found)}."
        )

    def notes(self, found: Measurements) -> Sequence[str]:
        """The counts of cases for each fit."""
        notes = ["Large eigenvalues are those with half of the variance, small ones the last half of the indices."]
        for solver, base in BASES.items():
            total, (both, small, large) = self._ratios(found, "error", solver), self._sides(found, solver)
            better, worse = judged(total)
            notes.append(
                f"{solver} over {base}: error lower in {better} of {len(total)} cases, higher in {worse}; both groups gain in "
                f"{both}, the small ones lose in {small}, the large ones lose in {large}."
            )
        return notes

    def _share(self, found: Measurements, solver: str) -> str:
        """The range of the part of large eigenvalues in the fall of the squared error, where the whole error falls."""
        shares = []
        for s, d, n in _cases(found.where(solver=solver)):
            v, falls = eigenvalues(POWERS[s], d), {}
            for value, variance in (("error", v.sum()), ("large", v[_large(v)].sum())):
                base, own = (
                    found.estimate(value, spectrum=s, dimension=d, nfe=n, solver=m).mean
                    for m in (BASES[solver], solver)
                )
                falls[value] = float(variance) * (base**2 - own**2)
            if falls["error"] > 0:
                shares.append(falls["large"] / falls["error"])
        return f"{100 * min(shares):.0f}% to {100 * max(shares):.0f}%"

    def _dimension(self, found: Measurements) -> str:
        """How the gain changes from the smallest to the largest dimension."""
        low, high = min(found.distinct("dimension")), max(found.distinct("dimension"))
        changes = []
        for s in [s for s in found.distinct("spectrum") if s != "flat"]:
            ratios = partial(self._ratios, value="error", solver="window", spectrum=s)
            pooled = [found.pooled(partial(ratios, dimension=d)) for d in (low, high)]
            changes.append(f"from {_short(pooled[0])} to {_short(pooled[1])} on {s}")
        return f"from {low} to {high} dimensions the ratio of window, a geometric mean, goes {' and '.join(changes)}"

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """Whether a fit trades one group of eigenvalues for the other, for each method."""
        claims = []
        for solver in BASES:
            large, small = (self._ratios(found, v, solver) for v in ("large", "small"))
            _, lost, reverse = self._sides(found, solver)
            lose = f"losses: {reverse} large, {lost} small"
            measured = f"error over base {_range(large)} (large), {_range(small)} (small); {lose}"
            verdict = f"yes in {lost + reverse} of {len(large)} cases" if lost + reverse else "no"
            claims.append(Claim(f"Does {solver} trade small eigenvalues for large ones?", measured, verdict))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Errors of bases and ratios of fits, for each spectrum."""
        parts = []
        for spectrum in found.distinct("spectrum"):
            lines = []
            for _, d, n in _cases(found.where(spectrum=spectrum), flat=True):
                own = found.where(spectrum=spectrum, dimension=d, nfe=n)
                for solver, base in BASES.items():
                    ratios = [own.ratio(v, {"solver": solver}, {"solver": base}) for v in ("error", "large", "small")]
                    worse = own.estimate("worse", solver=solver)
                    lines.append(
                        [d, n, solver, own.estimate("error", solver=base), *map(_short, ratios), _short(worse)]
                    )
            head = ["dimension", "evaluations", "fit", "error of base", "fit / base", "large", "small", "worse"]
            caption = (
                f"Spectrum {spectrum}: relative error of the base, and errors of the fit over it: of all components, of the "
                "large eigenvalues (half of the variance), of the small ones (last half of the indices). Worse: share of the "
                "components in which the error of the fit is higher by 1% or more."
            )
            parts.append(Part(caption, markdown(head, lines, left=3)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """Above, errors per eigenvalue at the largest dimension; below, fit over base against the dimension."""
        spectra = [s for s in found.distinct("spectrum") if s != "flat"]
        nfe, top = min(found.distinct("nfe")), max(found.distinct("dimension"))
        figure, axes = panels(2, len(spectra), width=4.6, height=3.4)
        for column, spectrum in enumerate(spectra):
            part, ax = found.where(spectrum=spectrum, nfe=nfe, dimension=top), axes[0][column]
            names = part.distinct("solver")
            lines_with_bands(
                ax,
                {s: Measurements(r for r in part.where(solver=s).rows if "index" in r) for s in names},
                "eigenvalue",
                "relative",
                solid=[s for s in names if s in BASES],
            )
            ax.set(title=f"{spectrum}, {top} dimensions, {nfe} evaluations", xlabel="eigenvalue")
            ax.set(ylabel="error / standard deviation", ylim=(ax.get_ylim()[0] / 50, None))
            ax.legend(fontsize="x-small", ncols=3, loc="lower left")
            ax = axes[1][column]
            for k, solver in enumerate(BASES):
                for value, style in (("large", "-"), ("small", ":")):
                    own = found.where(spectrum=spectrum, nfe=nfe)
                    places = sorted(own.distinct("dimension"))
                    over, under = {"solver": solver}, {"solver": BASES[solver]}
                    points = [own.ratio(value, over, under, dimension=d) for d in places]
                    spread = [p.error if p.seeds > 1 else 0.0 for p in points]
                    options: dict[str, Any] = {
                        "color": COLORS[k],
                        "linestyle": style,
                        "marker": "o",
                        "markersize": 3,
                        "capsize": 2,
                    }
                    ax.errorbar(places, [p.mean for p in points], yerr=spread, label=f"{solver}, {value}", **options)
            ax.axhline(1, color="#999999", linewidth=0.8)
            ax.set(xscale="log", yscale="log", xlabel="dimension", ylabel="error of fit / error of base")
            ax.grid(alpha=0.3)
            ax.set_ylim(ax.get_ylim()[0] / 50, None)
            ax.legend(fontsize="x-small", ncols=2, loc="lower right")
        return figure

    @property
    def method(self) -> str:
        """Data, fits and the exact errors."""
        return (
            "Data N(0, diag v) with eigenvalues v proportional to k^0, k^-1 and k^-2 in the index k, of mean 0.25. A power "
            "f^-2 of spatial frequency in two dimensions is k^-1 in the index. Eigenvectors do not matter: the denoiser is "
            "elementwise in their basis, and all solvers are linear with one weight for all components. Karras grids from 80 "
            f"to 0.002. Fits see {SAMPLES} samples, without a guard: the presets iia-ddim and iia-edm, and window, "
            '`IIA("ddim", terms="window", target="trajectory")`. The errors are no estimates: the final state of a plan is a '
            "gain per component times the initial state, and the error per component follows from the exact flow. Only the "
            "noise of the fits varies between seeds. Errors are root mean squares over a group of components, relative to the "
            "standard deviation of the group."
        )


def _measured(spectrum: str, dimension: int, seed: int, folder: Path) -> list[Row]:
    """The rows of a spectrum and a dimension."""
    one_thread()
    v = eigenvalues(POWERS[spectrum], dimension)
    problem, schedule = Gaussian(torch.zeros_like(v), v), EDM()
    x = problem.noisy(SAMPLES, schedule, SIGMA_MAX, torch.Generator("cpu").manual_seed(seed))
    ode, knots = problem.ode(schedule), 24 if dimension > 1000 else None
    teacher = Teacher.solve(ode, x, SIGMA_MAX, 0.0, steps=60, sigma_min=SIGMA_MIN, knots=knots)
    rows: list[Row] = []
    for nfe in NFES:
        errors: dict[str, Tensor] = {}
        for base in dict.fromkeys(BASES.values()):
            solver = get_solver(base)
            grid = solver.grid_for(nfe, lambda n: karras(n, SIGMA_MIN, SIGMA_MAX), schedule)
            errors[base] = _errors(solver.plan(schedule, grid), v)
            for fit in [f for f, b in BASES.items() if b == base]:
                if fit == "window":
                    method = IIA(base, terms="window", target="trajectory", guard=False)
                    plan = method.fit(ode, x, grid, teacher=teacher).plan
                else:
                    plan = preset(fit, guard=False).fit(ode, x, grid).plan
                errors[fit] = _errors(plan, v)
        for solver_name, own in errors.items():
            about: Row = {"spectrum": spectrum, "dimension": dimension, "nfe": nfe, "solver": solver_name}
            rows += _rows(about, own, errors.get(BASES.get(solver_name, "")), v)
    return rows


def _errors(plan: Plan, v: Tensor) -> Tensor:
    """Root mean square error of each component of the final state, exactly, [d]."""
    found = gaussian_response(plan, torch.zeros_like(v), v)
    return (found.gain - found.exact_gain).abs() * found.initial_std


def _rows(about: Row, errors: Tensor, base: Tensor | None, v: Tensor) -> list[Row]:
    """The errors of groups of components, and of single ones."""
    large = _large(v)
    small = torch.arange(len(v), device="cpu") >= len(v) // 2
    groups = {"error": torch.ones_like(large), "large": large, "small": small}
    whole: Row = {n: float((errors[g].square().sum() / v[g].sum()).sqrt()) for n, g in groups.items()}
    if base is not None:
        whole["worse"] = float((errors > 1.01 * base).double().mean())
    steps = torch.linspace(0, 1, PLACES, dtype=_F64, device="cpu")
    places = sorted({round(len(v) ** s) for s in steps.tolist()}) if bool(v[0] > v[-1]) else [1]
    singles: list[Row] = [
        {"index": k, "eigenvalue": float(v[k - 1]), "relative": float(errors[k - 1] / v[k - 1].sqrt())} for k in places
    ]
    return [about | row for row in (whole, *singles)]


def _large(v: Tensor) -> Tensor:
    """The fewest components with half of the variance, as a mask."""
    return (v.cumsum(0) - v) < 0.5 * v.sum()


def _cases(found: Measurements, *, flat: bool = False) -> list[tuple[str, int, int]]:
    """Spectra, dimensions and numbers of evaluations."""
    rows = (r for r in found.rows if flat or r["spectrum"] != "flat")
    return list(dict.fromkeys((str(r["spectrum"]), int(r["dimension"]), int(r["nfe"])) for r in rows))


def _range(ratios: Sequence[Estimate]) -> str:
    """The lowest and the highest ratio."""
    return " to ".join(map(_short, ends(ratios)))


def _short(value: Estimate) -> str:
    if not 0 < value.mean < 1e-3:
        return str(value)
    return f"{value.mean:.1e}" + (f" ± {value.error:.0e}" if value.error > 0 else "")


EXPERIMENT = Spectrum()
