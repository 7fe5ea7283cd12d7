"""IIA: weights on a given grid, by sequential least squares and by endpoint refinement, and the fitted solver."""

from .batch import Batch
from .directions import StepRecord, Term, Window
from .fitted import FittedSolver, describe
from .least_squares import LeastSquares
from .method import IIA, PRESETS, SETTINGS, preset
from .minimizers import Adam, GaussNewton, IncrementalGaussNewton, Minimizer, Objective, Status
from .plan_parameters import Parameters
from .provenance import Ingredient, Record, SearchRecord, StepReport
from .refinement import EndpointError, Iteration, Refinement, refine
from .targets import Local, Substeps, Target, TeacherTrajectory

__all__ = [
    "IIA",
    "PRESETS",
    "SETTINGS",
    "Adam",
    "Batch",
    "EndpointError",
    "FittedSolver",
    "GaussNewton",
    "IncrementalGaussNewton",
    "Ingredient",
    "Iteration",
    "LeastSquares",
    "Local",
    "Minimizer",
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
    "TeacherTrajectory",
    "Term",
    "Window",
    "describe",
    "preset",
    "refine",
]
