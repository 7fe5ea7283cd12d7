"""Costs: sampling time of fitted solvers, cost of a fit, and the number of images after which a fit has paid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import grids
from ..autofit import fit as find
from ..iia import PRESETS, FittedSolver, preset
from ..integrate import sample
from ..metrics import rmse
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Plan, traced
from ..schedules import EDM
from ..solvers import get_solver
from .drawing import COLORS, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import Unseen, fitting, unseen
from .wording import ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Overhead"]

CLASSICS = ("ddim", "heun", "dpmpp_2m", "ipndm3")
METHODS = ("iia-ddim", "iia-edm", "iia-dpmpp_2m", "iia.fit, closed-form", "iia.fit, standard")
RIVALS = {"break_even_base": "its base", "break_even_classic": "the best classic solver"}
STEPS = 40
"""Steps of accurate solutions of digits."""


@dataclass(frozen=True)
class _Size:
    """Sizes on a setting: samples, and the numbers of evaluations of the classics, the presets and :func:`iia_ode.fit`."""

    samples: int
    fit_samples: int
    classics: tuple[int, ...]
    presets: tuple[int, ...]
    found: tuple[int, ...]


SIZES = {
    "digits": _Size(24, 16, (3, 5, 7, 9, 13, 19, 41), (5, 9), (5,)),
    "mixture64": _Size(128, 64, (3, 5, 7, 9, 13, 19, 27, 41, 61, 91, 135), (5, 9), (5, 9)),
}
QUICK = _Size(32, 16, (3, 5, 9, 19), (5,), ())


class Overhead(Experiment):
    """Errors and costs of fits beside errors of solvers without a fit, and times of sampling."""

    name = "overhead"
    title = "Costs of a fit"
    question = (
        "Is a fitted solver as fast as its base, what does a fit cost, and after how many images has the cost been saved at "
        "equal error?"
    )
    keys = ("setting", "solver", "nfe")
    values = (
        "rmse",
        "fit_cost",
        "equal_base",
        "equal_classic",
        "break_even_base",
        "break_even_classic",
    )
    seeds = (0, 1)
    again = (100, 101)
    fits_of = "03617d6"

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each denoiser."""
        if quick:
            return [Cell("mixture64", partial(_measured, "mixture64", QUICK))]
        return [Cell(setting, partial(_measured, setting, size)) for setting, size in SIZES.items()]

    def answer(self, found: Measurements) -> str:
        """Time of sampling, cost of a fit, images until it has paid."""
        return " ".join(_told(found, setting) for setting in found.distinct("setting"))

    def notes(self, found: Measurements) -> Sequence[str]:
        """Times of sampling, and images until each fit has paid."""
        return [_times(found), *(text for setting in found.distinct("setting") for text in _paid(found, setting))]

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The cost per image, and the one-time cost."""
        slow = [
            _time(found, s, m, n)
            for s, m, n in _fits(found)
            if "time" in found.where(setting=s, solver=m, nfe=n).rows[0]
        ]
        claims = []
        if slow:
            top = max(slow, key=lambda e: e.mean)
            small = all(e.below(1.05) for e in slow)
            verdict = "confirmed" if small else "refuted" if any(e.above(1.05) for e in slow) else "not resolved"
            text = "A fitted solver takes as long as its base: less than 5% more on a network (paper: negligible)"
            claims.append(
                Claim(text, f"at most {top} times the time of the base on {', '.join(_timed(found))}", verdict)
            )
        for setting in found.distinct("setting"):
            numbers = _break_evens(found, setting, "break_even_classic")
            count = len([1 for s, *_ in _fits(found) if s == setting])
            verdict = f"{len(numbers)} of {count} fits pay" if numbers else "no fit pays"
            text = (
                f"After how many images has a fit on {setting} paid, against the best classic solver (one-time cost)?"
            )
            first, last = numbers[:1], numbers[1:][-1:]
            told = [f"{e} ({method} with {n})" for method, n, e in (*first, *last)]
            claims.append(Claim(text, f"{' to '.join(told)} images" if told else "no measured number", verdict))
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Break-even, and times of sampling."""
        parts = []
        for setting in found.distinct("setting"):
            lines = []
            for _, method, nfe in (f for f in _fits(found) if f[0] == setting):
                part = found.where(setting=setting, solver=method, nfe=nfe)
                columns = ("rmse", "fit_cost", "fit_seconds")
                lines.append([method, nfe, *(part.estimate(c) for c in columns), *_four(part)])
            head = [
                "fit",
                "evaluations",
                "RMSE",
                "cost",
                "seconds",
                "base needs",
                "images",
                "best classic needs",
                "images ",
            ]
            caption = (
                f"{setting}: endpoint RMSE per component; cost of the fit in sample evaluations, and in seconds on a machine "
                "under load; number of evaluations at which the base and the best classic solver reach the error; number of "
                "images after which the fit has paid. A dash: not reached with "
                f"{max(found.where(setting=setting).distinct('nfe'))} evaluations, or no evaluation saved."
            )
            parts.append(Part(caption, markdown(head, lines, left=2)))
        lines = [
            [
                s,
                m,
                n,
                _terms(found, s, m, n),
                *(found.estimate(c, setting=s, solver=m, nfe=n) for c in ("idle", "time")),
            ]
            for s, m, n in _fits(found)
        ]
        caption = (
            "Sampling with a fit over sampling with its base (DDIM for iia.fit): ratio of the multiply-adds per component "
            "outside of the model, of the time with a model that does nothing, and of the time with digits."
        )
        head = ["fitted on", "fit", "evaluations", "multiply-adds", "time, no model", "time, digits"]
        return [*parts, Part(caption, markdown(head, lines, left=3))]

    def figure(self, found: Measurements) -> Figure:
        """Work against precision, with the fits as points; and the images until a fit has paid."""
        settings = found.distinct("setting")
        figure, axes = panels(1, len(settings), width=4.6, height=3.8)
        for ax, setting in zip(axes[0], settings, strict=True):
            part = found.where(setting=setting)
            for k, solver in enumerate(CLASSICS):
                places = sorted(part.where(solver=solver).distinct("nfe"))
                means = [part.estimate("rmse", solver=solver, nfe=n).mean for n in places]
                ax.plot(places, means, "--", color=COLORS[k], label=solver, linewidth=1.2)
            for k, method in enumerate(m for m in METHODS if part.where(solver=m)):
                places = sorted(part.where(solver=method).distinct("nfe"))
                points = [part.estimate("rmse", solver=method, nfe=n) for n in places]
                means, errors = [p.mean for p in points], [p.error for p in points]
                ax.errorbar(
                    places, means, yerr=errors, fmt="os^Dv"[k], color=COLORS[k], label=method, markersize=5, capsize=2
                )
            ax.set(xscale="log", yscale="log", title=setting, xlabel="model evaluations (NFE)", ylabel="endpoint RMSE")
            ticks = [n for n in (3, 5, 9, 19, 41, 91) if n <= max(part.distinct("nfe"))]
            ax.set_xticks(ticks, [str(n) for n in ticks])
            ax.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
            ax.grid(alpha=0.3)
            ax.legend(fontsize="x-small")
        return figure

    @property
    def method(self) -> str:
        """Sizes, and how break-even and times are found."""
        sizes = "; ".join(f"{s}: {size.samples} unseen, {size.fit_samples} of a fit" for s, size in SIZES.items())
        return (
            f"Samples per seed: {sizes}. The cost of a fit is nearly proportional to its number of samples. A backward pass "
            "counts as two evaluations. The number of evaluations at equal error comes from interpolation in log(error) "
            "against log(evaluations). The best classic solver is the best of "
            f"{', '.join(CLASSICS)} at each number of evaluations, on Karras grids. The number of images is the cost of the "
            "fit over the evaluations saved per image. Times of sampling are medians of processor times, of repeats in turn, "
            "in one process on one thread. Times depend on the machine and are no part of the comparison of two runs. The "
            "model that does nothing multiplies 16 states of 4,096 components by a number."
        )


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measured(setting: str, size: _Size, seed: int, folder: Path) -> list[Row]:
    """Classic solvers, then fits with their costs."""
    del folder
    batch = unseen(setting, size.samples, seed, steps=STEPS)
    curves: dict[str, dict[int, float]] = {solver: {} for solver in CLASSICS}
    for solver, curve in curves.items():
        for nfe in size.classics:
            curve[nfe] = rmse(sample(batch.ode, batch.x, _grid(solver, nfe), solver), batch.final)
    rows: list[Row] = [
        {"setting": setting, "solver": solver, "nfe": nfe, "rmse": error}
        for solver, curve in curves.items()
        for nfe, error in curve.items()
    ]
    best = {nfe: min(curve[nfe] for curve in curves.values()) for nfe in size.classics}
    for method in METHODS:
        for nfe in size.presets if method in PRESETS else size.found:
            row, fit = _fitted(batch, method, nfe, size.fit_samples, seed)
            base = "ddim" if method not in PRESETS else str(PRESETS[method].base)
            for name, curve in (("base", curves[base]), ("classic", best)):
                row |= _break_even(name, curve, float(row["rmse"]), float(row["fit_cost"]), nfe)
            rows.append(row | _compared(batch, fit.plan, traced(get_solver(base), EDM(), _grid(base, nfe))))
    return rows


def _grid(solver: str, nfe: int) -> Tensor:
    """The Karras grid of a classic solver."""
    return get_solver(solver).grid_for(nfe, grids.karras, EDM())


def _fitted(batch: Unseen, method: str, nfe: int, samples: int, seed: int) -> tuple[Row, FittedSolver]:
    """A fit with its error and its cost."""
    ode, x = fitting(batch.setting.name, samples, seed)
    begun = time.perf_counter()
    if method in PRESETS:
        fit = preset(method).fit(ode, x, _grid(str(PRESETS[method].base), nfe))
    else:
        budget = method.rpartition(" ")[2]
        fit = find(ode, nfe, x=x, budget=budget, weights="scalars", sigma_max=80.0, sigma_min=0.002, seed=seed)
    seconds = time.perf_counter() - begun
    error = rmse(sample(batch.ode, batch.x, solver=fit), batch.final)
    cost = fit.record.sample_evaluations
    named: Row = {"setting": batch.setting.name, "solver": method, "nfe": nfe}
    return named | {"rmse": error, "fit_cost": cost, "fit_seconds": seconds}, fit


def _break_even(name: str, curve: Mapping[int, float], error: float, cost: float, nfe: int) -> Row:
    """Evaluations at equal error, and images until the fit has paid, as far as there are such numbers."""
    equal = _equal(curve, error)
    if equal is None:
        return {}
    row: Row = {f"equal_{name}": equal}
    return row | ({f"break_even_{name}": cost / (equal - nfe)} if equal > nfe else {})


def _equal(curve: Mapping[int, float], error: float) -> float | None:
    """The number of evaluations at which a curve first reaches an error, by interpolation in logarithms."""
    places = sorted(curve)
    for low, high in zip(places, places[1:], strict=False):
        if curve[high] <= error < curve[low]:
            share = math.log(curve[low] / error) / math.log(curve[low] / curve[high])
            return float(low * (high / low) ** share)
    return None


def _compared(batch: Unseen, fit: Plan, base: Plan) -> Row:
    """Multiply-adds and times of a plan and of its base."""
    row: Row = {"terms": _adds(fit), "base_terms": _adds(base)}
    idle = ProbabilityFlowODE(lambda x, t: 0.5 * x, EDM())
    states = 80 * torch.randn((16, 4096), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    row["idle"] = _ratio_of_times([partial(sample, idle, states, solver=p) for p in (fit, base)], 40)
    if not batch.setting.is_closed_form:
        rows = slice(0, 8)
        ode = batch.ode.condition(**{key: value[rows] for key, value in batch.ode.conditioning.items()})
        row["time"] = _ratio_of_times([partial(sample, ode, batch.x[rows], solver=p) for p in (fit, base)], 9)
    return row


def _adds(plan: Plan) -> int:
    """Multiply-adds per component outside of the model."""
    return sum(len(ins.terms) for ins in plan.code if isinstance(ins, Combine))


def _ratio_of_times(tasks: Sequence[Callable[[], Tensor]], repeats: int) -> float:
    """The median processor time of the first task over that of the second; both run in turn."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats + 1):
        for task, own in zip(tasks, seconds, strict=True):
            begun = time.process_time()
            task()
            own.append(time.process_time() - begun)
    ours, theirs = (median(own[1:]) for own in seconds)  # the first run makes preparations
    return ours / theirs


# ---- the account -----------------------------------------------------------------------------------------------------


def _fits(found: Measurements) -> list[tuple[str, str, int]]:
    """Setting, method and number of evaluations of each fit."""
    return list(
        dict.fromkeys((str(r["setting"]), str(r["solver"]), int(r["nfe"])) for r in found.rows if "fit_cost" in r)
    )


def _timed(found: Measurements) -> list[str]:
    """Settings on which sampling was timed."""
    return list(dict.fromkeys(str(r["setting"]) for r in found.rows if "time" in r))


def _time(found: Measurements, setting: str, method: str, nfe: int) -> Estimate:
    return found.estimate("time", setting=setting, solver=method, nfe=nfe)


def _terms(found: Measurements, setting: str, method: str, nfe: int) -> Estimate:
    """Ratio of multiply-adds."""
    part = found.where(setting=setting, solver=method, nfe=nfe)
    return Measurements(r | {"ratio": float(r["terms"]) / float(r["base_terms"])} for r in part.rows).estimate("ratio")


def _four(part: Measurements) -> list[Estimate]:
    """Evaluations at equal error and images until the fit has paid, as far as every seed has them."""
    columns = ("equal_base", "break_even_base", "equal_classic", "break_even_classic")
    seeds = len(part.distinct("seed"))
    found = [part.estimate(c) for c in columns]
    return [e if e.seeds == seeds else Estimate(math.nan, math.nan, 0) for e in found]


def _break_evens(found: Measurements, setting: str, value: str) -> list[tuple[str, int, Estimate]]:
    """Method, evaluations and images until the fit has paid, where every seed has the number; from the fewest images."""
    index = 1 if value == "break_even_base" else 3
    numbers = [
        (m, n, _four(found.where(setting=s, solver=m, nfe=n))[index]) for s, m, n in _fits(found) if s == setting
    ]
    return sorted((number for number in numbers if number[-1].seeds), key=lambda number: number[-1].mean)


def _told(found: Measurements, setting: str) -> str:
    """Time, cost and break-even on a setting, in a sentence."""
    own = [f for f in _fits(found) if f[0] == setting]
    costs = [found.estimate("fit_cost", setting=s, solver=m, nfe=n).mean for s, m, n in own]
    parts = [f"a fit costs {min(costs):.0f} to {max(costs):.0f} sample evaluations"]
    if setting in _timed(found):
        low, high = ends([_time(found, *fit) for fit in own])
        parts.insert(0, f"sampling takes {low} to {high} times the time of the base")
    saved = []
    for value, rival in RIVALS.items():
        numbers = [e for *_, e in _break_evens(found, setting, value)]
        images = f"after {numbers[0]} to {numbers[-1]} images" if numbers else "never"
        saved.append(f"{images} against {rival} ({len(numbers)} of {len(own)} fits)")
    return f"On {setting} {', '.join(parts)}, and the cost is saved {' and '.join(saved)}."


def _times(found: Measurements) -> str:
    """The sentence on times of sampling, with a model that does nothing and on networks."""
    told = []
    for value, what in (("idle", "with a model that does nothing"), ("time", f"on {' and '.join(_timed(found))}")):
        ratios = [found.estimate(value, setting=s, solver=m, nfe=n) for s, m, n in _fits(found)]
        ratios = [r for r in ratios if r.seeds]
        if ratios:
            low, high = ends(ratios)
            told.append(f"{low} to {high} times the time of its base {what}")
    return f"Sampling with a fit takes {' and '.join(told)}."


def _paid(found: Measurements, setting: str) -> list[str]:
    """The break-even of each fit of a setting, a sentence for each rival."""
    sentences = []
    for value, rival in RIVALS.items():
        numbers = _break_evens(found, setting, value)
        if not numbers:
            sentences.append(f"On {setting}, against {rival}, no fit has a break-even within the measured evaluations.")
            continue
        texts = [f"{number} images ({method} with {n})" for method, n, number in numbers]
        sentences.append(f"On {setting}, against {rival}, a fit has paid after {', '.join(texts)}.")
    return sentences


EXPERIMENT = Overhead()
