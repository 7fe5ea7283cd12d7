"""The effect of each ingredient of a fit on its error: python benchmarks/ablation.py [--settings mixture64] [--nfe 6 10].

The design is a star, not the full product. The full recipe (DDIM, trajectory targets, window terms, two earlier steps, a
searched leap grid, Gauss-Newton refinement) changes in one ingredient at a time; the plain base on the default grid gains
one ingredient at a time. Each of five seeds has its own noise for fits and for measuring. Each result is stored under --out
as soon as it is measured, and a rerun measures missing results only. --table writes docs/results/ablation.md.
"""

import argparse
import math
import statistics
import warnings
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from common import (
    CHUNK,
    DEFAULT,
    KARRAS,
    Batch,
    Entry,
    Store,
    batch,
    conditions,
    error_of,
    karras_family,
    kind_of,
    measure,
    number,
    parser,
    say,
    table,
    teacher_of,
    write_page,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.autofit import LeapGrid, leap_grids, search_grid
from iia_ode.iia import IIA
from iia_ode.iia.batch import Batch as Samples
from iia_ode.iia.refinement import refine
from iia_ode.plan import Plan
from iia_ode.teacher import Teacher
from iia_ode.warm_starts import WarmStart

SETTINGS = ("mixture64", "digits")
NFES = (6, 10)
TRIALS = 16  # grids that a search tries with the model
EFFORT: dict[str, dict[str, int]] = {
    "closed form": {
        "samples": 4096, "fit_samples": 2048, "searched": 512, "refined": 1024, "gauss_newton": 12, "probes": 3,
        "adam": 100, "chunk": 1024,
    },
    "network": {
        "samples": 256, "fit_samples": 256, "searched": 96, "refined": 96, "gauss_newton": 6, "probes": 2, "adam": 60,
        "chunk": CHUNK,
    },
}  # fmt: skip
"""What a variant is given: draws that are measured, draws that fits see, how many of them grids are chosen on (a warm start is
made from the others) and how many are refined on (a quarter of those held out), iterations of either refinement, and sketched
rows per sample. A mixture needs more draws, because a few samples in a thousand make nearly the whole error."""


@dataclass(frozen=True)
class Recipe:
    """Ingredients of a fit.

    Attributes
    ----------
    target, terms, history, intercept : options of the closed-form fit; without terms the recipe is DDIM itself.
    grid : ``"default"``, ``"tuned"`` (Karras), ``"leap"``, or ``"warm"``: the first interval by a Gaussian warm start.
    refinement : ``"gauss-newton"``, ``"adam"`` or None.
    """

    target: str = "trajectory"
    terms: str | None = "window"
    history: int = 2
    intercept: bool = False
    grid: str = "leap"
    refinement: str | None = "gauss-newton"


FULL = Recipe()
BASE = Recipe(terms=None, grid="default", refinement=None)
CHANGED: dict[str, Recipe] = {
    "full recipe": FULL,
    "target: local": replace(FULL, target="local"),
    "target: substeps": replace(FULL, target="substeps"),
    "terms: iia-ddim": replace(FULL, terms="iia-ddim"),
    "history: 0": replace(FULL, history=0),
    "history: 1": replace(FULL, history=1),
    "history: 3": replace(FULL, history=3),
    "warm start": replace(FULL, grid="warm"),
    "grid: Karras, tuned": replace(FULL, grid="tuned"),
    "grid: Karras, default": replace(FULL, grid="default"),
    "refinement: Adam": replace(FULL, refinement="adam"),
    "refinement: none": replace(FULL, refinement=None),
    "refinement: none, intercept": replace(FULL, refinement=None, intercept=True),
    "refinement: none, warm start": replace(FULL, refinement=None, grid="warm"),
    "refinement: none, history: 1": replace(FULL, refinement=None, history=1),
    "refinement: none, target: local": replace(FULL, refinement=None, target="local"),
    "refinement: none, target: substeps": replace(FULL, refinement=None, target="substeps"),
    "refinement: none, terms: iia-ddim": replace(FULL, refinement=None, terms="iia-ddim"),
}
ADDED: dict[str, Recipe] = {
    "base: DDIM": BASE,
    "+ Karras grid tuned": replace(BASE, grid="tuned"),
    "+ leap grid": replace(BASE, grid="leap"),
    "+ iia-ddim, substeps (the paper)": replace(BASE, terms="iia-ddim", target="substeps", history=1),
    "+ iia-ddim, trajectory": replace(BASE, terms="iia-ddim", history=1),
    "+ window, substeps": replace(BASE, terms="window", target="substeps"),
    "+ window, trajectory": replace(BASE, terms="window"),
    "+ window, trajectory, intercept": replace(BASE, terms="window", intercept=True),
    "+ Gauss-Newton": replace(BASE, refinement="gauss-newton"),
    "+ Adam": replace(BASE, refinement="adam"),
}


@dataclass(frozen=True, eq=False)
class Bench:
    """Data, teacher and store of one cell, with which recipes are made and measured.

    Attributes
    ----------
    name, nfe, seed : setting, number of evaluations and seed of the cell.
    own, test : the fitting noise, and the unseen noise.
    teacher : trajectories of the fitting noise.
    effort : numbers of draws and iterations of a variant; results are stored under them.
    store : storage of the grids shared by recipes.
    """

    name: str
    nfe: int
    seed: int
    own: Batch
    test: Batch
    teacher: Teacher
    effort: dict[str, int]
    store: Store

    @property
    def file(self) -> str:
        """Of the results."""
        return f"{self.name}-nfe{self.nfe:02}-seed{self.seed}"


def effort_of(name: str, samples: int | None, fit_samples: int | None) -> dict[str, int]:
    """The effort of a variant on a setting, with the requested numbers of draws if given."""
    found = EFFORT[kind_of(name)]
    draws = fit_samples or found["fit_samples"]
    fewer = {"searched": min(found["searched"], draws // 2), "refined": min(found["refined"], draws)}
    return found | fewer | {"samples": samples or found["samples"], "fit_samples": draws}


# ---- making one ----------------------------------------------------------------------------------------------------------


def closed_form(
    recipe: Recipe, ode: iia.ProbabilityFlowODE, grid: Tensor, x: Tensor, teacher: Teacher, chunk: int
) -> Plan:
    """The plan of a recipe on a grid, before refinement."""
    if recipe.terms is None:
        return iia.plan.trace(iia.get_solver("ddim"), ode.schedule, grid, consistent=False)
    method = IIA(
        "ddim", terms=recipe.terms, target=recipe.target, history=recipe.history, ridge=1e-9, guard=False,
        intercept=recipe.intercept,
    )  # fmt: skip
    own = teacher if recipe.target == "trajectory" else None
    return method.fit(ode, x, grid, teacher=own, chunk_size=chunk).plan


def warm_start(bench: Bench, t_1: float) -> WarmStart:
    """The Gaussian warm start, from endpoints of fitting noise not used to choose grids."""
    return WarmStart.gaussian(
        bench.own.setting.schedule,
        bench.own.start,
        t_1,
        samples=bench.teacher.final[bench.effort["searched"] :],
    )


def warmed(
    recipe: Recipe, warm: WarmStart, ode: Any, grid: Tensor, x: Tensor, teacher: Teacher, chunk: int
) -> tuple[Plan, Tensor]:
    """The plan after a warm start and its initial states; the targets are the true trajectories."""
    x_1 = warm.apply(x, ode)
    later = teacher.restarted(warm.t_1, x_1)
    return closed_form(recipe, ode, grid, x_1, later, chunk), x_1


def grid_of(bench: Bench, kind: str, fitted: bool) -> tuple[Tensor, WarmStart | None]:
    """The grid, searched for the closed-form fit of the full recipe or for DDIM itself, and the warm start if any.

    With a warm start the grid begins at the end of the warm start.
    """
    setting, nfe = bench.own.setting, bench.nfe
    if kind == "default":
        return karras_family(setting, *DEFAULT)(nfe), None
    entry = bench.store.cell(
        bench.file, f"grid: {kind}{'' if fitted else ', DDIM'}", bench.effort, lambda: searched(bench, kind, fitted)
    )
    if kind == "tuned":
        return karras_family(setting, *entry["grid"])(nfe), None
    grid = LeapGrid(*entry["grid"]).times(nfe + (kind == "warm"), setting.schedule, bench.own.start)
    return (grid, None) if kind == "leap" else (grid[1:], warm_start(bench, float(grid[1])))


def searched(bench: Bench, kind: str, fitted: bool) -> Entry:
    """A search on the first samples: one half for fitting, the other for judging."""
    own, setting = bench.own, bench.own.setting
    recipe = replace(FULL if fitted else BASE, refinement=None)
    samples = bench.effort["searched"]
    if kind == "tuned":
        alive = [(math.inf, grid) for grid in KARRAS]
        for count, keep in ((samples // 3, 5), (samples, 1)):
            alive = sorted((karras_error(bench, recipe, grid, count), grid) for _, grid in alive)[:keep]
        return {"grid": list(alive[0][1])}

    def make(some: Samples, grid: Tensor) -> Plan:
        if kind == "leap":
            return closed_form(recipe, some.ode, grid, some.x, some.taught, chunk)
        warm = warm_start(bench, float(grid[1]))
        return warm.then(warmed(recipe, warm, some.ode, grid[1:], some.x, some.taught, chunk)[0])

    part, chunk = slice(0, samples), bench.effort["chunk"]
    scale = float(bench.teacher.final.double().square().mean().sqrt())
    found = search_grid(
        make, Samples(own.ode, own.x, bench.teacher, CHUNK)[part], bench.nfe + (kind == "warm"),
        leap_grids(setting.sigma_max, scale), trials=TRIALS,
    )  # fmt: skip
    leap = next(g for g in found.ranking if isinstance(g, LeapGrid))
    return {"grid": [leap.sigma_1, leap.sigma_min, leap.rho]}


def karras_error(bench: Bench, recipe: Recipe, grid: tuple[float, float], samples: int) -> float:
    """The error of a recipe on a Karras grid, fitted to half of the samples and measured on the other half."""
    own, n, half = bench.own, len(bench.own.x), samples // 2
    first, other = slice(0, half), slice(half, samples)
    try:
        times = karras_family(own.setting, *grid)(bench.nfe)
        plan = closed_form(
            recipe, own.ode.subset(first, n), times, own.x[first], bench.teacher.subset(first), bench.effort["chunk"]
        )
    except iia.IIAError:
        return math.inf
    part = Batch(own.setting, own.ode.subset(other, n), own.x[other], own.final[other], {})
    return error_of(plan, part)


def made(bench: Bench, recipe: Recipe) -> tuple[Plan, Entry]:
    """The plan of a recipe, and an account of its making."""
    grid, warm = grid_of(bench, recipe.grid, recipe.terms is not None or recipe.refinement is not None)
    own, about, chunk = bench.own, {}, bench.effort["chunk"]
    if warm is None:
        x = own.x
        plan = closed_form(recipe, own.ode, grid, x, bench.teacher, chunk)
    else:
        plan, x = warmed(recipe, warm, own.ode, grid, own.x, bench.teacher, chunk)
        about["sigma_1"] = warm.level
    if recipe.refinement is not None:
        effort, part = bench.effort, slice(0, bench.effort["refined"])
        start, exact = x[part], bench.teacher.final[part].to(x)
        model = own.ode.subset(part, len(x))
        iterations = effort["adam" if recipe.refinement == "adam" else "gauss_newton"]
        found = refine(
            model, start, plan, exact, method=recipe.refinement, iterations=iterations, probes=effort["probes"],
            chunk_size=chunk, seed=bench.seed,
        )  # fmt: skip
        plan = found.plan
        about |= {
            "iterations": len(found.iterations) - 1,
            "best": found.best,
            "gain": found.gain,
            "reason": found.status.value,
        }
    return (plan if warm is None else warm.then(plan)), about


def variant(bench: Bench, recipe: Recipe) -> Entry:
    """The measured entry of one cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", iia.errors.FingerprintWarning)
        try:
            plan, about = made(bench, recipe)
        except iia.IIAError as problem:
            return {"skipped": str(problem).splitlines()[0]}
    return measure(plan, bench.test) | about


def cells(store: Store, name: str, nfe: int, seed: int, options: argparse.Namespace) -> None:
    """All variants of one setting, number of evaluations and seed."""
    effort = effort_of(name, options.samples, options.fit_samples)
    file = f"{name}-nfe{nfe:02}-seed{seed}"
    wanted = {k: r for k, r in {**CHANGED, **ADDED}.items() if not options.variants or k in options.variants}
    known = store.read(file)
    if all(known.get(label, {}).get("under") == effort for label in wanted):
        say(f"{file}: all there")
        return
    own = batch(name, effort["fit_samples"], seed, False, 90)
    test = batch(name, effort["samples"], seed, True, 150)
    bench = Bench(name, nfe, seed, own, test, teacher_of(name, effort["fit_samples"], seed), effort, store)
    for label, recipe in wanted.items():
        store.cell(file, label, effort, lambda r=recipe: variant(bench, r))  # type: ignore[misc]


# ---- the page ------------------------------------------------------------------------------------------------------------

LEAD = """# What each ingredient is worth

Added to DDIM alone on mixture64, Gauss-Newton refinement lowers the error most at 6 evaluations, and a closed-form fit to
the trajectory lowers the error most at 10. In the full recipe, replacing the leap grid by the default Karras grid raises
the error most; without refinement, replacing the trajectory target by the sub-step target does.

One or two samples in a hundred end in another component of the mixture. They make most of the RMS error, and the others
make the median. Without refinement, the trajectory target has a much lower RMS error than the local targets; with
refinement, the local target is as good. Refinement brings the median sample several times nearer to the truth and changes
the RMS error little. An intercept without refinement lowers the RMS error by about a tenth.
"""

HOW = """## How the ingredients were measured

`python benchmarks/ablation.py` measures whatever the stored results lack, and `python benchmarks/ablation.py --table`
writes this page. Errors are root mean square (RMS) differences per component to a converged reference, on noise used by no
fit and no choice. The tables give mean and standard deviation over seeds; each seed has its own noise for fits and for
measuring. A ratio is the geometric mean of the ratios within each seed. *Median sample* is the median of the errors of
single samples, averaged over seeds.

The design is a star around each of two centers, not the full product: one or two ingredients change at a time. The base is
always DDIM. A grid is searched once per seed and shared by the variants: for the closed-form fit of the full recipe or,
where nothing is fitted, for DDIM. The full recipe is `terms="window"`, `target="trajectory"`, two earlier steps and a leap
grid; then Gauss-Newton refines all weights and times. The warm start is Gaussian, with moments from teacher endpoints. It
replaces the first interval, and the evaluations saved there go to the rest of the grid.
"""

Found = dict[int, dict[int, dict[str, Entry]]]
"""By number of evaluations, seed and label."""


def figures(found: Found, nfe: int, label: str, over: str) -> list[str]:
    """Mean and spread over seeds, ratio to another variant seed by seed (geometric mean), median sample."""
    seeds = found[nfe]
    own = [rows[label] for rows in seeds.values() if rows.get(label, {}).get("rmse") is not None]
    if not own:
        skipped = [rows[label]["skipped"] for rows in seeds.values() if rows.get(label, {}).get("skipped")]
        return ["not possible" if skipped else "-", "-", "-"]
    errors = [entry["rmse"] for entry in own]
    spread = statistics.stdev(errors) if len(errors) > 1 else None
    pairs = [
        (rows[label]["rmse"], rows[over]["rmse"])
        for rows in seeds.values()
        if all(rows.get(k, {}).get("rmse") for k in (label, over))
    ]
    ratio = statistics.geometric_mean([a / b for a, b in pairs]) if pairs else None
    median = statistics.fmean(entry["median"] for entry in own)
    return [f"{number(statistics.fmean(errors))} ± {number(spread)}", number(ratio, 2), number(median)]


def star(found: Found, labels: list[str], over: str, of: str) -> str:
    """A table of variants."""
    nfes = sorted(found)
    heads = [part for n in nfes for part in (f"{n}: error ± spread", f"ratio to {of}", "median sample")]
    lines = [[label, *(cell for n in nfes for cell in figures(found, n, label, over))] for label in labels]
    return table(["variant", *heads], lines)


def page(files: dict[str, dict[str, Entry]]) -> str:
    """The whole page from the stored results."""
    found: dict[str, Found] = {}
    for file, rows in files.items():
        name, nfe, seed = file.rsplit("-", 2)
        cell = found.setdefault(name, {}).setdefault(int(nfe.removeprefix("nfe")), {})
        cell[int(seed.removeprefix("seed"))] = rows
    out = [LEAD]
    for name, cells_of in sorted(found.items()):
        entries = [entry for seeds in cells_of.values() for rows in seeds.values() for entry in rows.values()]
        seeds = sorted({seed for by_seed in cells_of.values() for seed in by_seed})
        keys = ("samples", "fit_samples", "searched", "refined", "gauss_newton", "adam", "probes")
        out.append(f"## {name}\n\n{conditions(entries, *keys)}; seeds {', '.join(map(str, seeds))}.\n")
        out.append("One ingredient of the full recipe changed:\n")
        out.append(star(cells_of, list(CHANGED), "full recipe", "full"))
        out.append("One ingredient added to the base:\n")
        out.append(star(cells_of, list(ADDED), "base: DDIM", "base"))
    return "\n".join([*out, HOW])


def main() -> None:
    found = parser(__doc__ or "", "ablation", SETTINGS, NFES)
    found.add_argument("--seeds", type=int, default=5, help="how many, from --seed on (default: %(default)s)")
    given = {kind: (effort["samples"], effort["fit_samples"]) for kind, effort in EFFORT.items()}
    found.add_argument("--samples", type=int, help=f"unseen draws that are measured (default: the first of {given})")
    found.add_argument("--fit-samples", type=int, help="draws that fits see (default: the second)")
    found.add_argument("--variants", nargs="+", help="only these")
    options = found.parse_args()
    store = Store(options.out)
    if not options.table:
        for name, seed, nfe in product(
            options.settings, range(options.seed, options.seed + options.seeds), options.nfe
        ):
            cells(store, name, nfe, seed, options)
    else:
        write_page(options.page, page(store.files()))


if __name__ == "__main__":
    main()
