"""The stability interval of a solver on the linear test problem dx/dt = mu x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..forms import conversion
from ..grids import uniform
from ..plan import Combine, Instruction, run_code, trace
from ..schedules import EDM
from ..solvers import SolverLike, as_solver

__all__ = ["stability_limit"]

_F64 = torch.float64

# On EDM at noise levels far above the step, alpha = 1 and sigma hardly changes over a step: an exponential integrator and the
# classical method that it generalises then have the same weights up to STEP / FAR. Smaller would cost digits instead: the data
# estimate x - t dx/dt is FAR / STEP times larger than what the step keeps of it.
FAR, STEP, STEPS = 4000.0, 1.0, 256
SCANS = ((6.0, 0.005), (60.0, 0.05))  # how far on the negative real axis, and how finely
# The first states are disturbed: a start-up that hits the decaying solution exactly would hide the growing solutions.
KICKS = 8
STILL = 1e-6  # logarithm of the growth per step at and below which growth counts as rounding


def stability_limit(solver: SolverLike) -> float | None:
    """The largest z with bounded solutions of dx/dt = mu x for all h mu in [-z, 0], to about three digits.

    Classical values: 2 for Euler, Heun and the midpoint rule, 2.785 for RK4; 1, 6/11 and 0.3 for Adams-Bashforth of orders
    2, 3 and 4.

    Parameters
    ----------
    solver : a registered name, or a solver.

    Returns
    -------
    The limit z; None for a solver that stays bounded on the whole tested interval [-60, 0].

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver.
    PlanError : the solver's step cannot be traced.
    """
    found = as_solver(solver)
    schedule = EDM()
    plan = trace(found, schedule, uniform(STEPS, FAR + STEPS * STEP, FAR), consistent=False)
    for reach, spacing in SCANS:
        z = -torch.arange(0, reach + spacing / 2, spacing, dtype=_F64, device="cpu")
        growth = _growth(plan.code, schedule, z)
        unstable = (growth > STILL).nonzero()
        if len(unstable):
            k = int(unstable[0])
            below, above = float(growth[k - 1]), float(growth[k])
            # Between the last bounded z and the first unbounded one, growth is linear in z.
            part = -below / (above - below) if math.isfinite(above - below) and below < 0 else 0.0
            return -float(z[k - 1]) + spacing * part
    return None


def _growth(code: tuple[Instruction, ...], schedule: EDM, z: Tensor) -> Tensor:
    """The logarithm of the growth of x per step over the second half of the run, for every z = h mu."""
    mu = z / -STEP  # time runs backwards

    def model(x: Tensor, t: float, form: str) -> Tensor:
        p, q = conversion(schedule, t, "velocity", form)
        return torch.as_tensor(p * x + q * mu * x)

    windows = {"middle": torch.zeros_like(z), "end": torch.zeros_like(z)}
    values = {0: torch.ones_like(z)}
    for k, ins in run_code(code, values, model):
        if isinstance(ins, Combine) and ins.step is not None:
            if ins.step <= KICKS:
                values[k] = values[k] + math.cos(ins.step**2)
            for name, last in (("middle", STEPS // 2), ("end", STEPS)):
                if last - 8 < ins.step <= last:
                    windows[name] = torch.maximum(windows[name], values[k].abs())
    ratio = windows["end"].log() - windows["middle"].log()
    ratio = torch.where(windows["end"] < 1e-250, -math.inf, ratio)  # died out
    ratio = torch.where(torch.isfinite(windows["end"]), ratio, math.inf)  # overflowed
    return ratio / (STEPS // 2)
