"""Wrappers of an ODE: a subclass overrides `output`, and every function of the library follows the new output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor

from ..errors import InputError
from .base import Ledger, ProbabilityFlowODE

__all__ = ["Wrapped", "layers_of"]


class Wrapped(ProbabilityFlowODE):
    """An ODE over another ODE; the base class of every change to a model's output.

    A subclass overrides :meth:`output`, and calls ``self.inner.output(x, t)`` there. Conditions, guidance, the ledger and the
    fingerprint are those of the inner ODE. Views (:meth:`condition`, :meth:`subset`) keep the subclass and its attributes. A
    subclass that changes the prediction type of the output sets ``self.prediction``. A subclass with other outputs than the
    inner ODE also overrides :meth:`fingerprint`; otherwise a fit to the inner ODE would pass for a fit to the wrapper.

    The parameters are those of the inner ODE, and those of the subclass. The keys of ``state_dict`` begin with ``inner.``.

    >>> class Clamped(iia_ode.ode.Wrapped):
    ...     def output(self, x, t):
    ...         return self.inner.output(x, t).clamp(-1, 1)

    Parameters
    ----------
    inner : the wrapped ODE.

    Raises
    ------
    InputError : `inner` is no ODE, or overrides `evaluate` or `forward`. A wrapper would pass over these methods.
    """

    inner: ProbabilityFlowODE

    def __init__(self, inner: ProbabilityFlowODE) -> None:
        if not isinstance(inner, ProbabilityFlowODE):
            raise InputError(f"{type(self).__name__} wraps a ProbabilityFlowODE, got {type(inner).__name__}.")
        kind = type(inner)
        own = [n for n in ("evaluate", "forward") if getattr(kind, n) is not getattr(ProbabilityFlowODE, n)]
        if own:
            raise InputError(
                f"{kind.__name__} overrides {' and '.join(own)}, which a wrapper passes over: subclass iia_ode.ode.Wrapped "
                "and override output instead."
            )
        super().__init__(inner.model, **inner.settings)
        self._modules.pop("model", None)  # registered once, as part of the inner ODE
        self.__dict__["model"] = inner.model
        self.inner, self.ledger = inner, inner.ledger

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The output of the inner ODE for states x [B, ...] at time t, in the shape and dtype of x."""
        return self.inner.output(x, t)

    def over(self, inner: ProbabilityFlowODE) -> Self:
        """The same wrapper around another ODE of the same model."""
        twin = self._copied()
        twin.inner, twin.ledger = inner, inner.ledger
        twin.conditioning, twin.unconditional = inner.conditioning, inner.unconditional
        return twin

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> Self:
        return self.over(self.inner._view(conditioning, unconditional))

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of what a ``with`` block spends, counted by the inner ODE."""
        return self.inner.counting()

    def fingerprint(self) -> str:
        """Fingerprint of the inner ODE."""
        return self.inner.fingerprint()


def layers_of(ode: ProbabilityFlowODE) -> Iterator[ProbabilityFlowODE]:
    """The ODE, its inner ODE, and so on, from the outside in."""
    yield ode
    while isinstance(ode, Wrapped):
        ode = ode.inner
        yield ode
