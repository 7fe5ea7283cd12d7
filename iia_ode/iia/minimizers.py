"""Minimizers of an objective with derivatives: damped Gauss-Newton, on all samples or on few, and Adam in stretches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Adam", "GaussNewton", "IncrementalGaussNewton", "Minimizer", "Objective", "Samples", "Status"]

_F64 = torch.float64
_TRIES, _FEW_TRIES = 6, 3  # dampings tried in a step of Gauss-Newton, on all samples and on few
_STRETCHES = 12  # of Adam
_STALLED = 12  # a stretch ends after this many steps without a lower loss
_WORSE = 1.5  # a stretch ends at this multiple of its first loss


class Status(Enum):
    """Why a minimization stopped."""

    ITERATIONS = "the number of iterations was reached"
    PATIENCE = "the held-out error no longer fell"
    TOLERANCE = "the training error fell by less than the tolerance"
    STALLED = "no step lowered the training error"
    NOT_FINITE = "the derivatives are not finite"


class Objective(Protocol):
    """A function of a vector theta [P], for a :class:`Minimizer`."""

    def loss(self, theta: Tensor, /) -> float:
        """The loss, or infinity where theta is not admissible."""

    def derivatives(self, theta: Tensor, /) -> tuple[Tensor, Tensor]:
        """The gradient [P] and the Gauss-Newton matrix [P, P], both up to the same factor; float64 on the host."""


class Samples(Objective, Protocol):
    """An objective over samples, for minimizations on a part of them at a time."""

    def part(self, first: int, count: int, /) -> Samples:
        """The objective of `count` samples from `first` on, in a circle."""

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def seen(self) -> float:
        """The loss at the point of the last derivatives."""


@dataclass(eq=False, kw_only=True)
class Minimizer(ABC):
    """A point that moves toward a minimum of an objective.

    Attributes
    ----------
    objective : the loss and its derivatives.
    theta : the current point, float64 [P], on the host; first the starting point.
    limit : maps (theta, tried) to an admissible step, such as :meth:`Parameters.clipped`; by default every step is admissible.
    loss : loss at the current point.
    damping : damping mu of the last step of Gauss-Newton; 0 before the first step, and for other minimizers.
    status : reason of the end; None while a further step is possible.
    """

    objective: Objective = field(kw_only=False)
    theta: Tensor = field(kw_only=False)
    limit: Callable[[Tensor, Tensor], Tensor] = lambda _, tried: tried
    loss: float = field(init=False)
    damping: float = field(init=False, default=0.0)
    status: Status | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.loss = self.objective.loss(self.theta)

    @abstractmethod
    def step(self) -> bool:
        """Take a step. Return False, with a :attr:`status`, if no step is left."""


@dataclass(eq=False, kw_only=True)
class GaussNewton(Minimizer):
    """Damped Gauss-Newton steps [Levenberg 1944; Marquardt 1963], each to a lower loss.

    A step solves (H + mu diag H) delta = -g. The damping mu grows by 8 until the loss falls, at most six times, and shrinks
    by 4 after a successful step.

    Attributes
    ----------
    tolerance : stop after a step that lowers the loss by less than this fraction.
    """

    tolerance: float = 2e-3
    _next: float = field(init=False, default=1e-3)

    def step(self) -> bool:
        """Take a step to a lower loss. Return False, with a status, if there is no such step."""
        if self.status is not None:
            return False
        gradient, square = self.objective.derivatives(self.theta)
        if not bool(torch.isfinite(gradient).all() and torch.isfinite(square).all()):
            self.status = Status.NOT_FINITE
            return False
        for k in range(_TRIES):
            damping = self._next * 8**k
            tried = self.limit(self.theta, self.theta - damped(gradient, square, damping))
            loss = self.objective.loss(tried)
            if loss < self.loss:
                break
        else:
            self.status = Status.STALLED
            return False
        if 1 - loss / self.loss < self.tolerance:
            self.status = Status.TOLERANCE
        self.theta, self.loss, self.damping = tried, loss, damping
        self._next = max(damping / 4, 1e-9)
        return True


@dataclass(eq=False, kw_only=True)
class IncrementalGaussNewton(Minimizer):
    """Damped Gauss-Newton steps, each on other samples: the extended Kalman filter of least squares [Bertsekas 1996].

    A step minimizes a weighted sum of the quadratic models of all samples so far, each about the point where its samples were
    evaluated, with weights that fall by `decay` per step. A step of few samples costs little, and the sum averages their noise
    out. A step must lower the loss of its own samples; otherwise only its model is kept.

    Attributes
    ----------
    objective : the loss over all samples.
    minibatch : number of samples of each step.
    whole : whether :attr:`loss` is the loss over all samples, at the cost of their evaluations; otherwise it is the loss over
        the samples of the last step alone, and NaN before the first.
    together : number of steps in a call of :meth:`step`.
    decay : weight of the models of the steps before.
    """

    objective: Samples = field(kw_only=False)
    minibatch: int
    whole: bool = False
    together: int = 3
    decay: float = 0.85
    _next: float = field(init=False, default=1e-2)
    _square: Tensor | None = field(init=False, default=None)
    _gradient: Tensor | None = field(init=False, default=None)
    _first: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.loss = self.objective.loss(self.theta) if self.whole else math.nan

    def step(self) -> bool:
        """Take `together` steps. Return False, with a status, where the derivatives are not finite."""
        for _ in range(self.together):
            if self.status is None:
                self._step(self.objective.part(self._first, self.minibatch))
        if self.whole:
            self.loss = self.objective.loss(self.theta)
        return self.status is None

    def _step(self, own: Samples) -> None:
        self._first += len(own)
        gradient, square = own.derivatives(self.theta)
        if not bool(torch.isfinite(gradient).all() and torch.isfinite(square).all()):
            self.status = Status.NOT_FINITE
            return
        if self._square is not None and self._gradient is not None:
            gradient, square = self.decay * self._gradient + gradient, self.decay * self._square + square
        self.loss, before = own.seen, self.theta
        for k in range(_FEW_TRIES):
            damping = self._next * 8**k
            tried = self.limit(before, before - damped(gradient, square, damping))
            if (loss := own.loss(tried)) < own.seen:
                self.theta, self.loss, self.damping = tried, loss, damping
                self._next = max(damping / 4, 1e-6)
                break
        else:  # few samples say little: the next step tries nearly the same damping
            self._next *= 8
        self._square, self._gradient = square, gradient + square @ (self.theta - before)


def damped(gradient: Tensor, square: Tensor, damping: float) -> Tensor:
    """The step (H + mu diag H)^-1 g of Levenberg and Marquardt."""
    scale = square.diagonal().clamp_min(1e-12 * float(square.diagonal().max()) + 1e-300)
    # In units of the diagonal the matrix is a correlation matrix, so that rounding does not depend on scales.
    unit = scale.sqrt()
    matrix = square / unit / unit[:, None] + damping * torch.eye(len(unit), dtype=_F64, device="cpu")
    step: Tensor = torch.linalg.solve(matrix, gradient / unit) / unit
    return step


@dataclass(eq=False, kw_only=True)
class Adam(Minimizer):
    """Stretches of Adam [Kingma & Ba 2015], each from the lowest loss so far, at half the rates of the stretch before.

    A stretch ends after 12 steps without a lower loss, at 1.5 times its first loss, or where theta is not admissible. Suitable
    rates depend on the model and on the number of evaluations. Rates that are too large lead to plans from which Adam does not
    recover.

    Attributes
    ----------
    rates : change of each parameter in a step of the first stretch: a number, or float64 [P].
    """

    rates: Tensor | float = 5e-3
    _best: tuple[float, Tensor] = field(init=False)
    _stretches: int = field(init=False, default=0)
    _since: int = field(init=False, default=0)
    _first: float = field(init=False, default=math.inf)
    _unit: float = field(init=False, default=0.0)
    _start: Tensor = field(init=False)
    _moves: Tensor = field(init=False)
    _optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._best = self.loss, self.theta
        self._begin()

    def step(self) -> bool:
        """Take a step; the loss may rise. Return False, with a status, if no step is left."""
        if self._since == _STALLED or self.loss > _WORSE * self._first:
            self._begin()
        while self.status is None:
            gradient = self.rates * self.objective.derivatives(self.theta)[0]
            if not bool(torch.isfinite(gradient).all()):
                if not self._unit:
                    self.status = Status.NOT_FINITE
                    break
                self._begin()
                continue
            # In units of the first derivative, so that the scale of the loss does not matter beside Adam's epsilon.
            self._unit = self._unit or float(gradient.abs().max()) or 1.0
            self._moves.grad = gradient / self._unit
            self._optimizer.step()
            tried = self.limit(self.theta, self._start + self.rates * self._moves.detach())
            self._moves.data = ((tried - self._start) / self.rates).nan_to_num()  # where a rate is 0
            if math.isfinite(loss := self.objective.loss(tried)):
                self.theta, self.loss, self._since = tried, loss, self._since + 1
                if loss < self._best[0]:
                    self._best, self._since = (loss, tried), 0
                return True
            self._begin()
        return False

    def _begin(self) -> None:
        """Return to the lowest loss so far and begin a stretch there; none is left after the last."""
        self.loss, self.theta = self._best
        if self._stretches == _STRETCHES:
            self.status = Status.STALLED
        self._start, self._first, self._unit, self._since = self.theta, self.loss, 0.0, 0
        self._moves = torch.zeros_like(self.theta, requires_grad=True)  # in units of the rates
        self._optimizer = torch.optim.Adam([self._moves], lr=0.5**self._stretches)
        self._stretches += 1
