"""Automatic fits: the search behind `iia_ode.fit` for grid, warm start, kind of weights and refinement."""

from .budget import BUDGETS, Budget
from .cost import FitCost, fit_cost
from .fit import fit
from .grid_search import search_grid, two_fold
from .grids import FreeGrid, LeapGrid, leap_grids
from .pipeline import Contender, Pipeline
from .search import Objective, Search, Trial, coordinate_descent

__all__ = [
    "BUDGETS",
    "Budget",
    "Contender",
    "FitCost",
    "FreeGrid",
    "LeapGrid",
    "Objective",
    "Pipeline",
    "Search",
    "Trial",
    "coordinate_descent",
    "fit",
    "fit_cost",
    "leap_grids",
    "search_grid",
    "two_fold",
]
