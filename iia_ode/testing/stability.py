"""Stability of a solver on the linear test problem dx/dt = mu x: the roots of its characteristic polynomial."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_number
from ..errors import InputError, PlanError
from ..forms import conversion
from ..grids import uniform
from ..plan import Combine, Plan, run_code, trace
from ..schedules import EDM
from ..solvers import SolverLike, as_solver

__all__ = ["stability_limit", "stability_region"]

_C128 = torch.complex128

# On EDM at noise levels far above the step, alpha = 1 and sigma hardly changes over a step: an exponential integrator and the
# classical method that it generalises then have the same weights up to STEP / FAR. Smaller would cost digits instead: the data
# estimate x - t dx/dt is FAR / STEP times larger than what the step keeps of it.
FAR, STEP, STEPS = 4000.0, 1.0, 48
FIRST, PERIOD = 28, 12  # the steps that are looked at: past the start-up, and whole blocks of 2, 3, 4 and 6 steps
SCANS = ((6.0, 0.005), (60.0, 0.05))  # how far along a ray, and how finely
POWERS = 1.5  # factor between two powers of the map at z = 0, the second of twice the exponent, that counts as growth
STILL = 1e-6  # logarithm of the growth per step at and below which growth counts as rounding


def stability_region(solver: SolverLike, z: Tensor) -> Tensor:
    """The growth per step of solutions of dx/dt = mu x at z = h mu, for equal steps h; stable where at most 1.

    The growth is the modulus of the largest root of the characteristic polynomial [Hairer, Wanner 1996, sections IV.2, V.1]:
    abs(R(z)) for a one-step method with the stability function R, the spectral radius of the companion matrix for a multistep
    method. At z = 0 a zero-stable method has growth 1. Exponential integrators are measured far from the data, where they have
    the weights of their classical counterparts to about three digits.

    Parameters
    ----------
    solver : a registered name, or a solver.
    z : complex or real numbers, a tensor of any shape.

    Returns
    -------
    The growth per step, float64 of the shape of z.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver, or z is no tensor of finite numbers.
    PlanError : the solver's step cannot be traced, or its memory grows from step to step.

    Examples
    --------
    >>> re, im = torch.linspace(-4, 1, 101), torch.linspace(-4, 4, 161)
    >>> growth = iia.testing.stability_region("rk4", re + 1j * im[:, None])
    >>> plt.contour(re, im, growth, levels=[1.0])
    """
    if not isinstance(z, Tensor) or not bool(torch.isfinite(z).all()):
        raise InputError(
            f"z must be a tensor of finite numbers, such as -1 + 1j * torch.linspace(0, 3, 31), got {z!r}."
        )
    return _growth(_plan(solver), z.detach().to("cpu", _C128).reshape(-1)).reshape(z.shape)


def stability_limit(solver: SolverLike, direction: complex = -1.0) -> float | None:
    """The largest r for which solutions of dx/dt = mu x stay bounded for all h mu from 0 to r on a ray; about three digits.

    Classical values on the negative real axis: 2 for Euler, Heun and the midpoint rule, 2.785 for RK4; 1, 6/11 and 0.3 for
    Adams-Bashforth of orders 2, 3 and 4. On the imaginary axis: 2.828 for RK4, 0 for Euler.

    Parameters
    ----------
    solver : a registered name, or a solver.
    direction : direction of the ray in the complex plane, such as -1 or 1j; only its angle counts.

    Returns
    -------
    The limit r; 0 for a zero-unstable method, which has unbounded solutions already at h mu = 0, by a large root or by a
    double root of size 1; None for a solver that
    stays bounded on the whole tested ray, up to 60.

    Raises
    ------
    UnknownNameError, InputError : `solver` is no solver, or `direction` is 0 or not finite.
    PlanError : the solver's step cannot be traced, or its memory grows from step to step.
    """
    size = check_number("abs(direction)", abs(direction), above=0)
    plan = _plan(solver)
    if not _is_zero_stable(plan):
        return 0.0
    for reach, spacing in SCANS:
        r = torch.arange(0, reach + spacing / 2, spacing, dtype=torch.float64, device="cpu")
        growth = _growth(plan, r * (direction / size)).log()
        unstable = (growth > STILL).nonzero()
        if len(unstable):
            k = int(unstable[0])
            if k == 0:
                return 0.0
            below, above = float(growth[k - 1]), float(growth[k])
            # Between the last bounded point and the first unbounded one, growth is linear.
            part = -below / (above - below) if math.isfinite(above - below) and below < 0 else 0.0
            return float(r[k - 1]) + spacing * part
    return None


def _plan(solver: SolverLike) -> Plan:
    return trace(as_solver(solver), EDM(), uniform(STEPS, FAR + STEPS * STEP, FAR), consistent=False)


def _is_zero_stable(plan: Plan) -> bool:
    """Whether the powers of the map at z = 0 stay bounded: no root is larger than 1, and none of size 1 is double."""
    few, many = (torch.linalg.matrix_power(_maps(plan, torch.zeros(1, dtype=_C128))[0], n).norm() for n in (64, 128))
    return bool(many <= POWERS * few)


def _growth(plan: Plan, z: Tensor) -> Tensor:
    """The spectral radius per step, for complex z [Z]; infinity where the map overflows."""
    maps = _maps(plan, z)
    bounded = torch.isfinite(torch.view_as_real(maps)).all(-1).all(-1).all(-1)
    roots = torch.linalg.eigvals(torch.where(bounded[:, None, None], maps, torch.zeros_like(maps))).abs().amax(-1)
    return torch.where(bounded, roots, math.inf) ** (1 / PERIOD)


def _maps(plan: Plan, z: Tensor) -> Tensor:
    """The maps from all that one step hands on to the same `PERIOD` steps later, complex [Z, n, n] for complex z [Z]."""
    ends = [0, *(k for k, ins in enumerate(plan.code, start=1) if isinstance(ins, Combine) and ins.step is not None)]
    first, last = ends[FIRST], ends[FIRST + PERIOD]
    alive = [[j for j in range(end + 1) if j == end or plan.last_use[j] > end] for end in (first, last)]
    before, after = alive
    if [j - first for j in before] != [j - last for j in after]:
        raise PlanError(
            f"{plan.name} hands {len(before)} vectors on after step {FIRST} and {len(after)} after step {FIRST + PERIOD}: "
            "only a solver whose memory has a fixed size has a region of stability."
        )
    mu = (z / -STEP)[:, None]  # time runs backwards

    def model(x: Tensor, t: float, form: str) -> Tensor:
        p, q = conversion(plan.schedule, t, "velocity", form)
        return torch.as_tensor(p * x + q * mu * x)

    unit = torch.eye(len(before), dtype=_C128, device="cpu")
    values = {j: unit[i].expand(len(z), -1) for i, j in enumerate(before)}
    for _ in run_code(plan.code[:last], values, model, start=first):
        pass
    return torch.stack([values[j] for j in after], dim=1)
