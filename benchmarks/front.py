"""Error against the cost of a fit, for the budgets of `iia_ode.fit`: python benchmarks/front.py [--settings digits].

Each budget fits six denoisers, from three sets of 256 draws each; errors are measured on unseen draws. The stored results also
hold the budgets of commit 03617d6, which took about four times as many evaluations. To make those again, copy this file to
that commit and run it there with --before. Each result is stored under --out as soon as it is measured, and a rerun measures
missing results only. --table writes docs/results/front.md and docs/images/front.png.
"""

import argparse
import math
from functools import cache
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from common import ROOT, Entry, Store, number, parser, table, write_page
from further import CASES, ode_of
from torch import Tensor

import iia_ode as iia
from iia_ode.experiments import get_setting
from iia_ode.metrics import rmse_with_error

UNSEEN = {"mixture64": 4096, "digits": 512, "patches": 256, **dict.fromkeys(CASES, 4096)}
NFES, SEEDS, FITTING = (5, 8), (0, 1, 2), 256
OLD, NEW = ("closed-form", "standard"), ("quick", "closed-form", "standard")
BEFORE = "03617d6"
NEW_DATA = tuple(f"`{name}`" for name, case in CASES.items() if not case.seen)
LIMITS = {("quick", 5): 1500, ("quick", 8): 1500, ("closed-form", 5): 6000, ("closed-form", 8): 9000,
          ("standard", 5): 20_000, ("standard", 8): 30_000}  # fmt: skip

HOW = f"""### How the front was measured

`python benchmarks/front.py` measures whatever the stored results lack, and `python benchmarks/front.py --table` writes this
page. `mixture64` is a mixture in 64 dimensions with its closed-form denoiser; `digits` and `patches` are trained networks on
8x8 and 16x16 images; the others are the networks of [the section before](#denoisers-of-other-data). {" and ".join(NEW_DATA)}
took no part in choosing the budgets.

Each budget gets {FITTING} draws and no other option, and uses as many of them as it says. An error is the root mean square
(RMS) error per component of final states on unseen draws, against an adaptive solution with tolerance 1e-6, as a geometric
mean over {len(SEEDS)} sets of draws. *Times* is the geometric mean (and range) of its ratios to the same budget at commit
{BEFORE}, over the denoisers that were in view, and then over those that were not. *Cost* is the largest number of sample
evaluations: one sample through the model once, with a backward pass counted as two.

Single errors scatter by a tenth to a third between sets of draws, because few samples that end in another mode make up most
of a root mean square.
"""


@cache
def ode(name: str) -> iia.ProbabilityFlowODE:
    """The ODE of a case or of a setting."""
    return ode_of(name) if name in CASES else get_setting(name).draw(1, 0)[0]


def given(name: str, seed: int) -> tuple[iia.ProbabilityFlowODE, dict[str, Any]]:
    """The ODE and the draws of a fit."""
    if name not in CASES:
        own, x = get_setting(name).draw(FITTING, seed)
        return own, {"x": x}
    generator = torch.Generator().manual_seed(100 + seed)
    return ode(name), {"noise": torch.randn((FITTING, CASES[name].dimension), generator=generator, dtype=torch.float64)}


@cache
def unseen(name: str, start: float) -> tuple[iia.ProbabilityFlowODE, Tensor, Tensor]:
    """The ODE, unseen initial states at a time, and their final states."""
    if name in CASES:
        own, generator = ode(name), torch.Generator().manual_seed(1007)
        noise = torch.randn((UNSEEN[name], CASES[name].dimension), generator=generator, dtype=torch.float64)
        x = own.schedule.sigma(start) * noise
    else:
        own, x = get_setting(name).draw(UNSEEN[name], 1007)
    final = iia.reference.solve(own, x, start, own.schedule.t_data, rtol=1e-6, atol=1e-6, sigma_min=0.002)
    return own, x, final


def fitted(name: str, nfe: int, budget: str, seed: int) -> Entry:
    """A fit and its error."""
    own, draws = given(name, seed)
    with torch.enable_grad():
        found = iia.fit(own, nfe, budget=budget, **draws)
    own, x, final = unseen(name, found.plan.grid[0])
    value, error = rmse_with_error(found.plan.run(own, x, check_finite=False), final)
    return {
        "rmse": value,
        "error": error,
        "chosen": found.record.search.chosen.name,
        "sample_evaluations": found.record.sample_evaluations,
    }


def cells(store: Store, name: str, nfe: int, before: bool) -> None:
    """All budgets and seeds of a denoiser at a number of evaluations."""
    for budget, seed in product(OLD if before else NEW, SEEDS):
        under: dict[str, Any] = {"samples": UNSEEN[name], "fit_samples": FITTING, "seed": seed}
        row = f"{budget}{' before' if before else ''}, {seed}"
        store.cell(f"{name}-nfe{nfe:02}", row, under, lambda b=budget, s=seed: fitted(name, nfe, b, s))  # type: ignore[misc]


Files = dict[str, dict[str, Entry]]


def errors(files: Files, name: str, nfe: int, row: str) -> list[Entry]:
    """The entries of a row for all seeds."""
    rows = files.get(f"{name}-nfe{nfe:02}", {})
    return [rows[f"{row}, {s}"] for s in SEEDS if f"{row}, {s}" in rows]


def mean_error(files: Files, name: str, nfe: int, row: str) -> float:
    """Geometric mean over seeds."""
    return geometric_mean([e["rmse"] for e in errors(files, name, nfe, row)])


def ratios(files: Files, nfe: int, row: str, to: str, seen: bool | None = None) -> list[float]:
    """Ratios of mean errors, a number per denoiser that was measured: in view of the budgets' choice or not, or all."""
    names = [n for n in UNSEEN if seen in (None, n not in CASES or CASES[n].seen)]
    known = [n for n in names if errors(files, n, nfe, row) and errors(files, n, nfe, to)]
    return [mean_error(files, n, nfe, row) / mean_error(files, n, nfe, to) for n in known]


def times(found: list[float]) -> str:
    """The geometric mean of ratios and their range."""
    return f"{geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-"


def cost(files: Files, nfe: int, row: str) -> int:
    """The largest number of sample evaluations over denoisers and seeds."""
    return max((e["sample_evaluations"] for n in UNSEEN for e in errors(files, n, nfe, row)), default=0)


def page(files: Files) -> str:
    """The page from the stored results."""
    out = ["## Error against the cost of a fit\n", answer(files)]
    for nfe in NFES:
        lines = []
        for row in (*(f"{b} before" for b in OLD), *NEW):
            if not cost(files, nfe, row):
                continue
            own = f"`{row.removesuffix(' before')}`{f', commit {BEFORE}' if 'before' in row else ''}"
            limit = LIMITS.get((row, nfe))
            own_errors = [
                number(mean_error(files, n, nfe, row), 3) if errors(files, n, nfe, row) else "-" for n in UNSEEN
            ]
            relative = [times(ratios(files, nfe, row, f"{row} before", seen)) for seen in (True, False)]
            price = f"{cost(files, nfe, row) / 1000:.1f}k" + (f" (asked: {limit / 1000:g}k)" if limit else "")
            lines.append([own, price, *own_errors, *relative])
        out.append(
            f"**{nfe} evaluations**\n\n"
            + table(["budget", "cost", *UNSEEN, "times, in view", "times, not in view"], lines)
        )
    return "\n".join([*out, HOW])


def answer(files: Files) -> str:
    """The first sentences of the page."""
    parts = []
    for budget in OLD:
        found = {
            seen: [geometric_mean(ratios(files, n, budget, f"{budget} before", seen) or [math.nan]) for n in NFES]
            for seen in (True, False)
        }
        share = [cost(files, n, budget) / cost(files, n, f"{budget} before") for n in NFES]
        parts.append(
            f'`"{budget}"` leaves {found[True][0]:.2f} times (at 5 evaluations) and {found[True][1]:.2f} times (at 8) the '
            f"error that it left at commit {BEFORE}, for {share[0]:.2f} and {share[1]:.2f} of the sample evaluations; on "
            f"denoisers that took no part in choosing the budgets, {found[False][0]:.2f} and {found[False][1]:.2f} times"
        )
    return f"{parts[0]}. {parts[1]}.\n"


def draw(files: Files, path: Path) -> None:
    """Error relative to the closed-form fits of before, against cost: a line per version."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(NFES), figsize=(9, 3.6), sharey=True)
    for ax, nfe in zip(axes, NFES, strict=True):
        for text, rows, color in (
            (f"commit {BEFORE}", [f"{b} before" for b in OLD], "0.55"),
            ("now", list(NEW), "tab:blue"),
        ):
            known = [r for r in rows if cost(files, nfe, r)]
            x = [cost(files, nfe, r) for r in known]
            y = [geometric_mean(ratios(files, nfe, r, "closed-form before")) for r in known]
            ax.plot(x, y, "o-", color=color, label=text)
            for row, a, b in zip(known, x, y, strict=True):
                ax.annotate(row.removesuffix(" before"), (a, b), xytext=(4, 5), textcoords="offset points", fontsize=8)
        ax.set(xscale="log", yscale="log", title=f"{nfe} evaluations of a run", xlabel="sample evaluations of the fit")
        ax.set_xlim(5e2, 6e5)
        ax.margins(y=0.12)
        ax.set_yticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f'error / error of "closed-form" at {BEFORE}')
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def run(options: argparse.Namespace) -> None:
    """Run the command line."""
    store = Store(options.out)
    if options.table:
        write_page(options.page, page(store.files()))
        draw(store.files(), ROOT / "docs" / "images" / "front.png")
        return
    for name, nfe in product(options.settings, options.nfe):
        cells(store, name, nfe, options.before)


if __name__ == "__main__":
    options = parser(__doc__ or "", "front", list(UNSEEN), NFES)
    options.add_argument("--before", action="store_true", help="the budgets of this commit are those of before")
    with torch.no_grad():
        run(options.parse_args())
