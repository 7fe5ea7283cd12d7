"""Identities between solvers: pairs of methods whose plans have equal weights.

Schedule and grid determine the weights, so an identity holds for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..grids import karras, log_snr, uniform
from ..schedules import EDM, VP, FlowMatching, Schedule
from ..solvers import DPMSolverMultistep, Lookahead, SolverLike, UniPC, as_solver

__all__ = ["IDENTITIES", "Identity"]

_ANY: tuple[Schedule, ...] = (EDM(), VP(), FlowMatching())


def _karras(schedule: Schedule) -> Tensor:
    return karras(8, 0.02, 20.0, schedule=schedule)


def _log_snr(schedule: Schedule) -> Tensor:
    return log_snr(7, 0.02, 20.0, schedule=schedule, to_data=False)


@dataclass(frozen=True, eq=False)
class Identity:
    """Two solvers with equal plans.

    Attributes
    ----------
    statement : the identity in one line.
    theorem : the reason.
    left, right : the solvers, as names or instances.
    schedules : schedules on which the identity holds and is checked.
    grid : function from a schedule to the grid of the check; most identities hold on any grid.
    stride : number of intervals of the left-hand grid in one interval of the right-hand grid.
    """

    statement: str
    theorem: str
    left: SolverLike
    right: SolverLike
    schedules: Sequence[Schedule] = _ANY
    grid: Callable[[Schedule], Tensor] = _karras
    stride: int = 1

    def difference(self, schedule: Schedule) -> float:
        """Largest relative difference of the canonical weights of the two plans; see :meth:`iia_ode.Plan.difference`."""
        grid = self.grid(schedule)
        left = as_solver(self.left).plan(schedule, grid)
        return left.difference(as_solver(self.right).plan(schedule, grid[:: self.stride]))


IDENTITIES: tuple[Identity, ...] = (
    Identity(
        "DDIM is DPM-Solver-1, whether on the data or on the noise estimate",
        "For given x, each estimate determines the other, and both are constant over the step.",
        "ddim",
        "deis_lab1",
    ),
    Identity(
        "DDIM is DEIS of order 0 in time",
        "A constant has the same integral in every variable.",
        "ddim",
        "deis_tab1",
    ),
    Identity("DDIM is iPNDM-1", "The one Adams-Bashforth weight is 1, and the transfer is DDIM's.", "ddim", "ipndm1"),
    Identity(
        "DDIM is Euler where alpha and sigma are linear in t",
        "There a constant velocity alpha' D + sigma' eps means constant estimates of data and noise.",
        "ddim",
        "euler",
        schedules=(EDM(), FlowMatching()),
    ),
    Identity(
        "DPM-Solver++(2M), Taylor variant, is exponential Adams of order 2",
        "Its weight of the difference is the exact integral of the linear interpolant.",
        DPMSolverMultistep(solver_type="taylor"),
        "expab2",
    ),
    Identity(
        "DPM-Solver-2M, Taylor variant, is DEIS in log-SNR",
        "The same on the noise estimate.",
        DPMSolverMultistep(form="noise", solver_type="taylor"),
        "deis_lab2",
    ),
    Identity(
        "UniP-2 with B(h) = e^h - 1 is DPM-Solver++(2M)",
        "With the constant 1/2 of its code, the predictor has the weight of the midpoint variant.",
        UniPC(max_order=2, corrector=False),
        "dpmpp_2m",
    ),
    Identity(
        "DPM2 of k-diffusion is DPM-Solver-2 in one step",
        "The geometric mean of two noise levels is the midpoint in log-SNR.",
        "dpm2",
        "dpm_solver_2s",
    ),
    Identity(
        "LMS is Adams-Bashforth in t on EDM",
        "There sigma/alpha is t, and the noise estimate is dx/dt.",
        "lms",
        "ab4",
        schedules=(EDM(),),
    ),
    Identity(
        "DEIS in time is LMS on EDM",
        "There a polynomial in t is one in sigma/alpha.",
        "deis_tab3",
        "lms3",
        schedules=(EDM(),),
    ),
    Identity(
        "DEIS rho-2Heun is Heun on EDM",
        "The same tableau in the same variable on the same slope.",
        "deis_rho_heun",
        "heun",
        schedules=(EDM(),),
    ),
    Identity(
        "iPNDM is LMS on a grid uniform in sigma",
        "Its weights are those of a uniform grid.",
        "ipndm",
        "lms",
        schedules=(EDM(),),
        grid=lambda _: uniform(8, 20.0, 0.0),
    ),
    Identity(
        "Lookahead over DDIM with lambda = 1/2 is DPM-Solver++(2M) on a grid uniform in log-SNR",
        "D + (D - D') / 2 is the two-step Adams-Bashforth value for steps of equal length.",
        Lookahead(lam=0.5),
        "dpmpp_2m",
        grid=_log_snr,
    ),
    Identity(
        "DPM-Solver++(2S) by blocks is DPM-Solver++(2S) on every second point of a grid uniform in log-SNR, of an even "
        "number of intervals",
        "The points between are its stages, at r1 = 1/2.",
        "dpmpp_2s_blocks",
        "dpmpp_2s",
        grid=_log_snr,
        stride=2,
    ),
)
"""The identities that the tests check and the documentation lists."""
