"""Wrappers of an ODE: a subclass overrides `output`, and every function of the library uses the new output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from .base import Ledger, ProbabilityFlowODE
from .fingerprint import Fingerprint

__all__ = ["Wrapped", "layers_of"]

# Attributes that a wrapper reads from its inner ODE and writes to it, so that the two cannot differ.
_OF_INNER = (
    *("conditioning", "unconditional", "guidance_scale", "guidance_rescale", "batched_guidance"),
    *("time", "time_rounding", "tag", "ledger"),
)


class Wrapped(ProbabilityFlowODE):
    """An ODE over another ODE; the base class of every change to a model's output.

    A subclass overrides :meth:`output`, and calls ``self.inner.output(x, t)`` there. Conditions, guidance, the ledger and the
    fingerprint come from the inner ODE. Views (:meth:`condition`, :meth:`subset`) keep the subclass and its attributes. A
    subclass that changes the prediction type of the output sets ``self.prediction``. If a subclass overrides `output`, the
    fingerprint also names the class and its attributes, so a fit to the inner ODE is not mistaken for a fit to the wrapper. A
    subclass with an attribute per sample overrides :meth:`subset`, and indexes the attribute of ``super().subset(...)``.

    The parameters are the parameters of the inner ODE and of the subclass. The keys of ``state_dict`` begin with ``inner.``.

    >>> class Clamped(iia_ode.ode.Wrapped):
    ...     def output(self, x, t):
    ...         return self.inner.output(x, t).clamp(-1, 1)

    Parameters
    ----------
    inner : the wrapped ODE.

    Raises
    ------
    InputError : `inner` is no ODE.
    """

    inner: ProbabilityFlowODE
    changes = False
    """Whether the outputs differ from the outputs of the inner ODE: True for each subclass that overrides `output`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "changes" not in vars(cls) and cls.output is not Wrapped.output:
            cls.changes = True

    def __init__(self, inner: ProbabilityFlowODE) -> None:
        if not isinstance(inner, ProbabilityFlowODE):
            raise InputError(f"{type(self).__name__} wraps a ProbabilityFlowODE, got {type(inner).__name__}.")
        super().__init__(inner.model, **inner.settings)
        self._modules.pop("model", None)  # registered once, as part of the inner ODE
        self.__dict__["model"] = inner.model
        for name in _OF_INNER:
            del self.__dict__[name]
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name) if name in _OF_INNER else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_INNER and "inner" in self._modules:
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The output of the inner ODE for states x [B, ...] at time t, in the shape and dtype of x."""
        return self.inner.output(x, t)

    def branches(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The branches of the inner ODE, without any change by the wrapper."""
        return self.inner.branches(x, t)

    def over(self, inner: ProbabilityFlowODE) -> Self:
        """The same wrapper around another ODE of the same model."""
        twin = self._copied()
        twin.inner = inner
        return twin

    def condition(self, **conditioning: Any) -> Self:
        """The same wrapper around the inner ODE under other conditions."""
        return self.over(self.inner.condition(**conditioning))

    def subset(self, index: slice | Tensor, batch: int) -> Self:
        """The same wrapper around the inner ODE of some samples of a batch."""
        inner = self.inner.subset(index, batch)
        for layer in layers_of(inner):
            layer.ledger = self.ledger
        return self.over(inner)

    def _check_guidance(self) -> None:
        self.inner._check_guidance()

    def check_conditions(self, batch: int) -> None:
        """Raise InputError unless the conditions of the inner ODE fit the batch."""
        self.inner.check_conditions(batch)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype in which the model computes for states x [B, ...]."""
        return self.inner.compute_dtype(x)

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of the evaluations of a ``with`` block, counted by the inner ODE."""
        return self.inner.counting()

    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the inner ODE, followed by the class and its attributes if the class overrides `output`."""
        found = self.inner.fingerprint()
        return found.changed_by(self) if self.changes else found


def layers_of(ode: ProbabilityFlowODE) -> Iterator[ProbabilityFlowODE]:
    """The ODE, its inner ODE, and so on, from the outside in."""
    yield ode
    while isinstance(ode, Wrapped):
        ode = ode.inner
        yield ode
