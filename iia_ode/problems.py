"""Test problems: data distributions with a closed-form denoiser. Gaussian data also has a closed-form flow."""

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
    """A distribution of data [*shape] with a closed-form denoiser.

    A subclass sets `shape` and defines :meth:`denoise` and :meth:`sample`.

    Attributes
    ----------
    shape : shape of one sample.
    """

    shape: torch.Size

    @abstractmethod
    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Compute the posterior mean of the data, E[x_0 | alpha x_0 + sigma eps = x].

        Parameters
        ----------
        x : noisy states [B, *shape].
        alpha, sigma : scales of data and noise, numbers or tensors broadcasting against x.

        Returns
        -------
        Data estimates, float64 [B, *shape].
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw data.

        Parameters
        ----------
        n : number of samples.
        generator : source of randomness on the CPU; by default torch's global one.

        Returns
        -------
        The samples, float64 [n, *shape] on the CPU.
        """

    def ode(self, schedule: Schedule, prediction: str = "data", **options: Any) -> ProbabilityFlowODE:
        """Build the exact probability-flow ODE of the distribution.

        Parameters
        ----------
        schedule : noise schedule.
        prediction : form of the model's output, such as ``"data"`` or ``"noise"``.
        options : further keyword arguments of :class:`~iia_ode.ProbabilityFlowODE`.

        Returns
        -------
        A :class:`~iia_ode.ProbabilityFlowODE` over the closed-form denoiser.

        Raises
        ------
        UnknownNameError : no such prediction type.
        InputError : an option is not usable.
        """
        return ProbabilityFlowODE(_ClosedForm(self, schedule, prediction), schedule, prediction, **options)

    def noisy(self, n: int, schedule: Schedule, t: float, generator: torch.Generator | None = None) -> Tensor:
        """Draw states x_t = alpha x_0 + sigma eps: initial states from the true marginal at time t.

        Parameters
        ----------
        n : number of samples.
        schedule : noise schedule.
        t : time.
        generator : source of randomness on the CPU; by default torch's global one.

        Returns
        -------
        The states, float64 [n, *shape] on the CPU.
        """
        clean = self.sample(n, generator)
        noise = torch.randn(clean.shape, dtype=_F64, device="cpu", generator=generator)
        return schedule.alpha(t) * clean + schedule.sigma(t) * noise


class _ClosedForm(nn.Module):
    def __init__(self, problem: Problem, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        self.problem, self.schedule, self.prediction = problem, schedule, prediction
        self.state_shape = tuple(problem.shape)
        for name, value in vars(problem).items():  # an ODE's fingerprint is made from the model's buffers
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        data = self.problem.denoise(x, self.schedule.alpha(t), self.schedule.sigma(t))
        p, q = conversion(self.schedule, t, "data", self.prediction)
        out: Tensor = p * x + q * data
        if self.prediction != "data":
            # At the data the noise estimate, -sigma score, is 0; the conversion from the data estimate is 0/0.
            p, q = conversion(self.schedule, t, "noise", self.prediction)
            out = torch.where(self.schedule.sigma(t) == 0, p * x, out)
        return out.to(x.dtype)


class Gaussian(Problem):
    """Gaussian data N(mean, diag variance), with an exact flow.

    Parameters
    ----------
    mean : mean, a tensor [*shape] or a number.
    variance : variance of each element, positive; a tensor [*shape] or a number. Mean and variance broadcast together.

    Raises
    ------
    InputError : mean and variance do not broadcast, are not finite, or the variance is not positive.
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
        """Compute the posterior mean, m + alpha v / (alpha^2 v + sigma^2) (x - alpha m); see :meth:`Problem.denoise`."""
        m, v = self.mean.to(x.device), self.variance.to(x.device)
        return m + alpha * v / (alpha * alpha * v + sigma * sigma) * (x - alpha * m)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples, float64 [n, *shape]; see :meth:`Problem.sample`."""
        noise = torch.randn((n, *self.shape), dtype=_F64, device="cpu", generator=generator)
        out: Tensor = self.mean + self.variance.sqrt() * noise
        return out

    def flow(self, x: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
        """Compute the exact solution of the probability-flow ODE.

        Parameters
        ----------
        x : states at time t, [B, *shape].
        schedule : noise schedule.
        t, s : start time and end time.

        Returns
        -------
        The states at time s, [B, *shape] in the dtype of x.
        """
        gain, offset = gaussian_flow(schedule, self.mean, self.variance, t, s)
        return gain.to(x) * x + offset.to(x)


class Mixture(Problem):
    """A mixture of K Gaussians with diagonal covariances.

    Parameters
    ----------
    weights : positive weights [K]. The constructor normalizes them to sum 1.
    means : means [K, *shape].
    stds : standard deviations, zero or positive (zero: see :class:`Empirical`). They broadcast against [K, *shape] from the
        right, as tensors do: a number, [*shape] for all components alike, or [K, 1, ...] for a number per component.

    Raises
    ------
    InputError : shapes do not fit, weights are not positive, standard deviations are negative, or values are not finite.
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
        """Compute the posterior mean: the components' posterior means, weighted by responsibilities.

        See :meth:`Problem.denoise` for arguments and shapes.
        """
        k, dims = len(self.log_weights), tuple(range(2, x.ndim + 1))
        m, v = self.means.to(x.device)[None], self.variances.to(x.device)[None]
        a, s = (u.unsqueeze(1) if isinstance(u, Tensor) and u.ndim else u for u in (alpha, sigma))
        total = a * a * v + s * s
        residual = x.unsqueeze(1) - a * m
        log_g = self.log_weights.to(x.device) - 0.5 * (total.log() + residual**2 / total).sum(dims)
        g = log_g.softmax(dim=1).reshape(-1, k, *[1] * (x.ndim - 1))
        return (g * (m + a * v / total * residual)).sum(dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples, float64 [n, *shape]; see :meth:`Problem.sample`."""
        pick = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn((n, *self.shape), dtype=_F64, device="cpu", generator=generator)
        return self.means[pick] + self.variances[pick].sqrt() * noise


class Empirical(Mixture):
    """A finite data set with equally likely points.

    The closed-form denoiser is the optimum of training on these points alone, as learned by a perfectly overfitted network.

    Parameters
    ----------
    data : points [K, *shape].

    Raises
    ------
    InputError : the data has fewer than two dimensions, no points, or values that are not finite.
    """

    def __init__(self, data: Tensor) -> None:
        points = torch.as_tensor(data, dtype=_F64, device="cpu")
        if points.ndim < 2 or len(points) < 1:
            raise InputError(f"a data set needs points [K, *shape], got shape {list(points.shape)}.")
        super().__init__(torch.ones(len(points), device="cpu"), points, 0.0)


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
