"""The plan: vectors, the tracer, the runner and the analysis. See `Plan`."""

from .analysis import CanonicalForm, GaussianResponse
from .bands import Bands
from .checks import check_grid, check_ode, check_start
from .maps import LinearMap, PerCondition, projections_from
from .plan import Combine, Evaluate, Plan
from .projections import Matrices, Principal, Projections
from .tracer import Past, Tracer, trace, traced
from .vectors import Vector

__all__ = [
    "Bands",
    "CanonicalForm",
    "Combine",
    "Evaluate",
    "GaussianResponse",
    "LinearMap",
    "Matrices",
    "Past",
    "PerCondition",
    "Plan",
    "Principal",
    "Projections",
    "Tracer",
    "Vector",
    "check_grid",
    "check_ode",
    "check_start",
    "projections_from",
    "trace",
    "traced",
]
