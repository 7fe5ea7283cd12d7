"""Endpoint error of fitted solvers against the best classic solver: python benchmarks/acceptance.py [--settings digits].

Fits and choices use one set of noise draws; errors are measured on unseen draws, against a converged reference. Each result is
stored under --out as soon as it is measured, and a rerun measures missing results only. --table writes
docs/results/acceptance.md.

Classic solvers are all registered solvers with exactly the given number of evaluations, each with its Karras grid tuned over
rho and sigma_min. The search for the best pair of solver and grid is exact (classic.py).
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from classic import able, classic_plan, classic_search
from common import (
    CHOICE,
    CHUNK,
    DEFAULT,
    Batch,
    Entry,
    Store,
    batch,
    conditions,
    error_of,
    is_closed_form,
    karras_family,
    kind_of,
    levels_for,
    measure,
    number,
    parser,
    plan_of,
    say,
    setting_of,
    start_of,
    table,
    write_page,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.autofit import BUDGETS, FreeGrid, LeapGrid, leap_grids, search_grid
from iia_ode.experiments import Setting
from iia_ode.iia import IIA, PRESETS
from iia_ode.iia.batch import Batch as Samples
from iia_ode.plan import Plan
from iia_ode.teacher import Teacher

SETTINGS = ("mixture64", "digits", "patches")
NFES = (4, 5, 6, 8, 10, 15)
FIT_SAMPLES = {"closed form": 2048, "network": 256}  # draws of fits and choices: more where draws are free
SAMPLES = {"closed form": 4096, "network": 512}  # unseen draws, for measuring
TEACHER_STEPS = 60  # of the teacher of scalar weights
TRIALS = 16  # grids that a search tries with the model
LEAPED = 3  # classic solvers with a searched leap grid
CHOSEN = ("classic-leap", "scalar", *BUDGETS)  # the rows that depend on the rule of choice
ROWS = {
    "classic": "best classic, Karras grid tuned",
    "classic-leap": "best classic, leap grid searched",
    "scalar": "closed form, scalar weights",
    **{name: f'`budget="{name}"`' for name in BUDGETS},
}


# ---- classic solvers -----------------------------------------------------------------------------------------------------


def classic(name: str, nfe: int, own: Batch) -> Entry:
    """The best of all classic solvers with tuned grids."""
    begun = time.perf_counter()
    best = classic_search(name, nfe, own)
    solver, (rho, level) = best.pair
    return {
        "solver": solver,
        "rho": rho,
        "sigma_min": level,
        "fit_rmse": best.rmse,
        "solvers": len(able(name, nfe)),
        "pairs": best.pairs,
        "finished": best.finished,
        "seconds": time.perf_counter() - begun,
        "sample_evaluations": best.sample_evaluations,
    }


def leap_plan(solver: str, name: str, nfe: int, grid: LeapGrid | FreeGrid) -> Plan:
    """The plan of a registered solver on a leap grid."""
    setting = setting_of(name)
    levels = levels_for(solver, name, nfe)
    if levels is None:
        raise iia.errors.GridError(f"{solver} cannot make {nfe} evaluations.")
    return plan_of(solver, setting, grid.times(levels, setting.schedule, start_of(setting)))


def free_grid(grid: LeapGrid | FreeGrid, nfe: int, setting: Setting) -> FreeGrid:
    """The levels of a grid."""
    return FreeGrid.of(grid.times(nfe, setting.schedule, start_of(setting)), setting.schedule)


def classic_leap(name: str, nfe: int, own: Batch, found: LeapGrid, best: str) -> Entry:
    """The best of all classic solvers on leap grids: on the grid found for the fit, and on their own.

    All solvers run on the leap grid found for the fit. The best three there and the best solver on Karras grids, among solvers
    with one evaluation per step, then get the grid search of the fit, with fixed weights.
    """
    setting, begun, spent = own.setting, time.perf_counter(), 0
    tried: list[tuple[float, str, FreeGrid]] = []
    for solver in able(name, nfe):
        try:
            plan = leap_plan(solver, name, nfe, found)
            tried.append((error_of(plan, own), solver, FreeGrid.of(torch.tensor(plan.grid), setting.schedule)))
        except iia.IIAError:
            continue
        spent += nfe * len(own.x)
    tried.sort(key=lambda entry: entry[0])
    on_found = tried[0][0]
    simple = [s for s in dict.fromkeys([*(s for _, s, _ in tried), best]) if levels_for(s, name, nfe) == nfe]
    chosen = list(dict.fromkeys([*simple[:LEAPED], *([best] if best in simple else [])]))
    samples = Samples(own.ode, own.x, trajectories(own), CHUNK)
    scale = float(own.final.double().square().mean().sqrt())
    for solver in chosen:

        def unfitted(_samples: Samples, grid: Tensor, solver: str = solver) -> Plan:
            return plan_of(solver, setting, grid)

        with own.ode.counting() as counted:
            search = search_grid(unfitted, samples, nfe, leap_grids(setting.sigma_max, scale), trials=TRIALS)
            free = free_grid(search.best, nfe, setting)
        spent += counted.samples
        tried.append((error_of(leap_plan(solver, name, nfe, free), own), solver, free))
        spent += nfe * len(own.x)
    error, solver, grid = min(tried, key=lambda entry: entry[0])
    return {
        "solver": solver,
        "levels": list(grid.levels),
        "searched": chosen,
        "fit_rmse": error,
        "on_found_grid": on_found,
        "seconds": time.perf_counter() - begun,
        "sample_evaluations": spent,
    }


# ---- fitted solvers ------------------------------------------------------------------------------------------------------


_TEACHERS: dict[int, Teacher] = {}


def trajectories(own: Batch) -> Teacher:
    """The teacher of the fitting noise, memoized; for searches outside a fit."""
    if id(own) not in _TEACHERS:
        setting = own.setting
        _TEACHERS[id(own)] = Teacher.solve(
            own.ode, own.x, own.start, setting.schedule.t_data,
            steps=TEACHER_STEPS, sigma_min=setting.sigma_min, chunk_size=CHUNK,
        )  # fmt: skip
    return _TEACHERS[id(own)]


def scalar(nfe: int, own: Batch, test: Batch) -> Entry:
    """A closed-form fit of scalar weights to trajectory targets on a searched grid; no intercept, no warm start."""
    setting, begun = own.setting, time.perf_counter()
    method = IIA("ddim", terms="window", target="trajectory", history=2, ridge=1e-9, guard=False)

    def closed(samples: Samples, grid: Tensor) -> Plan:
        return method.fit(samples.ode, samples.x, grid, teacher=samples.teacher).plan

    with own.ode.counting() as counted:
        teacher = Teacher.solve(
            own.ode, own.x, own.start, setting.schedule.t_data,
            steps=TEACHER_STEPS, sigma_min=setting.sigma_min, chunk_size=CHUNK,
        )  # fmt: skip
        samples = Samples(own.ode, own.x, teacher, CHUNK)
        candidates = leap_grids(setting.sigma_max, float(teacher.final.double().square().mean().sqrt()))
        search = search_grid(closed, samples, nfe, candidates, trials=TRIALS)
        leap = next(g for g in search.ranking if isinstance(g, LeapGrid))
        grid = search.best.times(nfe, setting.schedule, own.start)
        plan = method.fit(own.ode, own.x, grid, teacher=teacher, chunk_size=CHUNK).plan
    return {
        **measure(plan, test),
        "grid": [leap.sigma_1, leap.sigma_min, leap.rho],
        "levels": list(free_grid(search.best, nfe, setting).levels),
        "seconds": time.perf_counter() - begun,
        "sample_evaluations": counted.samples,
    }


def budget_row(name: str, nfe: int, own: Batch, test: Batch, seed: int) -> Entry:
    """`iia_ode.fit` with all defaults."""
    begun = time.perf_counter()
    # Closed forms draw from the marginal at the noisiest level, which is not quite noise: such states are taken as they are.
    start = {"x": own.x} if is_closed_form(own.setting) else {"noise": own.x / own.setting.sigma_max}
    found = iia.fit(own.ode, nfe, **start, budget=name, seed=seed)
    seconds, recipe = time.perf_counter() - begun, found.record.search
    if found.plan.nfe != nfe:
        raise iia.errors.PlanError(f"a fit for {nfe} evaluations makes {found.plan.nfe}.")
    return {
        **measure(found.plan, test),
        "chosen": recipe.chosen.name,
        "held_out_rmse": found.record.endpoint.fit,
        "ingredients": [[i.name, i.error] for i in recipe.ingredients],
        "grid": list(found.plan.grid),
        "seconds": seconds,
        "sample_evaluations": found.record.sample_evaluations,
    }


def preset_row(preset: str, name: str, nfe: int, own: Batch, test: Batch) -> Entry:
    """A preset of the paper and its base on the default grid."""
    method, setting = PRESETS[preset], own.setting
    solver = method.base_solver.label
    levels = levels_for(solver, name, nfe)
    if levels is None:
        return {"skipped": f"{solver} cannot make {nfe} evaluations"}
    grid = karras_family(setting, *DEFAULT)(levels)
    begun = time.perf_counter()
    try:
        found = method.fit(own.ode, own.x, grid, chunk_size=CHUNK)
    except iia.errors.NonFiniteError as error:
        return {"skipped": str(error).splitlines()[0]}
    base = measure(plan_of(solver, setting, grid), test)
    return {
        **measure(found.plan, test),
        "solver": solver,
        "base_rmse": base["rmse"],
        "seconds": time.perf_counter() - begun,
        "sample_evaluations": found.record.sample_evaluations,
    }


# ---- all of it -----------------------------------------------------------------------------------------------------------


def cells(store: Store, name: str, nfe: int, options: argparse.Namespace) -> None:
    """All rows of one setting at one number of evaluations."""
    seed, file = options.seed, f"{name}-nfe{nfe:02}-seed{options.seed}"
    kind = kind_of(name)
    samples, fitted = options.samples or SAMPLES[kind], options.fit_samples or FIT_SAMPLES[kind]
    under = {"samples": samples, "fit_samples": fitted, "seed": seed}

    def own() -> Batch:
        return batch(name, fitted, seed, False, 90)

    def test() -> Batch:
        return batch(name, samples, seed, True, 150)

    def conditions_of(row: str, **more: Any) -> Entry:
        return under | more | ({"choice": CHOICE} if row in CHOSEN else {})

    def cell(row: str, make: Callable[[], Entry], **more: Any) -> Entry:
        if options.rows and row not in options.rows:
            return {}
        return store.cell(file, row, conditions_of(row, **more), lambda: make() | {"reference": test().about})

    def search(row: str, make: Callable[[], Entry], plan: Callable[[Entry], Plan]) -> Entry:
        """A cell that keeps its stored choice where only the unseen samples have changed; no choice depends on them."""
        more = conditions_of(row)
        known = store.read(file).get(row)
        same = known is not None and known["under"] | {"samples": samples} == more
        keys = ("reference", "under", "library", "code", "cell_seconds")
        chosen = {k: v for k, v in (known or {}).items() if k not in keys}

        def made() -> Entry:
            entry = chosen if same else make()
            return entry | measure(plan(entry), test())

        return cell(row, made)

    best = search(
        "classic",
        lambda: classic(name, nfe, own()),
        lambda e: classic_plan(e["solver"], name, nfe, e["rho"], e["sigma_min"]),
    )
    found = cell("scalar", lambda: scalar(nfe, own(), test()))
    if best and found:
        search(
            "classic-leap",
            lambda: classic_leap(name, nfe, own(), LeapGrid(*found["grid"]), best["solver"]),
            lambda e: leap_plan(e["solver"], name, nfe, FreeGrid(tuple(e["levels"]))),
        )
    for name_of, budget in BUDGETS.items():
        cell(name_of, lambda b=name_of: budget_row(b, nfe, own(), test(), seed), budget=asdict(budget))  # type: ignore[misc]
    for preset in PRESETS:
        cell(preset, lambda preset=preset: preset_row(preset, name, nfe, own(), test()))  # type: ignore[misc]


# ---- the page ------------------------------------------------------------------------------------------------------------

TITLE = "# Fitted solvers against the best classic solver\n"

HOW = """## How the comparison was measured

`python benchmarks/acceptance.py` measures whatever the stored results lack, and `python benchmarks/acceptance.py --table`
writes this page. Errors are root mean square (RMS) differences per component between final states and a converged
reference. The noise is unseen: no fit and no choice of solver, grid or option used it (odd seeds; fits draw from even
seeds). Columns are numbers of evaluations (NFE).

- *Best classic*: the lowest error of all registered solvers that make exactly the given number of evaluations. The Karras
  grid of each solver is tuned on the fitting noise over rho in {3, 5, 7, 9} and sigma_min in {0.002, 0.01, 0.03, 0.06, 0.1,
  0.2, 0.3}. The search is exact: a pair of solver and grid is dropped only once its sum of squared errors exceeds the whole
  sum of the winner. An evaluation shared by several pairs counts once. Some winners have rho = 9, the largest value tried,
  and larger values might be better still.
- *Best classic, leap grid searched*: all solvers run on the leap grid found for the fit. The best three solvers there and
  the best solver on Karras grids, among solvers with one evaluation per step, then get the grid search of the fit while
  their weights stay fixed. The row separates the gain of the weights from the gain of the grid. The mixture alone has it.
- *Closed form, scalar weights*: `terms="window"`, `target="trajectory"`, two earlier steps, a grid searched for this fit;
  no intercept, no warm start, no gradients.
- *Budgets*: `iia_ode.fit` with its defaults. `thorough` draws additional noise where fewer than 384 draws are given, and
  makes its final choice on as many fresh draws.
- *Seeds*: the defaults of the library were revised several times with the results of seed 0 in view, although no option was
  set by the unseen noise of seed 0. The noise of the other seeds informed no revision.
- *Sample evaluations* were counted by the version of the code that made the row. Searches now memoize evaluations, and most
  fits take fewer.
- *Standard error of a ratio*: the two errors are taken as independent. They share their noise, and the figure is an upper
  bound.
- *Median sample*: the median of the errors of single samples. Where the median lies far below the error, a few samples that
  end in another mode make up nearly all of the error.
"""

Found = dict[int, dict[str, Entry]]
"""By number of evaluations, then by row."""


def thresholds(name: str) -> list[tuple[str, str, dict[int, float]]]:
    """Thresholds of a setting: (text, row, highest ratio to the best classic by number of evaluations)."""
    out = [("scalar closed form", "scalar", {5: 0.85, 6: 0.72, 8: 0.72, 10: 0.72})]
    for budget in ("standard", "thorough"):
        if name == "digits":
            out.append((budget, budget, dict.fromkeys((5, 6, 8, 10), 0.35)))
        if name == "patches":
            out.append((f"{budget}, a prototype's", budget, {5: 0.69, 6: 0.51, 8: 0.64, 10: 0.49}))
            out.append((f"{budget}, goal", budget, dict.fromkeys((5, 6, 8, 10), 0.50)))
    return out


def ratio(found: Found, row: str, nfe: int) -> float | None:
    """Error divided by the error of the best classic solver; None where either is missing."""
    entry, best = found[nfe].get(row), found[nfe].get("classic")
    if not entry or not best or entry.get("rmse") is None or not best.get("rmse"):
        return None
    return float(entry["rmse"] / best["rmse"])


def doubt(found: Found, row: str, nfe: int) -> float | None:
    """Standard error of the ratio with both errors taken as independent: an upper bound."""
    value = ratio(found, row, nfe)
    parts = [found[nfe].get(k, {}) for k in (row, "classic")] if nfe in found else []
    if value is None or not all("error" in e for e in parts):
        return None
    return value * math.hypot(*(e["error"] / e["rmse"] for e in parts))


def section(name: str, seed: int, found: Found) -> str:
    """The section of the page on one setting and seed."""
    nfes = sorted(n for n, rows in found.items() if set(rows) & set(ROWS))
    entries = [entry for rows in found.values() for entry in rows.values()]
    out = [f"## {name}{f', noise of seed {seed}' if seed else ''}\n"]
    about = [e["reference"] for e in entries if "reference" in e]
    for text in dict.fromkeys(
        f"Reference: {a['reference']}" + (f"; RMS distance {a['check']}" if "check" in a else "") for a in about
    ):
        out.append(f"{text}.")
    out.append(f"{conditions(entries, 'samples', 'fit_samples', 'seed')}.\n")
    if old := [f"{ROWS[row]} ({', '.join(ns)})" for row in CHOSEN if (ns := outdated(found, row))]:
        out.append(f"**Made with an earlier rule of choice**, at these numbers of evaluations: {'; '.join(old)}.\n")
    head = ["error (RMSE per component, ± standard error)", *map(str, nfes)]

    def error(entry: Entry | None) -> str:
        return "-" if not entry or "rmse" not in entry else f"{number(entry['rmse'])} ± {number(entry['error'])}"

    known = there(found)
    out.append(table(head, ([text, *(error(found[n].get(row)) for n in nfes)] for row, text in known.items())))
    head = ["ratio to the best classic", *map(str, nfes)]
    rest = {row: text for row, text in known.items() if row != "classic"}
    out.append(table(head, ([t, *(number(ratio(found, r, n), 2) for n in nfes)] for r, t in rest.items())))
    out.append(spread(found, nfes))
    out.append(judged(name, found))
    out.append(costs(found, nfes))
    out.append(winners(found, nfes))
    if measured := sorted(n for n, rows in found.items() if set(rows) & set(PRESETS)):
        out.append(presets(found, measured))
    return "\n".join(part for part in out if part)


def there(found: Found) -> dict[str, str]:
    """The rows measured at some number of evaluations."""
    return {row: text for row, text in ROWS.items() if any(row in rows for rows in found.values())}


def outdated(found: Found, row: str) -> list[str]:
    """Numbers of evaluations at which a row was made by an earlier rule of choice."""
    return [str(n) for n in sorted(found) if row in found[n] and found[n][row]["under"].get("choice") != CHOICE]


def spread(found: Found, nfes: list[int]) -> str:
    """Medians, and shares of bad samples."""

    def cell(entry: Entry | None) -> str:
        return "-" if not entry or "rmse" not in entry else f"{number(entry['median'])}, {100 * entry['bad']:.1f}%"

    head = ["median sample, share of samples above 0.1", *map(str, nfes)]
    return table(head, ([text, *(cell(found[n].get(row)) for n in nfes)] for row, text in there(found).items()))


def judged(name: str, found: Found) -> str:
    """Thresholds beside measured ratios."""
    lines = []
    for text, row, limits in thresholds(name):
        for nfe, limit in limits.items():
            value = ratio(found, row, nfe) if nfe in found else None
            verdict = "not measured" if value is None else "yes" if value <= limit else "**no**"
            margin = number(doubt(found, row, nfe) if nfe in found else None, 3)
            lines.append([text, str(nfe), number(limit, 2), number(value, 3), margin, verdict])
    return table(
        ["threshold, ratio to the best classic", "NFE", "at most", "measured", "± standard error", "met"], lines
    )


def costs(found: Found, nfes: list[int]) -> str:
    """Sample evaluations of fits and searches."""

    def cell(entry: Entry | None) -> str:
        if not entry or "sample_evaluations" not in entry:
            return "-"
        return f"{entry['sample_evaluations'] / 1000:.0f}k"

    head = ["sample evaluations of the fit or search", *map(str, nfes)]
    return table(head, ([text, *(cell(found[n].get(row)) for n in nfes)] for row, text in there(found).items()))


def winners(found: Found, nfes: list[int]) -> str:
    """The best classic solvers, and the choices of the fits."""
    lines = []
    for n in nfes:
        best, leap = found[n].get("classic"), found[n].get("classic-leap")
        plain = f"`{best['solver']}`, rho {best['rho']:g}, sigma_min {best['sigma_min']:g}" if best else "-"
        how = "-" if not best else f"{best['solvers']} solvers, {best['pairs']} pairs"
        grid = f"`{leap['solver']}`, {', '.join(f'{v:.2g}' for v in leap['levels'])}" if leap else "-"
        chosen = [found[n].get(b, {}).get("chosen", "-") for b in BUDGETS]
        lines.append([str(n), plain, how, grid, *chosen])
    head = [
        "NFE",
        "best classic",
        "of",
        "best classic on a leap grid, its levels",
        *(f"{b} chose" for b in BUDGETS),
    ]
    return table(head, lines, left=len(head))


def presets(found: Found, nfes: list[int]) -> str:
    """The paper's methods against their own bases."""

    def cell(entry: Entry | None) -> str:
        if not entry or not entry.get("base_rmse") or entry.get("rmse") is None:
            return "-"
        value = entry["rmse"] / entry["base_rmse"]
        verdict = " **loses**" if value > 1 else " **ties**" if value == 1 else ""
        return f"{number(entry['rmse'])} / {number(entry['base_rmse'])} = {value:.2f}{verdict}"

    head = ["the paper's methods on the default grid: error / base's error = ratio", *map(str, nfes)]
    return table(head, ([f"`{p}`", *(cell(found[n].get(p)) for n in nfes)] for p in PRESETS))


def page(files: dict[str, dict[str, Entry]]) -> str:
    """The whole page from the stored results."""
    found: dict[tuple[str, int], Found] = {}
    for file, rows in files.items():
        name, nfe, seed = file.rsplit("-", 2)
        found.setdefault((name, int(seed.removeprefix("seed"))), {})[int(nfe.removeprefix("nfe"))] = rows
    order = {name: k for k, name in enumerate(("digits", "patches", "mixture64"))}
    found = dict(sorted(found.items(), key=lambda item: (order.get(item[0][0], 9), item[0])))
    return "\n".join([TITLE, answer(found), *(section(*key, own) for key, own in found.items()), HOW])


def answer(found: dict[tuple[str, int], Found]) -> str:
    """The first sentence of the page and its table: the ratios of every budget, by setting and seed."""
    ranges, lines = [], []
    nfes = sorted({n for own in found.values() for n, rows in own.items() if set(rows) & set(BUDGETS)})
    for name in dict.fromkeys(name for name, _ in found):
        standard = [ratio(own, "standard", n) for (other, _), own in found.items() if other == name for n in own]
        if known := [value for value in standard if value is not None]:
            ranges.append(f"{min(known):.2f} to {max(known):.2f} on {name}")
    for (name, seed), own in found.items():
        for budget in BUDGETS:
            cells = [number(ratio(own, budget, n) if n in own else None, 2) for n in nfes]
            if set(cells) - {"-"}:
                lines.append([f"{name}, seed {seed}", f"`{budget}`", *cells])
    if not lines:
        return ""
    text = (
        f"On unseen noise, the endpoint error of `iia_ode.fit` at budget `standard`, divided by the error of the best tuned "
        f"classic solver, is {'; '.join(ranges)}."
    )
    return f"{text}\n\n{table(['ratio to the best classic', 'budget', *map(str, nfes)], lines, left=2)}"


def main() -> None:
    found = parser(__doc__ or "", "acceptance", SETTINGS, NFES)
    found.add_argument("--samples", type=int, help=f"unseen draws that are measured (default: {SAMPLES})")
    found.add_argument("--fit-samples", type=int, help=f"draws that fits see (default: {FIT_SAMPLES})")
    found.add_argument("--rows", nargs="+", help=f"only these of {', '.join([*ROWS, *PRESETS])}")
    options = found.parse_args()
    store = Store(options.out)
    if not options.table:
        for name, nfe in product(options.settings, options.nfe):
            say(f"{name}, {nfe} evaluations, from {start_of(setting_of(name)):g}")
            cells(store, name, nfe, options)
    else:
        write_page(options.page, page(store.files()))


if __name__ == "__main__":
    main()
