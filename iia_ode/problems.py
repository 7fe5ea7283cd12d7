"""Data distributions whose denoiser, and for Gaussian data whose flow, is known in closed form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .forms import conversion
from .ode import ProbabilityFlowODE
from .plan.analysis import as_moments, gaussian_flow
from .schedules import Schedule

__all__ = ["Empirical", "Gaussian", "Mixture", "Problem"]

_F64 = torch.float64


class Problem(ABC):
    """A distribution of data [*shape] with a closed-form denoiser."""

    shape: torch.Size

    @abstractmethod
    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x_0 | alpha x_0 + sigma eps = x] for x [B, *shape]; alpha and sigma are numbers or broadcast against x."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of the data, float64 [n, *shape]."""

    def ode(self, schedule: Schedule, prediction: str = "data", **options: Any) -> ProbabilityFlowODE:
        """The exact probability-flow ODE, its model answering in the form `prediction`; `options` go to the ODE."""
        return ProbabilityFlowODE(_ClosedForm(self, schedule, prediction), schedule, prediction, **options)

    def noisy(self, n: int, schedule: Schedule, t: float, generator: torch.Generator | None = None) -> Tensor:
        """n draws of x_t = alpha x_0 + sigma eps, float64 [n, *shape]: initial states from the true marginal."""
        clean = self.sample(n, generator)
        noise = torch.randn(clean.shape, dtype=_F64, device="cpu", generator=generator)
        return schedule.alpha(t) * clean + schedule.sigma(t) * noise


class _ClosedForm(nn.Module):
    def __init__(self, problem: Problem, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        self.problem, self.schedule, self.prediction = problem, schedule, prediction
        self.state_shape = tuple(problem.shape)
        for name, value in vars(problem).items():  # so that the model has a fingerprint
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        data = self.problem.denoise(x, self.schedule.alpha(t), self.schedule.sigma(t))
        p, q = conversion(self.schedule, t, "data", self.prediction)
        out: Tensor = p * x + q * data
        return out.to(x.dtype)


class Gaussian(Problem):
    """Data N(mean, diag variance), with its exact flow.

    Parameters
    ----------
    mean, variance : tensors of one shape, or numbers; the variance is positive.
    """

    def __init__(self, mean: Tensor | float, variance: Tensor | float) -> None:
        try:
            m, v = as_moments(mean, variance)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"a Gaussian needs a mean and a variance, tensors of one shape or numbers, got {_shape(mean)} and "
                f"{_shape(variance)}."
            ) from error
        if not bool((v > 0).all() and torch.isfinite(m).all() and torch.isfinite(v).all()):
            raise InputError("a Gaussian needs finite means and positive, finite variances.")
        self.mean: Tensor = m
        self.variance: Tensor = v
        self.shape = m.shape

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """m + alpha v / (alpha^2 v + sigma^2) (x - alpha m)."""
        m, v = self.mean.to(x.device), self.variance.to(x.device)
        return m + alpha * v / (alpha * alpha * v + sigma * sigma) * (x - alpha * m)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, float64 [n, *shape]."""
        noise = torch.randn((n, *self.shape), dtype=_F64, device="cpu", generator=generator)
        out: Tensor = self.mean + self.variance.sqrt() * noise
        return out

    def flow(self, x: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
        """The exact solution at time s of the probability flow that is at x [B, *shape] at time t."""
        gain, offset = gaussian_flow(schedule, self.mean, self.variance, t, s)
        return gain.to(x) * x + offset.to(x)


class Mixture(Problem):
    """A mixture of Gaussians with diagonal covariances.

    Parameters
    ----------
    weights : [K], positive; normalised here.
    means : [K, *shape].
    stds : standard deviations, not negative; zero is allowed (see :class:`Empirical`). They broadcast against
        [K, *shape] from the right, as tensors do: one number, [*shape] for all components alike, or [K, 1, ...] for one
        per component.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor | float) -> None:
        try:
            w, m, s = (torch.as_tensor(v, dtype=_F64, device="cpu") for v in (weights, means, stds))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"a mixture needs weights, means and stds as tensors of numbers: {error}.") from error
        if w.ndim != 1 or m.ndim < 2 or len(m) != len(w) or not bool(((w > 0) & (w < math.inf)).all()):
            raise InputError(
                f"a mixture needs positive weights [K] and means [K, *shape], got {list(w.shape)}, {list(m.shape)}."
            )
        if not bool((s >= 0).all() and torch.isfinite(s).all() and torch.isfinite(m).all()):
            raise InputError("a mixture needs finite means and finite standard deviations that are not negative.")
        try:
            variances = s.square().expand(m.shape)
        except RuntimeError as error:
            raise InputError(
                f"stds of shape {list(s.shape)} do not broadcast against means {list(m.shape)}: give one number, "
                f"{list(m.shape[1:])}, {[len(w)] + [1] * (m.ndim - 1)} or {list(m.shape)}."
            ) from error
        self.log_weights, self.means, self.shape = (w / w.sum()).log(), m, m.shape[1:]
        self.variances = variances

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Posterior mean: the components' own denoisers, weighted by their responsibilities."""
        k, dims = len(self.log_weights), tuple(range(2, x.ndim + 1))
        m, v = self.means.to(x.device)[None], self.variances.to(x.device)[None]
        a, s = (u.unsqueeze(1) if isinstance(u, Tensor) and u.ndim else u for u in (alpha, sigma))
        total = a * a * v + s * s
        residual = x.unsqueeze(1) - a * m
        log_g = self.log_weights.to(x.device) - 0.5 * (total.log() + residual**2 / total).sum(dims)
        g = log_g.softmax(dim=1).reshape(-1, k, *[1] * (x.ndim - 1))
        return (g * (m + a * v / total * residual)).sum(dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, float64 [n, *shape]."""
        pick = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn((n, *self.shape), dtype=_F64, device="cpu", generator=generator)
        return self.means[pick] + self.variances[pick].sqrt() * noise


class Empirical(Mixture):
    """A finite data set [K, *shape], every point equally likely: the denoiser that a perfectly overfitted network learns."""

    def __init__(self, data: Tensor) -> None:
        points = torch.as_tensor(data, dtype=_F64, device="cpu")
        if points.ndim < 2 or len(points) < 1:
            raise InputError(f"a data set needs points [K, *shape], got shape {list(points.shape)}.")
        super().__init__(torch.ones(len(points), device="cpu"), points, 0.0)


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
