"""Least squares min_c |b - A c| by QR in float64, accumulated sample by sample: the solver of every fitted step."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    largest : norm of the largest term c_j A_j.
    constant : the intercept, float64 with the shape of a sample, on the host; None without an intercept.
    """

    coefficients: Tensor
    rank: int
    condition: float
    before: float
    after: float
    largest: float
    constant: Tensor | None = None


class LeastSquares:
    """min_c |b - A c|, accumulated sample by sample as R factors of [A b]; with an intercept, min_{c, m} |b - A c - 1 m|.

    QR replaces the Gram matrix, because some directions are nearly collinear (the two directions of IIA-DDIM are exactly
    collinear after an unfitted step) and the Gram matrix squares their condition number. Each sample is reduced to the R
    factor of its own rows, (k + 1)^2 numbers; the R factor of the whole is computed once, from all of them. The chunks of a
    batch therefore have no influence on the result. The next steps of a fit would amplify even rounding differences by
    orders of magnitude.

    The intercept m has a number for each component of a sample. Subtracting the mean over samples from every component
    eliminates m. Helmert's orthogonal transformation does so on the fly: sample n enters as
    ``sqrt((n - 1) / n) (X_n - mean of X_1 .. X_{n-1})``. The transformation is as accurate as two passes and needs a running
    sum only.

    Parameters
    ----------
    columns : number k of columns of A, at least 1.
    intercept : whether to fit a constant for each component of a sample.

    Raises
    ------
    InputError : there are no columns.
    """

    def __init__(self, columns: int, *, intercept: bool = False) -> None:
        if columns < 1:
            raise InputError("a least-squares problem needs at least one column.")
        self.columns, self.intercept = columns, intercept
        self.rows = self.samples = 0
        self._factors: list[Tensor] = []  # [B, j, k + 1] each
        self._total: Tensor | None = None  # sum of all samples, [k + 1, D], where there is an intercept
        self._shape = torch.Size()  # of one sample
        self._whole: Tensor | None = None  # the R of the whole, once it is known

    def add(self, columns: Sequence[Tensor], target: Tensor) -> None:
        """Add samples.

        Parameters
        ----------
        columns : k tensors of the shape of `target`, in any dtype, on any device.
        target : [B, ...].

        Raises
        ------
        InputError : the number of columns is not k.
        """
        if len(columns) != self.columns:
            raise InputError(f"expected {self.columns} columns, got {len(columns)}.")
        self._shape = target.shape[1:]
        if len(target) == 0:
            return
        # On the host for every device: equal bits everywhere, and batched QR of tall blocks is no faster on a GPU.
        block = torch.stack([v.reshape(len(v), -1).cpu().to(_F64) for v in (*columns, target)], dim=1)
        self.rows += block.shape[0] * block.shape[2]
        if self.intercept:
            block = self._centred(block)
        self.samples += len(target)
        self._factors.append(torch.linalg.qr(block.mT, mode="r").R)
        self._whole = None

    def _centred(self, block: Tensor) -> Tensor:
        """The samples [B, k + 1, D] after Helmert's transformation; sample by sample, so that chunks have no influence."""
        total = torch.zeros_like(block[0]) if self._total is None else self._total.clone()
        out = torch.empty_like(block)
        for n, (sample, row) in enumerate(zip(block, out, strict=True), start=self.samples):
            torch.sub(sample, total, alpha=1 / max(n, 1), out=row).mul_(math.sqrt(n / (n + 1)))
            total += sample
        self._total = total
        return out

    def solve(self, *, ridge: float = 0.0, noise: Tensor | None = None) -> Solution:
        """The minimum-norm solution, with columns scaled to unit norm.

        Parameters
        ----------
        ridge : relative ridge. The j-th diagonal of the normal equations grows by ``ridge * |A_j|^2``, which shrinks the
            solution towards zero correction (the base solver). The intercept is shrunk in the same way.
        noise : norm of the rounding error in each column, float64 [k]. A column or a singular direction below ten times its
            rounding error counts as zero, because a fit would have huge coefficients that cancel. A direction below 1e-12 of
            the largest always counts as zero.

        Returns
        -------
        The correction, with residuals and rank.

        Raises
        ------
        InputError : there are no samples, or the samples have no components.
        NonFiniteError : the rows contain NaN or infinity.
        """
        centred = self._factor()
        zero = torch.zeros(self.columns, dtype=_F64, device="cpu")
        r = centred
        if self._total is not None and ridge:
            # The part of the means that the shrunk intercept leaves over.
            left = self._total.T * math.sqrt(1 / (1 + 1 / ridge) / self.samples)
            r = torch.linalg.qr(torch.cat([r, left]), mode="r").R
        a, b = r[:, :-1], r[:, -1]
        size = a.norm(dim=0)
        noise = zero if noise is None else noise
        # A data estimate where alpha = 0 is the same for all samples: its deviations from the mean are rounding alone.
        some = size > 10 * noise
        a, size = a * some, torch.where(some, size, torch.ones_like(size))
        u, singular, vt = torch.linalg.svd(a / size, full_matrices=False)
        floor = torch.maximum(1e-12 * singular[0], 10 * (vt * (some * noise / size)).norm(dim=1))
        keep = singular > floor
        inverse = torch.where(keep, singular / (singular**2 + ridge), torch.zeros_like(singular))
        coefficients = (vt.T @ (inverse * (u.T @ b))) / size
        constant = self._intercept(coefficients, ridge)
        before, after = self.residual(zero, None), self.residual(coefficients, constant)
        if not after <= before:  # by rounding: there was nothing to gain
            coefficients, after = zero, before
            constant = None if constant is None else torch.zeros_like(constant)
        rank = int(keep.sum())
        condition = float(singular[0] / singular[keep][-1]) if rank else 1.0
        largest = float((coefficients.abs() * size).max())
        return Solution(coefficients, rank, condition, before, after, largest, constant)

    def residual(self, coefficients: Tensor, constant: Tensor | None) -> float:
        """Root mean square of b - A c - m per component on the samples of this instance, in a fit or held out.

        Parameters
        ----------
        coefficients : c, float64 [k].
        constant : the intercept m, or None.
        """
        square = (self._factor() @ _minus(coefficients)).square().sum()
        if self._total is not None:
            gap = _minus(coefficients) @ self._total / self.samples
            if constant is not None:
                gap = gap + constant.reshape(-1)
            square = square + self.samples * gap.square().sum()
        return math.sqrt(float(square) / self.rows)

    def _intercept(self, coefficients: Tensor, ridge: float) -> Tensor | None:
        if self._total is None:
            return None
        mean = -(_minus(coefficients) @ self._total) / self.samples
        return (mean / (1 + ridge)).reshape(self._shape)

    def _factor(self) -> Tensor:
        """The R factor of all samples; with an intercept, of their deviations from the mean."""
        if self._whole is None:
            if not self._factors:
                raise InputError("nothing to solve: no samples were added.")
            if not self.rows:
                raise InputError("nothing to solve: the samples have no components.")
            stacked = torch.cat([f.reshape(-1, self.columns + 1) for f in self._factors])
            if not bool(torch.isfinite(stacked).all()):
                raise NonFiniteError(
                    "the least-squares system contains NaN or infinity: the model is not finite on this batch."
                )
            self._whole = torch.linalg.qr(stacked, mode="r").R
        return self._whole


def _minus(coefficients: Tensor) -> Tensor:
    """The vector (c, -1), which maps [A b] to A c - b."""
    return torch.cat([coefficients, coefficients.new_full((1,), -1.0)])
