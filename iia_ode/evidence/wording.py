"""Sentences made of measurements."""

from __future__ import annotations

from .measurements import Estimate

__all__ = ["percent"]


def percent(ratio: Estimate) -> str:
    """A ratio of errors as a change: ``"38% lower (± 4%)"``."""
    change = round(100 * abs(1 - ratio.mean))
    return f"{change}% {'lower' if ratio.mean < 1 else 'higher'} (± {100 * ratio.error:.0f}%)"
