"""The registry and one short file per family of solvers."""

from .base import Solver, SolverLike, as_solver, get_solver, is_registered, register, same_solver, solver_names
from .blocks import BlockDPMSolver
from .dpm_solver_v3 import DPMSolverV3
from .exponential import DDIM, SinglestepDPMSolver
from .meta import AnalyticFirstStep, DenoiseToZero, Lookahead, LowerOrderFinal, MetaSolver, OrderRamp
from .multistep import LMS, AdamsBashforth, DEISTime, DPMSolverMultistep, ExponentialAdams, Multistep
from .pseudo_numerical import PNDM
from .runge_kutta import (
    DPM2,
    RK4,
    Euler,
    Heun,
    Heun3,
    Midpoint,
    Ralston,
    RhoHeun,
    RhoKutta,
    RhoRK4,
    RhoRungeKutta,
    RungeKutta,
    ThreeEighths,
)
from .unipc import UniPC

__all__ = [
    "DDIM",
    "DPM2",
    "LMS",
    "PNDM",
    "RK4",
    "AdamsBashforth",
    "AnalyticFirstStep",
    "BlockDPMSolver",
    "DEISTime",
    "DPMSolverMultistep",
    "DPMSolverV3",
    "DenoiseToZero",
    "Euler",
    "ExponentialAdams",
    "Heun",
    "Heun3",
    "Lookahead",
    "LowerOrderFinal",
    "MetaSolver",
    "Midpoint",
    "Multistep",
    "OrderRamp",
    "Ralston",
    "RhoHeun",
    "RhoKutta",
    "RhoRK4",
    "RhoRungeKutta",
    "RungeKutta",
    "SinglestepDPMSolver",
    "Solver",
    "SolverLike",
    "ThreeEighths",
    "UniPC",
    "as_solver",
    "get_solver",
    "is_registered",
    "register",
    "same_solver",
    "solver_names",
]
