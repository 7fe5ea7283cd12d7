"""Orthogonal decompositions of the space of one sample: the base class, and principal directions."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..bounded import Bounded
from ..errors import InputError
from ..transforms import kept_property, transformed

__all__ = ["PLACES", "Cache", "Part", "Principal", "Projections", "is_orthonormal", "place"]

_F64 = torch.float64
_TOLERANCE = 1e-8

Part: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]
"""A batch x [B, *shape], and the prepared coefficients (:meth:`Projections.prepare`) in the dtype and on the device of x."""

Cache: TypeAlias = Bounded[tuple[torch.device, torch.dtype], tuple[Tensor, ...]]

PLACES = 8
"""Largest number of copies of a weight on other devices and in other dtypes; a usual host has at most 8 devices."""


def place(cache: Cache, tensors: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors on another device and in another dtype, copied there once; a tensor with a gradient is copied each time."""
    if transformed():
        return tuple(v.to(device, dtype) for v in tensors)
    known = cache.get((device, dtype))
    if known is not None:
        return known
    with torch.inference_mode(False):  # a copy made in the first run must serve a run with gradients
        copies = tuple(v.to(device, dtype) for v in tensors)
    return copies if any(v.requires_grad for v in tensors) else cache.put((device, dtype), copies)


class Projections(ABC):
    """Orthogonal projections P_1 .. P_G of a sample [*shape]: their sum is the identity, and P_g P_h = 0 for g != h.

    Immutable. Projections with equal configuration and tensors are equal and have equal hashes.

    Attributes
    ----------
    shape : shape of one sample.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Name of each group."""

    @kept_property
    @abstractmethod
    def sizes(self) -> Tensor:
        """Dimension of each group, float64 [G]; the sum is the dimension of a sample."""

    @abstractmethod
    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """The tensors for applying sum_g c_g P_g, from coefficients [G], or [B, G] for a map per sample; on their device."""

    @abstractmethod
    def _combined(self, parts: Sequence[Part], tables: tuple[Tensor, ...]) -> Tensor: ...

    @abstractmethod
    def _tables(self) -> tuple[Tensor, ...]:
        """The tensors for applying any map, float64 on the host."""

    @abstractmethod
    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_b <P_g x_b, P_g y_b> for each group, float64 [G] on the host, of x and y [B, *shape]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The kind and the options, JSON-ready; input of :func:`projections_from`, together with :meth:`tensors`."""

    def tensors(self) -> dict[str, Tensor]:
        """The float64 tensors not held by the configuration, by name."""
        return {}

    @property
    def count(self) -> int:
        """G, the number of groups."""
        return len(self.sizes)

    def apply(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """sum_g c_g P_g x for x [B, *shape] and coefficients [G], in the dtype and on the device of x.

        Raises
        ------
        InputError : x has samples of another shape.
        """
        return self.combine([(x, tuple(v.to(x) for v in self.prepare(coefficients.cpu().double())))])

    def combine(self, parts: Sequence[Part]) -> Tensor:
        """sum_j (sum_g c_jg P_g) x_j with one transform back, in the dtype and on the device of the x_j; a new tensor.

        Raises
        ------
        InputError : a sample of another shape.
        """
        x = parts[0][0]
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"{self!r} are of samples {list(self.shape)}, and these are {list(x.shape[1:])}.")
        with _exactly(x) as dtype:
            if dtype != x.dtype:
                parts = [(v.to(dtype), tuple(p.to(dtype) for p in prepared)) for v, prepared in parts]
            tables = place(self._placed, self._tables(), x.device, dtype)
            return self._combined(parts, tables).to(x.dtype)

    @kept_property
    def _placed(self) -> Cache:
        return Bounded(PLACES)

    @kept_property
    def digest(self) -> str:
        """A short hash of the configuration and the tensors."""
        body = hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode())
        for name, value in sorted(self.tensors().items()):
            body.update(f"\n{name} {list(value.shape)}\n".encode() + value.contiguous().numpy().tobytes())
        return body.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Projections) and other.digest == self.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}[{self.count}]"


@contextmanager
def _exactly(x: Tensor) -> Iterator[torch.dtype]:
    """Matrix products in the precision of x: no autocast, and float64 where float32 ones may be rounded to TF32."""
    kind = x.device.type
    coarse = kind == "cuda" and x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    dtype = _F64 if coarse else x.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            yield dtype
    else:
        yield dtype


@dataclass(frozen=True, eq=False, repr=False)
class Principal(Projections):
    """A group for each of K orthonormal directions, and the remainder as the last group.

    Parameters
    ----------
    directions : [K, d], orthonormal rows; K from 0 to d.
    shape : shape of one sample, d components.

    Raises
    ------
    InputError : the directions are not orthonormal, or do not fit the shape.
    """

    directions: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        v = self.directions.detach().to("cpu", _F64, copy=True).contiguous()
        object.__setattr__(self, "directions", v)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if v.ndim != 2 or v.shape[1] != math.prod(self.shape) or len(v) > v.shape[1] or not is_orthonormal(v):
            raise InputError(
                f"principal directions of samples {list(self.shape)} are orthonormal rows [K, {math.prod(self.shape)}], "
                f"K at most that; got {list(v.shape)}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """``direction 1`` to ``direction K``, and ``rest``."""
        return (*(f"direction {k + 1}" for k in range(len(self.directions))), "rest")

    @kept_property
    def sizes(self) -> Tensor:
        """Ones, and d - K."""
        k, d = self.directions.shape
        return torch.tensor([1.0] * k + [float(d - k)], dtype=_F64, device="cpu")

    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """The difference of each coefficient from the last coefficient, [..., K], and the last coefficient, [..., 1]."""
        return coefficients[..., :-1] - coefficients[..., -1:], coefficients[..., -1:]

    def _tables(self) -> tuple[Tensor, ...]:
        return (self.directions,)

    def _combined(self, parts: Sequence[Part], tables: tuple[Tensor, ...]) -> Tensor:
        (v,) = tables
        flat = [(x.reshape(len(x), -1), *prepared) for x, prepared in parts]
        along = torch.stack([(x @ v.T) * factor for x, factor, _ in flat]).sum(0)
        total = along @ v
        for x, _, rest in flat:
            total = total + rest * x
        return total.reshape(parts[0][0].shape)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_b <P_g x_b, P_g y_b>, float64 [G]."""
        a, b = (w.detach().cpu().double().reshape(len(w), -1) for w in (x, y))
        along = ((a @ self.directions.T) * (b @ self.directions.T)).sum(0)
        # Of the remainders themselves: the difference of two large sums would be rounding error where little is left.
        a, b = (w - (w @ self.directions.T) @ self.directions for w in (a, b))
        return torch.cat([along, (a * b).sum().reshape(1)])

    def config(self) -> dict[str, Any]:
        """The shape."""
        return {"kind": "principal", "shape": list(self.shape)}

    def tensors(self) -> dict[str, Tensor]:
        """The directions."""
        return {"directions": self.directions}


def is_orthonormal(rows: Tensor) -> bool:
    """Whether the rows of a float64 matrix are orthonormal."""
    if not bool(torch.isfinite(rows).all()):
        return False
    gap = rows @ rows.T - torch.eye(len(rows), dtype=_F64, device="cpu")
    return not gap.numel() or float(gap.abs().max()) <= _TOLERANCE
