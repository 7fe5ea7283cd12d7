"""The base class of noise schedules."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from ..errors import ScheduleError
from ..transforms import transformed

__all__ = ["FromFunctions", "Schedule", "as_levels", "derivative_of"]

_F64 = torch.float64
_NUMBERS = 2**14  # memoized by a schedule at most
_SLACK = 1e-6  # relative rounding of a level on the way through a time and back, of float32 too
T = TypeVar("T", float, Tensor)


class Schedule(ABC):
    """A noise schedule.

    A subclass has ``_alpha`` and ``_sigma`` on float64 tensors, and ``_t_of_lam``. ``_lam`` and the derivatives have defaults
    by autograd; the schedules of this library have closed forms, which are faster. Public methods map a number to a float, and
    a tensor to a float64 tensor of its shape on its device. On other devices than the host, which need not have float64, a
    tensor of another dtype than float64 gives a float32 tensor.

    Attributes
    ----------
    t_data, t_noise : times of the data (sigma = 0) and of the noisiest state.
    known_levels : lowest and highest level sigma/alpha of the model's training; None where they are not stated. No function
        of this library evaluates the model outside of these levels.
    """

    t_data: float = 0.0
    t_noise: float = 1.0
    known_levels: tuple[float, float] | None = None
    _ends_at_noise: ClassVar[bool] = False  # whether the schedule is undefined beyond t_noise
    _fixed: ClassVar[bool] = False  # whether the functions of this very class never change: their values are memoized

    @staticmethod
    def from_functions(
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        t_data: float = 0.0,
        t_noise: float = 1.0,
        name: str = "custom",
        *,
        known_levels: tuple[float, float] | None = None,
    ) -> FromFunctions:
        """Make a schedule from functions alpha(t) and sigma(t); derivatives come from autograd.

        Parameters
        ----------
        alpha, sigma : differentiable torch functions of float64 times [...], elementwise, of any shape.
        t_data, t_noise : times of the data (the least sigma) and of the noisiest state, in either order.
        name : of the schedule, stored in the files of fitted solvers.
        known_levels : lowest and highest level sigma/alpha of the model's training, if known.

        Returns
        -------
        The schedule.

        Raises
        ------
        ScheduleError : the values are not finite and non-negative, sigma/alpha does not increase towards the noise, or the
            levels are not in order.

        Examples
        --------
        >>> flow = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)
        """
        return FromFunctions(alpha, sigma, t_data, t_noise, name, known_levels=known_levels)

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
        return derivative_of(self._alpha, t)

    def _sigma_prime(self, t: Tensor) -> Tensor:
        return derivative_of(self._sigma, t)

    def _sigma_squared_prime(self, t: Tensor) -> Tensor:
        return 2 * self._sigma(t) * self._sigma_prime(t)

    def alpha(self, t: T) -> T:
        """Scale of the data at time t."""
        return self._on("alpha", self._alpha, t)

    def sigma(self, t: T) -> T:
        """Scale of the noise at time t."""
        return self._on("sigma", self._sigma, t)

    def alpha_prime(self, t: T) -> T:
        """d alpha / dt."""
        return self._on("alpha_prime", self._alpha_prime, t)

    def sigma_prime(self, t: T) -> T:
        """d sigma / dt."""
        return self._on("sigma_prime", self._sigma_prime, t)

    def lam(self, t: T) -> T:
        """Half-log-SNR log(alpha/sigma): +inf at the data, -inf where alpha = 0."""
        return self._on("lam", self._lam, t)

    def t_of_lam(self, lam: T) -> T:
        """The time whose half-log-SNR is `lam`: the inverse of :meth:`lam`."""
        return self._on("t_of_lam", self._t_of_lam, lam)

    def f(self, t: T) -> T:
        """Drift coefficient d log alpha / dt."""
        return self._on("f", lambda u: self._alpha_prime(u) / self._alpha(u), t)

    def g2(self, t: T) -> T:
        """Squared diffusion coefficient d sigma^2 / dt - 2 f sigma^2."""

        def g2(u: Tensor) -> Tensor:
            # The derivative of sigma^2 has its own method: at the data, VE and VP have sigma = 0 and sigma' infinite.
            drift = self._alpha_prime(u) / self._alpha(u)
            return self._sigma_squared_prime(u) - 2 * drift * self._sigma_squared(u)

        return self._on("g2", g2, t)

    def noise_to_signal(self, t: T) -> T:
        """sigma / alpha, the noise level of x / alpha: EDM's sigma for every schedule; 0 at the data."""
        return self._on("noise_to_signal", lambda u: self._sigma(u) / self._alpha(u), t)

    def size(self, t: T) -> T:
        """sqrt(alpha^2 + sigma^2): the root mean square of a state whose data have unit variance."""
        a, s = self.alpha(t), self.sigma(t)
        if isinstance(a, Tensor) and isinstance(s, Tensor):
            return torch.hypot(a, s)
        return math.hypot(a, s)

    def _on(self, name: str, function: Callable[[Tensor], Tensor], t: T) -> T:
        """Apply a named function of float64 tensors to a number or a tensor; the result has the type of t."""
        if isinstance(t, Tensor):
            brought = t.device.type == "cpu" or t.dtype == _F64
            return function(t.to(_F64 if brought else torch.float32))
        at = float(t)
        # Steps evaluate the same few numbers again and again, and each costs several operations on tensors. A subclass may
        # have parameters that change, whatever `_fixed` of its parent. 0.0 and -0.0 are one key, but can have two values.
        fixed = vars(type(self)).get("_fixed", False) and at != 0
        known: dict[tuple[str, float], float] = vars(self).setdefault("_numbers", {}) if fixed else {}
        if (value := known.get((name, at))) is None:
            value = float(function(torch.tensor(at, dtype=_F64, device="cpu")).detach())
            if len(known) >= _NUMBERS:
                known.clear()
            known[name, at] = value
        return value

    def t_of_noise_to_signal(self, ratio: float) -> float:
        """The time at which sigma / alpha = `ratio`; ratio 0 gives ``t_data`` exactly."""
        if ratio < 0:
            raise ScheduleError(f"a noise level sigma/alpha cannot be negative, got {ratio:g}.")
        return self.t_data if ratio == 0 else self._t_of_ratio(ratio)

    def _t_of_ratio(self, ratio: float) -> float:
        return self.t_of_lam(-math.log(ratio))

    def covers(self, t: float | Tensor) -> bool:
        """Whether t, or every time of a tensor, is not beyond the data and has finite alpha and sigma."""
        towards_noise = math.copysign(1.0, self.t_noise - self.t_data)
        if not isinstance(t, Tensor):
            inside = (t - self.t_data) * towards_noise >= 0 and all(
                0 <= v < math.inf for v in (self.alpha(t), self.sigma(t))
            )
            return inside and (not self._ends_at_noise or (self.t_noise - t) * towards_noise >= 0)
        levels = torch.stack([self.alpha(t), self.sigma(t)])
        within = ((t - self.t_data) * towards_noise >= 0).all() and (torch.isfinite(levels) & (levels >= 0)).all()
        return bool(within) and (not self._ends_at_noise or bool(((self.t_noise - t) * towards_noise >= 0).all()))

    def knows(self, t: float | Tensor) -> bool:
        """Whether the level at t, or at all times of a tensor, is within :attr:`known_levels`; True where none are stated."""
        if self.known_levels is None:
            return True
        low, high = self.known_levels[0] * (1 - _SLACK), self.known_levels[1] * (1 + _SLACK)
        if isinstance(t, Tensor):
            levels = self.noise_to_signal(t)
            return bool(((levels >= low) & (levels <= high)).all())
        return low <= self.noise_to_signal(t) <= high

    @property
    def is_of_numbers(self) -> bool:
        """Whether the schedule is of this library and holds numbers alone: then no derivative passes through it."""
        held = (v for name, v in vars(self).items() if name not in ("_numbers", "known_levels"))
        return type(self).__module__.startswith(f"{__package__}.") and all(isinstance(v, int | float) for v in held)

    def everywhere(self) -> Self:
        """A copy without known levels, for analyses that evaluate no model."""
        twin = copy.copy(self)
        object.__setattr__(twin, "known_levels", None)
        return twin

    def __getstate__(self) -> Any:
        """The state of a copy or a pickle: without memoized values."""
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k != "_numbers"} if isinstance(state, dict) else state

    def config(self) -> dict[str, Any]:
        """The schedule as JSON-ready values, by which a stored fitted solver is compared with the schedule of an ODE.

        The values are the type and its parameters, without flags that are False. A schedule with a parameter that is neither a
        number nor text adds its two end times and values of lambda.
        """
        kind = type(self)
        known = "__dataclass_fields__" in vars(kind)  # of its own: a subclass may hold more than its parent's fields
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init} if known else {}  # type: ignore[arg-type]
        values.pop("known_levels", None)
        plain = {k: v for k, v in values.items() if isinstance(v, int | float | str)}
        behaviour = {} if known and len(plain) == len(values) else self._behaviour()
        shown = {k: v for k, v in plain.items() if v is not False}
        return {"type": kind.__name__, **shown, **behaviour, **self._stated()}

    def _stated(self) -> dict[str, Any]:
        """The entry of the known levels; empty where they are not stated."""
        return {} if self.known_levels is None else {"known_levels": list(self.known_levels)}

    def _behaviour(self) -> dict[str, Any]:
        """The ends, and lambda at five interior times, because functions cannot be compared."""
        times = torch.linspace(self.t_data, self.t_noise, 7, dtype=_F64, device="cpu")[1:-1]
        samples = [float(f"{v:.9g}") for v in self._lam(times).tolist()]
        return {"t_data": self.t_data, "t_noise": self.t_noise, "lam": samples}


def as_levels(value: Any) -> tuple[float, float] | None:
    """Known levels as two floats, 0 <= lowest < highest, or None; ScheduleError for anything else."""
    if value is None:
        return None
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScheduleError(
            f"known_levels must be two levels sigma/alpha, such as (0.002, 80.0), got {value!r}."
        ) from error
    if not 0 <= low < high:
        raise ScheduleError(f"known_levels must be two levels sigma/alpha, 0 <= lowest < highest, got {value!r}.")
    return low, high


def derivative_of(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function by autograd, in every grad mode."""
    if transformed():  # where autograd's own functions do not reach
        inside: Tensor = torch.func.grad(lambda u: function(u).sum())(t)
        return inside
    # The time of an adaptive integrator may depend on the state: a gradient that reaches t passes through this function.
    # So does one that reaches a parameter of the function.
    through = torch.is_grad_enabled() and (t.requires_grad or function(t.detach()).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        u = t if through and t.requires_grad else t.detach().clone().requires_grad_(True)
        value = function(u)
        if not value.requires_grad:  # a constant, such as alpha = 1
            return torch.zeros_like(u, requires_grad=False)
        slope: Tensor = torch.autograd.grad(value.sum(), u, create_graph=through)[0]
        return slope


@dataclass(frozen=True)
class FromFunctions(Schedule):
    """A schedule from two functions of time; :meth:`Schedule.from_functions` makes it."""

    alpha_function: Callable[[Tensor], Tensor]
    sigma_function: Callable[[Tensor], Tensor]
    t_data: float = 0.0
    t_noise: float = 1.0
    name: str = "custom"
    known_levels: tuple[float, float] | None = field(default=None, kw_only=True, repr=False)
    _ends_at_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "known_levels", as_levels(self.known_levels))
        alpha, sigma = self.alpha_function, self.sigma_function
        if not callable(alpha) or not callable(sigma):
            raise ScheduleError(f"alpha and sigma must be functions of a float64 tensor, got {alpha!r} and {sigma!r}.")
        for end in ("t_data", "t_noise"):
            object.__setattr__(self, end, float(getattr(self, end)))
        times = torch.linspace(self.t_data, self.t_noise, 129, dtype=_F64, device="cpu")
        try:
            a, s = alpha(times), sigma(times)
            slopes = derivative_of(alpha, times), derivative_of(sigma, times)
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
        lam = self._lam(times)
        if bool(lam.isnan().any()) or not bool((lam.diff() < 0).all()):
            raise ScheduleError("sigma/alpha must increase strictly from t_data to t_noise.")

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alpha_function(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_function(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # Lambda is monotone by the check above. Each pass keeps the part with the level, out of 64 parts of the bracket: 17
        # passes are 102 halvings, which reach the last bit of any bracket, at a sixth of the calls.
        fractions = torch.arange(1, 64, dtype=lam.dtype, device=lam.device) / 64
        data, noise = torch.full_like(lam, self.t_data)[..., None], torch.full_like(lam, self.t_noise)[..., None]
        for _ in range(17):
            inside = data + (noise - data) * fractions
            cleaner = (self._lam(inside) > lam[..., None]).sum(dim=-1, keepdim=True)
            points = torch.cat([data, inside, noise], dim=-1)
            data, noise = points.gather(-1, cleaner), points.gather(-1, cleaner + 1)
        data, noise = data[..., 0], noise[..., 0]
        # An end is returned exactly, not as the last midpoint before it.
        t = (data + noise) / 2
        t = torch.where(lam >= self._lam(torch.full_like(lam, self.t_data)), torch.full_like(lam, self.t_data), t)
        t = torch.where(lam <= self._lam(torch.full_like(lam, self.t_noise)), torch.full_like(lam, self.t_noise), t)
        return torch.where(lam.isnan(), lam, t)

    def config(self) -> dict[str, Any]:
        """Name, ends, values of lambda in between, and the known levels if they are stated."""
        return {"type": "FromFunctions", "name": self.name, **self._behaviour(), **self._stated()}
