"""Figure 4 of the paper: S-PNDM, iPNDM and their IIA forms against the number of evaluations."""

from __future__ import annotations

from .paper_figures import PaperFigure

__all__ = ["EXPERIMENT"]

EXPERIMENT = PaperFigure(
    name="fig4",
    title="Figure 4: S-PNDM, iPNDM and their IIA forms",
    question="Does IIA improve S-PNDM and iPNDM, which are of higher order than DDIM?",
    solvers={"spndm": "spndm", "iia-spndm": "iia-spndm", "ipndm": "ipndm", "iia-ipndm": "iia-ipndm"},
    pairs=[("iia-spndm", "spndm"), ("iia-ipndm", "ipndm")],
    nfes={"digits": (5, 8, 10, 15, 20), "fashion": (5, 10, 20), "patches": (5, 10, 20)},
    claim="Figure 4: IIA-SPNDM < SPNDM and IIA-IPNDM < IPNDM in Frechet distance",
)
