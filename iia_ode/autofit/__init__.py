"""Automatic fits: the search behind `iia_ode.fit` for grid, warm start, kind of weights and refinement."""

from .budget import BUDGETS, Budget
from .cost import FitCost, fit_cost
from .fit import fit
from .grid_search import Search, search_grid, two_fold
from .grids import FreeGrid, LeapGrid, leap_grids
from .nearby import Watched
from .pipeline import Contender, Pipeline
from .search import coordinate_descent

__all__ = [
    "BUDGETS",
    "Budget",
    "Contender",
    "FitCost",
    "FreeGrid",
    "LeapGrid",
    "Pipeline",
    "Search",
    "Watched",
    "coordinate_descent",
    "fit",
    "fit_cost",
    "leap_grids",
    "search_grid",
    "two_fold",
]
