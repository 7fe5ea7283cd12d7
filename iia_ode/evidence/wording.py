"""Sentences made of measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .measurements import Estimate, Measurements

if TYPE_CHECKING:
    from .paper_figures import PaperFigure

__all__ = ["ordering", "percent"]


def percent(ratio: Estimate) -> str:
    """A ratio of errors as a change: ``"38% lower (± 4%)"``."""
    change = round(100 * abs(1 - ratio.mean))
    return f"{change}% {'lower' if ratio.mean < 1 else 'higher'} (± {100 * ratio.error:.0f}%)"


def ordering(figure: PaperFigure, found: Measurements) -> str:
    """In how many cases each ordering of a figure of the paper holds."""
    sentences = []
    for value, what in (("frechet", "Frechet distance"), ("rmse", "endpoint error")):
        for better, worse in figure.pairs:
            ratios = [r[-1] for r in figure.ratios(found, value) if r[2:4] == (better, worse)]
            if ratios:
                below, above = sum(r.below(1) for r in ratios), sum(r.above(1) for r in ratios)
                sentences.append(
                    f"{better} has a lower {what} than {worse} in {below} of {len(ratios)} cases below {figure.bound} "
                    f"evaluations, a higher one in {above}, and the 95% interval decides neither in "
                    f"{len(ratios) - below - above}."
                )
    return " ".join(sentences)
