"""IIA: terms, targets, the teacher, the least squares, fitting, the search for a grid, refinement, and the fitted solver.

The functions ``iia_ode.fit`` and ``iia_ode.refine`` stand directly under ``iia_ode``: here those names are modules.
"""

from .budgets import BUDGETS, Budget
from .candidates import Ingredient
from .directions import StepRecord, Term, Window
from .families import FreeGrid, LeapGrid, leap_grids
from .fit import IIA, PRESETS, preset
from .fitted import FittedSolver, StepReport, describe, load
from .least_squares import LeastSquares
from .moments import Moments, estimate_moments, exact_moments
from .plan_parameters import Parameters
from .refine import EndpointError, GaussNewton, Iteration, Objective, Refinement, Status
from .search import GridSearch, Trial, search_grid, search_levels
from .targets import Local, Samples, Substeps, Target, TeacherTrajectory
from .teacher import Teacher
from .warm_start import WarmStart

__all__ = [
    "BUDGETS",
    "IIA",
    "PRESETS",
    "Budget",
    "EndpointError",
    "FittedSolver",
    "FreeGrid",
    "GaussNewton",
    "GridSearch",
    "Ingredient",
    "Iteration",
    "LeapGrid",
    "LeastSquares",
    "Local",
    "Moments",
    "Objective",
    "Parameters",
    "Refinement",
    "Samples",
    "Status",
    "StepRecord",
    "StepReport",
    "Substeps",
    "Target",
    "Teacher",
    "TeacherTrajectory",
    "Term",
    "Trial",
    "WarmStart",
    "Window",
    "describe",
    "estimate_moments",
    "exact_moments",
    "leap_grids",
    "load",
    "preset",
    "search_grid",
    "search_levels",
]
