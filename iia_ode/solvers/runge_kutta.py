"""Explicit Runge-Kutta methods [Hairer, Norsett, Wanner 1993, section II.1].

The methods run in t on the velocity dx/dt, or in rho = sigma/alpha on the noise estimate, d(x/alpha) = eps d(rho): the rho-RK
of DEIS [Zhang & Chen 2023, section 3.2]. Where alpha = 1 and sigma = t, the two forms are the same method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import check_number, check_whole
from ..errors import PlanError
from ..plan import Past
from ..schedules import Schedule
from .base import Solver, register
from .transfer import first_order_step, is_singular, noise_step

__all__ = [
    "DPM2",
    "RK4",
    "Euler",
    "Heun",
    "Heun3",
    "Midpoint",
    "Ralston",
    "RhoHeun",
    "RhoKutta",
    "RhoRK4",
    "RhoRungeKutta",
    "RungeKutta",
    "ThreeEighths",
]

_ROUNDING = 1e-14  # of sums over a tableau's row


class RungeKutta(Solver):
    """An explicit Runge-Kutta method, given by its Butcher tableau.

    Stage i is the velocity at time t + c_i h and state x + h sum_j a_ij k_j; the step is x + h sum_i b_i k_i. A step to the
    data is an Euler step if a stage would be evaluated at sigma = 0, or below the levels that the model knows. Where alpha = 1
    and sigma = t, this Euler step lands on the model's data estimate.

    ``RungeKutta(a, b, c, order=2, name="mine")`` makes a solver from numbers. A subclass has the class attributes ``a``,
    ``b``, ``c`` and ``order``, takes no arguments, and can be registered under a name.

    Parameters
    ----------
    a : coefficients of the stages: row i - 1 has the i coefficients of stage i, for i from 1; or the whole square matrix,
        zero on and above its diagonal.
    b : weights of the stages.
    c : nodes of the stages, equal to the row sums of `a`; by default computed from `a`.
    order : claimed order of the method; :func:`iia_ode.testing.verify` measures it.
    name : of the method in plans and tables.

    Raises
    ------
    PlanError : the tableau is not explicit, or not consistent: b must sum to 1, and each row of a to its entry of c.

    Examples
    --------
    >>> ralston = iia.RungeKutta(a=[[2 / 3]], b=[1 / 4, 3 / 4], order=2, name="ralston2")
    >>> x = iia.sample(ode, x_T, iia.grids.karras(5), ralston)
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if given := {part: getattr(cls, part) for part in ("a", "b", "c") if hasattr(cls, part)}:
            if "a" not in given or "b" not in given:
                raise PlanError(f"{cls.__name__} needs a whole tableau: class attributes a, b and c.")
            cls.a, cls.b, cls.c = _tableau(cls.__name__, given["a"], given["b"], given.get("c"))

    def __init__(
        self,
        a: Sequence[Sequence[float]] | None = None,
        b: Sequence[float] | None = None,
        c: Sequence[float] | None = None,
        *,
        order: int | None = None,
        name: str | None = None,
    ) -> None:
        kind = type(self).__name__
        if hasattr(type(self), "b"):
            if any(value is not None for value in (a, b, c, order, name)):
                raise PlanError(
                    f"{kind} has the tableau of its class; make another one by iia_ode.RungeKutta(a, b, c, order=2)."
                )
            return
        if a is None or b is None or order is None:
            raise PlanError(f"{kind} needs a tableau and its order: {kind}(a, b, c, order=2, name='mine').")
        self.name = kind if name is None else name
        self.order = check_whole(f"order of {self.name}", order, least=1, error=PlanError)
        self.a, self.b, self.c = _tableau(self.name, a, b, c)

    def __eq__(self, other: object) -> bool:
        """Whether both are of one class with equal tableaus, orders and names."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state x + h sum_i b_i k_i, with stages k_i in the velocity dx/dt.

        Parameters
        ----------
        ode, x, t, s, past : as for :meth:`iia_ode.Solver.step`.

        Returns
        -------
        The state at s.
        """
        h = s - t
        k = [ode.velocity(x, t)]
        times = [t + node * h if node != 1.0 else s for node in self.c[1:]]
        if ode.is_data(s) and not _are_known(ode.schedule, times, s):
            return x + h * k[0]
        for row, u in zip(self.a, times, strict=True):
            y = x + sum(h * a * slope for a, slope in zip(row, k, strict=True) if a)
            k.append(ode.velocity(y, u))
        return x + sum(h * b * slope for b, slope in zip(self.b, k, strict=True) if b)


def _are_known(schedule: Schedule, times: Sequence[float], data: float) -> bool:
    """Whether a model can be evaluated at the times of the stages of a step to the data."""
    return all(u != data and schedule.knows(u) for u in times)


def _tableau(name: str, a: Any, b: Any, c: Any) -> tuple[Any, Any, Any]:
    """A tableau as tuples of floats: the rows of a below the first stage, b and c."""
    try:
        weights = tuple(float(w) for w in b)
        rows = [tuple(float(v) for v in row) for row in a]
        nodes = None if c is None else tuple(float(v) for v in c)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the tableau of {name} must be numbers: rows a, weights b and nodes c ({error}).") from error
    stages = len(weights)
    if rows and all(len(row) == stages == len(rows) for row in rows):
        if any(any(row[i:]) for i, row in enumerate(rows)):
            raise PlanError(
                f"the tableau of {name} is not that of an explicit method: a must be zero on and above its diagonal."
            )
        rows = [row[:i] for i, row in enumerate(rows)][1:]
    sums = (0.0, *(1.0 if abs(sum(row) - 1) < _ROUNDING else sum(row) for row in rows))
    nodes = sums if nodes is None else nodes
    if stages < 1 or len(nodes) != stages or [len(row) for row in rows] != list(range(1, stages)) or nodes[0] != 0:
        raise PlanError(
            f"the tableau of {name} is not that of an explicit method with {stages} stages: row i of a has i entries for i "
            f"from 1 to {stages - 1}, c has {stages} entries, and the first of them is 0."
        )
    gaps = [total - node for total, node in zip(sums, nodes, strict=True)]
    if not all(abs(gap) <= _ROUNDING for gap in (*gaps, sum(weights) - 1.0)):
        raise PlanError(
            f"the tableau of {name} is inconsistent: b must sum to 1, and each row of a to its c; b sums to "
            f"{sum(weights):.16g}, and the rows differ by {[float(f'{gap:.3g}') for gap in gaps[1:]]}."
        )
    return tuple(rows), weights, nodes


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


@register("ralston")
class Ralston(RungeKutta):
    """Ralston's method: order 2 with the smallest bound on its error, two evaluations a step [Ralston 1962].

    The second evaluation stands at two thirds of the step, also on the step to sigma = 0.
    """

    order = 2
    a, b, c = ((2 / 3,),), (1 / 4, 3 / 4), (0.0, 2 / 3)


@register("heun", "edm")
class Heun(RungeKutta):
    """Heun's method, or improved Euler: order 2, two evaluations a step, Euler to sigma = 0 [Karras et al. 2022, alg. 1].

    A run on a grid of N levels and a final 0 makes 2N - 1 evaluations.
    """

    order = 2
    a, b, c = ((1.0,),), (0.5, 0.5), (0.0, 1.0)


@register("heun3")
class Heun3(RungeKutta):
    """Heun's third-order method: order 3, three evaluations a step (also on the step to sigma = 0) [Heun 1900]."""

    order = 3
    a, b, c = ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)


@register("rk4")
class RK4(RungeKutta):
    """The classic fourth-order method: order 4, four evaluations a step, Euler to sigma = 0.

    torchdiffeq's fixed-grid ``rk4`` is the 3/8 rule, another method of order 4, with the name ``torchdiffeq:rk4`` here.
    """

    order = 4
    a, b, c = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)


@register("rk4_38")
class ThreeEighths(RungeKutta):
    """Kutta's 3/8 rule: order 4, four evaluations a step, Euler to sigma = 0 [Kutta 1901].

    torchdiffeq's fixed-grid ``rk4`` computes this rule.
    """

    order = 4
    a = ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0))
    b, c = (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0.0, 1 / 3, 2 / 3, 1.0)


class RhoRungeKutta(RungeKutta):
    """A tableau in rho = sigma/alpha on the noise estimate: d(x/alpha) = eps d(rho) [Zhang & Chen 2023, section 3.2].

    Where a stage would be evaluated at sigma = 0, or below the levels that the model knows, or the step starts at alpha = 0
    (rho infinite), the step is DDIM's.
    """

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """x/alpha + (rho_s - rho_t) sum_i b_i eps_i, times alpha_s."""
        schedule = ode.schedule
        if schedule.alpha(t) == 0 or schedule.alpha(s) == 0 or (ode.is_data(s) and 1.0 in self.c):
            return first_order_step(ode, x, t, s)
        start, end, scale = schedule.noise_to_signal(t), schedule.noise_to_signal(s), schedule.alpha(t)
        h = end - start
        times = [s if node == 1.0 else schedule.t_of_noise_to_signal(start + node * h) for node in self.c[1:]]
        if ode.is_data(s) and not _are_known(schedule, times, s):
            return first_order_step(ode, x, t, s)
        k = [ode.noise(x, t)]
        for row, u in zip(self.a, times, strict=True):
            y = x / scale + sum(h * a * slope for a, slope in zip(row, k, strict=True) if a)
            k.append(ode.noise(schedule.alpha(u) * y, u))
        y = x / scale + sum(h * b * slope for b, slope in zip(self.b, k, strict=True) if b)
        return schedule.alpha(s) * y


@register("deis_rho_heun")
class RhoHeun(RhoRungeKutta):
    """DEIS rho-2Heun: order 2, two evaluations a step, DDIM to sigma = 0 [Zhang & Chen 2023]. Heun where alpha = 1."""

    order = 2
    a, b, c = Heun.a, Heun.b, Heun.c


@register("deis_rho_kutta")
class RhoKutta(RhoRungeKutta):
    """DEIS rho-3Kutta: order 3, three evaluations a step, DDIM to sigma = 0 [Zhang & Chen 2023; Kutta 1901]."""

    order = 3
    a, b, c = ((0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), (0.0, 0.5, 1.0)


@register("deis_rho_rk4")
class RhoRK4(RhoRungeKutta):
    """DEIS rho-4RK: order 4, four evaluations a step, DDIM to sigma = 0 [Zhang & Chen 2023]. rk4 where alpha = 1."""

    order = 4
    a, b, c = RK4.a, RK4.b, RK4.c


@register("dpm2", "dpm_2")
@dataclass(frozen=True)
class DPM2(Solver):
    """DPM2 of k-diffusion: order 2, two evaluations a step, DDIM to sigma = 0 [Karras et al. 2022, alg. 2; Lu et al. 2022].

    The second evaluation stands at rho_m = rho_t^(1-r) rho_s^r (rho = sigma/alpha), and

        x_s / alpha_s = x / alpha_t + (rho_s - rho_t) ((1 - 1/(2r)) eps + 1/(2r) eps_m).

    With r = 1/2 the method is DPM-Solver-2, the midpoint rule in log-SNR.

    Parameters
    ----------
    r : position of the second evaluation in log-SNR, between 0 and 1.
    """

    order = 2
    r: float = 0.5

    def __post_init__(self) -> None:
        check_number("r of dpm2", self.r, above=0, below=1)

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The transfer from t to s with the weighted noise estimate."""
        schedule = ode.schedule
        if is_singular(schedule, t, s):
            return first_order_step(ode, x, t, s)
        m = schedule.t_of_lam((1 - self.r) * schedule.lam(t) + self.r * schedule.lam(s))
        first = ode.noise(x, t)
        second = ode.noise(noise_step(schedule, x, first, t, m), m)
        weight = 1 / (2 * self.r)
        return noise_step(schedule, x, (1 - weight) * first + weight * second, t, s)
