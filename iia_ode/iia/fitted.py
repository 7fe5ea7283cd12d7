"""A fitted solver: a plan, how it was made, and its file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..files import read_tensors, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from ..plan.plan import unpacked
from ..plan.storing import pack, tensors_misfit
from ..schedules import Schedule
from ..schedules.stored import stored_schedule
from .origin import check_origin
from .report import StepReport, describe_fit, explain_fit, table_of, table_of_weights
from .warm_start import WarmStart

__all__ = ["FittedSolver", "StepReport", "describe", "load"]

_F64 = torch.float64

# What a file's header holds: a dict has these keys, a list has entries like its only one, anything else is of that type.
_NUMBER = int | float
_MAYBE = int | float | None
_SCHEMA: dict[str, Any] = {
    "name": str,
    "code": [list],
    "about": {
        "base": {"name": str, "options": dict},
        "terms": str,
        "target": {"name": str},
        "history": int,
        "ridge": _NUMBER | str,
        "guard": bool,
        "intercept": bool,
        "schedule": {"type": str},
        "prediction": str,
        "guidance_scale": _NUMBER,
        "conditioning": dict,
        "state_shape": [int],
        "state_dtype": str,
        "batch": int,
        "held_out": int,
        "endpoint": {"base": _MAYBE, "fit": _MAYBE, "fell_back": bool, "reference": str, "why": str},
        "teacher": dict | None,
        "seed": int | None,
        "fingerprint": str,
        "evaluations": int,
        "sample_evaluations": int,
    },
    "reports": [
        {
            **dict.fromkeys(("t", "s", "before", "after", "condition", "ridge", "intercept"), _NUMBER),
            **dict.fromkeys(("held_before", "held_after"), _MAYBE),
            **dict.fromkeys(("index", "rank"), int),
            **{key: [_NUMBER] for key in ("values", "base_values", "corrections")},
            "symbols": [str],
            "accepted": bool,
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
    "spndm": """@inproceedings{liu2022pndm,
  author    = {Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou},
  title     = {Pseudo Numerical Methods for Diffusion Models on Manifolds},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
}""",
    "ipndm": """@inproceedings{zhang2023deis,
  author    = {Zhang, Qinsheng and Chen, Yongxin},
  title     = {Fast Sampling of Diffusion Models with Exponential Integrator},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
}""",
    "dpmpp_2m": """@misc{lu2022dpmsolverpp,
  author        = {Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  title         = {{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic Models},
  year          = {2022},
  eprint        = {2211.01095},
  archiveprefix = {arXiv},
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
        endpoint error on those of the fit and of its base (of the one call: of its ``recipe``'s ``rival``, a solver without a
        fit, on a grid of its own), evaluations spent, ...
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

    def after(self, warm: WarmStart) -> FittedSolver:
        """The same solver with a warm start before it: from the states that :meth:`WarmStart.apply` takes, not its result.

        Raises
        ------
        MismatchError : the warm start is for another schedule, or does not end where this solver starts.
        """
        plan = warm.then(self.plan)
        more = plan.steps - self.plan.steps
        return replace(self, plan=plan, reports=tuple(replace(r, index=r.index + more) for r in self.reports))

    def citation(self) -> str:
        """BibTeX entries of the papers behind this solver: IIA, and its base where it has one of its own."""
        base = _BIBTEX.get(self.about["base"]["name"])
        return "\n\n".join([_BIBTEX["iia"], *([base] if base else [])])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, everything else as JSON in its header."""
        code, tensors = pack(self.plan)
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
    return _built(path, *_read(path), schedule)


def _built(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    reports: tuple[StepReport, ...],
    schedule: Schedule | None,
) -> FittedSolver:
    """What a file holds, on this schedule or its own."""
    found = stored_schedule(path, header["about"]["schedule"], tensors, schedule)
    return FittedSolver(unpacked(path, found, header["name"], header["code"], tensors), reports, header["about"])


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
        stored_schedule(path, header["about"]["schedule"], tensors)
    except FileFormatError:
        nfe = sum(item[:1] == ["evaluate"] for item in header["code"])
        return describe_fit(header["name"], len(tensors["grid"]) - 1, nfe, header["about"], reports)
    return str(_built(path, tensors, header, reports, None))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], tuple[StepReport, ...]]:
    """A file whose checksum and layout are right; what it means is still to be checked."""
    tensors, header = read_tensors(path, "fitted solver", _SCHEMA)
    problem = tensors_misfit(tensors)
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
