"""The least squares behind every fit: QR in float64, one small factor per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError

__all__ = ["LeastSquares", "Solution"]

_F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Solution:
    """A least-squares correction.

    Attributes
    ----------
    coefficients : float64 [k], on the host.
    rank : numerical rank of the columns.
    condition : ratio of the largest to the smallest kept singular value of the scaled columns.
    before, after : root mean square residual per component, without and with the correction.
    """

    coefficients: Tensor
    rank: int
    condition: float
    before: float
    after: float


class LeastSquares:
    """min_c |b - A c|, accumulated sample by sample as the R factors of [A b].

    QR rather than the Gram matrix: some directions are nearly collinear (the two of IIA-DDIM are exactly so after an
    unfitted step), and the Gram matrix squares their condition number. Each sample is reduced to the R factor of its own
    rows, (k + 1)^2 numbers, and the R of the whole is taken once, from those. How a batch was cut into chunks, or spread
    over processes, then has no influence at all: fits of sequential steps amplify even rounding differences by orders of
    magnitude.

    Parameters
    ----------
    columns : number k of columns of A.
    """

    def __init__(self, columns: int) -> None:
        if columns < 1:
            raise InputError("a least-squares problem needs at least one column.")
        self.columns, self.rows = columns, 0
        self._factors: list[Tensor] = []

    def add(self, columns: list[Tensor], target: Tensor) -> None:
        """Add samples: k tensors of the shape [B, ...] of `target`, in any dtype, on any device."""
        block = torch.stack([v.reshape(len(v), -1).to(_F64) for v in (*columns, target)], dim=2)
        if block.shape[2] != self.columns + 1:
            raise InputError(f"expected {self.columns} columns, got {block.shape[2] - 1}.")
        self.rows += block.shape[0] * block.shape[1]
        self._factors.append(torch.linalg.qr(block, mode="r").R.cpu())

    def merge(self, other: LeastSquares) -> None:
        """Take in the samples that another instance has seen, after one's own."""
        if other.columns != self.columns:
            raise InputError(f"cannot merge {other.columns} columns into {self.columns}.")
        self.rows += other.rows
        self._factors += other._factors

    def solve(self, *, ridge: float = 0.0, noise: Tensor | None = None) -> Solution:
        """The minimum-norm solution in units of the columns' own sizes.

        Parameters
        ----------
        ridge : relative ridge: adds ``ridge * |A_j|^2`` to the j-th diagonal of the normal equations, which shrinks
            towards zero correction, that is towards the base solver.
        noise : norm of the rounding error in each column, float64 [k]. A singular direction of the columns that does not
            stand out of the rounding in it by a factor of ten is treated as zero: fitting it would fit noise, with huge
            coefficients that cancel. Float64 rounding (1e-12 of the largest) is always taken for zero.

        Raises
        ------
        NonFiniteError : the rows contained NaN or infinity.
        """
        if not self._factors:
            raise InputError("nothing to solve: no samples were added.")
        stacked = torch.cat(self._factors).flatten(0, 1)
        if not self.rows:
            raise InputError("nothing to solve: the samples have no components.")
        if not bool(torch.isfinite(stacked).all()):
            raise NonFiniteError(
                "the least-squares system has NaN or infinity in it: the model is not finite on this batch."
            )
        r = torch.linalg.qr(stacked, mode="r").R
        a, b = r[:, :-1], r[:, -1]
        root_rows = self.rows**0.5
        before = float(b.norm()) / root_rows
        size = a.norm(dim=0)
        size = torch.where(size > 0, size, torch.ones_like(size))
        u, singular, vt = torch.linalg.svd(a / size, full_matrices=False)
        floor = torch.full_like(singular, 1e-12 * float(singular[0]))
        if noise is not None:
            floor = torch.maximum(floor, 10 * (vt * (noise / size)).norm(dim=1))
        keep = singular > floor
        inverse = torch.where(keep, singular / (singular**2 + ridge), torch.zeros_like(singular))
        coefficients = (vt.T @ (inverse * (u.T @ b))) / size
        after = float((b - a @ coefficients).norm()) / root_rows
        if after > before:  # only rounding can do that: there was nothing to gain
            coefficients, after = torch.zeros_like(coefficients), before
        rank = int(keep.sum())
        condition = float(singular[0] / singular[keep][-1]) if rank else 1.0
        return Solution(coefficients, rank, condition, before, after)
