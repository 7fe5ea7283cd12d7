"""A fitted solver: a plan, how it was made, and its file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, InputError, MismatchError
from ..files import read_tensors, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from ..schedules import Discrete, Schedule, schedule_from_config
from .origin import brief, check_origin
from .report import StepReport, describe_fit, explain_fit, table_of, table_of_weights
from .storage import SCHEMA, misfit, pack, unpack

__all__ = ["FittedSolver", "StepReport", "describe", "load"]

_F64 = torch.float64

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


@dataclass(frozen=True, eq=False)
class FittedSolver:
    """A base solver with fitted weights, for one model, schedule and grid. It costs what its base costs.

    Attributes
    ----------
    plan : what runs.
    reports : one per fitted step.
    about : how it was made, JSON-ready: base, terms, target, schedule, prediction, guidance, batch, samples held out,
        endpoint error of base and fit on those, evaluations spent, ...
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
        """Raise unless this fit belongs to the ODE (and to states like x); warn if weights or guidance scale differ.

        Raises
        ------
        MismatchError : another schedule, prediction type, conditions (names or shapes) or state shape.
        """
        check_origin(self.name, self.about, ode, x)

    def __str__(self) -> str:
        said = describe_fit(self.name, self.plan.steps, self.nfe, self.about, self.reports)
        return said if self.reports else f"{said}\n\n{self.table()}"

    def table(self) -> str:
        """Every coefficient in the paper's symbols, and the step's residual without and with it, held out too.

        Where the steps were not fitted one by one, as in a refinement: the weights of the plan on its initial state and its
        data estimates, where they are linear maps those of each group; of maps with many groups, means.
        """
        return table_of(self.reports) if self.reports else table_of_weights(self.plan)

    def explain(self) -> str:
        """What was fitted, which steps gained most, which keep the base, and what the weights say, in plain words."""
        return explain_fit(self.plan, self.about, self.reports)

    def citation(self) -> str:
        """BibTeX entries of the papers behind this solver: IIA, and its base where it has one of its own."""
        base = _BIBTEX.get(self.about["base"]["name"])
        return "\n\n".join([_BIBTEX["iia"], *([base] if base else [])])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, everything else as JSON in its header."""
        code, tensors = pack(self.plan)
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
    return _built(path, *_read(path), schedule)


def _built(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    reports: tuple[StepReport, ...],
    schedule: Schedule | None,
) -> FittedSolver:
    """What a file holds, on this schedule or its own."""
    config, table = header["about"]["schedule"], tensors.get("schedule.alphas_cumprod")
    tensors = {k: v for k, v in tensors.items() if k != "schedule.alphas_cumprod"}
    try:
        found = schedule_from_config(config, table) if schedule is None else schedule
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the schedule it was fitted on: {error}") from error
    if found.config() != config:
        error_type = FileFormatError if schedule is None else MismatchError
        raise error_type(f"{str(path)!r} was fitted for schedule {brief(config)}, not {brief(found.config())}.")
    try:
        plan = unpack(found, header["name"], header["code"], tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} holds no valid plan: {error}") from error
    return FittedSolver(plan, reports, header["about"])


def describe(path: str | os.PathLike[str]) -> str:
    """What ``print(load(path))`` shows, for any schedule.

    Where the file cannot hold its schedule, it is all but the weights of a plan that was not fitted step by step, which need
    it.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file.
    """
    tensors, header, reports = _read(path)
    try:
        schedule_from_config(header["about"]["schedule"], tensors.get("schedule.alphas_cumprod"))
    except (TypeError, ValueError):
        nfe = sum(item[:1] == ["evaluate"] for item in header["code"])
        return describe_fit(header["name"], len(tensors["grid"]) - 1, nfe, header["about"], reports)
    return str(_built(path, tensors, header, reports, None))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], tuple[StepReport, ...]]:
    """A file whose checksum and layout are right; what it means is still to be checked."""
    tensors, header = read_tensors(path, "fitted solver")
    problem = misfit(header, SCHEMA, "its header")
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


def _step_report(values: dict[str, Any]) -> StepReport:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    report = StepReport(**fields)
    if not len(report.symbols) == len(report.values) == len(report.base_values) == len(report.corrections):
        raise ValueError("the report of a step has lists of different lengths")
    return report
