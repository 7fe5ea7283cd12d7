"""Warm starts: the first interval of a grid in closed form, before any plan, and the moments of the data behind them."""

from .moments import Moments, estimate_moments, exact_moments
from .warm_start import WarmStart

__all__ = ["Moments", "WarmStart", "estimate_moments", "exact_moments"]
