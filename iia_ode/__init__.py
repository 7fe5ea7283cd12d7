"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

from . import denoisers, grids, problems, reference
from .__about__ import __version__
from .errors import (
    FileFormatError,
    FingerprintWarning,
    GridError,
    IIAError,
    InputError,
    MismatchError,
    MissingDependencyError,
    NonFiniteError,
    PlanError,
    ScheduleError,
    UnknownNameError,
)
from .iia import IIA, FittedSolver, Local, Substeps, load, preset
from .integrate import odeint, sample, torchdiffeq_methods
from .ode import Evaluation, ProbabilityFlowODE
from .plan import Past, Plan, Vector, trace
from .schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule, from_functions
from .solvers import RungeKutta, Solver, get_solver, register, solver_names

__all__ = [
    "EDM",
    "IIA",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Evaluation",
    "FileFormatError",
    "FingerprintWarning",
    "FittedSolver",
    "FlowMatching",
    "GridError",
    "IIAError",
    "InputError",
    "Local",
    "MismatchError",
    "MissingDependencyError",
    "NonFiniteError",
    "Past",
    "Plan",
    "PlanError",
    "ProbabilityFlowODE",
    "RungeKutta",
    "Schedule",
    "ScheduleError",
    "Solver",
    "Substeps",
    "UnknownNameError",
    "Vector",
    "__version__",
    "denoisers",
    "from_functions",
    "get_solver",
    "grids",
    "load",
    "odeint",
    "preset",
    "problems",
    "reference",
    "register",
    "sample",
    "solver_names",
    "torchdiffeq_methods",
    "trace",
]
