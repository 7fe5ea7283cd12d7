"""What is said about a fit: the report of each step, the table, and an explanation in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..forms import conversion
from ..plan import Combine, Evaluate, LinearMap, Plan, Vector
from ..plan.vectors import Weight, is_number, weight_mean
from ..schedules.stored import brief

__all__ = ["StepReport", "describe_fit", "explain_fit", "table_of", "table_of_weights"]

_SMALL = 1e-3  # sum of weights on the past that is not worth a word
_GROUPS = 12  # of maps, up to which each has a table of its own


@dataclass(frozen=True)
class StepReport:
    """How the fit of one step went.

    Attributes
    ----------
    index, t, s : the step.
    symbols, values, base_values : the paper's coefficients: names, values in use, and the values that give the base.
    corrections : what is in use, in units of the directions; zeros where the step keeps the base.
    before, after : root mean square distance to the target per component on the samples fitted to, base and least squares.
    held_before, held_after : the same on held-out samples; None where none were held out.
    accepted : whether the least-squares solution is in use; False where it did not help held-out samples.
    rank, condition : of the least-squares problem with columns of unit length.
    ridge : relative ridge used.
    intercept : root mean square of the constant that is added, 0 where there is none.
    """

    index: int
    t: float
    s: float
    symbols: tuple[str, ...]
    values: tuple[float, ...]
    base_values: tuple[float, ...]
    corrections: tuple[float, ...]
    before: float
    after: float
    held_before: float | None
    held_after: float | None
    accepted: bool
    rank: int
    condition: float
    ridge: float
    intercept: float

    @property
    def gain(self) -> float:
        """Share of the residual that the fit removes, on held-out samples where there are any; negative if it adds."""
        before, after = self.before, self.after
        if self.held_before is not None and self.held_after is not None:
            before, after = self.held_before, self.held_after
        return 1 - after / before if before else 0.0


def table_of(reports: tuple[StepReport, ...]) -> str:
    """Every coefficient in the paper's symbols, and the step's residuals without and with it."""
    held = any(r.held_before is not None for r in reports)
    head = f"{'step':>4} {'t':>9} {'to':>9}  {'residual':>9} {'fitted':>9}"
    head += f"  {'held out':>9} {'fitted':>9}" if held else ""
    lines = [head + f"  {'rank':>4}  coefficients (base value)"]
    for r in reports:
        parts = [f"{n} = {v:.4g} ({b:.3g})" for n, v, b in zip(r.symbols, r.values, r.base_values, strict=True)]
        parts += [f"intercept {r.intercept:.2g}"] if r.intercept else []
        parts += [] if r.accepted else ["refused"]
        line = f"{r.index:>4} {r.t:>9.4g} {r.s:>9.4g}  {r.before:>9.2e} {r.after:>9.2e}"
        if held:
            line += " " + "".join(f" {'-' if v is None else f'{v:.2e}':>9}" for v in (r.held_before, r.held_after))
        lines.append(f"{line}  {r.rank:>4}  {', '.join(parts)}")
    return "\n".join(lines)


def table_of_weights(plan: Plan) -> str:
    """The plan as weights on its initial state and its data estimates: a row per state that is evaluated, and the last.

    Where weights are linear maps, such a table for each of the groups that they tell apart; for more than a few groups, as of
    the map of a warm start, one of means, and it says so.
    """
    form = plan.canonical()
    rows = (*form.states, form.final)
    maps = [w for row in rows for w in row.weights.values() if isinstance(w, LinearMap)]
    names = maps[0].projections.names if maps and all(m.projections == maps[0].projections for m in maps) else ()
    if 0 < len(names) <= _GROUPS:
        tables = [f"{name}\n{_weights(plan, rows, partial(_of_group, g))}" for g, name in enumerate(names)]
    else:
        tables = [_weights(plan, rows, weight_mean)]
    shown = (float, int, LinearMap) if len(tables) > 1 else (float, int)
    if any(not isinstance(w, shown) for row in rows for w in row.weights.values()):
        tables.append("Weights that are maps or tensors are given by their mean over components.")
    return "\n\n".join(tables)


def _weights(plan: Plan, rows: Sequence[Vector], number: Callable[[Weight], float]) -> str:
    times = [f"{t:.4g}" for t in (*plan.evaluation_times, plan.grid[-1])]
    lines = [f"{'state at':>9}  weights on x_0 and on D_1, D_2, ..."]
    for time, row in zip(times, rows, strict=True):
        weights = [f"{number(row.weights.get(j, 0.0)):>9.4f}" for j in range(max(row.weights, default=0) + 1)]
        lines.append(f"{time:>9}  {' '.join(weights)}{' + constant' if row.constant is not None else ''}")
    return "\n".join(lines)


def _and_then(recipe: Mapping[str, Any] | None) -> str:
    """What the one call did beyond fitting to a part of the noise, if it was that."""
    if recipe is None:
        return ""
    more = f" and {recipe['final_draws']} made for the last choice" if recipe["final_draws"] else ""
    return more + (", then on all of them" if recipe["fitted_to_all"] else "")


def _of_group(group: int, weight: Weight) -> float:
    return float(weight.coefficients[group]) if isinstance(weight, LinearMap) else weight_mean(weight)


def describe_fit(name: str, steps: int, nfe: int, about: Mapping[str, Any], reports: tuple[StepReport, ...]) -> str:
    """What a fitted solver is, how it was made, and its table."""
    a, end = about, about["endpoint"]
    ridge = a["ridge"] if isinstance(a["ridge"], str) else f"{a['ridge']:g}"
    recipe = a.get("recipe")
    head = [
        f"{name}: {a['base']['name']}{'' if end['fell_back'] else ' with fitted weights'}, {steps} steps, {nfe} evaluations",
        f"schedule {brief(a['schedule'])}, prediction {a['prediction']}, guidance scale {a['guidance_scale']:g}",
        f"terms {a['terms']}{' and an intercept' if a['intercept'] else ''}, target {_target(a)}, "
        f"history {a['history']}, ridge {ridge}",
        f"fitted on {a['batch'] - a['held_out']} samples [{', '.join(map(str, a['state_shape']))}] {a['state_dtype']}, "
        f"{a['held_out']} more held out{_and_then(recipe)}, seed {a['seed']}",
        f"the fit made {a['evaluations']} model calls ({a['sample_evaluations']} sample evaluations)",
    ]
    if recipe:
        chosen = next(i["name"] for i in recipe["ingredients"] if i["chosen"])
        head.insert(3, f"chosen: {chosen}" + (_refined(recipe["refinement"]) if recipe["refinement"] else ""))
    if end["base"] is not None:
        head.append(_endpoint(about))
    elif end["fell_back"] and end["why"]:
        head.append(f"the base was kept: {end['why']}")
    return "\n".join([*head, "", table_of(reports)] if reports else head)


def _target(about: Mapping[str, Any]) -> str:
    """What the steps aim at: of trajectories, those that were used, which need not be those that the target would make."""
    target, teacher = about["target"], about["teacher"]
    if target["name"] != "trajectory" or teacher is None:
        return brief(target)
    known = {
        k: teacher[k] for k in ("solver", "steps", "rtol", "sigma_min") if k in teacher
    }  # whatever the order of a file
    return f"trajectory ({', '.join(f'{k} {v}' for k, v in known.items())})"


def _refined(refinement: Mapping[str, Any]) -> str:
    """That of the iterations on the samples fitted to; those on all samples come on top."""
    used, made = refinement["best"], refinement["iterations"]
    return f": such a fit in closed form, and {used} of {made} iterations over all weights and times"


def _endpoint(about: Mapping[str, Any]) -> str:
    """Errors of the fit and of what it was judged against: its base, or in the one call a solver on a grid of its own."""
    end, recipe = about["endpoint"], about.get("recipe")
    base, rival = ("the base", "base") if recipe is None else (recipe["rival"], f"{recipe['rival']} without a fit")
    fit = "not finite" if end["fit"] is None else f"{end['fit']:.3g}"
    kept = base if end["fell_back"] else "the fit"
    return f"endpoint error on held-out noise: {rival} {end['base']:.3g}, fit {fit}; {kept} was kept"


def explain_fit(plan: Plan, about: Mapping[str, Any], reports: tuple[StepReport, ...]) -> str:
    """What was fitted, what it gained and what its weights say, in words."""
    if "recipe" in about:
        return "\n".join([*_explain_recipe(plan, about), *(_explain_steps(plan, about, reports) if reports else [])])
    if not reports:
        return f"{plan.name} is its base, {about['base']['name']}: these terms leave every step of this grid alone."
    return "\n".join(_explain_steps(plan, about, reports))


def _explain_recipe(plan: Plan, about: Mapping[str, Any]) -> list[str]:
    """What was tried, what it gained and what it cost."""
    recipe = about["recipe"]
    tried = recipe["ingredients"]
    chosen = next(i for i in tried if i["chosen"])
    made = sum(i["error"] is not None for i in tried)
    lines = [
        f"{plan.name} makes {plan.nfe} evaluations, at times {', '.join(f'{t:.3g}' for t in plan.evaluation_times)}.",
        f"Chosen from {made} on {about['held_out'] + recipe['final_draws']} held-out samples, outliers counted less: "
        f"{chosen['name']}, whose "
        f"error there is {chosen['error']:.3g}.",
    ]
    for other in tried:
        if not other["chosen"] and other["error"]:
            lines.append(
                f"  {other['name']}: {other['error']:.3g}; what was chosen has {chosen['error'] / other['error']:.2f} of that."
            )
    if (refinement := recipe["refinement"]) is not None:
        start, end = refinement["held_out"][0], refinement["held_out"][refinement["best"]]
        lines.append(
            f"The refinement took {refinement['iterations']} iterations, of which number {refinement['best']} is used: "
            f"{start:.3g} to {end:.3g} on held-out samples, outliers counted less; it stopped because {refinement['reason']}."
        )
    if recipe["fitted_to_all"]:
        lines.append(f"What was chosen was then fitted once more, to all {about['batch']} samples.")
    if about["batch"] > recipe["given"]:
        lines.append(f"Of the {about['batch']} samples, {recipe['given']} were asked for; the budget added the others.")
    if recipe["final_draws"]:
        lines.append(
            f"Of the held-out samples, {recipe['final_draws']} were made for the last choice, and are beyond those."
        )
    lines.append(
        f"All of it took {recipe['seconds']:.0f} s and {recipe['sample_evaluations']} sample evaluations of the model, "
        "backward passes counted as two each."
    )
    return lines


def _explain_steps(plan: Plan, about: Mapping[str, Any], reports: tuple[StepReport, ...]) -> list[str]:
    """What the fits of the steps gained and what their weights say."""
    most = max(len(r.symbols) for r in reports)
    # In the one call, the steps are fitted to a part of the noise, and judged by a part of that.
    batch, held = (((about.get("recipe") or {}).get("steps") or about)[k] for k in ("batch", "held_out"))
    where = f"{held} held-out samples" if held else "the samples that were fitted to"
    lines = [
        f"{plan.name} is {about['base']['name']} with up to {most} weights a step ({about['terms']}), fitted on "
        f"{batch - held} samples in {len(reports)} of {plan.steps} steps."
    ]
    if not held:
        lines.append("No samples were held out: nothing here says how the fit does on other noise.")
    used = [r for r in reports if r.accepted]
    for r in sorted(used, key=lambda r: r.gain, reverse=True)[:3]:
        lines.append(f"Step {r.index} ({r.t:.3g} to {r.s:.3g}): {r.gain:.0%} of its residual is gone, on {where}.")
    if about["endpoint"]["fell_back"]:
        why = about["endpoint"]["why"]
        lines.append(
            f"The base was kept in every step: the whole fit was not clearly better at the end{why and f' ({why})'}."
        )
    elif refused := [str(r.index) for r in reports if not r.accepted]:
        lines.append(f"The base was kept in {_steps(refused)}: the fit did not help held-out samples.")
    if poor := [str(r.index) for r in reports if r.rank < len(r.symbols)]:
        lines.append(f"Some directions are combinations of the others in {_steps(poor)}: those share their weight.")
    if constants := [r for r in reports if r.intercept]:
        largest = max(constants, key=lambda r: r.intercept)
        lines.append(f"The largest intercept is in step {largest.index}, {largest.intercept:.2g} per component.")
    weights = {index: (own, older) for index, own, older in _data_weights(plan)}
    if weighted := [r.index for r in used if abs(weights.get(r.index, (0.0, 0.0))[1]) > _SMALL]:
        most_older = max(weighted, key=lambda index: abs(weights[index][1]))
        own, older = weights[most_older]
        maps = any(not is_number(w) for ins in plan.code if isinstance(ins, Combine) for _, w in ins.terms)
        mean = " (means over the components: the weights are maps)" if maps else ""
        lines.append(
            f"Most weight on the past is in step {most_older}, which weighs its own data estimates by {own:.3g} and those of "
            f"earlier steps by {older:.3g}{mean}."
        )
    if about["endpoint"]["base"] is not None:
        end = _endpoint(about)
        lines.append(end[0].upper() + end[1:] + ".")
    return lines


def _steps(indices: list[str]) -> str:
    return f"step{'s' if len(indices) > 1 else ''} {', '.join(indices)}"


def _data_weights(plan: Plan) -> list[tuple[int, float, float]]:
    """For each step, the sums of its weights on the data estimates made in it, and on those of earlier steps."""
    totals: list[dict[int, float]] = [{}]  # for each vector, weights by the step that the estimate was made in
    step, found = 0, []
    for ins in plan.code:
        if isinstance(ins, Evaluate):
            _, q = conversion(plan.schedule, ins.t, "data", ins.form)
            totals.append({step: q})
            continue
        mine = _combined(ins, totals)
        if ins.step is None:
            totals.append(mine)
        else:
            found.append((step, mine.get(step, 0.0), sum(w for k, w in mine.items() if k != step)))
            totals.append({})  # a state at a grid point stands for itself
            step += 1
    return found


def _combined(ins: Combine, totals: list[dict[int, float]]) -> dict[int, float]:
    mine: dict[int, float] = {}
    for j, weight in ins.terms:
        number = weight_mean(weight)
        for k, w in totals[j].items():
            mine[k] = mine.get(k, 0.0) + number * w
    return mine
