"""The model card of a fitted solver: Markdown with a YAML header, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..iia.provenance import Record
from ..ode.clock import Told
from ..ode.guidance import Scales
from ..plan import Plan
from ..schedules.stored import brief
from .hub import SOLVER
from .in_use import is_noise

__all__ = ["card_of"]


def card_of(plan: Plan, record: Record, repo: str, citation: str) -> str:
    """The card of a solver in the repository `repo`."""
    model = record.notes.get("model")
    sections = [
        _header(record.notes),
        f"# {plan.name}: {plan.nfe} evaluations{f' for {model}' if model else ''}",
        f"A solver of the probability-flow ODE of {model or 'one diffusion or flow model'}, fitted by iia_ode. A sample takes "
        f"{plan.nfe} evaluations of the model.",
        f"## Use\n\n{_use(plan, repo, record.from_images)}",
        f"## Errors\n\n{_errors(plan, record)}",
    ]
    if record.in_use:
        sections.append(f"## The scheduler in use\n\n{_in_use(plan, record)}")
    if record.served:
        sections.append(f"## Guidance scales\n\n{_scales(record)}")
    sections.append(f"## Fit\n\n{_table(('', ''), _settings(record))}")
    notes = [(key, _shown(value)) for key, value in record.notes.items()]
    if notes:
        sections.append(f"## Notes\n\n{_table(('note', 'value'), notes)}")
    licence = record.notes.get("license")
    sections.append(f"## License\n\n{licence or 'No license was noted: fit.note(license=...).'}")
    sections.append(f"## Citation\n\n```bibtex\n{citation}\n```")
    return "\n\n".join(sections) + "\n"


def _header(notes: Mapping[str, Any]) -> str:
    """The YAML header; JSON strings are YAML strings."""
    lines = ["---", "library_name: iia_ode"]
    for key, name in (("license", "license"), ("model", "base_model")):
        if isinstance(notes.get(key), str):
            lines.append(f"{name}: {json.dumps(notes[key])}")
    lines += ["tags:", *(f"- {tag}" for tag in ("diffusion", "ode-solver", "few-step-sampling", "iia")), "---"]
    return "\n".join(lines)


def _use(plan: Plan, repo: str, from_images: bool) -> str:
    alpha, sigma = plan.schedule.alpha(plan.grid[0]), plan.schedule.sigma(plan.grid[0])
    signal = "" if is_noise(plan.schedule, plan.grid[0]) and not from_images else f"{alpha:.6g} * images + "
    return "\n".join(
        [
            "```py",
            "import iia_ode as iia",
            "",
            f"fit = iia.load({json.dumps(repo)})  # or a path of {SOLVER}",
            f"x_0 = iia.sample(ode, {signal}{sigma:.6g} * noise, solver=fit)  # ode: the model as an iia.ProbabilityFlowODE",
            "```",
        ]
    )


def _errors(plan: Plan, record: Record) -> str:
    """Errors of the fit and of the solvers without a fit at the same number of evaluations, and how they were measured."""
    end, search, base = record.endpoint, record.search, record.base.name
    if end.base is None and end.fit is None:
        return "The errors were not measured."
    rival = f"{base} (the base)" if search is None else f"{search.rival} (without a fit, on a grid of its own)"
    kept = "the base was kept" if end.fell_back else "this solver"
    rows = [(f"**{plan.name}** ({kept})", _error(end.base if end.fell_back else end.fit)), (rival, _error(end.base))]
    if search is not None:
        others = (i for i in search.ingredients if not i.chosen and not i.name.startswith(search.rival))
        rows += [(f"fit tried: {i.name}", _error(i.error)) for i in others if i.error]
    text = _table(("solver", f"error at {plan.nfe} evaluations"), rows)
    judged = f" on {end.judged} held-out samples" if end.judged else ""
    known = "" if end.teacher_error is None else f" The accurate states are known to about {end.teacher_error:.2g}."
    told = "The error is the root mean square distance of the final states to accurate states from the same noise"
    return f"{text}\n\n{told}{judged}.{known}"


def _in_use(plan: Plan, record: Record) -> str:
    """Errors of the schedulers in use beside the error of the fit on the same samples."""
    own = record.in_use[0]
    rows = [(f"**{plan.name}**", str(plan.nfe), _error(own.fit_error))]
    rows += [(f"`{i.name}`", str(i.evaluations), _error(i.error)) for i in record.in_use]
    return f"{_table(('sampler', 'evaluations', 'error'), rows)}\n\nThe errors are of {own.samples} held-out samples."


def _scales(record: Record) -> str:
    rows = [(f"{s.scale:g}", _error(s.error), f"{_error(s.rival_error)} ({s.rival})") for s in record.served]
    table = _table(("guidance scale", "error", "best solver without a fit"), rows)
    low, high = record.origin.serves or (0.0, 0.0)
    return f"{table}\n\nThe fit serves guidance scales from {low:g} to {high:g}; outside it warns."


def _settings(record: Record) -> Iterator[tuple[str, str]]:
    origin = record.origin
    scale = origin.guidance_scale
    yield "schedule", brief(origin.schedule)
    yield "prediction", origin.prediction
    yield "guidance scale", str(scale) if isinstance(scale, Scales) else f"{scale:g}"
    if origin.guidance_rescale:
        yield "guidance rescaled by", f"{origin.guidance_rescale:g}"
    if origin.time != Told("t"):
        yield "time that the model is told", str(origin.time)
    yield "state", f"[{', '.join(map(str, origin.state_shape))}] {origin.state_dtype}"
    if origin.conditioning:
        shapes = (f"{k} {v if isinstance(v, str) else list(v)}" for k, v in origin.conditioning.items())
        yield "conditions of a sample", ", ".join(shapes)
    yield "fingerprint of the model", f"`{origin.fingerprint}`"
    yield "base", str(record.base)
    yield "terms", record.terms
    yield "target", str(record.target)
    yield "samples", f"{record.batch}, {record.held_out} of them held out"
    yield "cost", f"{record.sample_evaluations} sample evaluations"
    if record.search is not None:
        yield "chosen", record.search.chosen.name
        yield "seed", str(record.seed)
    yield "iia_ode", record.library
    yield from record.surroundings.items()


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
