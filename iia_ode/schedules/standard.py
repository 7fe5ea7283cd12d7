"""The schedules of the field, in closed form."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_flag
from ..errors import ScheduleError
from .base import Schedule, as_levels

__all__ = ["EDM", "VE", "VP", "Cosine", "Discrete", "FlowMatching", "schedule_from_config"]

_F64 = torch.float64
_SNAP = 1e-6  # distance in log-SNR from the first or the last timestep that is rounding, of float32 too


@dataclass(frozen=True)
class _Standard(Schedule):
    """A schedule in closed form, on which a user can state the levels that a model knows.

    Parameters
    ----------
    known_levels : lowest and highest level sigma/alpha of the model's training, such as ``(0.002, 80.0)``, if known. Grids
        then run between these levels by default, and a time outside of them is an error.

    Raises
    ------
    ScheduleError : the levels are not two numbers, 0 <= lowest < highest.
    """

    known_levels: tuple[float, float] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known_levels", as_levels(self.known_levels))


@dataclass(frozen=True)
class EDM(_Standard):
    """alpha = 1, sigma = t [Karras et al. 2022]: time is the noise level.

    Parameters
    ----------
    known_levels : lowest and highest noise level of the model's training, if known; see :attr:`Schedule.known_levels`.

    Raises
    ------
    ScheduleError : the levels are not two numbers, 0 <= lowest < highest.
    """

    _fixed: ClassVar[bool] = True

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
        return ratio  # without a logarithm, so that the level is exact


@dataclass(frozen=True)
class VE(_Standard):
    """alpha = 1, sigma = sqrt(t) [Song et al. 2021, as parameterized by Karras et al. 2022]: time is the variance.

    Parameters
    ----------
    known_levels : lowest and highest level sigma/alpha of the model's training, if known; see :attr:`Schedule.known_levels`.

    Raises
    ------
    ScheduleError : the levels are not two numbers, 0 <= lowest < highest.
    """

    _fixed: ClassVar[bool] = True

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
class VP(_Standard, _VariancePreserving):
    """Variance preserving with beta(t) = beta_0 + (beta_1 - beta_0) t linear on [0, 1] [Song et al. 2021].

    log alpha = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2 and sigma^2 = 1 - alpha^2.

    Parameters
    ----------
    beta_0, beta_1 : rates beta at the data (t = 0) and at the noise (t = 1), 0 < beta_0 <= beta_1. Equal rates are a constant
        beta.
    known_levels : lowest and highest level sigma/alpha of the model's training, if known; see :attr:`Schedule.known_levels`.

    Raises
    ------
    ScheduleError : the rates do not obey 0 < beta_0 <= beta_1, or the levels are not two numbers, 0 <= lowest < highest.
    """

    _fixed: ClassVar[bool] = True

    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            for name in ("beta_0", "beta_1"):
                object.__setattr__(self, name, float(getattr(self, name)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScheduleError(f"VP needs two numbers 0 < beta_0 <= beta_1: {error}.") from error
        if not 0 < self.beta_0 <= self.beta_1 < math.inf:
            raise ScheduleError(f"VP needs 0 < beta_0 <= beta_1, got beta_0={self.beta_0}, beta_1={self.beta_1}.")

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_1 - self.beta_0) * t * t - 0.5 * self.beta_0 * t

    def _log_alpha_prime(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_1 - self.beta_0) * t - 0.5 * self.beta_0

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        if self.beta_0 == self.beta_1:
            return _softplus(-2 * lam) / self.beta_0
        # The positive root of the quadratic log alpha(t) = -softplus(-2 lam) / 2, in the form that cancels nothing.
        c = 2 * (self.beta_1 - self.beta_0) * _softplus(-2 * lam)
        return c / ((self.beta_0 + (self.beta_0**2 + c).sqrt()) * (self.beta_1 - self.beta_0))


@dataclass(frozen=True)
class Cosine(_Standard):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) on [0, 1] [Nichol & Dhariwal 2021, without offset].

    Parameters
    ----------
    known_levels : lowest and highest level sigma/alpha of the model's training, if known; see :attr:`Schedule.known_levels`.

    Raises
    ------
    ScheduleError : the levels are not two numbers, 0 <= lowest < highest.
    """

    _fixed: ClassVar[bool] = True

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
class FlowMatching(_Standard):
    """alpha = 1 - t, sigma = t on [0, 1]: rectified flow [Liu et al. 2023], optimal-transport paths [Lipman et al. 2023].

    Parameters
    ----------
    reverse : whether time runs from noise at 0 to data at 1: alpha = t, sigma = 1 - t. The velocity of a model, dx/dt, then
        has the opposite sign, x_0 - eps.
    known_levels : lowest and highest level sigma/alpha of the model's training, if known; see :attr:`Schedule.known_levels`.

    Raises
    ------
    ScheduleError : `reverse` is neither True nor False, or the levels are not two numbers, 0 <= lowest < highest.
    """

    _fixed: ClassVar[bool] = True

    reverse: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("reverse", self.reverse, error=ScheduleError)
        object.__setattr__(self, "t_data", float(self.reverse))
        object.__setattr__(self, "t_noise", float(not self.reverse))

    def _alpha(self, t: Tensor) -> Tensor:
        return t if self.reverse else 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return 1 - t if self.reverse else t

    def _alpha_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.reverse else -torch.ones_like(t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t) if self.reverse else torch.ones_like(t)

    def _lam(self, t: Tensor) -> Tensor:
        return t.log() - torch.log1p(-t) if self.reverse else torch.log1p(-t) - t.log()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(lam if self.reverse else -lam)

    def _t_of_ratio(self, ratio: float) -> float:
        if self.reverse:
            return 1 / (1 + ratio)
        return ratio / (1 + ratio) if ratio < math.inf else 1.0


@dataclass(frozen=True)
class Discrete(_VariancePreserving):
    """Variance preserving on integer timesteps, from a table of alpha_bar = alpha^2; log alpha is linear in between.

    Time is the timestep index in [0, T-1], on which discrete models are conditioned. log alpha continues linearly one unit
    past timestep 0, to the data: alpha = 1 at t = -1. Between timestep 0 and the data there is no model: :attr:`known_levels`
    are the levels of timesteps 0 and T-1.

    Parameters
    ----------
    alphas_cumprod : alpha_bar of timesteps 0 .. T-1, numbers [T] of any floating-point dtype, decreasing within (0, 1), T > 1.

    Raises
    ------
    ScheduleError : the table is not decreasing within (0, 1), or has fewer than two entries.
    """

    _fixed: ClassVar[bool] = True

    alphas_cumprod: Tensor = field(repr=False)
    t_data: float = field(default=-1.0, init=False)
    t_noise: float = field(default=math.nan, init=False)
    known_levels: tuple[float, float] | None = field(default=None, init=False, repr=False)
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
                "In a table that ends in 0 (zero terminal SNR), replace the last entry by a tiny number: "
                "alphas_cumprod[-1] = 1e-16. Dropping the entry instead would shift the level of the first evaluation."
            )
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "t_noise", float(len(table) - 1))
        object.__setattr__(self, "_knots", log_alpha)
        object.__setattr__(self, "_ends", tuple((t, self.lam(t)) for t in (0.0, self.t_noise)))
        object.__setattr__(self, "known_levels", (self.noise_to_signal(0.0), self.noise_to_signal(self.t_noise)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Discrete) and torch.equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(self.config()["table"])

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The timestep at or before t, log alpha there, and its slope from there on."""
        knots: Tensor = self._knots.to(t.device, t.dtype)  # type: ignore[attr-defined]  # set in __post_init__
        # A time that is no number has no timestep; log alpha becomes nan by the time itself.
        i = t.detach().nan_to_num().floor().clamp(-1, len(knots) - 3).long() + 1
        return i - 1, knots[i], knots[i + 1] - knots[i]

    def _log_alpha(self, t: Tensor) -> Tensor:
        before, left, slope = self._piece(t)
        return left + (t - before) * slope

    def _log_alpha_prime(self, t: Tensor) -> Tensor:
        return self._piece(t)[2]

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        knots: Tensor = self._knots.to(lam.device, lam.dtype)  # type: ignore[attr-defined]
        log_alpha = -0.5 * _softplus(-2 * lam)
        i = (torch.searchsorted(-knots, -log_alpha.detach(), right=True) - 1).clamp(0, len(knots) - 2)
        t = (i - 1) + (log_alpha - knots[i]) / (knots[i + 1] - knots[i])
        # Beyond the first and the last timestep there is no model: their levels give these timesteps exactly.
        for end, level in self._ends:  # type: ignore[attr-defined]
            rounding = (lam.detach() - level).abs() < _SNAP
            t = t - torch.where(rounding, t.detach() - end, 0.0)
        return t

    def config(self) -> dict[str, Any]:
        """Type, length and SHA-256 of the table."""
        digest = hashlib.sha256(self.alphas_cumprod.numpy().tobytes()).hexdigest()
        return {"type": "Discrete", "timesteps": len(self.alphas_cumprod), "table": digest}


def schedule_from_config(config: Mapping[str, Any], alphas_cumprod: Tensor | None = None) -> Schedule:
    """The schedule of a :meth:`Schedule.config`; a discrete schedule needs its table.

    Raises
    ------
    ScheduleError : the type is unknown; the schedule is made of functions, which a configuration cannot hold; the parameters
        belong to another type; or the table differs from the described table.
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
        raise ScheduleError(
            f"the schedule was described as {dict(config)}, and the rebuilt schedule is {schedule.config()}."
        )
    return schedule


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision (torch's own switches to the identity at 20, which costs 2e-9)."""
    return F.softplus(x, threshold=700.0)
