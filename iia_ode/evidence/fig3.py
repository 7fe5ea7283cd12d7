"""Figure 3 of the paper: DDIM and IIA-DDIM against the number of evaluations."""

from __future__ import annotations

from .paper_figures import PaperFigure

__all__ = ["EXPERIMENT"]

EXPERIMENT = PaperFigure(
    name="fig3",
    title="Figure 3: DDIM and IIA-DDIM",
    question="Is IIA-DDIM better than DDIM?",
    solvers={"ddim": "ddim", "iia-ddim": "iia-ddim"},
    pairs=[("iia-ddim", "ddim")],
    nfes={"digits": (5, 8, 10, 15, 20, 25, 35), "fashion": (5, 10, 15, 25), "patches": (5, 10, 15)},
    claim="Figure 3: IIA-DDIM < DDIM in Frechet distance",
)
