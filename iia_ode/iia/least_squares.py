"""The least squares behind every fit: QR in float64, one small factor per sample."""

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
    constant : the intercept, float64 with the shape of one sample, on the host; None where none was fitted.
    """

    coefficients: Tensor
    rank: int
    condition: float
    before: float
    after: float
    largest: float
    constant: Tensor | None = None


class LeastSquares:
    """min_c |b - A c|, accumulated sample by sample as the R factors of [A b]; with an intercept, min |b - A c - 1 m|.

    QR rather than the Gram matrix: some directions are nearly collinear (the two of IIA-DDIM are exactly so after an
    unfitted step), and the Gram matrix squares their condition number. Each sample is reduced to the R factor of its own
    rows, (k + 1)^2 numbers, and the R of the whole is taken once, from those. How a batch was cut into chunks then has no
    influence at all: fits of sequential steps amplify even rounding differences by orders of magnitude.

    The intercept m has one number for each component of a sample, so it is eliminated by taking the mean over samples out
    of every component. That is done on the fly by Helmert's orthogonal transformation: sample n enters as
    ``sqrt((n - 1) / n) (X_n - mean of X_1 .. X_{n-1})``, which is as sound as two passes and needs a running sum only.
    Two parts of a batch, each with its own mean, differ from the whole by one such row block, of the difference of means.

    Parameters
    ----------
    columns : number k of columns of A.
    intercept : whether to fit a constant for each component of a sample.
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
        """Add samples: k tensors of the shape [B, ...] of `target`, in any dtype, on any device."""
        if len(columns) != self.columns:
            raise InputError(f"expected {self.columns} columns, got {len(columns)}.")
        self._shape = target.shape[1:]
        if len(target) == 0:
            return
        # On the host, whatever the device: the same bits everywhere, and batched QR of tall blocks is no faster on a GPU.
        block = torch.stack([v.reshape(len(v), -1).cpu().to(_F64) for v in (*columns, target)], dim=1)
        self.rows += block.shape[0] * block.shape[2]
        if self.intercept:
            block = self._centred(block)
        self.samples += len(target)
        self._factors.append(torch.linalg.qr(block.mT, mode="r").R)
        self._whole = None

    def _centred(self, block: Tensor) -> Tensor:
        """The samples [B, k + 1, D] after Helmert's transformation, given those seen before; one by one, so no cut shows."""
        total = torch.zeros_like(block[0]) if self._total is None else self._total.clone()
        out = torch.empty_like(block)
        for n, (sample, row) in enumerate(zip(block, out, strict=True), start=self.samples):
            torch.sub(sample, total, alpha=1 / max(n, 1), out=row).mul_(math.sqrt(n / (n + 1)))
            total += sample
        self._total = total
        return out

    def merge(self, other: LeastSquares) -> None:
        """Take in the samples that another instance has seen, after one's own."""
        if (other.columns, other.intercept) != (self.columns, self.intercept):
            raise InputError(f"cannot merge {other.columns} columns into {self.columns}.")
        if not other.samples:
            return
        self._factors += other._factors
        if self._total is None:
            self._total = other._total
        elif other._total is not None:
            n, m = self.samples, other.samples
            gap = other._total / m - self._total / n
            self._factors.append(torch.linalg.qr(math.sqrt(n * m / (n + m)) * gap.T, mode="r").R[None])
            self._total = self._total + other._total
        self._shape = other._shape
        self.rows, self.samples = self.rows + other.rows, self.samples + other.samples
        self._whole = None

    def state(self) -> tuple[Tensor, Tensor]:
        """All that was accumulated, float64 on the host: factors [.., k + 1] stacked, and the sum [D, k + 1] (or empty)."""
        width = self.columns + 1
        factors = [f.reshape(-1, width) for f in self._factors]
        empty = torch.zeros(0, width, dtype=_F64, device="cpu")
        return torch.cat([empty, *factors]), empty if self._total is None else self._total.T

    @classmethod
    def of_state(
        cls, factors: Tensor, total: Tensor, *, samples: int, rows: int, shape: Sequence[int], intercept: bool
    ) -> LeastSquares:
        """The instance that :meth:`state` was taken of."""
        system = cls(factors.shape[1] - 1, intercept=intercept)
        system.rows, system.samples, system._shape = rows, samples, torch.Size(shape)
        system._factors = [factors[None]] if samples else []
        system._total = total.T.contiguous() if intercept and samples else None
        return system

    @property
    def sample_shape(self) -> torch.Size:
        """Shape of one sample; empty before the first call of :meth:`add`."""
        return self._shape

    def solve(self, *, ridge: float = 0.0, noise: Tensor | None = None) -> Solution:
        """The minimum-norm solution in units of the columns' own sizes.

        Parameters
        ----------
        ridge : relative ridge: adds ``ridge * |A_j|^2`` to the j-th diagonal of the normal equations, which shrinks
            towards zero correction, that is towards the base solver. An intercept is shrunk likewise.
        noise : norm of the rounding error in each column, float64 [k]. A singular direction of the columns that does not
            stand out of the rounding in it by a factor of ten is treated as zero: fitting it would fit noise, with huge
            coefficients that cancel. Float64 rounding (1e-12 of the largest) is always taken for zero.

        Raises
        ------
        NonFiniteError : the rows contained NaN or infinity.
        """
        centred = self._factor()
        zero = torch.zeros(self.columns, dtype=_F64, device="cpu")
        r = centred
        if self._total is not None and ridge:
            # What is left of the means when the intercept that a ridge allows has taken its part.
            left = self._total.T * math.sqrt(1 / (1 + 1 / ridge) / self.samples)
            r = torch.linalg.qr(torch.cat([r, left]), mode="r").R
        a, b = r[:, :-1], r[:, -1]
        size = a.norm(dim=0)
        size = torch.where(size > 0, size, torch.ones_like(size))
        u, singular, vt = torch.linalg.svd(a / size, full_matrices=False)
        floor = torch.full_like(singular, 1e-12).mul_(singular[0])
        if noise is not None:
            floor = torch.maximum(floor, 10 * (vt * (noise / size)).norm(dim=1))
        keep = singular > floor
        inverse = torch.where(keep, singular / (singular**2 + ridge), torch.zeros_like(singular))
        coefficients = (vt.T @ (inverse * (u.T @ b))) / size
        constant = self._intercept(coefficients, ridge)
        before, after = self.residual(zero, None), self.residual(coefficients, constant)
        if not after <= before:  # only rounding can do that: there was nothing to gain
            coefficients, after = zero, before
            constant = None if constant is None else torch.zeros_like(constant)
        rank = int(keep.sum())
        condition = float(singular[0] / singular[keep][-1]) if rank else 1.0
        largest = float((coefficients.abs() * size).max())
        return Solution(coefficients, rank, condition, before, after, largest, constant)

    def residual(self, coefficients: Tensor, constant: Tensor | None) -> float:
        """Root mean square of b - A c - m per component, on the samples seen here, which may be others than were fitted."""
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
        """R of all samples together, of their deviations from the mean where there is an intercept."""
        if self._whole is None:
            if not self._factors:
                raise InputError("nothing to solve: no samples were added.")
            if not self.rows:
                raise InputError("nothing to solve: the samples have no components.")
            stacked = torch.cat([f.reshape(-1, self.columns + 1) for f in self._factors])
            if not bool(torch.isfinite(stacked).all()):
                raise NonFiniteError(
                    "the least-squares system has NaN or infinity in it: the model is not finite on this batch."
                )
            self._whole = torch.linalg.qr(stacked, mode="r").R
        return self._whole


def _minus(coefficients: Tensor) -> Tensor:
    """What [A b] is multiplied by to give A c - b."""
    return torch.cat([coefficients, coefficients.new_full((1,), -1.0)])
