"""ODEs: the probability-flow ODE, and wrappers that change, memoize or share out its evaluations."""

from .base import Ledger, ProbabilityFlowODE
from .cached import cached
from .distributed import distributed
from .wrapped import Wrapped

__all__ = ["Ledger", "ProbabilityFlowODE", "Wrapped", "cached", "distributed"]
