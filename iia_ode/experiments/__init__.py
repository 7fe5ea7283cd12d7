"""Experiments on solvers: the settings to measure on, and the comparison of solvers at equal numbers of evaluations."""

from .compare import compare
from .results import Comparison, Protocol, Row
from .settings import Setting, batch_seed, get_setting, setting_names
from .slopes import Slope
from .steps import StepError, StepErrors, step_errors

__all__ = [
    "Comparison",
    "Protocol",
    "Row",
    "Setting",
    "Slope",
    "StepError",
    "StepErrors",
    "batch_seed",
    "compare",
    "get_setting",
    "setting_names",
    "step_errors",
]
