"""An ODE that answers from memory what it has been asked before, for fits whose candidates begin alike."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files import bytes_of
from ..ode import ProbabilityFlowODE, check_wrapped
from .shared import SharedODE

__all__ = ["RememberedODE"]

_KEPT = 2**30  # bytes of outputs, on the host


class RememberedODE(ProbabilityFlowODE):
    """An ODE that calls its model once for what it is asked again: the same states, times and conditions to the last bit.

    All candidates of a search for a grid start from the same states, and where only one level of a grid is moved, they are
    the same up to there; and what was fitted has run already on what it was fitted to. What is remembered is the model's own
    output, so that nothing comes out otherwise than it would; the ledger counts what the model made. A batch that is cut
    otherwise is another question. With gradients enabled nothing is remembered.
    Over several processes all of them must have the answer, or all of them ask: a state made in two ways may be the same to
    the last bit in one process and not in another.

    Parameters
    ----------
    ode : the ODE, whose model is a function of states, times and conditions, and neither it nor they change from here on.
        Its views share what is remembered: outputs of up to 1 GiB, on the host; those asked for longest ago go first.

    Raises
    ------
    InputError : the ODE has an `evaluate` or `forward` of its own, which would be passed over.
    """

    def __init__(self, ode: ProbabilityFlowODE) -> None:
        check_wrapped(ode)
        super().__init__(ode.model, **ode.settings)
        self.inner, self.ledger, self.memory = ode, ode.ledger, Memory()

    @classmethod
    def of(cls, ode: ProbabilityFlowODE) -> RememberedODE:
        """The ODE itself if it remembers already."""
        return ode if isinstance(ode, RememberedODE) else cls(ode)

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model returns, or returned when it was asked the same; an evaluation in the former case only."""
        if torch.is_grad_enabled():
            return self.inner.output(x, t)
        key = _digest(x, t, self._conditions)
        known = self.memory.get(key)
        if isinstance(self.inner, SharedODE) and not self.inner.ranks.all(known is not None):
            known = None
        if known is None:
            made = self.inner.output(x, t)
            self.memory.put(key, made)
            return made
        return known.to(x.device)

    @cached_property
    def _conditions(self) -> bytes:
        parts = [(of, k, v) for of, d in enumerate((self.conditioning, self.unconditional)) for k, v in d.items()]
        return _digest(*(v if isinstance(v, Tensor | str | int) else self.memory.place(v) for p in parts for v in p))

    def condition(self, **conditioning: Any) -> RememberedODE:
        """The same model, ledger and memory under another condition."""
        return self.over(self.inner.condition(**conditioning))

    def subset(self, index: slice | Tensor, batch: int) -> RememberedODE:
        """The ODE of some samples of a batch of size `batch`; with the same memory."""
        return self.over(self.inner.subset(index, batch))

    def over(self, inner: ProbabilityFlowODE) -> RememberedODE:
        """Another view of the same model, with this memory."""
        view = RememberedODE(inner)
        view.memory = self.memory
        return view

    def fingerprint(self) -> str:
        """That of the ODE, made once: its model does not change, and each fit of a search asks for it."""
        if self.memory.fingerprint is None:
            self.memory.fingerprint = self.inner.fingerprint()
        return self.memory.fingerprint


class Memory:
    """Tensors by key, on the host, with up to so many bytes of numbers; what was asked for longest ago goes first.

    And the fingerprint of the model that made them, once it was asked for.
    """

    def __init__(self, limit: int = _KEPT) -> None:
        self.limit, self.size = limit, 0
        self.fingerprint: str | None = None
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
        self._forget(key)
        if (size := _bytes(value)) > self.limit:
            return
        while self.size + size > self.limit:
            self._forget(next(iter(self._known)))
        self._known[key] = value.detach().to("cpu", copy=True)
        self.size += size

    def _forget(self, key: bytes) -> None:
        if (gone := self._known.pop(key, None)) is not None:
            self.size -= _bytes(gone)

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """An empty one: where objects are says nothing of their copies."""
        return Memory(self.limit)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _digest(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            # A model may see how a tensor lies in memory, in the last bit of what it makes of it.
            digest.update(f"{part.dtype}{list(part.shape)}{part.stride()}".encode())
            digest.update(bytes_of(part))
        else:
            digest.update(f"{part!r}|".encode())
    return digest.digest()
