"""Mean and covariance of data for a Gaussian flow, with a covariance that is diagonal over an orthogonal decomposition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_share
from ..errors import InputError
from ..plan import Bands, PerCondition, Principal, Projections

__all__ = ["Moments", "centred", "estimate_moments", "exact_moments"]

_F64 = torch.float64
_DENSE = 1024  # largest dimension for a shrinkage target with a dense decomposition


@dataclass(frozen=True, eq=False)
class Moments:
    """The Gaussian N(mean, sum_g variances[g] P_g).

    Attributes
    ----------
    mean : [*shape], or a mean for each value of a condition; float64 on the host.
    projections : the decomposition of samples [*shape] into G groups.
    variances : float64 [G], not negative, on the host.
    about : the estimator, JSON-ready.

    Raises
    ------
    InputError : shapes do not fit together, or a variance is negative or not finite.
    """

    mean: Tensor | PerCondition
    projections: Projections
    variances: Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        v = torch.as_tensor(self.variances, dtype=_F64, device="cpu").detach()
        object.__setattr__(self, "variances", v)
        if not isinstance(self.mean, PerCondition):
            object.__setattr__(self, "mean", torch.as_tensor(self.mean, dtype=_F64, device="cpu").detach())
        if tuple(self.mean.shape) != self.projections.shape or v.shape != (self.projections.count,):
            raise InputError(
                f"moments over {self.projections!r} need a mean {list(self.projections.shape)} and "
                f"{self.projections.count} variances, got {list(self.mean.shape)} and {list(v.shape)}."
            )
        if not bool(((v >= 0) & (v < math.inf)).all()):
            raise InputError("variances must be finite and not negative.")

    def log_likelihood(self, residuals: Tensor, level: float) -> float:
        """Mean log-likelihood per component of noisy data, averaged over the noise.

        Parameters
        ----------
        residuals : data minus the mean, [n, *shape].
        level : standard deviation sigma/alpha of the noise; 0 is allowed where no variance is 0.
        """
        sizes, total = self.projections.sizes, self.variances + level * level
        used = sizes > 0
        energy = self.projections.inner(residuals, residuals) / len(residuals) + sizes * level * level
        terms = energy / total + sizes * (2 * math.pi * total).log()
        return float(-0.5 * terms[used].sum() / sizes.sum())


def exact_moments(mean: Tensor, covariance: Tensor, rank: int | None = None) -> Moments:
    """Moments of a given mean and covariance.

    Parameters
    ----------
    mean : [*shape], d components.
    covariance : [d, d], variances per component [*shape], or a number.
    rank : number of principal directions to keep; the remaining directions share their mean variance.

    Returns
    -------
    The moments over principal directions.

    Raises
    ------
    InputError : the covariance is not symmetric and positive, or has another size.
    """
    m = torch.as_tensor(mean, dtype=_F64, device="cpu").detach()
    c = torch.as_tensor(covariance, dtype=_F64, device="cpu").detach()
    shape, d = tuple(m.shape), m.numel()
    about: dict[str, Any] = {"moments": "given"}
    if c.shape == (d, d) and not (d == 1 and c.shape == shape):
        if not torch.allclose(c, c.T, rtol=1e-8, atol=1e-10 * float(c.abs().max())):
            raise InputError("a covariance must be symmetric.")
        values, directions = torch.linalg.eigh((c + c.T) / 2)
        return Moments(m, *_principal(shape, values.flip(0), directions.flip(1).T, rank), about)
    if c.numel() != 1 and tuple(c.shape) != shape:
        raise InputError(f"a covariance for samples {list(shape)} is [{d}, {d}], or variances, got {list(c.shape)}.")
    if c.numel() == 1:
        none = torch.zeros(0, d, dtype=_F64, device="cpu")
        return Moments(m, Principal(none, shape), c.reshape(1), about)
    values, order = c.flatten().sort(descending=True)
    return Moments(m, *_principal(shape, values, torch.eye(d, dtype=_F64, device="cpu")[order], rank), about)


def _principal(
    shape: tuple[int, ...], values: Tensor, directions: Tensor, rank: int | None
) -> tuple[Principal, Tensor]:
    """The first `rank` of d decreasing eigenvalues with their directions [k, d], and the mean of the other eigenvalues."""
    d = math.prod(shape)
    if float(values.min()) < -1e-10 * float(values.abs().max()):
        raise InputError("a covariance must not have negative eigenvalues.")
    values, k = values.clamp(min=0), len(directions) if rank is None else min(rank, len(directions))
    if k < 0:
        raise InputError(f"a rank is not negative, got {rank}.")
    # Without a remainder the last coefficient multiplies rounding error only; the mean variance is as good as any.
    rest = values[k:].mean() if k < d else values.mean()
    return Principal(directions[:k], shape), torch.cat([values[:k], rest.reshape(1)])


def estimate_moments(
    samples: Tensor,
    *,
    labels: Tensor | None = None,
    key: str | None = None,
    rank: int | None = None,
    shrink: float | str = "auto",
    level: float = 0.0,
    held_out: float = 0.25,
) -> Moments:
    """Estimate moments of data from samples, such as the endpoints of a teacher.

    Parameters
    ----------
    samples : [n, *shape].
    labels, key : integers [n], and the name of the condition in ``ode.conditioning``. There is a mean for each value, and a
        common covariance.
    rank : principal directions to keep; by default all directions of the samples.
    shrink : target and strength of the shrinkage of the sample covariance S. A number r in [0, 1] gives (1 - r) S + r mu I;
        ``"ledoit-wolf"`` computes r [Ledoit & Wolf 2004]. ``"dct"`` makes the covariance diagonal in DCT coefficients and in
        principal directions of the channels, and needs few samples. ``"auto"`` takes the estimate with the highest likelihood
        on held-out samples; for d up to 1024 the candidates include mixtures of S and ``"dct"``.
    level : noise level sigma/alpha of the likelihood: the level at the end of the warm start. By default the standard
        deviation of the data.
    held_out : share of the samples, the last ones, that ``"auto"`` holds out; the chosen estimate then uses all samples.

    Returns
    -------
    The moments; `about` names the estimate, with the scores of ``"auto"``.

    Raises
    ------
    InputError : there are too few samples, labels do not fit, or an option is unknown.
    """
    x = _checked(samples)
    mean, residuals, freed = centred(x, labels, key)
    choices: dict[str, Any] = {"samples": len(x)}
    if shrink == "auto":
        cut = len(x) - max(1, int(held_out * len(x)))
        if cut < 2:
            raise InputError(f"shrink='auto' holds samples out and needs at least 4, got {len(x)}.")
        # Both parts keep the residuals from the common mean, because only the covariance is chosen.
        scale = level if level > 0 else float(residuals.square().mean().sqrt())
        scores = {
            name: Moments(torch.zeros(x.shape[1:], dtype=_F64), *parts).log_likelihood(residuals[cut:], scale)
            for name, parts in _candidates(residuals[:cut], 0, rank)
        }
        best = max(scores, key=scores.__getitem__)
        choices |= {"scores": scores, "level": scale, "held_out": len(x) - cut}
    else:
        best = _named(shrink)
    chosen = dict(_candidates(residuals, freed, rank, only=best))[best]
    return Moments(mean, *chosen, {"moments": "estimated", "covariance": best, "rank": rank, **choices})


def _named(shrink: float | str) -> str:
    if shrink in ("ledoit-wolf", "dct"):
        return str(shrink)
    share = check_share("shrink, if not 'auto', 'ledoit-wolf' or 'dct',", shrink)
    return f"isotropic {share:g}"


def _checked(samples: Tensor) -> Tensor:
    x = torch.as_tensor(samples, device="cpu").detach().double()
    if x.ndim < 1 or len(x) < 2 or not bool(torch.isfinite(x).all()):
        raise InputError(f"moments need at least 2 finite samples [n, *shape], got {list(x.shape)}.")
    return x


def centred(x: Tensor, labels: Tensor | None, key: str | None) -> tuple[Tensor | PerCondition, Tensor, int]:
    """The mean, or mean per label, of x [n, *shape], the residuals, and the degrees of freedom of the means; float64, host."""
    x = _checked(x)
    if labels is None:
        mean = x.mean(0)
        return mean, x - mean, 1
    marks = torch.as_tensor(labels, device="cpu").detach().long()
    if marks.shape != (len(x),) or not key:
        raise InputError(f"labels are an integer for each of {len(x)} samples, with the condition's name as key.")
    values, place = torch.unique(marks, return_inverse=True)
    sums = torch.zeros(len(values), *x.shape[1:], dtype=_F64, device="cpu").index_add_(0, place, x)
    counts = torch.bincount(place).double().reshape(-1, *[1] * (x.ndim - 1))
    means = sums / counts
    if len(x) - len(values) < 1:
        raise InputError("a covariance within classes needs a class with two samples.")
    return PerCondition(key, tuple(values.tolist()), means), x - means[place], len(values)


def _candidates(
    r: Tensor, freed: int, rank: int | None, only: str | None = None
) -> Iterator[tuple[str, tuple[Projections, Tensor]]]:
    """Covariances from residuals r [n, *shape], by name; their means took `freed` degrees of freedom."""
    shape, n, d = tuple(r.shape[1:]), len(r) - freed, math.prod(r.shape[1:])
    flat = r.reshape(len(r), d)
    _, singular, vh = torch.linalg.svd(flat, full_matrices=False)
    values, mu = singular.square() / n, float(flat.square().sum()) / n / d
    if only is None:
        names = ["ledoit-wolf", *(f"isotropic {s:g}" for s in (0.01, 0.1, 0.3, 1.0))]
    else:
        names = [only] if only.startswith(("iso", "led")) else []
    for name in names:
        by = _ledoit_wolf(flat, values, mu) if name == "ledoit-wolf" else float(name.split()[1])
        full = torch.zeros(d, dtype=_F64, device="cpu")
        full[: len(values)] = values
        yield name, _principal(shape, (1 - by) * full + by * mu, vh, rank)
    if not 0 < len(shape) <= 3 or (only is not None and "dct" not in only):
        return
    bands = _spectral(r)
    variances = bands.inner(r, r) / n / bands.sizes
    if only in (None, "dct"):
        yield "dct", (bands, variances)
    if d > _DENSE:
        return
    eye = torch.eye(d, dtype=_F64, device="cpu").reshape(d, *shape)
    target, sample = bands.apply(eye, variances).reshape(d, d), flat.T @ flat / n
    for by in (0.1, 0.3, 0.5, 0.7, 0.9):
        name = f"towards dct {by:g}"
        if only in (None, name):
            eigenvalues, directions = torch.linalg.eigh((1 - by) * sample + by * (target + target.T) / 2)
            yield name, _principal(shape, eigenvalues.flip(0), directions.flip(1).T, rank)


def _ledoit_wolf(flat: Tensor, values: Tensor, mu: float) -> float:
    """The shrinkage towards mu I with the smallest expected squared error [Ledoit & Wolf 2004, lemma 3.2-3.4]."""
    n, d = flat.shape
    spread = float(values.square().sum()) - d * mu * mu  # d times delta^2
    noise = (float(flat.square().sum(1).square().sum()) / n - float(values.square().sum())) / n
    return min(max(noise / spread, 0.0), 1.0) if spread > 0 else 1.0


def _spectral(r: Tensor) -> Bands:
    """Every DCT coefficient of every principal direction of the channels."""
    shape = tuple(r.shape[1:])
    if len(shape) == 1:
        return Bands(shape, "all")
    c = r.movedim(1, 0).reshape(shape[0], -1)
    _, directions = torch.linalg.eigh(c @ c.T)
    return Bands(shape, "all", directions.flip(1).T)
