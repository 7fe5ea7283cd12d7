"""Reports of a fitted solver: the table of steps, the table of weights, a description, and an explanation in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..forms import conversion
from ..iia.provenance import Record, SearchRecord, Split, StepReport
from ..ode.guidance import Scales
from ..ode.origin import Origin
from ..plan import Combine, Evaluate, LinearMap, Plan, Vector
from ..plan.vectors import Weight, is_number, weight_mean
from ..schedules.stored import brief

__all__ = ["describe_fit", "explain_fit", "table_of", "table_of_weights"]

_SMALL = 1e-3  # sum of weights on earlier steps, below which there is no sentence
_GROUPS = 12  # largest number of groups of a linear map with a table each


# ---- tables ----------------------------------------------------------------------------------------------------------


def table_of(reports: tuple[StepReport, ...]) -> str:
    """Every coefficient in the paper's symbols, with the residual of each step before and after the fit."""
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
    """The weights of a plan on its initial state and its data estimates: a row per evaluated state and for the final state.

    Linear maps have a table for each group. Maps with many groups, as in a warm start, have a single table of means.
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


def _of_group(group: int, weight: Weight) -> float:
    return float(weight.coefficients[group]) if isinstance(weight, LinearMap) else weight_mean(weight)


# ---- words -----------------------------------------------------------------------------------------------------------


def describe_fit(name: str, steps: int, nfe: int, record: Record, reports: tuple[StepReport, ...]) -> str:
    """The head of a fitted solver, its cost and its errors; with reports of steps, their table too."""
    r, end, search, origin = record, record.endpoint, record.search, record.origin
    ridge = r.ridge if isinstance(r.ridge, str) else f"{r.ridge:g}"
    lines = [
        f"{name}: {r.base.name}{'' if end.fell_back else ' with fitted weights'}, {steps} steps, {nfe} evaluations",
        f"schedule {brief(origin.schedule)}, prediction {origin.prediction}, guidance scale {_scale(origin)}"
        f"{f', told {origin.time}' if str(origin.time) != 't' else ''}",
        f"terms {r.terms}{' and an intercept' if r.intercept else ''}{'' if r.last_step else ', step to the data left'}, "
        f"target {_target(r)}, "
        f"history {r.history}, ridge {ridge}",
        f"fitted on {r.batch - r.held_out} samples [{', '.join(map(str, origin.state_shape))}] {origin.state_dtype}, "
        f"{r.held_out} more held out{_beyond(search)}, seed {r.seed}",
        f"the fit made {r.evaluations} model calls ({r.sample_evaluations} sample evaluations)",
    ]
    if search is not None:
        lines.insert(3, f"chosen: {search.chosen.name}{_refined(search)}")
    if origin.serves is not None:
        lines.append("measured at further guidance scales: serves {:g} to {:g}".format(*origin.serves))
    lines += [
        f"in use before: {i.name}, {i.evaluations} evaluations, error {_number(i.error)}; fit {_number(i.fit_error)}"
        for i in record.in_use
    ]
    lines += [f"{name}: {value}" for name, value in record.notes.items()]
    if origin.train_mode:
        lines.append("the model was in train mode: its outputs were random, or depended on the batch")
    if end.base is not None:
        lines.append(_endpoint(record))
        lines += [end.limits] if end.limits else []
    elif end.fell_back and end.why:
        lines.append(f"the base was kept: {end.why}")
    if end.base is None and end.teacher_error is not None:
        lines.append(f"the teacher's final states are known to about {end.teacher_error:.2g}")
    return "\n".join([*lines, "", table_of(reports)] if reports else lines)


def _scale(origin: Origin) -> str:
    shown = str(origin.guidance_scale) if isinstance(origin.guidance_scale, Scales) else f"{origin.guidance_scale:g}"
    return shown if not origin.guidance_rescale else f"{shown} rescaled by {origin.guidance_rescale:g}"


def _target(record: Record) -> str:
    """The target of the steps; for trajectories, the options of the teacher in use."""
    if record.target.name != "trajectory" or record.teacher is None:
        return str(record.target)
    return f"trajectory ({record.teacher})"


def _beyond(search: SearchRecord | None) -> str:
    """The samples that a search used beyond a training part and a held-out part."""
    if search is None:
        return ""
    more = f" and {search.final_draws} made for the last choice" if search.final_draws else ""
    return more + (", then on all of them" if search.fitted_to_all else "")


def _refined(search: SearchRecord) -> str:
    """The iterations of a refinement on the training samples, in words; empty without a refinement."""
    if (refinement := search.refinement) is None:
        return ""
    return f": a fit in closed form, then {refinement.best} of {refinement.iterations} iterations over all weights and times"


def _endpoint(record: Record) -> str:
    """Endpoint errors of the fit and of its base; after a search, of its rival on a grid of its own."""
    end, search = record.endpoint, record.search
    base, label = ("the base", "base") if search is None else (search.rival, f"{search.rival} without a fit")
    kept = base if end.fell_back else "the fit"
    own = "" if end.teacher_error is None else f" (the true states are known to about {end.teacher_error:.2g})"
    return (
        f"endpoint error on held-out noise: {label} {_number(end.base)}, fit {_number(end.fit)}; {kept} was kept{own}"
    )


def _number(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.3g}"


def explain_fit(plan: Plan, record: Record, reports: tuple[StepReport, ...]) -> str:
    """A summary in words: the method, its gain and cost, and the largest weights."""
    if record.search is None and not reports:
        return f"{plan.name} is its base, {record.base.name}: these terms leave every step of this grid alone."
    lines = [] if record.search is None else _explain_search(plan, record, record.search)
    lines += _explain_steps(plan, record, reports) if reports else []
    if limits := record.endpoint.limits:
        lines.append(f"{limits[0].upper()}{limits[1:]}.")
    return "\n".join(lines)


def _explain_search(plan: Plan, record: Record, search: SearchRecord) -> list[str]:
    """The solvers that a search made, with their errors and its cost."""
    chosen, made = search.chosen, sum(i.error is not None for i in search.ingredients)
    error = chosen.error or 0.0
    lines = [
        f"{plan.name} makes {plan.nfe} evaluations, at times {', '.join(f'{t:.3g}' for t in plan.evaluation_times)}.",
        f"Chosen from {made} solvers by their error on {record.held_out + search.final_draws} held-out samples, with less "
        f"weight on outliers: {chosen.name}, with error {error:.3g}.",
    ]
    if record.endpoint.teacher_error is not None:
        lines.append(
            f"The true final states are known to about {record.endpoint.teacher_error:.2g}; no error here is lower."
        )
    for other in search.ingredients:
        if not other.chosen and other.error:
            lines.append(f"  {other.name}: {other.error:.3g}; the chosen error is {error / other.error:.2f} of it.")
    if (refinement := search.refinement) is not None:
        start, end = (_number(refinement.held_out[k]) for k in (0, refinement.best))
        lines.append(
            f"The refinement took {refinement.iterations} iterations. Number {refinement.best} is used: its error on held-out "
            f"samples, with less weight on outliers, fell from {start} to {end}. "
            f"The refinement stopped because {refinement.reason}."
        )
    if search.fitted_to_all:
        lines.append(f"The chosen solver was then fitted once more, to all {record.batch} samples.")
    if record.batch > search.given:
        lines.append(f"Of the {record.batch} samples, {search.given} were asked for; the budget added the others.")
    if search.final_draws:
        lines.append(
            f"Of the held-out samples, {search.final_draws} were made for the last choice, beyond the {record.batch}."
        )
    lines.append(
        f"The search took {search.seconds:.0f} s and {record.sample_evaluations} sample evaluations of the model, with a "
        "backward pass counted as two."
    )
    return lines


def _explain_steps(plan: Plan, record: Record, reports: tuple[StepReport, ...]) -> list[str]:
    """The gains of the steps, and the largest weights."""
    most = max(len(r.symbols) for r in reports)
    # A search fits the steps to a part of its samples, and judges them by a part of those.
    split = (record.search and record.search.steps) or Split(record.batch, record.held_out)
    where = (
        f"{split.held_out} held-out sample{'s' * (split.held_out > 1)}" if split.held_out else "the training samples"
    )
    # Held-out samples that have only chosen the ridge are fitted in the end.
    fitted = split.batch if record.ridge == "auto" and not record.guard else split.batch - split.held_out
    lines = [
        f"{plan.name} is {record.base.name} with up to {most} weights a step ({record.terms}), fitted on "
        f"{fitted} samples in {len(reports)} of {plan.steps} steps."
    ]
    if not split.held_out:
        lines.append(
            "No samples were held out: no guard judged the fit, and these numbers say nothing about other noise."
        )
    used = [r for r in reports if r.accepted]
    for r in sorted(used, key=lambda r: r.gain, reverse=True)[:3]:
        lines.append(
            f"Step {r.index} ({r.t:.3g} to {r.s:.3g}): the fit removes {r.gain:.0%} of the residual, on {where}."
        )
    if record.endpoint.fell_back:
        why = f" ({record.endpoint.why})" if record.endpoint.why else ""
        lines.append(f"The base was kept in every step: the whole fit was not clearly better at the end{why}.")
    elif refused := [str(r.index) for r in reports if not r.accepted]:
        lines.append(f"The base was kept in {_steps(refused)}: the fit did not help held-out samples.")
    if poor := [str(r.index) for r in reports if r.rank < len(r.symbols)]:
        lines.append(f"Some directions are combinations of the others in {_steps(poor)}: they share their weight.")
    if constants := [r for r in reports if r.intercept]:
        largest = max(constants, key=lambda r: r.intercept)
        lines.append(f"The largest intercept is in step {largest.index}: {largest.intercept:.2g} per component.")
    lines += _explain_past(plan, [r.index for r in used])
    if record.endpoint.base is not None:
        end = _endpoint(record)
        lines.append(f"{end[0].upper()}{end[1:]}.")
    return lines


def _explain_past(plan: Plan, used: list[int]) -> Iterator[str]:
    """A sentence on the step among `used` with the largest weight on data estimates of earlier steps."""
    weights = {k: pair for k, pair in _data_weights(plan).items() if k in used and abs(pair[1]) > _SMALL}
    if not weights:
        return
    step = max(weights, key=lambda index: abs(weights[index][1]))
    own, older = weights[step]
    maps = any(not is_number(w) for ins in plan.code if isinstance(ins, Combine) for _, w in ins.terms)
    mean = " (means over the components: the weights are maps)" if maps else ""
    yield (
        f"The largest weight on the past is in step {step}: {own:.3g} on its own data estimates, {older:.3g} on data "
        f"estimates of earlier steps{mean}."
    )


def _steps(indices: list[str]) -> str:
    """``step 1`` or ``steps 1, 2``."""
    return f"step{'s' if len(indices) > 1 else ''} {', '.join(indices)}"


def _data_weights(plan: Plan) -> dict[int, tuple[float, float]]:
    """For each step, the sum of weights on data estimates made in the step, and on data estimates of earlier steps."""
    totals: list[dict[int, float]] = [{}]  # for each vector, weights on data estimates by step
    found: dict[int, tuple[float, float]] = {}
    for ins in plan.code:
        step, mine = len(found), dict[int, float]()
        if isinstance(ins, Evaluate):
            mine[step] = conversion(plan.schedule, ins.t, "data", ins.form)[1]
        else:
            for j, weight in ins.terms:
                for k, w in totals[j].items():
                    mine[k] = mine.get(k, 0.0) + weight_mean(weight) * w
            if ins.step is not None:
                found[step] = mine.get(step, 0.0), sum(w for k, w in mine.items() if k != step)
                mine = {}  # a state at a grid point is a vector of its own
        totals.append(mine)
    return found
