"""Evidence: an experiment for each claim of the paper and for each question that the paper left open.

``iia-ode experiment NAME`` runs an experiment of :data:`EXPERIMENTS`.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import unknown_name
from .agreement import Agreement, agreement
from .experiment import Cell, Claim, Experiment, Part
from .measurements import Estimate, Measurements
from .running import load, run

__all__ = [
    "EXPERIMENTS",
    "Agreement",
    "Cell",
    "Claim",
    "Estimate",
    "Experiment",
    "Measurements",
    "Part",
    "agreement",
    "get_experiment",
    "load",
    "run",
]

EXPERIMENTS = (
    "fig2",
    "fig3",
    "fig4",
    "table1",
    "guidance",
    "overhead",
    "ablation",
    "shift",
    "schedules",
    "solvers",
    "batch",
    "spectrum",
    "learned",
)
"""Names of all experiments, in the order of the overview."""


def get_experiment(name: str) -> Experiment:
    """Make an experiment by name.

    Parameters
    ----------
    name : a name of :data:`EXPERIMENTS`.

    Returns
    -------
    The experiment.

    Raises
    ------
    UnknownNameError : no such experiment.
    """
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    found: Experiment = import_module(f".{name}", __package__).EXPERIMENT
    return found
