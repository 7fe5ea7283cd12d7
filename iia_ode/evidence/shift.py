"""Distribution shift: coefficients fitted on one domain used on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import grids
from ..autofit import fit as find
from ..experiments import batch_seed
from ..iia import FittedSolver, preset
from ..integrate import sample
from ..metrics import rmse
from ..ode import ProbabilityFlowODE
from ..teacher import Teacher
from .drawing import COLORS, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import Unseen, setting_of, unseen
from .transfer import moved_error, survival
from .wording import judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Shift"]

BASE = "ddim"
PRESET = "iia-ddim"
FOUND = "iia.fit"
NFE = 5
STEPS = 40
"""Steps of accurate solutions of the networks."""


@dataclass(frozen=True)
class _Domain:
    """A model with a distribution of conditions.

    Attributes
    ----------
    setting : the setting.
    classes : the classes of the samples, from the first up to the second; by default all.
    scale : guidance scale.
    samples, fit_samples : numbers of unseen samples and of samples of a fit.
    """

    setting: str
    classes: tuple[int, int] | None = None
    scale: float = 1.0
    samples: int = 24
    fit_samples: int = 16


DOMAINS = {
    "mixture64": _Domain("mixture64", samples=128, fit_samples=64),
    "digits": _Domain("digits"),
    "digits 0-4": _Domain("digits", (0, 5)),
    "digits 5-9": _Domain("digits", (5, 10)),
    "digits, guidance 2": _Domain("digits", scale=2.0),
    "fashion": _Domain("fashion", samples=16, fit_samples=12),
    "fashion, half of the training": _Domain("fashion-halfway", samples=16, fit_samples=12),
}
SHIFTS = {
    "classes": (("digits 0-4", "digits 5-9"), ("digits 5-9", "digits 0-4")),
    "guidance scale": (("digits", "digits, guidance 2"), ("digits, guidance 2", "digits")),
    "checkpoint": (("fashion, half of the training", "fashion"), ("fashion", "fashion, half of the training")),
    "data set": (("fashion", "digits"), ("digits", "fashion")),
    "kind of model": (("mixture64", "digits"), ("digits", "mixture64")),
}
"""Pairs (fitted on, used on), from the smallest shift to the largest."""
PAIRS = [(kind, *pair) for kind, pairs in SHIFTS.items() for pair in pairs]
METHODS = {PRESET: tuple(DOMAINS), FOUND: tuple(d for d in DOMAINS if "guidance" not in d)}
"""Domains of each method: the experiment ``guidance`` has fits by `iia.fit` at several scales."""


class Shift(Experiment):
    """The share of the gain over DDIM that survives where a fit is used outside of its domain."""

    name = "shift"
    title = "Distribution shift"
    question = (
        "How much of the gain of fitted coefficients survives on other classes, on another data set, on another checkpoint of "
        "the same training, and at another guidance scale?"
    )
    keys = ("solver", "fitted_on", "used_on")
    values = ("rmse",)
    seeds = (0, 1)
    again = (100, 101)
    fits_of = "03617d6"

    def cells(self, quick: bool) -> Sequence[Cell]:
        """A cell for each method."""
        if quick:
            domains = ("mixture64", "digits")
            return [Cell(PRESET, partial(_measured, {PRESET: domains}, 4))]
        return [Cell("all", partial(_measured, METHODS, 1))]

    def answer(self, found: Measurements) -> str:
        """The surviving share for each kind of shift."""
        sentences = []
        for method in _methods(found):
            parts = [f"{_share_text(found, method, kind)} ({kind})" for kind in SHIFTS if _ratios(found, method, kind)]
            ratios = [r for kind in SHIFTS for r in _ratios(found, method, kind)]
            better, worse = judged(ratios)
            if parts:
                sentences.append(
                    f"Of the gain of {method} over {BASE} with {NFE} evaluations survive {', '.join(parts)}; the moved fit "
                    f"is clearly better than {BASE} in {better} of {len(ratios)} cases, worse in {worse}."
                )
        return " ".join(sentences)

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """A verdict for each kind of shift."""
        claims = []
        for kind, pairs in SHIFTS.items():
            methods = [m for m in _methods(found) if _ratios(found, m, kind)]
            if not methods:
                continue
            ratios = [r for m in methods for r in _ratios(found, m, kind)]
            better, worse = judged(ratios)
            verdict = f"{better} of {len(ratios)} better, {worse} worse"
            what = f"{pairs[0][0]} to {pairs[0][1]} and back"
            measured = "; ".join(f"{m}: {_share_text(found, m, kind)} of the gain survives" for m in methods)
            claims.append(
                Claim(f"Does the gain survive a change of {kind} ({what}; open question)?", measured, verdict)
            )
        return claims

    def tables(self, found: Measurements) -> Sequence[Part]:
        """The shares, with the errors behind them."""
        parts = []
        for method in _methods(found):
            lines = []
            for kind, source, target in PAIRS:
                moved = found.estimate("rmse", solver=method, fitted_on=source, used_on=target)
                if not moved.seeds:
                    continue
                base = found.estimate("rmse", solver=BASE, used_on=target)
                own = found.estimate("rmse", solver=method, fitted_on=target, used_on=target)
                share = _share(found, method, source, target)
                lines.append(
                    [kind, source, target, base, own, moved, f"{100 * share.mean:.0f}% ± {100 * share.error:.0f}%"]
                )
            if lines:
                head = ["shift", "fitted on", "used on", BASE, "fitted there", "moved", "share of the gain"]
                caption = (
                    f"{method}, {NFE} evaluations: RMSE of the final state per component of {BASE}, of the fit made on the "
                    "domain of use, and of the moved fit; and the share of the gain that survives, "
                    f"log(moved / {BASE}) / log(fitted there / {BASE})."
                )
                parts.append(Part(caption, markdown(head, lines, left=3)))
        return parts

    def figure(self, found: Measurements) -> Figure:
        """Shares as bars with standard errors, for each pair of domains."""
        figure, axes = panels(1, 1, width=8.0, height=5.0)
        ax, methods = axes[0][0], _methods(found)
        pairs = [(s, t) for _, s, t in PAIRS if _pair_ratio(found, methods[0], s, t).seeds]
        for k, method in enumerate(methods):
            shares = [_share(found, method, s, t) for s, t in pairs]
            places = [i + 0.38 * k for i in range(len(pairs))]
            means, errors = [100 * s.mean for s in shares], [100 * s.error for s in shares]
            ax.barh(places, means, 0.36, xerr=errors, label=method, color=COLORS[k], error_kw={"capsize": 2})
        ax.set_yticks([i + 0.19 * (len(methods) - 1) for i in range(len(pairs))], [f"{s} → {t}" for s, t in pairs])
        ax.invert_yaxis()
        for bound in (0, 100):
            ax.axvline(bound, color="#000000", linewidth=0.8)
        ax.set(xlabel=f"share of the gain over {BASE} that survives, %")
        ax.grid(alpha=0.3, axis="x")
        ax.legend(fontsize="small")
        return figure

    @property
    def method(self) -> str:
        """Domains and numbers of samples."""
        sizes = "; ".join(f"{name}: {d.samples} unseen, {d.fit_samples} of a fit" for name, d in DOMAINS.items())
        return (
            f"Samples per seed: {sizes}. The weights are scalars, so a plan fits samples of every shape: digits have 8x8 "
            f"pixels, fashion 28x28, and mixture64 has 64 components. All domains have levels from 80 to 0.002. {PRESET} has "
            f"the paper's (M, r) = (3, 1) on the Karras grid; {FOUND} has the budget closed-form with scalar weights, and its "
            f"grid moves with the weights. The share is log(moved / {BASE}) / log(fitted on the domain of use / {BASE}) of "
            "endpoint errors on unseen noise of the domain of use: 100% is as good as a fit made there, 0% as the base. "
            "*Clearly* means by the 95% interval over seeds."
        )


def _measured(methods: Mapping[str, Sequence[str]], cut: int, seed: int, folder: Path) -> list[Row]:
    """Errors of the base on each domain, of each fit on its own domain, and of each moved fit; sizes divided by `cut`."""
    del folder
    names = list(dict.fromkeys(name for domains in methods.values() for name in domains))
    batches = {name: _unseen(DOMAINS[name], cut, seed) for name in names}
    rows: list[Row] = []
    for name, batch in batches.items():
        final = sample(batch.ode, batch.x, grids.karras(NFE), BASE)
        rows.append({"solver": BASE, "used_on": name, "rmse": rmse(final, batch.final)})
    for method, domains in methods.items():
        for source in domains:
            fit = _fit(DOMAINS[source], method, cut, seed)
            uses = [source, *(t for _, s, t in PAIRS if s == source and t in domains)]
            for target in uses:
                error = moved_error(batches[target], fit)
                rows.append({"solver": method, "fitted_on": source, "used_on": target, "rmse": error})
    return rows


def _fit(domain: _Domain, method: str, cut: int, seed: int) -> FittedSolver:
    """A fit on a domain."""
    ode, x = _drawn(domain, domain.fit_samples // cut, batch_seed(seed, unseen=False))
    if method == PRESET:
        return preset(PRESET).fit(ode, x, grids.karras(NFE))
    return find(ode, NFE, x=x, budget="closed-form", weights="scalars", sigma_max=80.0, sigma_min=0.002, seed=seed)


@cache
def _unseen(domain: _Domain, cut: int, seed: int) -> Unseen:
    """Unseen noise of a domain with converged final states."""
    samples = domain.samples // cut
    if domain.classes is None:
        return unseen(domain.setting, samples, seed, guidance_scale=domain.scale, steps=STEPS)
    ode, x = _drawn(domain, samples, batch_seed(seed, unseen=True))
    setting = setting_of(domain.setting)
    start, end = setting.schedule.t_of_noise_to_signal(setting.sigma_max), setting.schedule.t_data
    final = Teacher.solve(ode, x, start, end, steps=STEPS, sigma_min=setting.sigma_min).final
    return Unseen(setting, ode, x, final)


def _drawn(domain: _Domain, samples: int, seed: int) -> tuple[ProbabilityFlowODE, Tensor]:
    """Conditions and states of a domain; classes are of equal numbers where they are restricted."""
    ode, x = setting_of(domain.setting).draw(samples, seed, guidance_scale=domain.scale)
    if domain.classes is None:
        return ode, x
    labels = torch.arange(*domain.classes).repeat(samples)[:samples]
    return ode.condition(class_labels=labels), x


# ---- the account -----------------------------------------------------------------------------------------------------


def _methods(found: Measurements) -> list[str]:
    return [m for m in found.distinct("solver") if m != BASE]


def _share(found: Measurements, method: str, source: str, target: str) -> Estimate:
    """The surviving share for a pair of domains."""
    moved, own = ({"solver": method, "fitted_on": place} for place in (source, target))
    return survival(found, moved, own, {"solver": BASE}, used_on=target)


def _pair_ratio(found: Measurements, method: str, source: str, target: str) -> Estimate:
    """The error of a moved fit over the error of the base."""
    return found.ratio("rmse", over={"solver": method, "fitted_on": source}, under={"solver": BASE}, used_on=target)


def _ratios(found: Measurements, method: str, kind: str) -> list[Estimate]:
    """The ratios of a kind of shift, as far as measured."""
    ratios = [_pair_ratio(found, method, source, target) for source, target in SHIFTS[kind]]
    return [r for r in ratios if r.seeds]


def _share_text(found: Measurements, method: str, kind: str) -> str:
    """The shares of a kind of shift: ``"98% ± 1% and 95% ± 2%"``."""
    shares = [_share(found, method, source, target) for source, target in SHIFTS[kind]]
    texts = [f"{100 * s.mean:.0f}% ± {100 * s.error:.0f}%" for s in shares if s.seeds]
    return " and ".join(texts) or "no own gain to compare with"


EXPERIMENT = Shift()
