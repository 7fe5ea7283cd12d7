"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

import importlib
from types import ModuleType

from . import denoisers, errors, grids, metrics, plots, problems, reference, testing
from .__about__ import __version__
from .autofit import Budget, fit
from .errors import IIAError
from .estimation import ModelStatistics
from .iia import IIA, FittedSolver, preset
from .integrate import odeint, sample
from .loading import load
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
    "get_solver",
    "grids",
    "load",
    "metrics",
    "odeint",
    "plots",
    "preset",
    "problems",
    "reference",
    "register",
    "sample",
    "solver_names",
    "testing",
]


def __getattr__(name: str) -> ModuleType:
    """Import the modules of experiments and of diffusers on first access."""
    if name in ("experiments", "diffusers"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
