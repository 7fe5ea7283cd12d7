"""IIA: terms, targets, the teacher, the least squares, fitting, the search for a grid, refinement, and the fitted solver.

The functions ``iia_ode.fit`` and ``iia_ode.refine`` stand directly under ``iia_ode``: here those names are modules.
"""

from .budgets import BUDGETS, Budget
from .directions import StepRecord, Term, Window
from .families import FreeGrid, LeapGrid, leap_grids
from .fit import IIA, PRESETS, preset
from .fitted import FittedSolver, describe, load
from .least_squares import LeastSquares
from .moments import Moments, estimate_moments, exact_moments
from .plan_parameters import Parameters
from .provenance import Ingredient, Record, SearchRecord, StepReport
from .refine import Iteration, Refinement
from .search import GridSearch, Trial, search_grid, search_levels
from .targets import Local, Samples, Substeps, Target, TeacherTrajectory
from .teacher import Teacher
from .warm_choice import Choice, choose
from .warm_start import WarmStart

__all__ = [
    "BUDGETS",
    "IIA",
    "PRESETS",
    "Budget",
    "Choice",
    "FittedSolver",
    "FreeGrid",
    "GridSearch",
    "Ingredient",
    "Iteration",
    "LeapGrid",
    "LeastSquares",
    "Local",
    "Moments",
    "Parameters",
    "Record",
    "Refinement",
    "Samples",
    "SearchRecord",
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
    "choose",
    "describe",
    "estimate_moments",
    "exact_moments",
    "leap_grids",
    "load",
    "preset",
    "search_grid",
    "search_levels",
]
