"""Why a preset of the paper loses to its base: python benchmarks/preset_losses.py, which writes docs/results/preset_losses.md.

Where the tables of benchmarks/acceptance.py say that a preset loses on the default grid. On the mixture in 64 dimensions: how
many samples end in another component, how far the rest end from the truth, what another target makes of it, and how the errors
of single steps add up. On the networks, for one case of each preset that loses there: what more sub-steps and another target
make of it.
"""

from dataclasses import replace

import torch
from common import (
    CHUNK,
    PAGES,
    Batch,
    batch,
    grid_of,
    number,
    plan_of,
    run,
    say,
    setting_of,
    table,
    teacher_of,
    write_page,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.iia import PRESETS
from iia_ode.plan import Plan

NAME, SAMPLES, UNSEEN = "mixture64", 2048, 4096
LOSING = (("biia-edm", 15), ("iia-edm", 15), ("iia-ipndm", 10), ("iia-ipndm", 15))
NETWORKS = (
    ("digits", "iia-ipndm", 10),
    ("digits", "iia-ipndm", 15),
    ("patches", "iia-ipndm", 10),
    ("patches", "iia-spndm", 6),
    ("patches", "iia-dpmpp_2m", 15),
)
DRAWS = 256  # of networks, for fits and for measuring
CARRIED = 512  # draws whose steps are looked at one by one
FINER = 12  # sub-steps, for the paper's three
APART = 0.3  # a sample whose own RMSE is above this has ended in another component

PAGE = f"""# Where a preset loses to its base, and why

Made by `python benchmarks/preset_losses.py`: {NAME}, fitted on {SAMPLES} draws and measured on {UNSEEN} others, on the
default grid. A sample that ends more than {APART} from where it should has ended in another component. *The rest* are the
samples that neither does that to, fit nor base.

{{table}}
On the networks, {DRAWS} draws for fits and {DRAWS} others; error over that of the base:

{{networks}}
Errors of the single steps of `iia-ipndm` and its base on {NAME}, each carried to the end by the exact flow, so that they add
up to the final error; over the {CARRIED} first draws, less those that end in another component. *Adjacent steps*: the cosine
between the errors of one step and the next, all steps weighted by their size.

{{carried}}
Two things lose. Over Heun, the fits bring the rest several times nearer to the truth and send twice as many samples to
another component. The least squares know the many samples between components, for which every step is nearly linear, not
the few at a border, for which it is not; and one of those weighs as much as hundreds of others. The trajectory's target does
no better there.

Over the multistep bases it is that the target is local. The errors of iPNDM's steps are large, each points the other way
than the one before, and at the end they all but cancel. Aiming every step at the true solution from where it stands makes
the errors three or four times smaller and takes the cancelling away: more is left at the end. More sub-steps make that
target more accurate and help little. `target="trajectory"` aims at the trajectory from the beginning, so that a step makes
up for those before it: it ends nearer than the base on the networks; on the mixture it is as near at 10 evaluations, and at 15
what it makes up for is less than what cancelled.
"""


def squares(plan: Plan, test: Batch) -> Tensor:
    """Mean square error of each sample."""
    return (run(plan, test).double() - test.final.double()).square().flatten(1).mean(dim=1)


def networks() -> str:
    """The table of the networks."""
    lines = []
    for name, preset, nfe in NETWORKS:
        own, test = batch(name, DRAWS, 0, False, 90), batch(name, DRAWS, 0, True, 90)
        method = PRESETS[preset]
        grid = grid_of(method.base_solver.label, name, nfe)
        base = squares(plan_of(method.base_solver.label, own.setting, grid), test).mean()
        ratios = []
        for target, substeps in (("substeps", 3), ("substeps", FINER), ("trajectory", 3)):
            teacher = teacher_of(name, DRAWS, 0) if target == "trajectory" else None
            fit = replace(method, target=target, substeps=substeps).fit(
                own.ode, grid, own.x, teacher=teacher, chunk_size=CHUNK
            )
            ratios.append(number(float((squares(fit.plan, test).mean() / base).sqrt()), 2))
        lines.append([name, f"`{preset}`", str(nfe), *ratios])
        say(" ".join(lines[-1]))
    return table(["setting", "preset", "NFE", "3 sub-steps", f"{FINER} sub-steps", "trajectory"], lines, left=3)


def carried(plan: Plan, test: Batch) -> Tensor:
    """The error of each step, carried to the end by the exact flow, [steps, samples, components]."""
    states = [test.x]
    plan.run(test.ode, test.x, callback=lambda _k, _t, state: states.append(state.clone()))
    ends = []
    for t, x in zip(plan.grid, states, strict=True):
        level = test.ode.schedule.noise_to_signal(t)
        if level > 0:  # else these are the data already
            x = iia.reference.solve(test.ode, x, t, 0.0, rtol=1e-6, atol=1e-6, sigma_min=min(level, 2e-3) / 2)
        ends.append(x)
    found = torch.stack(ends).flatten(2)
    return found[1:] - found[:-1]


def cancelling(nfe: int) -> list[list[str]]:
    """The lines of `iia-ipndm` and its base."""
    own, test = batch(NAME, SAMPLES, 0, False, 90), batch(NAME, UNSEEN, 0, True, 150).first(CARRIED)
    method = PRESETS["iia-ipndm"]
    grid = grid_of("ipndm", NAME, nfe)
    plans = {"`ipndm`": plan_of("ipndm", own.setting, grid)}
    for target in ("substeps", "trajectory"):
        teacher = teacher_of(NAME, SAMPLES, 0) if target == "trajectory" else None
        fit = replace(method, target=target).fit(own.ode, grid, own.x, teacher=teacher, chunk_size=512)
        plans[f"`iia-ipndm`, {target}"] = fit.plan
    errors = {name: carried(plan, test) for name, plan in plans.items()}
    near = torch.stack([e.sum(dim=0).square().mean(dim=1).sqrt() <= APART for e in errors.values()]).all(dim=0)
    lines = []
    for name, every in errors.items():
        e = every[:, near]
        products, sizes = (e[1:] * e[:-1]).sum(dim=(1, 2)), e.flatten(1).norm(dim=1)
        cosine = float(products.sum() / (sizes[1:] * sizes[:-1]).sum())
        largest = e.square().flatten(1).mean(dim=1).max().sqrt()
        apart, end = e.square().sum(dim=0).mean().sqrt(), e.sum(dim=0).square().mean().sqrt()
        figures = (number(float(v)) for v in (largest, apart, end))
        lines.append([name, str(nfe), *figures, number(cosine, 2)])
    return lines


def main() -> None:
    setting, test = setting_of(NAME), batch(NAME, UNSEEN, 0, True, 150)
    own = batch(NAME, SAMPLES, 0, False, 90)
    lines = []
    for preset, nfe in LOSING:
        method = PRESETS[preset]
        solver = method.base_solver.label
        grid = grid_of(solver, NAME, nfe)
        by_base = squares(plan_of(solver, setting, grid), test)
        for target in ("substeps", "trajectory"):
            teacher = teacher_of(NAME, SAMPLES, 0) if target == "trajectory" else None
            fit = replace(method, target=target).fit(own.ode, grid, own.x, teacher=teacher, chunk_size=512)
            by_fit = squares(fit.plan, test)
            apart = [e.sqrt() > APART for e in (by_base, by_fit)]
            rest = ~(apart[0] | apart[1])
            ends = [number(float(e[rest].mean().sqrt())) for e in (by_base, by_fit)]
            ratio = number(float((by_fit.mean() / by_base.mean()).sqrt()), 2)
            counts = [str(int(a.sum())) for a in apart]
            lines.append([f"`{preset}`", str(nfe), target, ratio, *counts, *ends])
    steps = table(
        ["solver", "NFE", "largest step's error", "root of the sum of squares", "error at the end", "adjacent steps"],
        [line for nfe in (10, 15) for line in cancelling(nfe)],
    )
    head = [
        "preset", "NFE", "target", "error over the base's", "base: other component", "fit: other component",
        "base: the rest, RMSE", "fit: the rest, RMSE",
    ]  # fmt: skip
    write_page(
        PAGES / "preset_losses.md", PAGE.format(table=table(head, lines, left=3), networks=networks(), carried=steps)
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
