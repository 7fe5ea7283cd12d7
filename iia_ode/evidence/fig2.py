"""Figure 2 of the paper: EDM, BIIA-EDM and IIA-EDM against the number of evaluations."""

from __future__ import annotations

from .paper_figures import PaperFigure

__all__ = ["EXPERIMENT"]

EXPERIMENT = PaperFigure(
    name="fig2",
    title="Figure 2: EDM, BIIA-EDM and IIA-EDM",
    question="Is IIA-EDM better than BIIA-EDM, and BIIA-EDM better than EDM, at fewer than 25 evaluations?",
    solvers={"heun": "heun", "biia-edm": "biia-edm", "iia-edm": "iia-edm"},
    pairs=[("biia-edm", "heun"), ("iia-edm", "biia-edm"), ("iia-edm", "heun")],
    nfes={"digits": (5, 7, 9, 11, 15, 25, 35), "fashion": (5, 9, 15, 25), "patches": (5, 9, 15)},
    claim="Figure 2: IIA-EDM < BIIA-EDM < EDM in Frechet distance below 25 evaluations",
)
"""EDM is Heun's method on the Karras grid."""
