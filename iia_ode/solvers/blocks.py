"""Singlestep DPM-Solver++ with grid points as stages, as in schedulers that return after every evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import check_flag, check_whole
from ..plan import Past
from .base import Solver, register
from .multistep import Output
from .transfer import ExponentialStep, ddim_step, first_order_step, is_singular, log_snr_fractions

__all__ = ["BlockDPMSolver"]


@dataclass(frozen=True)
class _Block:
    """The block in progress: its first state and the output there."""

    x: Any
    first: Output


@register("dpmpp_2s_blocks", variants={"dpmpp_3s_blocks": {"max_order": 3}})
@dataclass(frozen=True)
class BlockDPMSolver(Solver):
    """DPM-Solver++ singlestep over blocks of 2 or 3 intervals: order 2 or 3, one evaluation an interval [Lu et al. 2022b].

    Each block is one exponential Runge-Kutta step from its first point, with grid points as stages, as in diffusers'
    DPMSolverSinglestepScheduler. Let u = 0 at the start of a block and u = 1 at the end of the interval, m_0 and m the first
    and the newest output, and w_k as in ``dpmpp_2m``:

        first interval: keep x + scale w_0 m_0;  second: + w_0/2 (m - m_0)/u;  third: + w_1 (m - m_0)/u in its place

    The third interval reaches order 3 where the stages lie near 1/3 and 2/3 of the block in log-SNR, as on any smooth grid of
    many points. Leftover intervals, and the step to sigma = 0, take a shorter block and lower the order of the run: choose a
    number of intervals divisible by the length of a block.

    Parameters
    ----------
    max_order : intervals in a block, 2 or 3; 1 is DDIM.
    lower_order_final : shorten the last blocks for a last step of first order, as diffusers does.
    """

    max_order: int = 2
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        check_whole("max_order of dpmpp_2s_blocks", self.max_order, least=1, most=3)
        check_flag("lower_order_final of dpmpp_2s_blocks", self.lower_order_final)

    @property
    def order(self) -> int:  # type: ignore[override]
        """max_order; at most 2 with a last step of first order."""
        return min(self.max_order, 2) if self.lower_order_final else self.max_order

    @property
    def irregular_order(self) -> int:
        """At most 2: the third interval has order 3 only where the stages lie at 1/3 and 2/3."""
        return min(self.order, 2)

    def positions(self, steps: int) -> list[int]:
        """The position (from 1) of every interval of a grid in its block."""
        k = self.max_order
        whole = [i % k + 1 for i in range(steps)]
        if not self.lower_order_final or k == 1 or steps % k == 1:
            return whole
        if k == 3 and steps % k == 0:
            return [*whole[:-3], 1, 2, 1]
        return [*whole[:-1], 1] if k == 2 else whole

    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state at s, computed from the start of the block."""
        position = self.positions(past.index + 1 + past.remaining)[past.index]
        schedule = ode.schedule
        if ode.is_data(t):
            return first_order_step(ode, x, t, s), ()
        now = Output(t, ode.data(x, t))
        block = past.memory if past.memory and position > 1 else None
        if block is None or is_singular(schedule, t, s) or schedule.alpha(block.first.t) == 0:
            return ddim_step(schedule, x, now.value, t, s), _Block(x, now)
        first, interval = block.first, ExponentialStep.of(schedule, "data", block.first.t, s)
        (u,) = log_snr_fractions(schedule, first.t, s, [t])
        w = interval.moments(2)
        slope = (w[0] / 2 if position == 2 else w[1]) / u
        y = interval.keep * block.x + w[0] * first.value + slope * (now.value - first.value)
        return y, block
