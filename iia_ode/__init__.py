"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

from . import denoisers, errors, grids, metrics, plots, problems, reference, testing
from .__about__ import __version__
from .autofit import Budget, fit
from .errors import IIAError
from .estimation import estimate_statistics
from .iia import IIA, FittedSolver, Teacher, WarmStart, preset
from .iia.fitted import load
from .integrate import odeint, sample
from .ode import ProbabilityFlowODE, distributed
from .plan import Plan
from .schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule
from .solvers import RungeKutta, Solver, get_solver, register, solver_names
from .statistics import ModelStatistics

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
    "estimate_statistics",
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
