"""Explicit Runge-Kutta methods in t, on the velocity dx/dt [Hairer, Norsett, Wanner 1993, section II.1]."""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import PlanError
from ..plan import Past
from .base import Solver, register

__all__ = ["RK4", "Euler", "Heun", "Midpoint", "RungeKutta"]


class RungeKutta(Solver):
    """A method given by its Butcher tableau; the tableau checks itself when the class is made.

    Stage i is the velocity at time t + c_i h and state x + h sum_j a_ij k_j; the step is x + h sum_i b_i k_i.
    Where a stage would be evaluated at sigma = 0 the step is Euler's (which, where alpha = 1 and sigma = t, lands on the
    model's data estimate).

    Attributes
    ----------
    a : rows below the first stage; ``a[i - 1]`` has i entries.
    b, c : weights and nodes.
    """

    a: ClassVar[tuple[tuple[float, ...], ...]]
    b: ClassVar[tuple[float, ...]]
    c: ClassVar[tuple[float, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not all(hasattr(cls, part) for part in ("a", "b", "c")):
            raise PlanError(f"{cls.__name__} needs a tableau: class attributes a, b and c.")
        stages = len(cls.b)
        if stages < 1 or len(cls.c) != stages or [len(row) for row in cls.a] != list(range(1, stages)) or cls.c[0] != 0:
            raise PlanError(f"the tableau of {cls.__name__} is not that of an explicit method with {stages} stages.")
        rows = [sum(row) - node for row, node in zip(cls.a, cls.c[1:], strict=True)]
        if max(map(abs, [*rows, sum(cls.b) - 1.0])) > 1e-14:
            raise PlanError(
                f"the tableau of {cls.__name__} is inconsistent: b must sum to 1, and each row of a to its c."
            )

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """x + h sum_i b_i k_i."""
        h = s - t
        k = [ode.velocity(x, t)]
        if ode.is_data(s) and 1.0 in self.c:
            return x + h * k[0]
        for row, node in zip(self.a, self.c[1:], strict=True):
            y = x + sum(h * a * slope for a, slope in zip(row, k, strict=True) if a)
            k.append(ode.velocity(y, t + node * h if node != 1.0 else s))
        return x + sum(h * b * slope for b, slope in zip(self.b, k, strict=True) if b)


@register("euler")
class Euler(RungeKutta):
    """Euler's method: order 1, one evaluation a step. Where alpha = 1 and sigma = t it is DDIM."""

    order = 1
    a, b, c = (), (1.0,), (0.0,)


@register("midpoint")
class Midpoint(RungeKutta):
    """The explicit midpoint rule: order 2, two evaluations a step (also on the step to sigma = 0)."""

    order = 2
    a, b, c = ((0.5,),), (0.0, 1.0), (0.0, 0.5)


@register("heun", "edm")
class Heun(RungeKutta):
    """Heun's method, or improved Euler: order 2, two evaluations a step, Euler to sigma = 0 [Karras et al. 2022, alg. 1].

    On a grid of N levels and a final 0 that is 2N - 1 evaluations.
    """

    order = 2
    a, b, c = ((1.0,),), (0.5, 0.5), (0.0, 1.0)


@register("rk4")
class RK4(RungeKutta):
    """The classic fourth-order method: order 4, four evaluations a step, Euler to sigma = 0.

    torchdiffeq's fixed-grid ``rk4`` is the 3/8 rule, another method of order 4: it is here as ``torchdiffeq:rk4``.
    """

    order = 4
    a, b, c = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
