"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

from . import denoisers, grids, metrics, plots, problems, reference
from .__about__ import __version__
from .errors import (
    ConformanceError,
    DuplicateWarning,
    FileFormatError,
    FingerprintWarning,
    GridError,
    GuardWarning,
    IIAError,
    InputError,
    MismatchError,
    MismatchWarning,
    MissingDependencyError,
    NonFiniteError,
    PlanError,
    RankError,
    ScheduleError,
    UnknownNameError,
)
from .estimation import ModelStatistics
from .forms import Evaluation
from .iia import IIA, Budget, FittedSolver, Local, Substeps, Teacher, TeacherTrajectory, WarmStart, Window, preset
from .iia.recipe import fit
from .iia.refine import refine
from .integrate import odeint, sample
from .loading import load
from .noise import sample_seeds, seeded_noise
from .ode import ProbabilityFlowODE
from .plan import Past, Plan, Vector, trace
from .schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule
from .solvers import RungeKutta, Solver, get_solver, register, solver_names
from .testing import verify

__all__ = [
    "EDM",
    "IIA",
    "VE",
    "VP",
    "Budget",
    "ConformanceError",
    "Cosine",
    "Discrete",
    "DuplicateWarning",
    "Evaluation",
    "FileFormatError",
    "FingerprintWarning",
    "FittedSolver",
    "FlowMatching",
    "GridError",
    "GuardWarning",
    "IIAError",
    "InputError",
    "Local",
    "MismatchError",
    "MismatchWarning",
    "MissingDependencyError",
    "ModelStatistics",
    "NonFiniteError",
    "Past",
    "Plan",
    "PlanError",
    "ProbabilityFlowODE",
    "RankError",
    "RungeKutta",
    "Schedule",
    "ScheduleError",
    "Solver",
    "Substeps",
    "Teacher",
    "TeacherTrajectory",
    "UnknownNameError",
    "Vector",
    "WarmStart",
    "Window",
    "__version__",
    "denoisers",
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
    "refine",
    "register",
    "sample",
    "sample_seeds",
    "seeded_noise",
    "solver_names",
    "testing",
    "trace",
    "verify",
]
