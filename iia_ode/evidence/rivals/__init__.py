"""Published learned solvers, written from their papers as rivals of :func:`iia_ode.fit`.

Each rival takes an ODE with states of the schedule EDM, and returns a plan with the cost of learning it.
"""

from .ays import align, bound_costs, squared_differences
from .bns import NonStationary, bns
from .gits import best_path, gits, local_costs
from .pairs import Learned, Pairs

__all__ = [
    "Learned",
    "NonStationary",
    "Pairs",
    "align",
    "best_path",
    "bns",
    "bound_costs",
    "gits",
    "local_costs",
    "squared_differences",
]
