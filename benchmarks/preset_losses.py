"""Why a preset of the paper loses to its base: python benchmarks/preset_losses.py, which writes docs/results/preset_losses.md.

On the mixture in 64 dimensions, on the default grid, where the table of benchmarks/acceptance.py says that a preset loses: how
many samples end in another component, how far the rest end from the truth, and what another target makes of it.
"""

from dataclasses import replace

import torch
from common import (
    DEFAULT,
    PAGES,
    Batch,
    batch,
    karras_family,
    levels_for,
    number,
    plan_of,
    run,
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
APART = 0.3  # a sample whose own RMSE is above this has ended in another component

PAGE = f"""# Where a preset loses to its base, and why

Made by `python benchmarks/preset_losses.py`: {NAME}, fitted on {SAMPLES} draws and measured on {UNSEEN} others, on the
default grid. A sample that ends more than {APART} from where it should has ended in another component. *The rest* are the
samples that neither does that to, fit nor base.

{{table}}
Two things lose. Over Heun, the fits bring the rest several times nearer to the truth and send twice as many samples to
another component. The least squares know the many samples between components, for which every step is nearly linear, not
the few at a border, for which it is not; and one of those weighs as much as hundreds of others. The trajectory's target does
no better there. Over iPNDM it is the target: sub-steps start a multistep base anew, without the base's own history, so what
the step is fitted to is less accurate than the base itself, and the rest end farther from the truth too. With
`target="trajectory"` most of that is gone.
"""


def squares(plan: Plan, test: Batch) -> Tensor:
    """Mean square error of each sample."""
    return (run(plan, test).double() - test.final.double()).square().flatten(1).mean(dim=1)


def main() -> None:
    setting, test = setting_of(NAME), batch(NAME, UNSEEN, 0, True, 150)
    own = batch(NAME, SAMPLES, 0, False, 90)
    lines = []
    for preset, nfe in LOSING:
        method = PRESETS[preset]
        solver = method.base_solver.label
        levels = levels_for(solver, NAME, nfe)
        if levels is None:
            raise iia.GridError(f"{solver} cannot make {nfe} evaluations.")
        grid = karras_family(setting, *DEFAULT)(levels)
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
    head = [
        "preset", "NFE", "target", "error over the base's", "base: other component", "fit: other component",
        "base: the rest, RMSE", "fit: the rest, RMSE",
    ]  # fmt: skip
    write_page(PAGES / "preset_losses.md", PAGE.format(table=table(head, lines, left=3)))


if __name__ == "__main__":
    with torch.no_grad():
        main()
