r"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, in float64, exact at both ends.

Time runs in each schedule's own unit (EDM: the noise level; VP, cosine, flow: [0, 1]; discrete: the timestep index) and
every schedule is defined by ``alpha`` and ``sigma``. Everything else follows: the half-log-SNR
:math:`\lambda_t = \log(\alpha_t/\sigma_t)` [Lu et al. 2022], its inverse, and the coefficients of the probability-flow
ODE :math:`dx/dt = f(t)\,x + g^2(t)/(2\sigma_t)\,\epsilon` with :math:`f = d\log\alpha/dt` and
:math:`g^2 = d\sigma^2/dt - 2 f \sigma^2` [Song et al. 2021, Kingma et al. 2021].
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ScheduleError

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "FlowMatching",
    "FromFunctions",
    "Schedule",
    "from_functions",
    "schedule_from_config",
]

_F64 = torch.float64
T = TypeVar("T", float, Tensor)


class Schedule(ABC):
    """A noise schedule.

    A subclass gives ``_alpha`` and ``_sigma`` on float64 tensors and ``_t_of_lam``; ``_lam`` and the derivatives have
    defaults, by autograd, and the schedules here their own, which are faster. Public methods take a number and return a
    float, or take a tensor and return a float64 tensor of its shape on its device.

    Attributes
    ----------
    t_data, t_noise : times at which the data (sigma = 0) and the noisiest state stand.
    """

    t_data: float = 0.0
    t_noise: float = 1.0
    _ends_at_noise: ClassVar[bool] = False  # whether nothing is known beyond t_noise

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_lam(self, lam: Tensor) -> Tensor: ...

    def _lam(self, t: Tensor) -> Tensor:
        return self._alpha(t).log() - self._sigma(t).log()

    def _sigma_squared(self, t: Tensor) -> Tensor:
        return self._sigma(t) ** 2

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return _derivative(self._alpha, t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return _derivative(self._sigma, t)

    def _sigma_squared_prime(self, t: Tensor) -> Tensor:
        return 2 * self._sigma(t) * self._sigma_prime(t)

    def alpha(self, t: T) -> T:
        """Scale of the data at time t."""
        return _on(self._alpha, t)

    def sigma(self, t: T) -> T:
        """Scale of the noise at time t."""
        return _on(self._sigma, t)

    def alpha_prime(self, t: T) -> T:
        """d alpha / dt."""
        return _on(self._alpha_prime, t)

    def sigma_prime(self, t: T) -> T:
        """d sigma / dt."""
        return _on(self._sigma_prime, t)

    def lam(self, t: T) -> T:
        """Half-log-SNR log(alpha/sigma): +inf at the data, -inf where alpha = 0."""
        return _on(self._lam, t)

    def t_of_lam(self, lam: T) -> T:
        """The time whose half-log-SNR is `lam`: the inverse of :meth:`lam`."""
        return _on(self._t_of_lam, lam)

    def f(self, t: T) -> T:
        """Drift coefficient d log alpha / dt."""
        return _on(lambda u: self._alpha_prime(u) / self._alpha(u), t)

    def g2(self, t: T) -> T:
        """Squared diffusion coefficient d sigma^2 / dt - 2 f sigma^2."""

        def g2(u: Tensor) -> Tensor:
            # The derivative of sigma^2 has its own method: at the data, VE and VP have sigma = 0 and sigma' infinite.
            drift = self._alpha_prime(u) / self._alpha(u)
            return self._sigma_squared_prime(u) - 2 * drift * self._sigma_squared(u)

        return _on(g2, t)

    def noise_to_signal(self, t: T) -> T:
        """sigma / alpha, the noise level of x / alpha: EDM's sigma for every schedule; 0 at the data."""
        return _on(lambda u: self._sigma(u) / self._alpha(u), t)

    def t_of_noise_to_signal(self, ratio: float) -> float:
        """The time at which sigma / alpha = `ratio`; ratio 0 gives ``t_data`` exactly."""
        if ratio < 0:
            raise ScheduleError(f"a noise level sigma/alpha cannot be negative, got {ratio:g}.")
        return self.t_data if ratio == 0 else self._t_of_ratio(ratio)

    def _t_of_ratio(self, ratio: float) -> float:
        return self.t_of_lam(-math.log(ratio))

    def covers(self, t: Tensor) -> bool:
        """Whether the schedule is defined at all times t: none beyond the data, and none that is not a number."""
        towards_noise = math.copysign(1.0, self.t_noise - self.t_data)
        levels = torch.stack([self.alpha(t), self.sigma(t)])
        inside = ((t - self.t_data) * towards_noise >= 0).all() and (torch.isfinite(levels) & (levels >= 0)).all()
        return bool(inside) and (not self._ends_at_noise or bool(((self.t_noise - t) * towards_noise >= 0).all()))

    def config(self) -> dict[str, Any]:
        """The schedule as JSON-ready values: what a fitted solver's file compares with the schedule it is used on.

        These are the type and its parameters, and, where a parameter is no number and no text, what the schedule does.
        """
        kind = type(self)
        known = "__dataclass_fields__" in vars(kind)  # of its own: a subclass may hold more than its parent's fields
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init} if known else {}  # type: ignore[arg-type]
        plain = {k: v for k, v in values.items() if isinstance(v, int | float | str)}
        behaviour = {} if known and len(plain) == len(values) else self._behaviour()
        return {"type": kind.__name__, **plain, **behaviour}

    def _behaviour(self) -> dict[str, Any]:
        """The ends, with values of lambda at five interior times, since functions themselves cannot be compared."""
        times = torch.linspace(self.t_data, self.t_noise, 7, dtype=_F64, device="cpu")[1:-1]
        samples = [float(f"{v:.9g}") for v in self._lam(times).tolist()]
        return {"t_data": self.t_data, "t_noise": self.t_noise, "lam": samples}


def _on(function: Callable[[Tensor], Tensor], t: T) -> T:
    """Apply a function of float64 tensors to a number or a tensor, and answer in kind."""
    if isinstance(t, Tensor):
        return function(t.to(_F64))
    return float(function(torch.tensor(float(t), dtype=_F64, device="cpu")))


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function by autograd, in every grad mode."""
    # An adaptive integrator's time may depend on the state: a gradient that reaches t must pass through here.
    through = t.requires_grad and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        u = t if through else t.detach().clone().requires_grad_(True)
        value = function(u)
        if not value.requires_grad:  # a constant, such as alpha = 1
            return torch.zeros_like(u, requires_grad=False)
        slope: Tensor = torch.autograd.grad(value.sum(), u, create_graph=through)[0]
        return slope


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t [Karras et al. 2022]: time is the noise level."""

    t_noise: float = field(default=80.0, init=False)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _lam(self, t: Tensor) -> Tensor:
        return -t.log()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (-lam).exp()

    def _t_of_ratio(self, ratio: float) -> float:
        return ratio  # without the detour through a logarithm, so that a level asked for is the level one gets


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma = sqrt(t) [Song et al. 2021, as parameterised by Karras et al. 2022]: time is the variance."""

    t_noise: float = field(default=6400.0, init=False)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def _sigma_squared(self, t: Tensor) -> Tensor:
        return t

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return 0.5 / t.sqrt()

    def _sigma_squared_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _lam(self, t: Tensor) -> Tensor:
        return -0.5 * t.log()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (-2 * lam).exp()

    def _t_of_ratio(self, ratio: float) -> float:
        return ratio * ratio


class _VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1, from log alpha and its derivative."""

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_alpha_prime(self, t: Tensor) -> Tensor: ...

    def _alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return self._sigma_squared(t).sqrt()

    def _sigma_squared(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))  # 1 - alpha^2, without cancellation near the data

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return self._log_alpha_prime(t) * self._alpha(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return 0.5 * self._sigma_squared_prime(t) / self._sigma(t)

    def _sigma_squared_prime(self, t: Tensor) -> Tensor:
        return -2 * self._log_alpha_prime(t) * (2 * self._log_alpha(t)).exp()

    def _lam(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving with beta(t) = beta_0 + (beta_1 - beta_0) t linear on [0, 1] [Song et al. 2021].

    log alpha = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2 and sigma^2 = 1 - alpha^2.
    """

    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        try:
            for name in ("beta_0", "beta_1"):
                object.__setattr__(self, name, float(getattr(self, name)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScheduleError(f"VP needs two numbers 0 < beta_0 < beta_1: {error}.") from error
        if not 0 < self.beta_0 < self.beta_1 < math.inf:
            raise ScheduleError(f"VP needs 0 < beta_0 < beta_1, got beta_0={self.beta_0}, beta_1={self.beta_1}.")

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_1 - self.beta_0) * t * t - 0.5 * self.beta_0 * t

    def _log_alpha_prime(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_1 - self.beta_0) * t - 0.5 * self.beta_0

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # The positive root of the quadratic log alpha(t) = -softplus(-2 lam) / 2, in the form that cancels nothing.
        c = 2 * (self.beta_1 - self.beta_0) * _softplus(-2 * lam)
        return c / ((self.beta_0 + (self.beta_0**2 + c).sqrt()) * (self.beta_1 - self.beta_0))


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) on [0, 1] [Nichol & Dhariwal 2021, without offset]."""

    def _alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * (1 - t)).sin()  # a sine, because cos(pi/2) is 6e-17 in floating point and not 0

    def _sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self._sigma(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self._alpha(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return 2 / math.pi * (-lam).exp().atan()


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """alpha = 1 - t, sigma = t on [0, 1]: rectified flow [Liu et al. 2023], optimal-transport paths [Lipman et al. 2023]."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - t.log()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)

    def _t_of_ratio(self, ratio: float) -> float:
        return ratio / (1 + ratio) if ratio < math.inf else 1.0


@dataclass(frozen=True)
class Discrete(_VariancePreserving):
    """Variance preserving on integer timesteps, from a table of alpha_bar = alpha^2; log alpha is linear in between.

    Parameters
    ----------
    alphas_cumprod : alpha_bar of timesteps 0 .. T-1, a 1-d tensor or sequence, decreasing within (0, 1).

    Time is the timestep index in [0, T-1], which is what such models are conditioned on. The line is continued one unit
    past timestep 0, to alpha = 1 at t = -1: the data.
    """

    alphas_cumprod: Tensor = field(repr=False)
    t_data: float = field(default=-1.0, init=False)
    t_noise: float = field(default=math.nan, init=False)
    _ends_at_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            # Tensors made in inference mode could not take part in a gradient later.
            with torch.inference_mode(False):
                table = torch.as_tensor(self.alphas_cumprod, dtype=_F64, device="cpu").detach().clone()
                log_alpha = torch.cat([torch.zeros(1, dtype=_F64, device="cpu"), 0.5 * table.flatten().log()])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScheduleError(f"Discrete needs alphas_cumprod as a tensor or a list of numbers: {error}.") from error
        decreasing = table.ndim == 1 and len(table) > 1 and bool((table.diff() < 0).all())
        if not decreasing or not bool(((table > 0) & (table < 1)).all()):
            raise ScheduleError(
                "Discrete needs alphas_cumprod: at least two numbers within (0, 1), decreasing with the timestep. "
                "A table that ends in 0 (zero terminal SNR) needs its last entry dropped or replaced by a small number."
            )
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "t_noise", float(len(table) - 1))
        object.__setattr__(self, "_knots", log_alpha)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Discrete) and torch.equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(self.config()["table"])

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The timestep at or before t, log alpha there, and its slope from there on."""
        knots: Tensor = self._knots.to(t.device)  # type: ignore[attr-defined]  # set in __post_init__
        # A time that is no number has no timestep; log alpha becomes nan by the time itself.
        i = t.detach().nan_to_num().floor().clamp(-1, len(knots) - 3).long() + 1
        return i - 1, knots[i], knots[i + 1] - knots[i]

    def _log_alpha(self, t: Tensor) -> Tensor:
        before, left, slope = self._piece(t)
        return left + (t - before) * slope

    def _log_alpha_prime(self, t: Tensor) -> Tensor:
        return self._piece(t)[2]

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        knots: Tensor = self._knots.to(lam.device)  # type: ignore[attr-defined]
        log_alpha = -0.5 * _softplus(-2 * lam)
        i = (torch.searchsorted(-knots, -log_alpha.detach(), right=True) - 1).clamp(0, len(knots) - 2)
        return (i - 1) + (log_alpha - knots[i]) / (knots[i + 1] - knots[i])

    def config(self) -> dict[str, Any]:
        """Type, length and SHA-256 of the table."""
        digest = hashlib.sha256(self.alphas_cumprod.numpy().tobytes()).hexdigest()
        return {"type": "Discrete", "timesteps": len(self.alphas_cumprod), "table": digest}


@dataclass(frozen=True)
class FromFunctions(Schedule):
    """A schedule from two functions of time; made by :func:`from_functions`."""

    alpha_function: Callable[[Tensor], Tensor]
    sigma_function: Callable[[Tensor], Tensor]
    t_data: float = 0.0
    t_noise: float = 1.0
    name: str = "custom"
    _ends_at_noise: ClassVar[bool] = True

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alpha_function(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_function(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # Bisection: monotone by the check in `from_functions`, and 100 halvings reach the last bit of any bracket.
        data, noise = torch.full_like(lam, self.t_data), torch.full_like(lam, self.t_noise)
        for _ in range(100):
            middle = (data + noise) / 2
            cleaner = self._lam(middle) > lam
            data, noise = torch.where(cleaner, middle, data), torch.where(cleaner, noise, middle)
        # An end is returned as itself, not as the last midpoint before it.
        t = (data + noise) / 2
        t = torch.where(lam >= self._lam(torch.full_like(lam, self.t_data)), torch.full_like(lam, self.t_data), t)
        t = torch.where(lam <= self._lam(torch.full_like(lam, self.t_noise)), torch.full_like(lam, self.t_noise), t)
        return torch.where(lam.isnan(), lam, t)

    def config(self) -> dict[str, Any]:
        """Name, ends, and values of lambda in between."""
        return {"type": "FromFunctions", "name": self.name, **self._behaviour()}


def from_functions(
    alpha: Callable[[Tensor], Tensor],
    sigma: Callable[[Tensor], Tensor],
    t_data: float = 0.0,
    t_noise: float = 1.0,
    name: str = "custom",
) -> FromFunctions:
    """A schedule from functions alpha(t), sigma(t) of a float64 tensor; derivatives come from autograd.

    Parameters
    ----------
    alpha, sigma : differentiable torch functions, elementwise.
    t_data, t_noise : times of the data (sigma = 0 or as near as it gets) and of the noisiest state; either may be larger.
    name : kept in the files of fitted solvers.

    Raises
    ------
    ScheduleError : the values are not finite and non-negative, or sigma/alpha does not increase towards the noise.
    """
    if not callable(alpha) or not callable(sigma):
        raise ScheduleError(f"alpha and sigma must be functions of a float64 tensor, got {alpha!r} and {sigma!r}.")
    schedule = FromFunctions(alpha, sigma, float(t_data), float(t_noise), name)
    times = torch.linspace(schedule.t_data, schedule.t_noise, 129, dtype=_F64, device="cpu")
    try:
        a, s = alpha(times), sigma(times)
        slopes = _derivative(alpha, times), _derivative(sigma, times)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ScheduleError(
            f"alpha and sigma must be torch functions of a float64 tensor that autograd can follow: {error}."
        ) from error
    if any(v.shape != times.shape or v.dtype != _F64 for v in (a, s)):
        raise ScheduleError("alpha and sigma must map a float64 tensor to a float64 tensor of the same shape.")
    if any(bool((v != v[0]).any()) and not bool(slope.any()) for v, slope in zip((a, s), slopes, strict=True)):
        raise ScheduleError(
            "alpha and sigma must be torch functions: autograd finds no dependence on t in one of them."
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(s).all() and (a >= 0).all() and (s >= 0).all()):
        raise ScheduleError("alpha and sigma must be finite and non-negative between t_data and t_noise.")
    lam = schedule._lam(times)
    if bool(lam.isnan().any()) or not bool((lam.diff() < 0).all()):
        raise ScheduleError("sigma/alpha must increase strictly from t_data to t_noise.")
    return schedule


def schedule_from_config(config: Mapping[str, Any], alphas_cumprod: Tensor | None = None) -> Schedule:
    """The schedule that :meth:`Schedule.config` described; a discrete one needs its table.

    Raises
    ------
    ScheduleError : an unknown type, or one made of functions, which only its owner can supply; parameters of another type
        of schedule; a table other than the one described.
    """
    kinds: dict[str, type[Schedule]] = {"EDM": EDM, "VE": VE, "VP": VP, "Cosine": Cosine, "FlowMatching": FlowMatching}
    kind = config.get("type")
    if kind == "Discrete" and alphas_cumprod is not None:
        schedule: Schedule = Discrete(alphas_cumprod)
    elif isinstance(kind, str) and kind in kinds:
        try:
            schedule = kinds[kind](**{k: v for k, v in config.items() if k != "type"})
        except TypeError as error:
            raise ScheduleError(f"not the parameters of a {kind} schedule: {error}.") from error
    else:
        raise ScheduleError(f"a schedule of type {kind!r} cannot be rebuilt from its description: pass schedule=.")
    if schedule.config() != dict(config):
        raise ScheduleError(f"the schedule was described as {dict(config)}, and what was made is {schedule.config()}.")
    return schedule


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision (torch's own switches to the identity at 20, which costs 2e-9)."""
    return F.softplus(x, threshold=700.0)
