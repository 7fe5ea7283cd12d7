"""The plan: vectors, the tracer, the runner and the analysis. See `Plan`."""

from .analysis import CanonicalForm, GaussianErrors, GaussianResponse, gaussian_errors
from .bands import Bands
from .capture import Graph, graph
from .checks import check_grid, check_ode, check_start
from .initial import check_size, check_states
from .instructions import Combine, Evaluate, Instruction, run_code
from .loop import advance, evaluator
from .maps import LinearMap, PerCondition, projections_from
from .plan import Plan
from .projections import Principal, Projections
from .reading import read_plan, read_run
from .rows import run_rows
from .run import Run
from .tableaus import Tableau, butcher
from .tracer import Past, Tracer, trace, traced
from .vectors import Vector

__all__ = [
    "Bands",
    "CanonicalForm",
    "Combine",
    "Evaluate",
    "GaussianErrors",
    "GaussianResponse",
    "Graph",
    "Instruction",
    "LinearMap",
    "Past",
    "PerCondition",
    "Plan",
    "Principal",
    "Projections",
    "Run",
    "Tableau",
    "Tracer",
    "Vector",
    "advance",
    "butcher",
    "check_grid",
    "check_ode",
    "check_size",
    "check_start",
    "check_states",
    "evaluator",
    "gaussian_errors",
    "graph",
    "projections_from",
    "read_plan",
    "read_run",
    "run_code",
    "run_rows",
    "trace",
    "traced",
]
