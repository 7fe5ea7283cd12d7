"""An ODE that answers from memory what it has been asked before, for searches whose candidates begin alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files import bytes_of
from ..ode import ProbabilityFlowODE

__all__ = ["RememberedODE"]

_KEPT = 2**30  # bytes of outputs, on the host


class RememberedODE(ProbabilityFlowODE):
    """An ODE that calls its model once for what it is asked again: the same states, times and conditions to the last bit.

    All candidates of a search for a grid start from the same states, and where only one level of a grid is moved, a fit and
    its run are the same up to there: half of all evaluations. What is remembered is the model's own output, so that nothing
    comes out otherwise than it would; the ledger counts what the model made. Where gradients are asked for, nothing is
    remembered.

    Parameters
    ----------
    ode : the ODE, whose model is a function of states, times and conditions.
    memory : of an ODE of the same model, to share; a new one by default. The outputs asked for longest ago are forgotten
        beyond 1 GiB, which lies on the host.
    """

    def __init__(self, ode: ProbabilityFlowODE, memory: Memory | None = None) -> None:
        super().__init__(ode.model, **ode.settings)
        self.inner, self.ledger = ode, ode.ledger
        self.memory = Memory() if memory is None else memory

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model returns, or returned when it was asked the same; an evaluation in the former case only."""
        if torch.is_grad_enabled():
            return self.inner.output(x, t)
        key = _digest(x, t, self._conditions)
        known = self.memory.get(key)
        if known is None:
            made = self.inner.output(x, t)
            self.memory.put(key, made)
            return made
        return known.to(x.device)

    @cached_property
    def _conditions(self) -> bytes:
        items = (*self.conditioning.items(), *self.unconditional.items())
        return _digest(*(v if isinstance(v, Tensor | str) else self.memory.place(v) for item in items for v in item))

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> RememberedODE:
        return RememberedODE(self.inner._view(conditioning, unconditional), self.memory)

    def fingerprint(self) -> str:
        """That of the ODE."""
        return self.inner.fingerprint()


class Memory:
    """Tensors by key, on the host, up to so many bytes; what was asked for longest ago goes first."""

    def __init__(self, limit: int = _KEPT) -> None:
        self.limit, self.size = limit, 0
        self._known: dict[bytes, Tensor] = {}
        self._objects: dict[int, Any] = {}

    def place(self, value: Any) -> int:
        """Where an object is, which no other will be while this memory is: the object is kept."""
        self._objects[id(value)] = value
        return id(value)

    def get(self, key: bytes) -> Tensor | None:
        """A copy of the tensor of that key, for the caller to do with as it likes."""
        if (found := self._known.pop(key, None)) is None:
            return None
        self._known[key] = found
        return found.clone()

    def put(self, key: bytes, value: Tensor) -> None:
        """Remember a copy."""
        if (size := value.numel() * value.element_size()) > self.limit:
            return
        while self.size + size > self.limit:
            oldest = self._known.pop(next(iter(self._known)))
            self.size -= oldest.numel() * oldest.element_size()
        self._known[key] = value.detach().to("cpu", copy=True)
        self.size += size


def _digest(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(bytes_of(part))
        else:
            digest.update(f"{part!r}|".encode())
    return digest.digest()
