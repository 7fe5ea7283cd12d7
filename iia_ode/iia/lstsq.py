"""The least squares behind every fit: streaming QR in float64."""

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
    """min_c |b - A c|, accumulated block by block as the R factor of [A b].

    QR of [R; new rows] rather than the Gram matrix: some directions are nearly collinear (the two of IIA-DDIM are
    exactly so after an unfitted step), and the Gram matrix squares their condition number. The R factors of two parts of
    a batch merge into that of the whole, so chunks give the coefficients of one batch.

    Parameters
    ----------
    columns : number k of columns of A.
    """

    def __init__(self, columns: int) -> None:
        if columns < 1:
            raise InputError("a least-squares problem needs at least one column.")
        self.columns, self.rows = columns, 0
        self._r: Tensor | None = None

    def add(self, columns: list[Tensor], target: Tensor) -> None:
        """Add a block of rows: k tensors of the shape of `target`, in any dtype, on any device."""
        block = torch.stack([v.reshape(-1) for v in (*columns, target)], dim=1).to(_F64)
        if block.shape[1] != self.columns + 1:
            raise InputError(f"expected {self.columns} columns, got {block.shape[1] - 1}.")
        self.rows += len(block)
        self._absorb(torch.linalg.qr(block, mode="r").R.cpu())

    def merge(self, other: LeastSquares) -> None:
        """Take in the rows that another instance has seen."""
        if other.columns != self.columns:
            raise InputError(f"cannot merge {other.columns} columns into {self.columns}.")
        self.rows += other.rows
        if other._r is not None:
            self._absorb(other._r)

    def _absorb(self, r: Tensor) -> None:
        stacked = r if self._r is None else torch.cat([self._r, r])
        self._r = torch.linalg.qr(stacked, mode="r").R

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
        if self._r is None:
            raise InputError("nothing to solve: no rows were added.")
        r = self._r
        if not bool(torch.isfinite(r).all()):
            raise NonFiniteError(
                "the least-squares system has NaN or infinity in it: the model is not finite on this batch."
            )
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
