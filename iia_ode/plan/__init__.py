"""The plan: vectors, the tracer, the runner and the analysis. See `Plan`."""

from .analysis import CanonicalForm, GaussianResponse
from .checks import check_grid, check_start
from .plan import Combine, Evaluate, Plan
from .tracer import Past, Tracer, trace
from .vectors import Vector

__all__ = [
    "CanonicalForm",
    "Combine",
    "Evaluate",
    "GaussianResponse",
    "Past",
    "Plan",
    "Tracer",
    "Vector",
    "check_grid",
    "check_start",
    "trace",
]
