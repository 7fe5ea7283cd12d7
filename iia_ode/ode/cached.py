"""Memoized evaluations, for searches whose candidates share their first evaluations."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
from torch import Tensor

from ..bounded import Bounded
from ..files import bytes_of
from ..transforms import has_tangent, transformed
from .base import ProbabilityFlowODE
from .conditions import Shared, named, pieces
from .distributed import Distributed
from .fingerprint import Fingerprint
from .wrapped import Wrapped, layers_of

__all__ = ["Cached", "cached"]

_LIMIT = 2**30  # bytes of outputs, on the host
_MOST = 2**20  # outputs


def cached(ode: ProbabilityFlowODE) -> ProbabilityFlowODE:
    """Memoize the evaluations of an ODE; an ODE with memoized evaluations is returned unchanged.

    The candidates of a search start from the same states, and agree up to the first level in which their grids differ.
    Evaluations up to this level are made once. Results are unchanged: the cache holds outputs of the model, and a hit needs
    the same states, times and conditions to the last bit. The key covers a whole batch, so another chunking misses the cache.
    The cache is bypassed with gradients enabled, with tangents of forward differentiation, and inside a transform of
    ``torch.func`` or a graph. The ledger counts evaluations of the model only, not hits.

    The cache lies inside a distributed ODE: each process memoizes its own share of the samples.

    Parameters
    ----------
    ode : the ODE. Its model must be a function of states, times and conditions, and must not change afterwards. Views of the
        ODE share the cache. The cache holds up to 1 GiB of outputs on the host, and drops the least recently used outputs
        first.

    Returns
    -------
    The ODE with a cache.

    Raises
    ------
    InputError : the ODE overrides `evaluate` or `forward`.
    """
    layers = list(layers_of(ode))
    if any(isinstance(layer, Cached) for layer in layers):
        return ode
    return _below(ode) if any(isinstance(layer, Distributed) for layer in layers) else Cached(ode)


def _below(ode: ProbabilityFlowODE) -> ProbabilityFlowODE:
    """The same wrappers with a cache right below the distribution."""
    if not isinstance(ode, Wrapped):
        return Cached(ode)
    return ode.over(Cached(ode.inner) if isinstance(ode, Distributed) else _below(ode.inner))


class Cached(Wrapped):
    """See :func:`cached`."""

    def __init__(self, inner: ProbabilityFlowODE) -> None:
        super().__init__(inner)
        self.memory = Memory()
        self._known: tuple[list[tuple[str, Any, object]], bytes] | None = None

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The memoized output for states x [B, ...] at time t, or a new one."""
        if torch.is_grad_enabled() or transformed() or has_tangent(x) or has_tangent(t):
            return self.inner.output(x, t)
        key = _digest(x, t, self._conditions)
        known = self.memory.outputs.get(key)
        if known is not None:
            return known.to(x.device, copy=True)
        made = self.inner.output(x, t)
        self.memory.outputs.put(key, made.detach().to("cpu", copy=True))
        return made

    @property
    def _conditions(self) -> bytes:
        """The digest of the conditions, made again where an assignment or an operation in place changed one."""
        leaves = [("scale", self.guidance_scale), *named(self.conditioning), (";", None), *named(self.unconditional)]
        seen = [(name, leaf, _state(leaf)) for name, leaf in leaves]
        known = self._known
        if known is None or len(seen) != len(known[0]) or not all(map(_is_same, seen, known[0])):
            self._known = known = seen, self._digested()
        return known[1]

    def _digested(self) -> bytes:
        def place(leaf: Any) -> object:
            if isinstance(leaf, list | tuple) and all(isinstance(v, str | int | float) for v in leaf):
                return leaf
            return leaf if isinstance(leaf, str | int | float) else ("object", self.memory.place(leaf))

        scale = self.guidance_scale if isinstance(self.guidance_scale, Tensor) else place(self.guidance_scale)
        trees = self.conditioning, self.unconditional
        return _digest(scale, *(piece for values in trees for piece in (b";", *pieces(values, place))))

    def over(self, inner: ProbabilityFlowODE) -> Self:
        """The same cache around another view of the model."""
        twin = super().over(inner)
        twin._known = None
        return twin

    changes = False  # the results are those of the inner ODE

    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the inner ODE, computed once: the model does not change."""
        if self.memory.fingerprint is None:
            self.memory.fingerprint = self.inner.fingerprint()
        return self.memory.fingerprint


class Memory:
    """Outputs by key on the host, up to `limit` bytes, and the fingerprint of their model."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self.limit = limit
        self.outputs: Bounded[bytes, Tensor] = Bounded(_MOST, _size, limit)
        self.fingerprint: Fingerprint | None = None
        self._objects: dict[int, Any] = {}

    def place(self, value: Any) -> int:
        """Identity of an object. The object is kept alive, so that no later object has the same identity."""
        self._objects[id(value)] = value
        return id(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """An empty memory, because identities of objects do not survive a copy."""
        return Memory(self.limit)


def _size(value: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return value.numel() * value.element_size()


def _state(leaf: Any) -> object:
    """A value that changes when a condition is changed in place."""
    if isinstance(leaf, Shared):
        return [(value, _state(value)) for _, value in named({"": leaf.value})]
    if isinstance(leaf, Tensor):
        return 0 if leaf.is_inference() else leaf._version
    return tuple(leaf) if isinstance(leaf, list) else None


def _is_same(new: tuple[str, Any, Any], old: tuple[str, Any, Any]) -> bool:
    """Whether a condition is the one seen before, and unchanged."""
    if new[0] != old[0] or new[1] is not old[1]:
        return False
    if isinstance(new[1], Shared):
        return len(new[2]) == len(old[2]) and all(
            a is b and v == w for (a, v), (b, w) in zip(new[2], old[2], strict=True)
        )
    return bool(new[2] == old[2])


def _digest(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            # The strides count: a model's last bit may depend on the memory layout of its input.
            digest.update(f"{part.dtype}{list(part.shape)}{part.stride()}".encode())
            digest.update(bytes_of(part))
        elif isinstance(part, bytes | memoryview):
            digest.update(part)
        else:
            digest.update(f"{part!r}|".encode())
    return digest.digest()
