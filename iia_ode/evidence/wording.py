"""Sentences made of measurements."""

from __future__ import annotations

from collections.abc import Sequence

from .measurements import Estimate

__all__ = ["ends", "judged", "percent"]


def percent(ratio: Estimate) -> str:
    """A ratio of errors as a change: ``"38% lower (± 4%)"``."""
    change = round(100 * abs(1 - ratio.mean))
    return f"{change}% {'lower' if ratio.mean < 1 else 'higher'} (± {100 * ratio.error:.0f}%)"


def judged(ratios: Sequence[Estimate]) -> tuple[int, int]:
    """Number of ratios below 1 by the 95% interval, and of ratios above 1."""
    return sum(r.below(1) for r in ratios), sum(r.above(1) for r in ratios)


def ends(ratios: Sequence[Estimate]) -> tuple[Estimate, Estimate]:
    """The ratios with the lowest and the highest mean."""
    return min(ratios, key=lambda r: r.mean), max(ratios, key=lambda r: r.mean)
