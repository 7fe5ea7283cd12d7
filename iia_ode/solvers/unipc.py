"""UniPC: a predictor and a corrector with shared evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_choice, check_flag, check_whole
from ..plan import Past
from .base import Solver, register
from .multistep import Output
from .transfer import ExponentialStep, ddim_step, first_order_step, is_singular, log_snr_fractions, noise_step

__all__ = ["UniPC"]


@register(
    "unipc",
    variants={
        **{f"unipc{k}": {"max_order": k} for k in (1, 2, 4)},
        "unipc_noise": {"form": "noise"},
        "unipc_bh1": {"variant": "bh1"},
    },
)
@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC-p: order p + 1 with its corrector, one evaluation a step, DDIM to sigma = 0 [Zhao et al. 2023].

    With the outputs m_j (data or noise), their positions u_j in units of the step in log-SNR, the step H (negative for noise),
    and B = -H (bh1) or e^(-H) - 1 (bh2):

        x_s = keep x + scale (w_0 m_0 - B sum_j rho_j (m_j - m_0) / u_j),    sum_j rho_j u_j^(k-1) = b_k = -w_k / B

    The predictor sums over the p - 1 outputs before m_0. The corrector adds the output at the predicted state (u = 1). The
    same output starts the next step, and the corrector costs no evaluation. The last step is not corrected.

    Erratum kept as published: a sum with a single difference has rho = 1/2 in place of b_1. The variants differ in such sums
    only. With more differences B cancels, and both variants have the exact exponential Adams weights.

    Parameters
    ----------
    max_order : p, 1 to 4.
    form : ``"data"`` or ``"noise"``.
    variant : ``"bh1"`` or ``"bh2"``.
    corrector : False for the predictor alone, UniP-p of order p.
    """

    max_order: int = 3
    form: str = "data"
    variant: str = "bh2"
    corrector: bool = True

    def __post_init__(self) -> None:
        check_whole("max_order of unipc", self.max_order, least=1, most=4)
        check_choice("form of unipc", self.form, ("data", "noise"))
        check_choice("variant of unipc", self.variant, ("bh1", "bh2"))
        check_flag("corrector of unipc", self.corrector)

    @property
    def order(self) -> int:  # type: ignore[override]
        """p + 1 with the corrector, p without the corrector."""
        return self.max_order + self.corrector

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The predicted state, corrected with the output there except in the last step."""
        schedule = ode.schedule
        memory = past.memory
        if not memory:
            if schedule.alpha(t) == 0 or ode.is_data(t):
                return first_order_step(ode, x, t, s), ()
            memory = (Output(t, ode.as_form(x, t, self.form)),)
        history = memory[: self.max_order]
        if is_singular(schedule, t, s):
            first = ddim_step if self.form == "data" else noise_step
            return first(schedule, x, history[0].value, t, s), ()
        interval = ExponentialStep.of(schedule, self.form, t, s)
        u = log_snr_fractions(schedule, t, s, [output.t for output in history])
        y = self._combine(interval, x, u, [output.value for output in history])
        if past.remaining == 0:
            return y, ()
        new = Output(s, ode.as_form(y, s, self.form))
        if self.corrector:
            y = self._combine(interval, x, [*u, 1.0], [*(output.value for output in history), new.value])
        return y, (new, *history)

    def _combine(self, interval: ExponentialStep, x: Any, u: Sequence[float], m: Sequence[Any]) -> Any:
        """keep x plus the integral, with the B(h) weights of the differences to m_0."""
        w = interval.moments(len(u))
        if len(u) == 2:
            B = interval.H if self.variant == "bh1" else -math.expm1(-interval.H)
            rho = [interval.scale * B / 2]
        else:
            matrix = np.vander(np.array(u[1:]), len(u) - 1, increasing=True).T
            rho = np.linalg.solve(matrix, np.array(w[1:])).tolist() if len(u) > 1 else []
        total = interval.keep * x + w[0] * m[0]
        for node, weight, output in zip(u[1:], rho, m[1:], strict=True):
            total = total + weight / node * (output - m[0])
        return total
