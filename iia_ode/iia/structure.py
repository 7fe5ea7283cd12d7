"""Structured weights: one weight per frequency band and channel projection in the place of one per direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import Bands, LinearMap, Projections
from .terms import StepRecord, Term, window

__all__ = ["Window"]


@dataclass(frozen=True, eq=False)
class Window:
    """The directions of ``terms="window"``, each split by an orthogonal decomposition of the sample.

    A set of terms for :class:`~iia_ode.IIA`, as ``IIA("ddim", terms=Window(bands=4, channels="luma-chroma"))``. Scalar
    weights span one operator per direction, these one per direction and group: still linear, and fitted in closed form. With
    one band and no channels it is the plain window. The base's own weights must be numbers, or maps over the same
    decomposition.

    Parameters
    ----------
    bands, channels, axes : of :class:`~iia_ode.plan.Bands`.
    shape : of one sample; by default that of the samples that are fitted to.
    maps : a decomposition of the user's own, in the place of all that: orthogonal projections that sum to the identity, such
        as :class:`~iia_ode.plan.Principal`. A weight is then a number for each of them.
    history : how many earlier steps are used, at most as many as the fit's own `history`.
    states : how many earlier states are used, at most as many as steps; None is all of them.

    Raises
    ------
    InputError : options that do not fit together.
    """

    bands: int | str = 1
    channels: str | Tensor | None = None
    shape: tuple[int, ...] | None = None
    maps: Projections | None = None
    history: int | None = None
    states: int | None = None
    axes: int | None = None

    def __post_init__(self) -> None:
        for name in ("history", "states"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise InputError(f"{name} is a whole number from 0, or None for all, got {value!r}.")
        if self.bands != "all" and (not isinstance(self.bands, int) or isinstance(self.bands, bool) or self.bands < 1):
            raise InputError(f"bands is a whole number from 1, or 'all', got {self.bands!r}.")
        if self._split and self.maps is not None:
            raise InputError("give bands and channels, or maps, not both.")
        if self.maps is not None and not isinstance(self.maps, Projections):
            raise InputError(f"maps is a decomposition such as Bands or Principal of iia_ode.plan, got {self.maps!r}.")
        if self.axes is not None and not self._split:
            raise InputError("axes says where bands are taken: give bands or channels with it, or leave it out.")
        if self.shape is not None:
            _ = self.projections

    @property
    def _split(self) -> bool:
        return self.bands != 1 or self.channels is not None

    def for_shape(self, shape: Sequence[int]) -> Window:
        """The same for samples of this shape.

        Raises
        ------
        InputError : it is for samples of another shape, or these cannot be split so.
        """
        own = self.maps.shape if self.maps is not None else self.shape
        if own is not None and tuple(own) != tuple(shape):
            raise InputError(
                f"{self.__name__} is for samples {list(own)}, and these are {list(shape)}: give it none, or maps for these."
            )
        return replace(self, shape=tuple(shape)) if self._split and own is None else self

    @cached_property
    def projections(self) -> Projections | None:
        """The decomposition; None where there is one group only.

        Raises
        ------
        InputError : the shape of one sample is not known yet.
        """
        found = self.maps
        if self._split and self.shape is None:
            raise InputError(
                "a window with bands or channels is for samples of some shape, which IIA.fit sees; outside of a fit give it: "
                "shape=(3, 16, 16)."
            )
        if found is None and self.shape is not None:
            found = Bands(self.shape, self.bands, self.channels, self.axes)
        return None if found is None or found.count == 1 else found

    @property
    def __name__(self) -> str:
        """What reports and files call these terms."""
        if self.maps is not None:
            options = [f"maps={self.maps!r}"]
        else:
            channels = "matrix" if isinstance(self.channels, Tensor) else self.channels
            options = [f"bands={self.bands}"] * (self.bands != 1) + [f"channels={channels}"] * (channels is not None)
        options += [f"{k}={v}" for k in ("history", "states") if (v := getattr(self, k)) is not None]
        return f"window({', '.join(options)})" if options else "window"

    @cached_property
    def _units(self) -> tuple[tuple[str, LinearMap], ...]:
        p = self.projections
        if p is None:
            return ()
        rows = torch.eye(p.count, dtype=torch.float64, device="cpu")
        return tuple((name, LinearMap(p, row)) for name, row in zip(p.names, rows, strict=True))

    def __call__(self, step: StepRecord, earlier: tuple[StepRecord, ...]) -> tuple[Term, ...]:
        """The directions of a step."""
        earlier = earlier if self.history is None else earlier[: self.history]
        plain = window(step, earlier)
        if self.states is not None:
            old = [term for term in plain if term.history and term.symbol.startswith("z")]
            dropped = {id(term) for term in old[self.states :]}
            plain = tuple(term for term in plain if id(term) not in dropped)
        if not self._units:
            return plain
        return tuple(
            Term(f"{term.symbol}[{name}]", term.direction * unit, history=term.history)
            for term in plain
            for name, unit in self._units
        )
