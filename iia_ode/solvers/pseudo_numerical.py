"""Pseudo-numerical methods: uniform-grid Adams-Bashforth weights on the noise estimate, with DDIM's transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import check_choice, check_whole
from ..plan import Past
from .base import Solver, register
from .transfer import first_order_step, noise_step

__all__ = ["ADAMS_BASHFORTH", "PNDM"]

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights on a uniform grid, newest output first [Hairer, Norsett, Wanner 1993, section III.1]."""


@register(
    "ipndm",
    variants={
        **{f"ipndm{k}": {"max_order": k} for k in (1, 2, 3)},
        "spndm": {"start": "heun", "max_order": 2},
        "plms": {"start": "heun"},
        "fpndm": {"start": "runge_kutta"},
    },
)
@dataclass(frozen=True)
class PNDM(Solver):
    """Pseudo-numerical methods: order 2, one evaluation a step [Liu et al. 2022].

    Adams-Bashforth weights of a uniform grid combine the noise estimates on every grid. DDIM's transfer moves the state with
    the combination: x_s = (alpha_s/alpha_t) x + (sigma_s - sigma_t alpha_s/alpha_t) e with e = sum_j b_j eps_j.

    - ``ipndm``, ``ipndm1``-``ipndm3``: the first steps combine fewer outputs [Zhang & Chen 2023, appendix H];
    - ``spndm`` (S-PNDM) and ``plms``: the first step is Heun's, with two evaluations; then order 2, or up to 4;
    - ``fpndm`` (F-PNDM): three classic Runge-Kutta steps of four evaluations, then four outputs.

    The weights are exact only on a grid uniform in sigma/alpha. There the weights equal those of ``lms``, and orders 3 and 4
    are reached. On other smooth grids, versions with two outputs or more have order 2, with a small error constant.

    Parameters
    ----------
    max_order : number of combined outputs, 1 to 4; 1 is DDIM, without start-up.
    start : ``"euler"``, ``"heun"`` or ``"runge_kutta"``, for the first steps.
    """

    max_order: int = 4
    start: str = "euler"

    def __post_init__(self) -> None:
        check_whole("max_order of ipndm", self.max_order, least=1, most=4)
        check_choice("start of ipndm", self.start, ("euler", "heun", "runge_kutta"))

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order, at most 2: the weights belong to a uniform grid."""
        return min(self.max_order, 2)

    @property
    def irregular_order(self) -> int:
        """1, because the weights belong to equal steps."""
        return 1

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The transfer with the combined noise, and the outputs for later steps."""
        schedule = ode.schedule
        if schedule.alpha(t) == 0:  # x is pure noise here, and only the data estimate determines the step
            return first_order_step(ode, x, t, s), ()
        history = (ode.noise(x, t), *past.memory)[: self.max_order]
        weights = ADAMS_BASHFORTH[len(history)]
        combined = sum(w * noise for w, noise in zip(weights, history, strict=True))
        if not ode.is_data(s):
            if self.start == "heun" and len(history) == 1 < self.max_order:
                combined = (history[0] + ode.noise(noise_step(schedule, x, history[0], t, s), s)) / 2
            elif self.start == "runge_kutta" and len(history) < self.max_order:
                combined = self._runge_kutta(ode, x, history[0], t, s)
        return noise_step(schedule, x, combined, t, s), history

    @staticmethod
    def _runge_kutta(ode: Any, x: Any, first: Any, t: float, s: float) -> Any:
        """The mean noise of the classic fourth-order method; the transfer reaches its stages [Liu et al. 2022, eq. 14]."""
        middle = (t + s) / 2
        second = ode.noise(noise_step(ode.schedule, x, first, t, middle), middle)
        third = ode.noise(noise_step(ode.schedule, x, second, t, middle), middle)
        fourth = ode.noise(noise_step(ode.schedule, x, third, t, s), s)
        return (first + 2 * second + 2 * third + fourth) / 6
