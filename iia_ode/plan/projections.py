"""Orthogonal decompositions of the space of one sample: what they share, principal directions, and a user's own."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from .bounded import Bounded

__all__ = ["PLACES", "Cache", "Matrices", "Part", "Principal", "Projections", "is_orthonormal", "place"]

_F64 = torch.float64
_TOLERANCE = 1e-8

Part: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]
"""A batch x [B, *shape], and what :meth:`Projections.prepare` made of its coefficients, in the dtype and device of x."""

Cache: TypeAlias = Bounded[tuple[torch.device, torch.dtype], tuple[Tensor, ...]]

PLACES = 8
"""Copies of a weight on other devices and in other dtypes that are kept at once: one for each device of a usual host."""


def place(cache: Cache, tensors: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors on another device and in another dtype, copied there once; a tensor with a gradient is copied each time."""
    known = cache.get((device, dtype))
    if known is not None:
        return known
    with torch.inference_mode(False):  # a copy of the first run must serve one with gradients too
        copies = tuple(v.to(device, dtype) for v in tensors)
    return copies if any(v.requires_grad for v in tensors) else cache.put((device, dtype), copies)


class Projections(ABC):
    """Orthogonal projections P_1 .. P_G of a sample [*shape]: their sum is the identity, and P_g P_h = 0 for g != h.

    Immutable; two are equal, and have one hash, if their configuration and tensors are.

    Attributes
    ----------
    shape : of one sample.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What each group is called."""

    @cached_property
    @abstractmethod
    def sizes(self) -> Tensor:
        """Dimension of each group, float64 [G]; they add up to that of a sample."""

    @abstractmethod
    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """What applying sum_g c_g P_g needs of the coefficients [G], or [B, G] for samples with their own; where those are."""

    @abstractmethod
    def _combined(self, parts: Sequence[Part], tables: tuple[Tensor, ...]) -> Tensor: ...

    @abstractmethod
    def _tables(self) -> tuple[Tensor, ...]:
        """The tensors, float64 on the host, that applying needs whatever the coefficients."""

    @abstractmethod
    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_b <P_g x_b, P_g y_b> for each group, float64 [G] on the host, of x and y [B, *shape]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The kind and its options, JSON-ready; with :meth:`tensors` it is what :func:`projections_from` needs."""

    def tensors(self) -> dict[str, Tensor]:
        """The float64 tensors that the configuration does not hold, by name."""
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
        return self.combine([(x, tuple(v.to(x) for v in self.prepare(coefficients.double().cpu())))])

    def combine(self, parts: Sequence[Part]) -> Tensor:
        """sum_j (sum_g c_jg P_g) x_j in one go, in the dtype and on the device of the x_j; a tensor of its own.

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

    @cached_property
    def _placed(self) -> Cache:
        return Bounded(PLACES)

    @cached_property
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
    """One group for each of K orthonormal directions, and the remainder as the last.

    Parameters
    ----------
    directions : [K, d], orthonormal rows; K from 0 to d.
    shape : of one sample, d components.

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

    @cached_property
    def sizes(self) -> Tensor:
        """Ones, and what is left."""
        k, d = self.directions.shape
        return torch.tensor([1.0] * k + [float(d - k)], dtype=_F64, device="cpu")

    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """The difference of each coefficient from the last one, [..., K], and that one, [..., 1]."""
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
        a, b = (w.detach().double().cpu().reshape(len(w), -1) for w in (x, y))
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


@dataclass(frozen=True, eq=False, repr=False)
class Matrices(Projections):
    """A user's own orthogonal projections, as matrices; for small samples, since they are dense.

    Parameters
    ----------
    matrices : [G, d, d]: symmetric, idempotent, adding up to the identity.
    shape : of one sample, d components.

    Raises
    ------
    InputError : they are not that.
    """

    matrices: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        p = self.matrices.detach().to("cpu", _F64, copy=True).contiguous()
        object.__setattr__(self, "matrices", p)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        d = math.prod(self.shape)
        if p.ndim != 3 or len(p) < 1 or p.shape[1:] != (d, d):
            raise InputError(
                f"projections of samples {list(self.shape)} are matrices [G, {d}, {d}], got {list(p.shape)}."
            )
        gaps = (p - p.mT, p @ p - p, p.sum(0) - torch.eye(d, dtype=_F64, device="cpu"))
        if not max(float(gap.abs().max()) for gap in gaps) <= _TOLERANCE:
            raise InputError(
                "these matrices are no orthogonal decomposition: each must be symmetric and its own square, and they must add "
                "up to the identity."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """``part 1``, ``part 2``, ..."""
        return tuple(f"part {g + 1}" for g in range(len(self.matrices)))

    @cached_property
    def sizes(self) -> Tensor:
        """Ranks."""
        return torch.diagonal(self.matrices, dim1=1, dim2=2).sum(1).round()

    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """The matrix [..., d, d] of the whole."""
        return (torch.tensordot(coefficients, self.matrices.to(coefficients.device), dims=1),)

    def _tables(self) -> tuple[Tensor, ...]:
        return ()

    def _combined(self, parts: Sequence[Part], tables: tuple[Tensor, ...]) -> Tensor:
        total = torch.stack([x.reshape(len(x), 1, -1) @ matrix for x, (matrix,) in parts]).sum(0)
        return total.reshape(parts[0][0].shape)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_b <P_g x_b, P_g y_b>, float64 [G]."""
        a, b = (w.detach().double().cpu().reshape(len(w), -1) for w in (x, y))
        return torch.stack([((a @ p) * b).sum() for p in self.matrices])

    def config(self) -> dict[str, Any]:
        """The shape."""
        return {"kind": "matrices", "shape": list(self.shape)}

    def tensors(self) -> dict[str, Tensor]:
        """The matrices."""
        return {"matrices": self.matrices}


def is_orthonormal(rows: Tensor) -> bool:
    """Whether the rows of a float64 matrix are."""
    if not bool(torch.isfinite(rows).all()):
        return False
    gap = rows @ rows.T - torch.eye(len(rows), dtype=_F64, device="cpu")
    return not gap.numel() or float(gap.abs().max()) <= _TOLERANCE
