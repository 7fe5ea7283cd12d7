"""Why a preset of the paper loses to its base: python benchmarks/preset_losses.py, after benchmarks/acceptance.py.

The script takes every preset with a loss on the default grid in the stored results of acceptance.py, on the same draws. It
measures the ratio with a paired standard error, and the ratios with more sub-steps and with the trajectory target. On the
mixture in 64 dimensions, it counts samples in another component and measures the error of the rest. For a few fits, it
measures how the errors of single steps add up. Each result is stored under --out as soon as it is measured, and a rerun
measures missing results only. --table writes docs/results/preset_losses.md.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from acceptance import FIT_SAMPLES, SAMPLES
from common import (
    CHUNK,
    RESULTS,
    Batch,
    Entry,
    Store,
    batch,
    conditions,
    grid_of,
    is_closed_form,
    kind_of,
    number,
    parser,
    plan_of,
    run,
    squares,
    table,
    teacher_of,
    write_page,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.iia import IIA, PRESETS
from iia_ode.metrics import paired_ratio
from iia_ode.plan import Plan
from iia_ode.teacher import Teacher

SETTINGS = ("digits", "patches", "mixture64")
NFES = tuple(range(1, 16))
ADDED_UP = (("mixture64", "iia-ipndm", 10), ("mixture64", "iia-ipndm", 15), ("digits", "iia-ipndm", 10),
            ("patches", "iia-spndm", 6))  # fmt: skip
"""Fits whose steps are looked at one by one: the preset on which most is lost, and one of another kind."""
CARRIED = {"closed form": 512, "network": 64}  # draws with step errors
CARRY_STEPS = 60  # steps of the teacher's method from each state to the end, on networks
FINER = 12  # sub-steps, in place of the paper's three
APART = 0.3  # RMSE above which a sample counts as in another component
TARGETS = {"as the paper": {}, f"{FINER} sub-steps": {"substeps": FINER}, "trajectory": {"target": "trajectory"}}
KEY = " by step"  # suffix of entries on single steps

LEAD = """# Where a preset loses to its base, and why

From four evaluations on, a preset loses for one of two reasons: over multistep bases, its local target shrinks the errors of
single steps but removes their cancellation; over Heun on the mixture, its fit sends more samples to another component.
`target="trajectory"` removes nearly all losses on the networks.

The table divides the error of the fit by the error of the base and gives the paired standard error of the ratio: both start
from the same noise. Where the ratio lies within two standard errors of 1, the draws do not tell which is better.
"""

RESTS = f"""A sample of the mixture that ends more than {APART} from its reference has ended in another component. *The rest*
are the samples that end in the right component under the fit and under the base.
"""

STEPS = f"""The next table has the errors of single steps. The exact flow carries each error to the end, and their sum is the
final error. The samples are the first {CARRIED["closed form"]} draws of the mixture, without those in another component, or
{CARRIED["network"]} draws of a network. *Adjacent steps* is the cosine between the errors of one step and the next,
weighted by the sizes of the errors.
"""

WHY = """## Why presets lose

**Heun on the mixture.** The fits bring the rest several times nearer to the truth and send twice as many samples to another
component. Least squares knows the many samples between components, for which every step is nearly linear. It does not know
the few samples at a border, for which a step is not linear; a single such sample weighs as much as hundreds of others. The
trajectory target does no better there.

**Multistep bases.** Wherever single steps were examined, the local target is the cause. The step errors of the base are
large, each opposes the one before, and at the end they nearly cancel. A local target aims every step at the true solution
from the state of the step. The errors become smaller and no longer cancel, and more error is left at the end. More
sub-steps make the local target more accurate. From four evaluations on, they lower the ratio by about a quarter at most,
and raise it in some rows. `target="trajectory"` aims at the trajectory from the beginning, and a step then corrects the
steps before it. On the networks, the trajectory target ends nearer than the base in nearly every row above, and in no row
farther as far as the draws tell. On the mixture it ends nearer at few evaluations only; at more of them, the corrections
are worth less than the lost cancellation.

**Three evaluations.** A single step is fitted, across most noise levels, and three sub-steps may be a poor target for such
a step. On the digits, twelve sub-steps remove the whole loss. On the patches the loss is a few hundredths, and the
trajectory target removes it.
"""

HOW = """## How the losses were measured

`python benchmarks/preset_losses.py` measures whatever the stored results lack, and `python benchmarks/preset_losses.py
--table` writes this page. Fits and unseen noise are those of `benchmarks/acceptance.py`. Where a preset *ties* on the
acceptance page, at three evaluations and fewer, it equals its base: the first step has no earlier step to use, the last
step (to the data) is never fitted, and there is no other step.
"""


def draws(name: str) -> tuple[Batch, Batch]:
    """The fitting draws and the unseen draws of the acceptance page."""
    kind = kind_of(name)
    return batch(name, FIT_SAMPLES[kind], 0, False, 90), batch(name, SAMPLES[kind], 0, True, 150)


def fitted(method: IIA, own: Batch, grid: Tensor) -> Plan:
    """The fit to these draws."""
    teacher = teacher_of(own.setting.name, len(own.x), 0) if method.target == "trajectory" else None
    return method.fit(own.ode, own.x, grid, teacher=teacher, chunk_size=CHUNK).plan


def ratios(name: str, preset: str, nfe: int) -> Entry:
    """A preset and its variants against the base."""
    own, test = draws(name)
    method = PRESETS[preset]
    grid = grid_of(method.base_solver.label, name, nfe)
    by_base, out = squares(run(plan_of(method.base_solver.label, own.setting, grid), test), test.final), {}
    for label, options in TARGETS.items():
        plan = fitted(replace(method, **options), own, grid)  # type: ignore[arg-type]
        by_fit = squares(run(plan, test), test.final)
        apart = [e.sqrt() > APART for e in (by_base, by_fit)]
        rest = ~(apart[0] | apart[1])
        out[label] = {
            "ratio": paired_ratio(by_fit, by_base),
            "apart": [int(a.sum()) for a in apart],
            "rest": [float(e[rest].mean().sqrt()) for e in (by_base, by_fit)],
        }
    return out


def carried(plan: Plan, test: Batch) -> Tensor:
    """The error of each step, carried to the end by the exact flow, [steps, samples, components]."""
    states, network = [test.x], not is_closed_form(test.setting)
    plan.run(test.ode, test.x, callback=lambda _k, _t, state: states.append(state.clone()))
    ends = []
    for t, x in zip(plan.grid, states, strict=True):
        level = test.ode.schedule.noise_to_signal(t)
        if network and level > test.setting.sigma_min:
            low = test.setting.sigma_min
            x = Teacher.solve(test.ode, x, t, 0.0, steps=CARRY_STEPS, sigma_min=low, chunk_size=CHUNK).final
        elif network and level > 0:
            x = test.ode.data(x, t)
        elif level > 0:  # at level 0 the states are the data
            x = iia.reference.solve(test.ode, x, t, 0.0, rtol=1e-6, atol=1e-6, sigma_min=min(level, 2e-3) / 2)
        ends.append(x.double())
    found = torch.stack(ends).flatten(2)
    return found[1:] - found[:-1]


def by_step(name: str, preset: str, nfe: int) -> Entry:
    """Sums of step errors of a base, a preset, and the preset with the trajectory target."""
    own, test = draws(name)
    method = PRESETS[preset]
    base, test = method.base_solver.label, test.first(CARRIED[kind_of(name)])
    grid = grid_of(base, name, nfe)
    plans = {f"`{base}`": plan_of(base, own.setting, grid)}
    for label in ("as the paper", "trajectory"):
        plans[f"`{preset}`, {label}"] = fitted(replace(method, **TARGETS[label]), own, grid)  # type: ignore[arg-type]
    errors = {label: carried(plan, test) for label, plan in plans.items()}
    near = torch.stack([e.sum(dim=0).square().mean(dim=1).sqrt() <= APART for e in errors.values()]).all(dim=0)
    out = {}
    for label, every in errors.items():
        e = every[:, near]
        products, sizes = (e[1:] * e[:-1]).sum(dim=(1, 2)), e.flatten(1).norm(dim=1)
        out[label] = {
            "largest": float(e.square().flatten(1).mean(dim=1).max().sqrt()),
            "root_of_sum": float(e.square().sum(dim=0).mean().sqrt()),
            "end": float(e.sum(dim=0).square().mean().sqrt()),
            "cosine": float(products.sum() / (sizes[1:] * sizes[:-1]).sum()),
        }
    return out


def losing(name: str, nfes: list[int]) -> list[tuple[str, int]]:
    """Presets with a loss in the stored results of the acceptance page, and their numbers of evaluations."""
    found, store = [], Store(RESULTS / "acceptance")
    for nfe in sorted(nfes):
        rows = store.read(f"{name}-nfe{nfe:02}-seed0")
        for preset in PRESETS:
            row = rows.get(preset, {})
            if row.get("rmse") is not None and row.get("base_rmse") and row["rmse"] > row["base_rmse"]:
                found.append((preset, nfe))
    return sorted(found)


def fill(store: Store, options: argparse.Namespace) -> None:
    """Measure missing entries."""
    for name in options.settings:
        kind = kind_of(name)
        under = {"samples": SAMPLES[kind], "fit_samples": FIT_SAMPLES[kind], "seed": 0}
        for preset, nfe in losing(name, options.nfe):
            store.cell(name, f"{preset} {nfe}", under, partial(ratios, name, preset, nfe))
        for own, preset, nfe in ADDED_UP:
            if own == name and nfe in options.nfe:
                more = under | {"samples": CARRIED[kind]}
                store.cell(name, f"{preset} {nfe}{KEY}", more, partial(by_step, name, preset, nfe))


def page(files: dict[str, dict[str, Entry]]) -> str:
    """The whole page from the stored results."""
    order = [(name, key, e) for name in SETTINGS for key, e in sorted(files.get(name, {}).items())]
    compared = [(name, *key.split(), e) for name, key, e in order if not key.endswith(KEY)]
    compared.sort(key=lambda row: (SETTINGS.index(row[0]), row[1], int(row[2])))
    how = [HOW]
    for name in SETTINGS:
        if own := list(files.get(name, {}).values()):
            how.append(f"- {name}: {conditions(own, 'samples', 'fit_samples', 'seed')}.")
    missing: dict[str, list[str]] = {}
    for name in SETTINGS:
        for preset, nfe in losing(name, list(NFES)):
            if f"{preset} {nfe}" not in files.get(name, {}):
                missing.setdefault(f"`{preset}` on {name}", []).append(str(nfe))
    if missing:
        lacking = "; ".join(f"{where} at {', '.join(nfes)}" for where, nfes in missing.items())
        how.append(f"- Losing there and not measured here: {lacking}.")
    cell = "{0[0]:.2f} ± {0[1]:.2f}".format
    head = ["setting", "preset", "NFE", *TARGETS]
    lines = [[n, f"`{p}`", nfe, *(cell(e[label]["ratio"]) for label in TARGETS)] for n, p, nfe, e in compared]
    parts = [LEAD, table(head, lines, left=2), RESTS]
    head = [
        "preset", "NFE", "target", "base: other component", "fit: other component", "base: the rest, RMSE",
        "fit: the rest, RMSE",
    ]  # fmt: skip
    lines = [
        [f"`{p}`", nfe, label, *map(str, e[label]["apart"]), *map(number, e[label]["rest"])]
        for n, p, nfe, e in compared if n == "mixture64" for label in TARGETS
    ]  # fmt: skip
    parts += [table(head, lines, left=3), STEPS]
    head = [
        "setting", "solver", "NFE", "largest step's error", "root of the sum of squares", "error at the end",
        "adjacent steps",
    ]  # fmt: skip
    lines = [
        [name, label, key.removesuffix(KEY).split()[1], *(number(v[k]) for k in ("largest", "root_of_sum", "end")),
         number(v["cosine"], 2)]
        for name, key, e in order if key.endswith(KEY) for label, v in e.items() if label.startswith("`")
    ]  # fmt: skip
    return "\n".join([*parts, table(head, lines, left=2), WHY, *how])


def main() -> None:
    options = parser(__doc__ or "", "preset_losses", SETTINGS, NFES).parse_args()
    store = Store(options.out)
    if options.table:
        write_page(options.page, page(store.files()))
    else:
        fill(store, options)


if __name__ == "__main__":
    with torch.no_grad():
        main()
