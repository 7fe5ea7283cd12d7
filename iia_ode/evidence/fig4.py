"""Figure 4 of the paper: S-PNDM, iPNDM and their IIA forms; and which target of a fit costs what on mixture64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean

from ..iia import preset
from .experiment import Cell, Part, markdown
from .measurements import Estimate, Measurements, Row
from .models import drawn, fitting, karras_within
from .paper_figures import PaperFigure
from .solvers import errors

__all__ = ["EXPERIMENT"]

SETTING, COUNTS, SAMPLES, FIT_SAMPLES, STEPS = "mixture64", (5, 10, 20), 128, 64, 100
BASES = ("spndm", "ipndm")
BASE = "base"
TARGETS = {
    "substeps": "sub-steps of the base",
    "local": "the exact flow from the fit's own state",
    "trajectory": "the accurate trajectory",
}


class Figure4(PaperFigure):
    """The figure, with fits to three targets on mixture64, which show what the restart of the base in the sub-steps costs."""

    keys = ("setting", "solver", "base", "target", "nfe")
    values = ("rmse", "frechet", "typical", "step")

    def cells(self, quick: bool) -> Sequence[Cell]:
        """The cells of the figure, and the cell of the targets."""
        return [*super().cells(quick), *([] if quick else [Cell(f"{SETTING}, targets", _targets)])]

    def notes(self, found: Measurements) -> Sequence[str]:
        """The notes of the figure, and for each base what the targets say."""
        return [*super().notes(found), *(_diagnosis(found, b) for b in BASES if found.where(base=b))]

    def tables(self, found: Measurements) -> Sequence[Part]:
        """The tables of the figure, and a table of the targets."""
        part = Measurements(r for r in found.rows if "target" in r)
        lines = []
        for base in part.distinct("base"):
            ratios = [_ratios(part, base, target) for target in TARGETS]
            steps = [part.estimate("step", base=base, target="local", nfe=n) for n in COUNTS]
            lines += [[base, what, *row] for what, row in zip(TARGETS.values(), ratios, strict=True)]
            lines.append([base, "error of a step to the exact flow", *steps])
        caption = (
            f"{SETTING}: error of a typical sample of fits to three targets, over the error of the base; and the error of a "
            "step to the exact flow after the fit, over the error before, on the noise of the fit."
        )
        table = [Part(caption, markdown(["base", "target", *map(str, COUNTS)], lines, left=2))] if part else []
        return [*super().tables(found), *table]

    @property
    def method(self) -> str:
        """The method of the figure, and of the targets."""
        return (
            f"{super().method} On {SETTING}, fits with the same terms have three targets: sub-steps of the base, which "
            "restart the multistep base; the exact flow over the step, from the fit's own state; and the accurate trajectory, "
            f"which also repairs the errors of earlier steps. Fits see {FIT_SAMPLES} samples, and {SAMPLES} are unseen. The "
            "error of a typical sample is the geometric mean of the RMS errors of single samples; the error of a step is a "
            "geometric mean over steps."
        )


def _targets(seed: int, folder: Path) -> list[Row]:
    """Errors of the bases and of fits to each target on mixture64, and the errors of steps."""
    del folder
    batch = drawn(SETTING, SAMPLES, seed, unseen=True, steps=STEPS)
    ode, x = fitting(SETTING, FIT_SAMPLES, seed)
    rows: list[Row] = []
    for base in BASES:
        for count in COUNTS:
            method = preset(f"iia-{base}")
            found = karras_within(method.base_solver, count, batch.setting)
            if found is None:
                continue
            about: Row = {"base": base, "nfe": count}
            rows.append({**about, "target": BASE, **errors(batch, method.base_solver, found[1])})
            for target in TARGETS:
                fit = preset(f"iia-{base}", target=target).fit(ode, x, found[1])
                step = geometric_mean(r.after / r.before for r in fit.reports)
                rows.append({**about, "target": target, **errors(batch, fit), "step": step})
    return rows


def _ratios(found: Measurements, base: str, target: str) -> list[Estimate]:
    """The typical error of a fit over that of its base, for each number of evaluations."""
    return [found.ratio("typical", {"target": target}, {"target": BASE}, base=base, nfe=n) for n in COUNTS]


def _diagnosis(found: Measurements, base: str) -> str:
    """Whether the restart of the base in the sub-steps explains the error, and whether errors of steps cancel."""
    part = found.where(base=base)
    total = {t: part.pooled(partial(_ratios, base=base, target=t)) for t in TARGETS}
    step = part.pooled(lambda own: [own.estimate("step", target="local", nfe=n) for n in COUNTS])
    told = ", ".join(f"{total[t]} for {what}" for t, what in TARGETS.items())
    text = (
        f"On {SETTING} with {', '.join(map(str, COUNTS))} evaluations, fits to {base} have this multiple of its error of a "
        f"typical sample, by target: {told} (geometric means). The fit to the exact flow leaves {step} of the error of a step."
    )
    if not total["substeps"].above(1):
        return f"{text} So no loss is clear in the mean with the sub-steps."
    cause = "explains" if not total["local"].above(1) else "does not explain"
    text += f" So the restart of the base in the sub-steps {cause} the loss."
    if step.below(1) and total["local"].above(1):
        text += (
            " Steps come nearer to the exact flow and the end does not: errors of the steps of the base cancel in part."
        )
    if not total["trajectory"].above(1):
        end = "turns the loss into a gain" if total["trajectory"].below(1) else "leaves no clear loss in the mean"
        text += f" A target that repairs the errors of earlier steps {end}."
    return text


EXPERIMENT = Figure4(
    name="fig4",
    title="Figure 4: S-PNDM, iPNDM and their IIA forms",
    question="Does IIA improve S-PNDM and iPNDM, which are of higher order than DDIM?",
    solvers={"spndm": "spndm", "iia-spndm": "iia-spndm", "ipndm": "ipndm", "iia-ipndm": "iia-ipndm"},
    pairs=[("iia-spndm", "spndm"), ("iia-ipndm", "ipndm")],
    nfes={"digits": (5, 8, 10, 15, 20), "fashion": (5, 10, 20), "patches": (5, 10, 20)},
    claim="Figure 4: IIA-SPNDM < SPNDM and IIA-IPNDM < IPNDM in Frechet distance",
)
