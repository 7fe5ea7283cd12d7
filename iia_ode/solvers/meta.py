"""Meta-solvers: wrappers of any solver that change its evaluations or its order. IIA is a meta-solver too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..checks import check_number, check_whole
from ..errors import GridError, InputError
from ..forms import Evaluation, Forms
from ..plan import Past
from ..plan.tracer import take_step
from ..schedules import VP
from .base import Solver, SolverLike, as_solver, register
from .exponential import DDIM
from .multistep import DPMSolverMultistep, ExponentialAdams
from .runge_kutta import Heun

__all__ = ["AnalyticFirstStep", "DenoiseToZero", "Lookahead", "LowerOrderFinal", "MetaSolver", "OrderRamp"]


@dataclass(frozen=True)
class MetaSolver(Solver):
    """A solver around another solver, ``base``: a registered name or a Solver."""

    base: SolverLike = DDIM()

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", as_solver(self.base))

    @property
    def solver(self) -> Solver:
        """The base as a solver."""
        return as_solver(self.base)

    @property
    def label(self) -> str:
        """The registered name; for other options, the name with the label of the base and the options in brackets."""
        label = super().label
        if "(" not in label:
            return label
        others = [f", {f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "base"]
        return f"{self.name}({self.solver.label}{''.join(others)})"

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the base."""
        return self.solver.order

    @property
    def irregular_order(self) -> int:
        """The order, limited by the order of the base on irregular grids."""
        return min(self.order, self.solver.irregular_order)

    @property
    def consistent(self) -> bool:  # type: ignore[override]
        """Whether plans of the base are checked for consistency."""
        return self.solver.consistent


class _View(Forms[Any]):
    """The ODE with some evaluations replaced; all other attributes come from the ODE."""

    def __init__(self, ode: Any, evaluate: Callable[[Any, float, str], Evaluation[Any]]) -> None:
        self._ode, self._evaluate = ode, evaluate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ode, name)

    def evaluate(self, x: Any, t: float, form: str = "data") -> Evaluation[Any]:
        """The evaluation by the ODE, or its replacement."""
        return self._evaluate(x, t, form)


@register("lookahead")
@dataclass(frozen=True)
class Lookahead(MetaSolver):
    """LA-DPM: extrapolates the data estimate, order 1, the base's evaluations a step [Zhang, Niwa, Kleijn 2023, eq. 13].

    The first evaluation in a step of the base returns D_i + lam (D_i - D_{i-1}) in place of D_i, with the model's own estimate
    D_{i-1} at the grid point before. Over ``ddim``, lam = 1/2 gives order 2, and on a grid uniform in log-SNR equals
    ``dpmpp_2m``. Every other nonzero lam leaves order 1, for every base.

    Parameters
    ----------
    base : the solver to wrap.
    lam : strength of the extrapolation; 0 is the base.
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lam of lookahead", self.lam, such_as=0.1)

    @property
    def order(self) -> int:  # type: ignore[override]
        """The base's order for lam = 0; 2 over DDIM, under any of its names, for lam = 1/2; otherwise 1."""
        if self.lam == 0:
            return self.solver.order
        base, grid = self.solver, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64, device="cpu")
        while isinstance(base, AnalyticFirstStep | DenoiseToZero):
            base = base.solver
        return 2 if self.lam == 0.5 and base.plan(VP(), grid / 8).equivalent(DDIM().plan(VP(), grid / 8)) else 1

    @property
    def irregular_order(self) -> int:
        """1 with an extrapolation, because the weight lam belongs to equal steps."""
        return self.solver.irregular_order if self.lam == 0 else 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The base's step, with its first evaluation extrapolated from the grid point before."""
        inner, before = past.memory or ((), ())
        looked: list[tuple[Any, Evaluation[Any]]] = []  # the state of the first evaluation, and its replacement
        at_grid_points: dict[float, Any] = {}

        def evaluate(y: Any, u: float, form: str) -> Evaluation[Any]:
            if looked and y is looked[0][0] and u == looked[0][1].t:
                return looked[0][1]
            plain: Evaluation[Any] = ode.evaluate(y, u, form if looked else "data")
            if u in (t, s):
                at_grid_points[u] = plain.data
            if looked:
                return plain
            # A two-stage step evaluates at its end too, and the next step starts there: skip the evaluation at the same time.
            earlier = [data for time, data in before if time != u]
            if earlier:
                data = plain.data + self.lam * (plain.data - earlier[-1])
                looked.append((y, Evaluation(plain.schedule, plain.t, plain.x, data, "data")))
            else:
                looked.append((y, plain))
            return looked[0][1]

        y, memory = take_step(self.solver, _View(ode, evaluate), x, t, s, replace(past, memory=inner))
        return y, (memory, tuple(at_grid_points.items()) or before)


@register("analytic_first_step", "afs")
@dataclass(frozen=True)
class AnalyticFirstStep(MetaSolver):
    """Saves the first evaluation: the base's order after the first step, one evaluation less [Dockhorn et al. 2022].

    At high noise the state is nearly all noise. The first evaluation in the first step of the base is replaced by
    eps = x / sqrt(alpha^2 + sigma^2) [section 3.3]. The error of the first step is proportional to its length times
    alpha/sigma, and a cold start shows order 1: use the wrapper on grids with a start at high noise.

    Parameters
    ----------
    base : the solver to wrap.
    """

    base: SolverLike = Heun()
    consistent = False  # the replacement of the first evaluation is exact only as alpha / sigma goes to 0

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The base's step; the first step uses the analytic estimate."""
        if past.index > 0:
            return self.solver.step(ode, x, t, s, past)
        if ode.is_data(t):
            raise GridError(
                f"{self.label} takes the first state for noise, and this grid starts at the data (t = {t:g}): use "
                f"{self.solver.label!r} itself."
            )
        alpha, sigma, size = ode.schedule.alpha(t), ode.schedule.sigma(t), ode.schedule.size(t)
        # The same estimate as data, alpha x / (size (size + sigma)): finite at alpha = 0.
        analytic = Evaluation(ode.schedule, t, x, alpha / (size * (size + sigma)) * x, "data")

        def evaluate(y: Any, u: float, form: str) -> Any:
            return analytic if u == t else ode.evaluate(y, u, form)

        return self.solver.step(_View(ode, evaluate), x, t, s, past)


@register("denoise_to_zero")
@dataclass(frozen=True)
class DenoiseToZero(MetaSolver):
    """Ends on the model's data estimate: the base's order, with one evaluation in the step to sigma = 0.

    The step to sigma = 0 is x = D(x, t) for every base, like "denoise to zero" in dpm-solver and diff-sampler. Multi-stage
    bases save evaluations. ``unipc`` and ``dpm_solver_v3`` have no evaluation in their last step, and need one more. On a grid
    that does not end at sigma = 0, the wrapper equals the base.

    Parameters
    ----------
    base : the solver to wrap.
    """

    base: SolverLike = Heun()

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The base's step, or the data estimate."""
        if ode.is_data(s):
            return ode.data(x, t), past.memory
        return self.solver.step(ode, x, t, s, past)


@dataclass(frozen=True)
class _OrderSetter(MetaSolver):
    """Base of wrappers that change the ``max_order`` of a solver from step to step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "max_order" not in self.solver.options():
            raise InputError(
                f"{self.name} needs a base with an option max_order, such as 'dpmpp_2m' or 'ipndm'; "
                f"{self.solver.label} has none. Wrap the solver with max_order first: Lookahead(LowerOrderFinal('dpmpp_2m'))."
            )

    def with_order(self, order: int) -> Solver:
        """The base with the given ``max_order``."""
        base: Any = self.solver
        changed: Solver = replace(base, max_order=order)
        return changed


@register("lower_order_final")
@dataclass(frozen=True)
class LowerOrderFinal(_OrderSetter):
    """Lowers the order at the end to 3, 2, 1: global order at most 2, no more evaluations than the base [Lu et al. 2022b].

    With few steps the lower order is more stable at low noise. The last step has order 1.

    Parameters
    ----------
    base : a solver with an option ``max_order``.
    """

    base: SolverLike = DPMSolverMultistep()

    @property
    def order(self) -> int:  # type: ignore[override]
        """The base's order, at most 2: the last step has order 1."""
        return min(self.solver.order, 2)

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The base's step, with an order of at most one more than the number of remaining steps."""
        highest = self.solver.options()["max_order"]
        return self.with_order(min(highest, past.remaining + 1)).step(ode, x, t, s, past)


@register("order_ramp")
@dataclass(frozen=True)
class OrderRamp(_OrderSetter):
    """Sets the order of each step, such as 1, 2, 3, 3, 2, 1: evaluations a step and final order are the base's.

    Parameters
    ----------
    base : a solver with an option ``max_order``.
    orders : order of each step; the last order serves all later steps. The order may rise by one at a time, since a
        multistep method keeps no more outputs than its order needs.
    """

    base: SolverLike = ExponentialAdams(max_order=3)
    orders: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.orders, list | tuple) or not self.orders:
            raise InputError(
                f"order_ramp needs at least one order, such as orders=(1, 2, 3, 2, 1); got {self.orders!r}."
            )
        object.__setattr__(self, "orders", tuple(self.orders))
        for before, order in zip((0, *self.orders), self.orders, strict=False):
            check_whole("each of the orders of order_ramp", order, least=1, most=4)
            if order > before + 1 and before:
                raise InputError(f"the orders of order_ramp may rise by one at a time, got {self.orders}.")
        for order in set(self.orders):
            self.with_order(order)

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the base with the last of the orders."""
        return self.with_order(self.orders[-1]).order

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The base's step with the order of the current step."""
        return self.with_order(self.orders[min(past.index, len(self.orders) - 1)]).step(ode, x, t, s, past)
