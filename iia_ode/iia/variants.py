"""What a fit in closed form may be made of: scalars, constants, and weights for each band of frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .directions import Terms, Window
from .fit import IIA

__all__ = ["SCALARS", "Variant", "variants_of"]


@dataclass(frozen=True, eq=False)
class Variant:
    """The options of a fit in closed form that are tried against each other.

    Attributes
    ----------
    name : what reports call it.
    terms, intercept : of :class:`~iia_ode.IIA`.
    """

    name: str
    terms: str | Terms = "window"
    intercept: bool = False

    @property
    def groups(self) -> int:
        """How many numbers a weight is."""
        projections = self.terms.projections if isinstance(self.terms, Window) else None
        return 1 if projections is None else projections.count

    def of(self, method: IIA) -> IIA:
        """The method with these options."""
        return IIA(**{**method.__dict__, "terms": self.terms, "intercept": self.intercept})


SCALARS = Variant("scalars")


def variants_of(shape: Sequence[int], *, intercepts: bool) -> list[Variant]:
    """Those for samples of a shape, scalars first; bands are for images [C, H, W], where neighbours mean something.

    The energy of images falls steeply with frequency, so at any level of noise low frequencies are further on their way than
    high ones, and brightness further than colour: one weight cannot suit them all.
    """
    found = [SCALARS]
    if len(shape) == 3 and min(shape[1:]) >= 4:
        bands = Window(4 if min(shape[1:]) >= 8 else 2, "luma-chroma" if shape[0] == 3 else None, tuple(shape))
        found.append(Variant("bands", bands))
    if intercepts:
        found += [
            Variant(v.name + ", intercept" if v is not SCALARS else "intercept", v.terms, intercept=True) for v in found
        ]
    return found
