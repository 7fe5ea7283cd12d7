"""A fitted solver: a plan, how it was made, and its file."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, FingerprintWarning, InputError, MismatchError
from ..files import read_tensors, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Evaluate, Plan
from ..schedules import Discrete, Schedule, schedule_from_config

__all__ = ["FittedSolver", "StepReport", "conditioning_shapes", "describe", "load"]

_F64 = torch.float64

# What a file's header holds: a dict has these keys, a list has entries like its only one, anything else is of that type.
_NUMBER = int | float
_SCHEMA: dict[str, Any] = {
    "name": str,
    "code": [list],
    "about": {
        "base": {"name": str, "options": dict},
        "terms": str,
        "target": {"name": str},
        "history": int,
        "ridge": _NUMBER,
        "schedule": {"type": str},
        "prediction": str,
        "guidance_scale": _NUMBER,
        "conditioning": dict,
        "state_shape": [int],
        "state_dtype": str,
        "batch": int,
        "seed": int | None,
        "fingerprint": str,
        "evaluations": int,
        "sample_evaluations": int,
    },
    "reports": [
        {
            **dict.fromkeys(("t", "s", "before", "after", "condition"), _NUMBER),
            **dict.fromkeys(("index", "rank"), int),
            **{key: [_NUMBER] for key in ("values", "base_values", "corrections")},
            "symbols": [str],
        }
    ],
}

_BIBTEX = {
    "iia": """@inproceedings{zhang2024iia,
  author    = {Zhang, Guoqiang and Niwa, Kenta and Kleijn, W. Bastiaan},
  title     = {On Accelerating Diffusion-Based Sampling Process via Improved Integration Approximation},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
}""",
    "heun": """@inproceedings{karras2022edm,
  author    = {Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
  title     = {Elucidating the Design Space of Diffusion-Based Generative Models},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
}""",
    "ddim": """@inproceedings{song2021ddim,
  author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  title     = {Denoising Diffusion Implicit Models},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
}""",
}


@dataclass(frozen=True)
class StepReport:
    """How the fit of one step went.

    Attributes
    ----------
    index, t, s : the step.
    symbols, values, base_values : the paper's coefficients: names, fitted values, and the values that give the base.
    corrections : the least-squares solution, in units of the directions.
    before, after : root mean square distance to the target per component on the fitting batch, base and fitted.
    rank, condition : of the least-squares problem with columns of unit length.
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
    rank: int
    condition: float


@dataclass(frozen=True, eq=False)
class FittedSolver:
    """A base solver with fitted weights, for one model, schedule and grid. It costs what its base costs.

    Attributes
    ----------
    plan : what runs.
    reports : one per fitted step.
    about : how it was made, JSON-ready: base, terms, target, schedule, prediction, guidance, batch, evaluations spent, ...
    """

    plan: Plan
    reports: tuple[StepReport, ...]
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.plan.name

    @property
    def grid(self) -> Tensor:
        """The grid it was fitted on, float64 [N + 1]."""
        return torch.tensor(self.plan.grid, dtype=_F64, device="cpu")

    @property
    def nfe(self) -> int:
        """Model evaluations of one run."""
        return self.plan.nfe

    def check(self, ode: ProbabilityFlowODE, x: Tensor | None = None) -> None:
        """Raise unless this fit belongs to the ODE (and to states like x); warn if the model's weights differ.

        Raises
        ------
        MismatchError : another schedule, prediction type, guidance scale, conditions (names or shapes) or state shape.
        """
        found: dict[str, Any] = {
            "schedule": ode.schedule.config(),
            "prediction": ode.prediction,
            "guidance_scale": ode.guidance_scale,
        }
        for key, value in found.items():
            if self.about[key] != value:
                theirs, ours = (_brief(v) if isinstance(v, dict) else v for v in (self.about[key], value))
                raise MismatchError(
                    f"{self.name} was fitted for {key} {theirs}, and this ODE has {ours}. "
                    "Fit again for this ODE, or use the ODE it was fitted for."
                )
        if self.about["conditioning"] != (shapes := conditioning_shapes(ode)):
            raise MismatchError(
                f"{self.name} was fitted with conditioning of shapes {self.about['conditioning']} a sample, and this ODE "
                f"has {shapes}. Fit again for this ODE, or use the ODE it was fitted for."
            )
        if x is not None and list(x.shape[1:]) != self.about["state_shape"]:
            raise MismatchError(
                f"{self.name} was fitted for states [B, {', '.join(map(str, self.about['state_shape']))}], got "
                f"{list(x.shape)}."
            )
        if self.about["fingerprint"] != ode.fingerprint():
            warnings.warn(
                f"{self.name} was fitted on a model with fingerprint {self.about['fingerprint']}, this one has "
                f"{ode.fingerprint()}: its weights were not made for it.",
                FingerprintWarning,
                stacklevel=3,
            )

    def __str__(self) -> str:
        return _describe(self.name, self.plan.steps, self.nfe, self.about, self.reports)

    def table(self) -> str:
        """Every fitted coefficient in the paper's symbols, and the step's residual without and with it."""
        return _table(self.reports)

    def citation(self) -> str:
        """BibTeX entries of the papers behind this solver: IIA, and its base where it has one of its own."""
        base = _BIBTEX.get(self.about["base"]["name"])
        return "\n\n".join([_BIBTEX["iia"], *([base] if base else [])])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, everything else as JSON in its header."""
        code, tensors = _pack(self.plan)
        if isinstance(self.plan.schedule, Discrete):
            tensors["schedule.alphas_cumprod"] = self.plan.schedule.alphas_cumprod
        header = {
            "name": self.name,
            "code": code,
            "about": self.about,
            "reports": [asdict(r) for r in self.reports],
        }
        return write_tensors(path, "fitted solver", tensors, header)


def load(path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> FittedSolver:
    """Read a fitted solver; samples from it are bit-equal to those before it was saved.

    Parameters
    ----------
    path : a file that :meth:`FittedSolver.save` wrote.
    schedule : needed only where the fit was made on a schedule that a file cannot hold, such as one from functions.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file, or one that does not hold its schedule.
    MismatchError : `schedule` is not the one the file was made for.
    """
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InputError(f"schedule must be a Schedule such as iia_ode.EDM(), got {type(schedule).__name__}.")
    tensors, header, reports = _read(path)
    config, table = header["about"]["schedule"], tensors.pop("schedule.alphas_cumprod", None)
    try:
        found = schedule_from_config(config, table) if schedule is None else schedule
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the schedule it was fitted on: {error}") from error
    if found.config() != config:
        error_type = FileFormatError if schedule is None else MismatchError
        raise error_type(f"{str(path)!r} was fitted for schedule {_brief(config)}, not {_brief(found.config())}.")
    try:
        plan = _unpack(found, header["name"], header["code"], tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} holds no valid plan: {error}") from error
    return FittedSolver(plan, reports, header["about"])


def describe(path: str | os.PathLike[str]) -> str:
    """What ``print(load(path))`` shows, for any schedule: one that a file cannot hold is not needed here.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file.
    """
    tensors, header, reports = _read(path)
    nfe = sum(item[:1] == ["evaluate"] for item in header["code"])
    return _describe(header["name"], len(tensors["grid"]) - 1, nfe, header["about"], reports)


def conditioning_shapes(ode: ProbabilityFlowODE) -> dict[str, Any]:
    """The shape of each condition for one sample, or its type where it is no tensor; JSON-ready."""
    return {k: list(v.shape[1:]) if isinstance(v, Tensor) else type(v).__name__ for k, v in ode.conditioning.items()}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], tuple[StepReport, ...]]:
    """A file whose checksum and layout are right; what it means is still to be checked."""
    tensors, header = read_tensors(path, "fitted solver")
    problem = _misfit(header, _SCHEMA, "its header")
    for name in ("grid", "times", "weights"):
        if name not in tensors or tensors[name].ndim != 1:
            problem = problem or f"its tensor {name!r} is missing or not 1-dimensional"
    if any(v.dtype != _F64 for v in tensors.values()):
        problem = problem or "a tensor is not float64"
    if problem is None:
        try:
            return tensors, header, tuple(_step_report(r) for r in header["reports"])
        except (TypeError, ValueError) as error:
            problem = str(error)
    raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")


def _misfit(value: Any, pattern: Any, where: str) -> str | None:
    """Where a JSON value first departs from its pattern (see _SCHEMA), in words."""
    kind: Any = type(pattern) if isinstance(pattern, dict | list) else pattern
    if not isinstance(value, kind):
        return f"{where} is {value!r}"
    parts: list[str | None] = []
    if isinstance(pattern, dict):
        if missing := sorted(pattern.keys() - value.keys()):
            return f"{where} lacks {', '.join(missing)}"
        parts = [_misfit(value[k], p, f"{where}.{k}") for k, p in pattern.items()]
    elif isinstance(pattern, list):
        parts = [_misfit(v, pattern[0], f"{where}[{k}]") for k, v in enumerate(value)]
    return next(filter(None, parts), None)


def _step_report(values: dict[str, Any]) -> StepReport:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    report = StepReport(**fields)
    if not len(report.symbols) == len(report.values) == len(report.base_values) == len(report.corrections):
        raise ValueError("the report of a step has lists of different lengths")
    return report


def _pack(plan: Plan) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """A plan as a JSON-ready list of instructions, and tensors: numbers in the order of use, odd ones by their place."""
    code: list[list[Any]] = []
    weights: list[float] = []
    times: list[float] = []
    tensors: dict[str, Tensor] = {}
    for k, ins in enumerate(plan.code, start=1):
        if isinstance(ins, Evaluate):
            code.append(["evaluate", ins.state, ins.form])
            times.append(ins.t)
            continue
        code.append(["combine", [j for j, _ in ins.terms], ins.step])
        for j, weight in ins.terms:
            if isinstance(weight, Tensor):
                tensors[f"weight.{k}.{j}"] = weight.double()
            else:
                weights.append(weight)
        if ins.constant is not None:
            tensors[f"constant.{k}"] = ins.constant.double()
    for name, numbers in (("grid", plan.grid), ("times", times), ("weights", weights)):
        tensors[name] = torch.tensor(numbers, dtype=_F64, device="cpu")
    return code, tensors


def _unpack(schedule: Schedule, name: str, code: list[list[Any]], tensors: dict[str, Tensor]) -> Plan:
    """The plan that :func:`_pack` took apart; every number and tensor has to find its place."""
    rest = dict(tensors)
    grid = rest.pop("grid")
    weights, times = (iter(rest.pop(key).tolist()) for key in ("weights", "times"))
    instructions: list[Evaluate | Combine] = []
    try:
        for k, item in enumerate(code, start=1):
            match item:
                case ["evaluate", int(state), str(form)]:
                    instructions.append(Evaluate(state, next(times), form))
                case ["combine", [*indices], int() | None as step] if all(isinstance(j, int) for j in indices):
                    terms = [
                        (j, rest.pop(key) if (key := f"weight.{k}.{j}") in rest else next(weights)) for j in indices
                    ]
                    instructions.append(Combine(tuple(terms), rest.pop(f"constant.{k}", None), step))
                case _:
                    raise ValueError(f"instruction {k} is {item!r}.")
    except StopIteration as error:
        raise ValueError("it has fewer weights or times than its instructions need.") from error
    surplus = [key for key, numbers in (("weights", weights), ("times", times)) if next(numbers, None) is not None]
    if surplus := [*surplus, *rest]:
        raise ValueError(f"its instructions do not use all of {', '.join(surplus)}.")
    return Plan(schedule, tuple(grid.tolist()), tuple(instructions), name)


def _describe(name: str, steps: int, nfe: int, about: dict[str, Any], reports: tuple[StepReport, ...]) -> str:
    a = about
    head = [
        f"{name}: {a['base']['name']} with fitted weights, {steps} steps, {nfe} evaluations",
        f"schedule {_brief(a['schedule'])}, prediction {a['prediction']}, guidance scale {a['guidance_scale']:g}",
        f"target {_brief(a['target'])}, history {a['history']}, ridge {a['ridge']:g}, fitted on {a['batch']} samples "
        f"[{', '.join(map(str, a['state_shape']))}] {a['state_dtype']}, seed {a['seed']}",
        f"the fit made {a['evaluations']} model calls ({a['sample_evaluations']} sample evaluations)",
        "",
    ]
    return "\n".join([*head, _table(reports)])


def _table(reports: tuple[StepReport, ...]) -> str:
    lines = [f"{'step':>4} {'t':>9} {'to':>9}  {'residual':>9} {'fitted':>9}  {'rank':>4}  coefficients (base value)"]
    for r in reports:
        parts = [f"{n} = {v:.4g} ({b:.3g})" for n, v, b in zip(r.symbols, r.values, r.base_values, strict=True)]
        lines.append(
            f"{r.index:>4} {r.t:>9.4g} {r.s:>9.4g}  {r.before:>9.2e} {r.after:>9.2e}  {r.rank:>4}  {', '.join(parts)}"
        )
    return "\n".join(lines)


def _brief(config: dict[str, Any]) -> str:
    """``VP (beta_0=0.1, beta_1=20.0)``, whatever the order of the keys."""
    key = "type" if "type" in config else "name"
    rest = ", ".join(f"{k}={v}" for k, v in sorted(config.items()) if k != key)
    return f"{config[key]} ({rest})" if rest else str(config[key])
