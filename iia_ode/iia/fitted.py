"""A fitted solver: a plan, how it was made, and its file."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, FingerprintWarning, IIAError, InputError, MismatchError
from ..files import read_tensors, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Combine, Evaluate, Plan
from ..schedules import Discrete, Schedule, schedule_from_config

__all__ = ["FittedSolver", "StepReport", "load"]

_F64 = torch.float64


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
        return torch.tensor(self.plan.grid, dtype=_F64)

    @property
    def nfe(self) -> int:
        """Model evaluations of one run."""
        return self.plan.nfe

    def check(self, ode: ProbabilityFlowODE, x: Tensor | None = None) -> None:
        """Raise unless this fit belongs to the ODE (and to states like x); warn if the model's weights differ.

        Raises
        ------
        MismatchError : another schedule, prediction type, guidance scale, set of conditions or state shape.
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
        if set(self.about["conditioning"]) != set(ode.conditioning):
            raise MismatchError(
                f"{self.name} was fitted with conditioning {sorted(self.about['conditioning'])}, and this ODE has "
                f"{sorted(ode.conditioning)}."
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
        a = self.about
        head = [
            f"{self.name}: {a['base']['name']} with fitted weights, {self.plan.steps} steps, {self.nfe} evaluations",
            f"schedule {_brief(a['schedule'])}, prediction {a['prediction']}, guidance scale {a['guidance_scale']:g}",
            f"target {_brief(a['target'])}, history {a['history']}, ridge {a['ridge']:g}, fitted on {a['batch']} samples "
            f"[{', '.join(map(str, a['state_shape']))}] {a['state_dtype']}, seed {a['seed']}",
            f"the fit made {a['evaluations']} model calls ({a['sample_evaluations']} sample evaluations)",
            "",
        ]
        return "\n".join([*head, self.table()])

    def table(self) -> str:
        """Every fitted coefficient in the paper's symbols, and the step's residual without and with it."""
        lines = [
            f"{'step':>4} {'t':>9} {'to':>9}  {'residual':>9} {'fitted':>9}  {'rank':>4}  coefficients (base value)"
        ]
        for r in self.reports:
            parts = [f"{n} = {v:.4g} ({b:.3g})" for n, v, b in zip(r.symbols, r.values, r.base_values, strict=True)]
            lines.append(
                f"{r.index:>4} {r.t:>9.4g} {r.s:>9.4g}  {r.before:>9.2e} {r.after:>9.2e}  {r.rank:>4}  {', '.join(parts)}"
            )
        return "\n".join(lines)

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
    schedule : needed only where the fit was made on a schedule from functions, which a file cannot hold.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file.
    MismatchError : `schedule` is not the one the file was made for.
    """
    tensors, header = read_tensors(path, "fitted solver")
    try:
        config = header["about"]["schedule"]
        found = schedule or schedule_from_config(config, tensors.get("schedule.alphas_cumprod"))
        if found.config() != config:
            raise MismatchError(
                f"{str(path)!r} was fitted for schedule {_brief(config)}, not {_brief(found.config())}."
            )
        plan = _unpack(found, header["name"], header["code"], tensors)
        reports = tuple(_step_report(r) for r in header["reports"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, IIAError) and not isinstance(error, InputError):
            raise
        raise FileFormatError(f"{str(path)!r} is damaged: {error}.") from error
    return FittedSolver(plan, reports, header["about"])


def _step_report(values: dict[str, Any]) -> StepReport:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return StepReport(**fields)


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
    tensors["grid"] = torch.tensor(plan.grid, dtype=_F64)
    tensors["times"] = torch.tensor(times, dtype=_F64)
    tensors["weights"] = torch.tensor(weights, dtype=_F64)
    return code, tensors


def _unpack(schedule: Schedule, name: str, code: list[list[Any]], tensors: dict[str, Tensor]) -> Plan:
    weights, times = iter(tensors["weights"].tolist()), iter(tensors["times"].tolist())
    instructions: list[Evaluate | Combine] = []
    try:
        for k, (kind, *rest) in enumerate(code, start=1):
            if kind == "evaluate":
                instructions.append(Evaluate(rest[0], next(times), rest[1]))
                continue
            terms = [(j, tensors[key] if (key := f"weight.{k}.{j}") in tensors else next(weights)) for j in rest[0]]
            instructions.append(Combine(tuple(terms), tensors.get(f"constant.{k}"), rest[1]))
    except StopIteration as error:
        raise ValueError("it has fewer weights or times than its instructions need") from error
    return Plan(schedule, tuple(tensors["grid"].tolist()), tuple(instructions), name)


def _brief(config: dict[str, Any]) -> str:
    """``VP (beta_0=0.1, beta_1=20.0)``, whatever the order of the keys."""
    key = "type" if "type" in config else "name"
    rest = ", ".join(f"{k}={v}" for k, v in sorted(config.items()) if k != key)
    return f"{config[key]} ({rest})" if rest else str(config[key])
