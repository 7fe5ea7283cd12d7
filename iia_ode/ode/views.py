"""Views of an ODE: other conditions or some samples of a batch, with the same model and the same ledger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from .calls import Ledger, counted, own_device
from .clock import Time
from .conditions import picked
from .guidance import Scale, check_guidance

__all__ = ["Views"]


class Views(nn.Module):
    """The part of :class:`~iia_ode.ProbabilityFlowODE` that makes views and counts evaluations."""

    model: Callable[..., Tensor]
    conditioning: dict[str, Any]
    unconditional: dict[str, Any]
    guidance_scale: Scale
    ledger: Ledger
    time: Time | None

    def condition(self, **conditioning: Any) -> Self:
        """The ODE under other conditions, with the same model, null condition, guidance scale and ledger.

        Raises
        ------
        InputError : guidance lacks a keyword, or a condition cannot be split with the samples.
        """
        view = self._view(conditioning, self.unconditional)
        view._check_guidance()
        return view

    def subset(self, index: slice | Tensor, batch: int) -> Self:
        """The ODE restricted to some samples of a batch.

        Parameters
        ----------
        index : the samples, a slice or an integer or boolean tensor [n].
        batch : size of the whole batch. Conditions and guidance scales with `batch` entries are indexed; others stay.

        Returns
        -------
        The ODE, with the same model and ledger.
        """
        view = self._view(picked(self.conditioning, index, batch), picked(self.unconditional, index, batch))
        view.guidance_scale = picked({"scale": self.guidance_scale}, index, batch)["scale"]
        return view

    def _check_guidance(self) -> None:
        """Raise InputError if a condition cannot be split with the samples, or if guidance lacks a null condition."""
        check_guidance(self.conditioning, self.unconditional, self.guidance_scale)

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> Self:
        """A shallow copy with other conditions, and with the same class, model and ledger."""
        view = self._copied()
        view.conditioning, view.unconditional = dict(conditioning), dict(unconditional)
        return view

    def _copied(self) -> Self:
        """A shallow copy with submodules, parameters and buffers of its own."""
        twin = copy.copy(self)
        twin.__dict__ |= {name: dict(self.__dict__[name]) for name in ("_modules", "_parameters", "_buffers")}
        return twin

    @property
    def nfe(self) -> int:
        """Number of batched model evaluations; ``ode.ledger.reset()`` sets the number to zero."""
        return self.ledger.evaluations

    @property
    def device(self) -> torch.device | None:
        """Device of the model's parameters; None for a model without parameters, which runs on the device of the states."""
        return own_device(self.model)

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of the evaluations of a ``with`` block, filled in at the end of the block."""
        return counted(self.ledger)
