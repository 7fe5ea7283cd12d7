"""IIA: weights on a given grid, by sequential least squares and by endpoint refinement, and the fitted solver."""

from .batch import Batch
from .directions import StepRecord, Term, Window
from .fitted import FittedSolver, describe
from .least_squares import LeastSquares
from .method import IIA, PRESETS, preset
from .moments import Moments, estimate_moments, exact_moments
from .plan_parameters import Parameters
from .provenance import Ingredient, Record, SearchRecord, StepReport
from .refinement import EndpointError, GaussNewton, Iteration, Objective, Refinement, Status, refine
from .targets import Local, Substeps, Target, TeacherTrajectory
from .teacher import Teacher
from .warm_start import WarmStart

__all__ = [
    "IIA",
    "PRESETS",
    "Batch",
    "EndpointError",
    "FittedSolver",
    "GaussNewton",
    "Ingredient",
    "Iteration",
    "LeastSquares",
    "Local",
    "Moments",
    "Objective",
    "Parameters",
    "Record",
    "Refinement",
    "SearchRecord",
    "Status",
    "StepRecord",
    "StepReport",
    "Substeps",
    "Target",
    "Teacher",
    "TeacherTrajectory",
    "Term",
    "WarmStart",
    "Window",
    "describe",
    "estimate_moments",
    "exact_moments",
    "preset",
    "refine",
]
