"""Experiments on solvers: the settings to measure on, and the comparison of solvers at equal numbers of evaluations."""

from .compare import compare
from .results import Comparison, Protocol, Row
from .settings import Setting, batch_seed, get_setting, setting_names
from .slopes import Slope

__all__ = ["Comparison", "Protocol", "Row", "Setting", "Slope", "batch_seed", "compare", "get_setting", "setting_names"]
