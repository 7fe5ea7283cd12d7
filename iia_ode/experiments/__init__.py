"""Experiments on solvers: the settings to measure on, and the comparison of solvers at equal numbers of evaluations."""

from .compare import compare
from .results import Comparison, Protocol, Row
from .settings import Setting, batch_seed, get_setting, setting_names

__all__ = ["Comparison", "Protocol", "Row", "Setting", "batch_seed", "compare", "get_setting", "setting_names"]
