"""IIA: terms, targets, the least squares, fitting, and the fitted solver with its file."""

from .fit import IIA, PRESETS, preset
from .fitted import FittedSolver, StepReport, describe, load
from .lstsq import LeastSquares
from .targets import Local, Substeps, Target
from .terms import StepRecord, Term

__all__ = [
    "IIA",
    "PRESETS",
    "FittedSolver",
    "LeastSquares",
    "Local",
    "StepRecord",
    "StepReport",
    "Substeps",
    "Target",
    "Term",
    "describe",
    "load",
    "preset",
]
