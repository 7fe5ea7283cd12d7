"""DPM-Solver-v3: exponential Adams with a linear part and a scaling from the statistics of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from ..checks import check_flag, check_whole
from ..errors import InputError
from ..plan import Past
from ..schedules import Schedule
from ..statistics import Array, StatisticsTables, StepIntegrals
from .base import Solver, register
from .multistep import Output
from .transfer import ddim_step, first_order_step, is_singular

__all__ = ["DPMSolverV3"]


@register("dpm_solver_v3")
@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """DPM-Solver-v3: order p + 1 with its corrector, one evaluation a step, DDIM to sigma = 0 [Zheng et al. 2023, alg. 2].

    With f = (sigma eps - l x) / alpha and the half-log-SNR lambda, the exact solution over a step, for any coefficients
    l, s, b of lambda, is

        x_s = alpha_s A [x / alpha - int E (g + B) dlambda],    g = e^(-int s) f - B,    B = int e^(-int s) b,
        A = e^(-int l),    E = e^(int l + s),

    with integrals from the start of the step. The solver replaces g by the polynomial through the p newest outputs. The
    corrector adds the output at the predicted state. The corrector costs no evaluation: the same output starts the next step,
    with f as computed at the predicted state (the paper's correction of eps). The last step is not corrected.

    Without statistics, l = 1, s = 0, b = 0: exponential Adams on the data. l = 0, s = -1, b = 0 is exponential Adams on the
    noise. The statistics of a model (:meth:`iia_ode.ModelStatistics.estimate`) make g nearly constant; on Gaussian data g is
    constant, and every step is exact. Beyond the ends of their table the statistics are constant, and a step across an end
    has order 2 only.

    As published, the corrector drops the oldest output (``drop_oldest``; the release drops it unless ``c_pseudo`` is set), and
    has order p. :class:`LowerOrderFinal` lowers the order at the end. The half-corrector for large guidance scales is not
    implemented.

    Parameters
    ----------
    statistics : statistics of the model on the same schedule; None for data prediction.
    max_order : p, 1 to 3.
    corrector : False for the predictor alone, of order p.
    drop_oldest : combine p outputs in the corrector instead of p + 1, the new output included.
    p_pseudo, c_pseudo : use a predictor or corrector of pseudo-order [eq. 15, 16]: the derivative of order k uses the k + 1
        nearest outputs alone. With three outputs or more the order is 2. Pseudo-order is meant for very few steps.
    """

    statistics: StatisticsTables | None = None
    max_order: int = 3
    corrector: bool = True
    drop_oldest: bool = False
    p_pseudo: bool = False
    c_pseudo: bool = False

    def __post_init__(self) -> None:
        check_whole("max_order of dpm_solver_v3", self.max_order, least=1, most=3)
        for name in ("corrector", "drop_oldest", "p_pseudo", "c_pseudo"):
            check_flag(f"{name} of dpm_solver_v3", getattr(self, name))
        if self.statistics is not None and not isinstance(self.statistics, StatisticsTables):
            raise InputError(
                f"statistics of dpm_solver_v3 must be ModelStatistics or None, got {self.statistics!r}. The options of a "
                "solver only name its statistics: load them, iia_ode.load(path), and pass the object."
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """p, and with the corrector at most p + 1; pseudo-order with more than two outputs limits either part to order 2."""
        predictor = min(self.max_order, 2) if self.p_pseudo else self.max_order
        outputs = self.max_order + 1 - self.drop_oldest
        if not self.corrector or outputs < 2:
            return predictor
        return min(predictor + 1, min(outputs, 2) if self.c_pseudo else outputs)

    @property
    def consistent(self) -> bool:  # type: ignore[override]
        """False with statistics: the method is then exact in its own variables only."""
        return self.statistics is None

    def options(self) -> dict[str, Any]:
        """The options, JSON-ready. Statistics appear as a digest only, and must be passed again as an object."""
        return {**super().options(), "statistics": None if self.statistics is None else repr(self.statistics)}

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The predicted state, corrected with the output there except in the last step."""
        schedule, statistics = ode.schedule, self.statistics or _data_prediction()
        statistics.check(schedule)
        if not past.memory and (schedule.alpha(t) == 0 or ode.is_data(t)):
            return first_order_step(ode, x, t, s), ()
        history = past.memory[: self.max_order] or (self._output(ode, x, t),)
        if is_singular(schedule, t, s):
            return ddim_step(schedule, x, _linear(statistics, schedule, x, t) - history[0].value, t, s), ()
        corrected = len(history) + 1 - self.drop_oldest if self.corrector and past.remaining else 0
        update = _Update.over(statistics, schedule, t, s, [*(o.t for o in history), s], max(len(history), corrected))
        y = update(x, history, self.p_pseudo)
        if past.remaining == 0:
            return y, ()
        new = self._output(ode, y, s)
        if corrected > 1:
            y = update(x, (history[0], new, *history[1:])[:corrected], self.c_pseudo)
        return y, (new, *history)[: self.max_order]

    def _output(self, ode: Any, x: Any, t: float) -> Output:
        """f at state x; with statistics stored as a single vector, in place of x and the model's output."""
        x = ode.hold(x)
        f = _linear(self.statistics or _data_prediction(), ode.schedule, x, t) - ode.data(x, t)
        return Output(t, f if self.statistics is None else ode.hold(f))


@dataclass(frozen=True)
class _Update:
    """The update over one step, for any subset of outputs at the prepared times."""

    alphas: tuple[float, float]
    integrals: StepIntegrals
    nodes: dict[float, int]
    u: tuple[float, ...]

    @classmethod
    def over(
        cls, statistics: StatisticsTables, schedule: Schedule, t: float, s: float, times: Sequence[float], n: int
    ) -> _Update:
        """The update from t to s, with outputs at any of `times`, at most n in one combination."""
        lam = [schedule.lam(time) for time in times]
        start, end = schedule.lam(t), schedule.lam(s)
        return cls(
            (schedule.alpha(t), schedule.alpha(s)),
            statistics.integrals(start, end, lam, n),
            {time: k for k, time in enumerate(times)},
            tuple((value - start) / (end - start) for value in lam),
        )

    def __call__(self, x: Any, outputs: Sequence[Output], pseudo: bool) -> Any:
        """alpha_s A [x / alpha - int E (P + B)], with the polynomial P through the values g of the outputs."""
        (alpha, alpha_s), own = self.alphas, self.integrals
        nodes = [self.nodes[output.t] for output in outputs]
        coefficients = polynomial_coefficients([self.u[k] for k in nodes], pseudo)
        weights = np.tensordot(coefficients, own.moments[: len(nodes)], axes=1)
        y = _weight(own.keep * (alpha_s / alpha)) * x
        constant = -own.bias
        for k, w, output in zip(nodes, weights, outputs, strict=True):
            y = y + _weight(-alpha_s * w * own.scales[k]) * output.value
            constant = constant + w * own.offsets[k]
        return y + torch.as_tensor(alpha_s * constant, device="cpu") if constant.any() else y


def polynomial_coefficients(u: Sequence[float], pseudo: bool) -> Array:
    """Coefficients of the Lagrange basis on the nodes `u` with u[0] = 0: row j, constant first, belongs to value j.

    Newton's form is sum_k D_k N_k with divided differences D_k and N_k = prod_{i<k} (u - u_i). The pseudo-order polynomial
    has u^k in place of N_k.
    """
    n = len(u)
    differences, basis = np.eye(n), np.zeros((n, n))
    divided, newton = [differences[0]], np.eye(1, n)[0]
    for k in range(n):
        basis[k] = np.eye(1, n, k)[0] if pseudo else newton
        newton = np.concatenate([[0.0], newton[:-1]]) - u[k] * newton
        if k + 1 < n:
            gaps = np.array([u[i + k + 1] - u[i] for i in range(n - k - 1)])
            differences = np.diff(differences, axis=0) / gaps[:, None]
            divided.append(differences[0])
    return np.asarray(np.stack(divided).T @ basis)


def _linear(statistics: StatisticsTables, schedule: Schedule, x: Any, t: float) -> Any:
    """(1 - l) x / alpha = f + D: computing f from the data estimate D is accurate at every noise level."""
    l = statistics.curves[0](schedule.lam(t))  # noqa: E741
    return _weight((1.0 - l) / schedule.alpha(t)) * x


def _weight(value: Array) -> Any:
    return torch.from_numpy(value) if np.ndim(value) else float(value)


@cache
def _data_prediction() -> StatisticsTables:
    return StatisticsTables.constant(1.0, 0.0, 0.0)
