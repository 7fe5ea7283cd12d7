"""ODEs: the probability-flow ODE, and wrappers that change, memoize or share out its evaluations."""

from .base import Ledger, ProbabilityFlowODE
from .cached import cached
from .conditions import Shared
from .distributed import distributed
from .fingerprint import Fingerprint
from .guidance import Interval
from .networks import by_level
from .wrapped import Wrapped

__all__ = [
    "Fingerprint",
    "Interval",
    "Ledger",
    "ProbabilityFlowODE",
    "Shared",
    "Wrapped",
    "by_level",
    "cached",
    "distributed",
]
