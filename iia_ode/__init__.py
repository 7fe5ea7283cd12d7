"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

import importlib
from types import ModuleType

from . import denoisers, errors, grids, metrics, plots, problems, reference, testing  # noqa: F401  (two are not typed often)
from .__about__ import __version__
from .autofit import Budget, fit, fit_cost
from .errors import IIAError
from .estimation import ModelStatistics
from .iia import IIA, FittedSolver, preset
from .integrate import odeint, sample
from .loading import load
from .many import sample_many
from .ode import ProbabilityFlowODE, distributed
from .plan import Plan
from .schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule
from .solvers import RungeKutta, Solver, get_solver, register, solver_names
from .teacher import Teacher
from .warm_starts import WarmStart

__all__ = [
    "EDM",
    "IIA",
    "VE",
    "VP",
    "Budget",
    "Cosine",
    "Discrete",
    "FittedSolver",
    "FlowMatching",
    "IIAError",
    "ModelStatistics",
    "Plan",
    "ProbabilityFlowODE",
    "RungeKutta",
    "Schedule",
    "Solver",
    "Teacher",
    "WarmStart",
    "__version__",
    "denoisers",
    "distributed",
    "errors",
    "fit",
    "fit_cost",
    "get_solver",
    "grids",
    "load",
    "odeint",
    "preset",
    "problems",
    "reference",
    "register",
    "sample",
    "sample_many",
    "solver_names",
    "testing",
]


def __getattr__(name: str) -> ModuleType:
    """Import a module that few programs use on first access."""
    if name in ("diffusers", "experiments", "kdiffusion"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
