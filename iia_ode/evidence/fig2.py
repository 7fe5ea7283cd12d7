"""Figure 2 of the paper: EDM, BIIA-EDM and IIA-EDM against the number of evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from .experiment import Claim
from .measurements import Measurements
from .paper_figures import FIT_SAMPLES, SAMPLES, PaperFigure
from .wording import ordering

__all__ = ["EXPERIMENT", "Fig2"]


class Fig2(PaperFigure):
    """EDM is Heun's method on the Karras grid; BIIA-EDM and IIA-EDM are fitted to it."""

    name = "fig2"
    title = "Figure 2: EDM, BIIA-EDM and IIA-EDM"
    question = "Is IIA-EDM better than BIIA-EDM, and BIIA-EDM better than EDM, at fewer than 25 evaluations (figure 2 of the paper)?"
    solvers = {"heun": "heun", "biia-edm": "biia-edm", "iia-edm": "iia-edm"}
    pairs = (("iia-edm", "biia-edm"), ("biia-edm", "heun"))
    nfes = {"digits": (5, 7, 9, 11, 15, 19, 25, 35), "fashion": (5, 9, 15, 25), "patches": (5, 9, 15, 25)}

    def answer(self, found: Measurements) -> str:
        """In how many cases the ordering of the paper holds."""
        return ordering(self, found)

    @property
    def method(self) -> str:
        """Denoisers and numbers of samples."""
        sizes = ", ".join(f"{n} of {s}" for s, n in SAMPLES.items())
        return (
            f"Unseen samples per seed: {sizes}. Fits see {FIT_SAMPLES} other samples, with the paper's settings "
            "(M, r) = (3, 1). The endpoint error is against converged solutions from the same noise. The Frechet distance is "
            "on the features of the packaged classifiers, from the training images; at so few images its value is biased "
            "upwards, equally for all methods."
        )

    def claims(self, found: Measurements) -> Sequence[Claim]:
        """The claim of the figure."""
        text = "IIA-EDM < BIIA-EDM < EDM in FID below 25 evaluations (figure 2)"
        return [Claim(text, self.answer(found), "see page")]


EXPERIMENT = Fig2()
