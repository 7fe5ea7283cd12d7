"""Worth of the parts of IIA: step sizes, earlier gradients, the length of the history; and where overfitting begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..grids import karras
from ..iia import IIA
from ..iia.directions import StepRecord, Term, bi_iia_edm, iia_ddim, iia_edm
from ..solvers import get_solver
from .drawing import COLORS, lines_with_bands, panels
from .experiment import Cell, Claim, Experiment, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import drawn, part_of, squares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Ablation"]

Records = tuple[StepRecord, ...]
Terms = Callable[[StepRecord, Records], tuple[Term, ...]]


def _fixed(terms: Terms, symbol: str) -> Terms:
    """Terms with the weight of the current gradient left at the base's value."""
    return lambda step, earlier: tuple(t for t in terms(step, earlier) if t.symbol != symbol)


def _total(step: StepRecord, earlier: Records) -> tuple[Term, ...]:
    """The terms of BIIA with weights of sum 1: earlier gradients replace a part of the current gradient."""
    current, *past = bi_iia_edm(step, earlier) or (None,)
    if current is None:
        return ()
    return tuple(Term(t.symbol, t.direction - current.direction, history=True) for t in past)


def _both(step: StepRecord, earlier: Records) -> tuple[Term, ...]:
    """The terms of IIA-DDIM and a weight of the current gradient."""
    return (*bi_iia_edm(step, ())[:1], *iia_ddim(step, earlier))


# Parts of the method: (base, name) -> terms and history.
BIIA, EDM, DDIM, WINDOW = "biia-edm", "iia-edm", "iia-ddim", "window"
PARTS: dict[str, dict[str, tuple[str | Terms, int]]] = {
    BIIA: {
        "full": (BIIA, 1),
        "current gradient only": (BIIA, 0),
        "fixed step size": (_fixed(bi_iia_edm, "gamma_0"), 1),
        "fixed sum of weights": (_total, 1),
    },
    EDM: {
        "full": (EDM, 1),
        "current gradient only": (EDM, 0),
        "fixed step size": (_fixed(iia_edm, "beta_0"), 1),
    },
    DDIM: {
        "full": (_both, 1),
        "current gradient only": (BIIA, 0),
        "fixed step size": (DDIM, 1),
    },
}
ASKED = {
    "full": "all parts",
    "fixed step size": "fixed step sizes",
    "current gradient only": "the current gradient only",
}
BASE_OF = {BIIA: "heun", EDM: "heun", DDIM: "ddim", WINDOW: "ddim"}
HISTORIES = {EDM: range(5), DDIM: range(1, 5), WINDOW: range(5)}
PART_COUNTS = (5, 9, 13, 19)
COUNT = {"mixture64": 9, "mixture": 13, "digits": 7}
BATCHES = {**dict.fromkeys(("mixture64", "mixture"), (4, 16, 64, 256, 1024)), "digits": (4, 32)}
BLOCKS = {s: {4: 6, 16: 4, 64: 3, 256: 2} for s in ("mixture64", "mixture")} | {"digits": {4: 2}}
"""Number of fits to disjoint batches of a size; larger batches have one."""
UNSEEN = {"mixture64": 256, "mixture": 512, "digits": 32}
STEPS = {"mixture64": 200, "mixture": 200, "digits": 40}
DIGITS_HISTORIES = {EDM: (0, 2), DDIM: (1, 3)}
EXCESS = 1.05
"""A batch is too small if its fits have more than this multiple of the error of the largest batch."""


class Ablation(Experiment):
    """Parts of the three methods of the paper, and histories, on noise of the fit and on unseen noise."""

    name = "ablation"
    title = "Step sizes, earlier gradients, and the length of the history"
    question = (
        "How much of the gain remains with fixed step sizes, or with the current gradient only, and at which history r and "
        "batch size does the fit begin to overfit?"
    )
    keys = ("setting", "method", "part", "history", "nfe", "batch")
    values = ("train", "held_out", "gap")
    seeds = (0, 1, 2)
    again = (100, 101, 102)
    methods: ClassVar[tuple[str, ...]] = (BIIA, EDM, DDIM, WINDOW)

    def cells(self, quick: bool) -> Sequence[Cell]:
        """Cells of the parts, and cells of the histories."""
        if quick:
            return [
                Cell("parts, iia-edm", partial(parts, EDM, (5,), 64, 64, 32)),
                Cell("history, iia-ddim", partial(histories, "mixture64", DDIM, (1, 2), (4, 16), 32)),
            ]
        n = UNSEEN["mixture64"]
        found = [Cell(f"parts, {m}", partial(parts, m, PART_COUNTS, 256, 1024, n)) for m in PARTS]
        for s, name in (("mixture64", "history"), ("mixture", "mixture")):
            for m, lengths in HISTORIES.items():
                found.append(Cell(f"{name}, {m}", partial(histories, s, m, lengths, BATCHES[s], UNSEEN[s])))
        for m, some in DIGITS_HISTORIES.items():
            work = partial(histories, "digits", m, some, BATCHES["digits"], UNSEEN["digits"])
            found.append(Cell(f"digits, {m}", work))
        return found

    # ---- estimates ---------------------------------------------------------------------------------------------------

    def kept(self, found: Measurements, method: str, part: str) -> dict[int, Estimate]:
        """The error of a part of a method relative to the error of the base, on unseen noise, by evaluations."""
        own = found.where(setting="mixture64", method=method, part=("base", *PARTS[method]))
        counts = sorted(own.distinct("nfe"))
        return {n: own.ratio("held_out", {"part": part}, {"part": "base"}, nfe=n) for n in counts}

    def excess(self, found: Measurements, setting: str, method: str, history: int) -> dict[int, Estimate]:
        """The error on unseen noise relative to the largest batch, by batch size."""
        own = found.where(setting=setting, method=method, part="history", history=history)
        batches = sorted(own.distinct("batch"))
        return {n: own.ratio("held_out", {"batch": n}, {"batch": batches[-1]}) for n in batches}

    def best(self, found: Measurements, setting: str, method: str) -> tuple[int, Estimate]:
        """The history with the lowest error at the largest batch, and its error relative to r = 1."""
        own = found.where(setting=setting, method=method, part="history")
        own = own.where(batch=max(own.distinct("batch")))
        ratios = {r: own.ratio("held_out", {"history": r}, {"history": 1}) for r in own.distinct("history")}
        return min(ratios.items(), key=lambda item: item[1].mean if item[1].seeds else math.inf)

    # ---- the page ----------------------------------------------------------------------------------------------------

    def answer(self, found: Measurements) -> str:
        """The worth of parts, and the begin of overfitting."""
        known = self._at_count(found)
        told = [f"{', '.join(str(kept[p]) for p in ASKED)} for {method}" for method, (_, kept) in known.items()]
        begins = [f"on {setting} {begin}" for setting, begin in self._begins(found).items()]
        return (
            f"On mixture64 with {min(n for n, _ in known.values())} evaluations the error over that of the base with "
            f"{', with '.join(ASKED.values())} is {'; '.join(told)}. The longest history overfits by more than "
            f"{EXCESS - 1:.0%} {', '.join(begins)}."
        )

    def notes(self, found: Measurements) -> Sequence[str]:
        """All parts of each method, and the smallest batch of each model."""
        notes = []
        for method, (count, kept) in self._at_count(found).items():
            texts = [f"{e} with {'all parts' if p == 'full' else p}" for p, e in kept.items()]
            notes.append(
                f"On mixture64 with {count} evaluations {method} leaves of the error of {BASE_OF[method]}: {', '.join(texts)}."
            )
        return [*notes, *self._overfitting(found)]

    def _at_count(self, found: Measurements) -> dict[str, tuple[int, dict[str, Estimate]]]:
        """By method, the number of evaluations of the answer, and there the error of each part relative to the base."""
        known = {}
        for method in (m for m in PARTS if found.where(method=m, part="full")):
            told = {p: self.kept(found, method, p) for p in PARTS[method]}
            count = COUNT["mixture64"] if COUNT["mixture64"] in told["full"] else min(told["full"])
            known[method] = count, {p: e[count] for p, e in told.items()}
        return known

    def pooled(self, found: Measurements, setting: str, longest: bool) -> dict[int, tuple[Estimate, Estimate]]:
        """Gap and excess of the longest or the shortest history by batch size, geometric means over methods."""
        own = found.where(setting=setting, part="history")
        last = {m: (max if longest else min)(own.where(method=m).distinct("history")) for m in own.distinct("method")}
        part = Measurements(r for r in own.rows if r["history"] == last[str(r["method"])])
        batches = sorted(own.distinct("batch"))

        def gap(batch: int) -> Estimate:
            return part.pooled(lambda one: [one.estimate("gap", method=m, batch=batch) for m in last])

        def excess(batch: int) -> Estimate:
            few, most = {"batch": batch}, {"batch": batches[-1]}
            return part.pooled(lambda one: [one.ratio("held_out", few, most, method=m) for m in last])

        return {n: (gap(n), excess(n)) for n in batches}

    def _overfitting(self, found: Measurements) -> list[str]:
        """Gap and excess of the smallest batch for the shortest and the longest history, and the best history."""
        sentences = []
        for setting in found.where(part="history").distinct("setting"):
            own, told = found.where(setting=setting, part="history"), []
            for longest, name in ((False, "shortest"), (True, "longest")):
                few, (gap, excess) = next(iter(self.pooled(found, setting, longest).items()))
                told.append(f"gap {gap} and excess {excess} with the {name} history")
            text = f"{setting}, fits to {few} samples, mean over methods: {' and '.join(told)}"
            for method in own.distinct("method"):
                best, ratio = self.best(found, setting, method)
                if ratio.mean < 2 - EXCESS and ratio.below(1):
                    text += f"; {method} is best with r = {best} at the largest batch, {ratio} of the error of r = 1"
            sentences.append(f"{text}.")
        return sentences

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """Two open questions: the parts of each method, and overfitting in r on each model."""
        claims = []
        for part in list(ASKED)[1:]:
            for method, (count, kept) in self._at_count(found).items():
                told = f"{kept[part]} of the base's error at {count} evaluations, {kept['full']} with all parts"
                verdict = self._share(found, method, part, count, kept[part])
                claims.append(Claim(f"Open question: {method} with {part}", told, verdict))
        for setting, begin in self._begins(found).items():
            few, (gap, excess) = next(iter(self.pooled(found, setting, longest=True).items()))
            _, (short, _) = next(iter(self.pooled(found, setting, longest=False).items()))
            told = f"fits to {few} samples: gap {gap}, excess {excess} with the longest history; gap {short} with the shortest"
            text = f"Open question: does a longer history r overfit by more than {EXCESS - 1:.0%} on {setting}?"
            claims.append(Claim(text, told, begin))
        return claims

    @staticmethod
    def _share(found: Measurements, method: str, part: str, count: int, kept: Estimate) -> str:
        """Whether a part gains, and whether less than all parts."""
        if not kept.below(1):
            return "loses" if kept.above(1) else "not resolved"
        rows = found.where(setting="mixture64", method=method, nfe=count)
        ratio = rows.ratio("held_out", {"part": part}, {"part": "full"})
        return "gains, clearly less than all parts" if ratio.above(1) else "gains, not clearly less"

    def _begins(self, found: Measurements) -> dict[str, str]:
        """By model, below which batch size the gap or the excess of the longest history is above 5%."""
        told = {}
        for setting in found.where(part="history").distinct("setting"):
            pooled = self.pooled(found, setting, longest=True)
            over = [n for n, pair in pooled.items() if max(e.mean for e in pair) > EXCESS]
            begins = (
                f"below {min(n for n in pooled if n > max(over))} samples" if over and max(over) < max(pooled) else ""
            )
            told[setting] = begins or ("at all sizes" if over else "at no size")
        return told

    def tables(self, found: Measurements) -> Sequence[Part]:
        """Parts by evaluations; histories by batch size."""
        tables = []
        for method in (m for m in PARTS if found.where(method=m, part="full")):
            kept = {p: self.kept(found, method, p) for p in PARTS[method]}
            counts = list(next(iter(kept.values())))
            lines = [[p, *(e[n] for n in counts)] for p, e in kept.items()]
            caption = (
                f"{method} on mixture64: error on unseen noise relative to {BASE_OF[method]}, fitted to 256 samples."
            )
            tables.append(Part(caption, markdown(["part", *map(str, counts)], lines)))
        for setting in found.distinct("setting"):
            for method in found.where(setting=setting, part="history").distinct("method"):
                own = found.where(setting=setting, part="history", method=method)
                lines = [
                    [r, n, *(own.estimate(v, history=r, batch=n) for v in self.values), e]
                    for r in own.distinct("history")
                    for n, e in self.excess(found, setting, method, r).items()
                ]
                head = ["r", "batch", "fitting noise", "unseen noise", "gap", "excess"]
                caption = (
                    f"{method} on {setting}: RMSE per component on the noise of the fit and on unseen noise, the gap, and the "
                    "error on unseen noise relative to the largest batch."
                )
                tables.append(Part(caption, markdown(head, lines, 2)))
        return tables

    def figure(self, found: Measurements) -> Figure:
        """Parts in the first row; errors of small batches relative to the largest, and gaps, in the others."""
        settings = [s for s in ("mixture64", "mixture") if found.where(setting=s, part="history")]
        figure, axes = panels(1 + 2 * len(settings), 3, width=3.6, height=2.7)
        for ax, method in zip(axes[0], PARTS, strict=True):
            self._draw_parts(ax, found, method)
        for k, setting in enumerate(settings):
            for column, method in enumerate(HISTORIES):
                own = found.where(setting=setting, part="history", method=method)
                for row, value in enumerate(("held_out", "gap"), start=1 + 2 * k):
                    ax = axes[row][column]
                    if not own:
                        ax.set_axis_off()
                        continue
                    lines = {f"r = {r}": _under(own.where(history=r), value) for r in own.distinct("history")}
                    lines_with_bands(ax, lines, "batch", "shown", logarithmic="x")
                    label = "error, relative\nto the largest batch" if value == "held_out" else "gap"
                    ax.set(title=f"{method} on {setting}", xlabel="samples of the fit", ylabel=label)
                    ax.axhline(1, color="#999999", linewidth=0.8)
        return figure

    def _draw_parts(self, ax: Any, found: Measurements, method: str) -> None:
        """Bars of the remaining error, by evaluations."""
        if not found.where(method=method, part="full"):
            ax.set_axis_off()
            return
        for k, part in enumerate(PARTS[method]):
            ratios = self.kept(found, method, part)
            places = [i + 0.2 * (k - 1.5) for i in range(len(ratios))]
            values = list(ratios.values())
            ax.bar(places, [v.mean for v in values], 0.18, yerr=[v.error for v in values], color=COLORS[k], label=part)
        ax.axhline(1, color="#999999", linewidth=0.8)
        ax.set_xticks(range(len(ratios)), [str(n) for n in ratios])
        ax.set(title=method, xlabel="model evaluations (NFE)", ylabel=f"error relative to {BASE_OF[method]}")
        ax.set_ylim(top=1.45 * ax.get_ylim()[1])
        ax.legend(fontsize="x-small", loc="upper left")

    @property
    def method(self) -> str:
        """Definitions and numbers of samples."""
        return (
            "The base of biia-edm and iia-edm is Heun's method, of iia-ddim and the window DDIM; targets are three sub-steps, "
            "without a guard and without a ridge. *Current gradient only* has no earlier steps (r = 0): only step sizes are "
            "fitted. *Fixed step size* leaves the weight of the current gradient at the base's value (gamma_0 = 1 or "
            "beta_0 = 1/t), and fits the others; the terms of iia-ddim are of this kind by themselves, and *full* adds a step "
            "size to them. *Fixed sum of weights* has gamma_0 + gamma_1 = 1. The error on the fitting noise is the endpoint "
            "error on the samples of the fit. The gap compares single samples: it is the geometric mean of (error of the fit "
            "/ error of the base) over unseen samples, divided by the same mean over the samples of the fit, and 1 without "
            "overfitting. A few samples end in another component of the mixture and dominate the RMSE of a small batch, so a "
            "gap of RMSEs would be noise. Small batches are fitted several times, to disjoint batches "
            f"({', '.join(f'{k} of {n} samples' for n, k in BLOCKS['mixture64'].items())} on mixture64); errors are root mean "
            f"squares over these fits. Unseen samples: {', '.join(f'{n} on {s}' for s, n in UNSEEN.items())}. "
            f"Histories are measured at {', '.join(f'{n} evaluations on {s}' for s, n in COUNT.items())}. Heun's method has "
            "four fitted steps on mixture64, so r = 4 is r = 3 there. The components of mixture64 are isotropic, so that "
            "earlier steps span few further directions; mixture has other variances in each of its 8 dimensions. The "
            "excess is the RMSE on unseen noise relative to the RMSE after a fit to the largest batch. Overfitting counts "
            f"where the gap or the excess of the longest history, as a mean over methods, is above {EXCESS - 1:.0%}."
        )


def parts(
    method: str, counts: Sequence[int], fit_samples: int, pool: int, samples: int, seed: int, folder: Path
) -> list[Row]:
    """Rows of the parts of a method on mixture64."""
    rows: list[Row] = []
    for nfe in counts:
        bench = Bench("mixture64", method, nfe, pool, samples, seed)
        rows.append(bench.base(fit_samples))
        for part, (terms, history) in PARTS[method].items():
            rows.append(bench.row(terms, history, fit_samples, 1, {"part": part}))
    return rows


def histories(
    setting: str, method: str, lengths: Sequence[int], batches: Sequence[int], samples: int, seed: int, folder: Path
) -> list[Row]:
    """Rows of the histories of a method, by batch size."""
    blocks = {n: BLOCKS[setting].get(n, 1) for n in batches}
    bench = Bench(setting, method, COUNT[setting], max(n * k for n, k in blocks.items()), samples, seed)
    return [bench.row(method, r, n, k, {"part": "history", "history": r}) for r in lengths for n, k in blocks.items()]


class Bench:
    """The noise of a cell, with the errors of the base on each sample."""

    def __init__(self, setting: str, method: str, nfe: int, pool: int, samples: int, seed: int) -> None:
        self.setting, self.method, self.nfe = setting, method, nfe
        self.pool = drawn(setting, pool, seed, unseen=False, steps=STEPS[setting])
        self.unseen = drawn(setting, samples, seed, unseen=True, steps=STEPS[setting])
        self.solver = get_solver(BASE_OF[method])
        known = self.unseen.setting
        levels = partial(karras, sigma_min=known.sigma_min, sigma_max=known.sigma_max, schedule=known.schedule)
        self.grid = self.solver.grid_for(nfe, levels, known.schedule)
        self._own, self._held = (squares(batch, self.solver, self.grid) for batch in (self.pool, self.unseen))

    def base(self, batch: int) -> Row:
        """The row of the base."""
        about: Row = {"setting": self.setting, "method": self.method, "part": "base", "nfe": self.nfe, "batch": batch}
        return {**about, "train": _root(self._own[:batch]), "held_out": _root(self._held)}

    def row(self, terms: str | Terms, history: int, batch: int, blocks: int, about: Mapping[str, Any]) -> Row:
        """The row of a method, over fits to disjoint batches."""
        method = IIA(self.solver, terms, history=history, guard=False)
        own, held, gaps = [], [], []
        for k in range(blocks):
            part = part_of(self.pool, k * batch, (k + 1) * batch)
            fit = method.fit(part.ode, part.x, self.grid)
            own.append(squares(part, fit))
            held.append(squares(self.unseen, fit))
            base = self._own[k * batch : (k + 1) * batch]
            gaps.append(0.5 * float((held[-1] / self._held).log().mean() - (own[-1] / base).log().mean()))
        known: Row = {"setting": self.setting, "method": self.method, "nfe": self.nfe, "batch": batch, **about}
        errors = {"train": _root(torch.cat(own)), "held_out": _root(torch.cat(held))}
        return {**known, **errors, "gap": math.exp(sum(gaps) / blocks)}


def _under(own: Measurements, value: str) -> Measurements:
    """Gaps as they are; errors of each seed relative to the largest batch."""
    if value == "gap":
        return Measurements({**r, "shown": r[value]} for r in own.rows)
    bottom = own.by_seed(value, batch=max(own.distinct("batch")))
    return Measurements({**r, "shown": float(r[value]) / bottom[r["seed"]]} for r in own.rows)


def _root(values: Tensor) -> float:
    return float(values.mean().sqrt())


EXPERIMENT = Ablation()
